"""The whole road on real digits, from one command: `python -m examples.digits` (or `make demo`)."""
