"""The whole road on real digits, from one command: `python -m lit_jax.demo` (or `make demo`)."""
