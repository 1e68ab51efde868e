"""Command lines, one file each, run by `lit-jax VERB` and by the scripts of a checkout."""
