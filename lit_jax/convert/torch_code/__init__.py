"""PyTorch code that exports carry with them (`lit_jax.convert.torch_student` joins it to one file). Imported by
nothing in lit_jax."""
