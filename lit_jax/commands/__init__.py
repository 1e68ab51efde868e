"""The command lines, one file each; `lit-jax VERB` and the scripts of a checkout run these."""
