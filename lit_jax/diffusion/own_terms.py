"""Terms of the loss from outside the package: functions that a recipe names, with their weights.

    config.train.losses = (('my_losses:gradients', 0.1),)

A term is a function of `Seen` that returns one number an image, [B]."""
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import jax

from lit_jax.diffusion.flow_paths import PREDICTIONS
from lit_jax.diffusion.kinds import Ddpm, Diffusion
from lit_jax.diffusion.schedule import Schedule
from lit_jax.runtime.dtypes import accumulator
from lit_jax.runtime.errors import UserError, shown
from lit_jax.runtime.own_modules import import_function

Array = jax.Array
TAKEN = ('mse', 'vb', 'cosine', *(f'distill_{name}' for name in (*PREDICTIONS, 'variance')), 'balance',
         'align', 'features', 'total')


@dataclass(frozen=True)
class Seen:
    """What a term may look at, all of one batch.

    Attributes:
        diffusion: `kinds.Ddpm` or `kinds.Flow`.
        t: [B], the model's times: int32 timesteps, of a flow float32.
        x0, x_t, noise: [B, H, W, C], clean, noised, and the noise in it.
        output: of the student, [B, H, W, 2C]: noise, then raw variance if it is learned
            (`objective.split_output`); of a flow, its prediction (`Flow.split`).
        teacher_output: the same of the teacher, which gets no gradient; None without one.
        cond: the condition, such as {'label': [B]}."""
    diffusion: Diffusion
    x0: Array
    x_t: Array
    t: Array
    noise: Array
    cond: Mapping[str, Array]
    output: Array
    teacher_output: Array | None

    @property
    def schedule(self) -> Schedule:
        """The tables of a noise schedule. UserError for a flow, which has none."""
        if not isinstance(self.diffusion, Ddpm):
            raise UserError(f'a loss of train.losses reads seen.schedule, but this recipe is a '
                            f'{self.diffusion.kind}, which has none: use seen.diffusion there')
        return self.diffusion.table


@dataclass(frozen=True)
class Term:
    """A term of one's own: its name in the log, its function, its weight in the total."""
    name: str
    function: Callable[[Seen], Array]
    weight: float

    def __call__(self, seen: Seen) -> Array:
        """[B], float32 or wider. UserError for another shape, while the step is traced."""
        value = self.function(seen)
        shape = getattr(value, 'shape', None)
        if shape != seen.t.shape:
            found = 'no array' if shape is None else f'the shape {shape}'
            raise UserError(f'the loss {self.name} returns {found}; it must return one number an image, '
                            f'{seen.t.shape}: take the mean over the other axes')
        return value.astype(accumulator(value))


def import_losses(listed: Sequence) -> tuple[Term, ...]:
    """The terms of `train.losses`, ('package.module:function', weight) each; imports their modules.
    UserError for what is no such pair or function, and for two of one name."""
    terms: dict[str, Term] = {}
    for pair in listed:
        if not _is_pair(pair):
            raise UserError(f'train.losses has {shown(pair)}; each term is a pair '
                            f"('package.module:function', weight)")
        name = pair[0].partition(':')[2]
        if name in terms or name in TAKEN:
            raise UserError(f'train.losses: there is a term {name} already; give the function another name')
        terms[name] = Term(name, import_function('the loss', pair[0]), float(pair[1]))
    return tuple(terms.values())


def _is_pair(pair) -> bool:
    if not (isinstance(pair, list | tuple) and len(pair) == 2 and isinstance(pair[0], str)):
        return False
    return ':' in pair[0] and isinstance(pair[1], int | float) and not isinstance(pair[1], bool)
