"""A linear student of a diffusion transformer of your own: everything else is taken from teacher and data.

    python train.py --config=configs/student.py:linear --config.teacher.path=models/mine \\
        --config.data.path=latents/mine --workdir=runs/mine_lit

The teacher may be a DiT or a PixArt of any size, as a model folder or a workdir. Size, classes or captions,
latent space, noise levels and sampling defaults are read from it; the student inherits from it and is taught
by it. A row is a mixer (linear, dydila, sana, edit, moh, gla, softmax, or package.module:Class), a system
(lit, dydi_lit, sana_dit, moh_dit, dig), or one of them that keeps some blocks of its teacher: linear_every_4
(or every_4), dydila_last_2, linear_first_1. What is read can be set by its flag as usual; what then disagrees
is told before anything is compiled."""
from lit_jax import recipes


def get_config(row='linear'):
    return recipes.student(row)
