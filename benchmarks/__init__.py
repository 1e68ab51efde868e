"""Peers side by side, each run from a checkout as `python -m benchmarks.NAME`."""
