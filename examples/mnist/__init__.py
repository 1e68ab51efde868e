"""Conversion at a twentieth of the cost, on real digits: `python -m examples.mnist` (or `make demo`)."""
