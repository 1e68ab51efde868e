"""The comparison of all systems on 8x8 digits: `python -m examples.digits.compare` (or `make compare`)."""
