"""PyTorch code that exports carry with them: `lit_jax.convert.torch_student` joins it to one file. Nothing in
lit_jax imports it."""
