"""The whole method on real digits, from one command: `python -m examples.digits` (or `make demo`)."""
