"""The noise schedule: float64 tables of the forward process and its posterior, and respacing to fewer steps.

Notation of DDPM (Ho et al. 2020): β_t is the variance added at step t, ᾱ_t = Π(1 - β_s), x_t ~ N(√ᾱ_t x_0,
1 - ᾱ_t). A respaced schedule keeps some timesteps and their ᾱ (improved DDPM, Nichol & Dhariwal 2021, §4).
Its steps are indices 0..num_steps-1; the model gets the original index, `timestep_map[step]`.
"""
from dataclasses import dataclass, fields

import jax
import jax.numpy as jnp
import numpy as np

from lit_jax.runtime.dtypes import accumulator
from lit_jax.runtime.errors import UserError, check_known, shown


@dataclass(frozen=True, eq=False)
class Schedule:
    """Tables [num_steps], numpy float64.

    timestep_map: original indices, ascending, int32 (float64 from `spread_levels`).
    posterior_*: q(x_{t-1} | x_t, x_0) = N(coef1·x_0 + coef2·x_t, variance). The variance is 0 at t = 0, where
    `posterior_log_variance` has the value of t = 1. log_betas: upper end of the learned range."""
    timestep_map: np.ndarray
    betas: np.ndarray
    log_betas: np.ndarray
    alphas_cumprod: np.ndarray
    alphas_cumprod_prev: np.ndarray
    alphas_cumprod_next: np.ndarray
    sqrt_alphas_cumprod: np.ndarray
    sqrt_one_minus_alphas_cumprod: np.ndarray
    sqrt_recip_alphas_cumprod: np.ndarray
    sqrt_recipm1_alphas_cumprod: np.ndarray
    posterior_variance: np.ndarray
    posterior_log_variance: np.ndarray
    posterior_mean_coef1: np.ndarray
    posterior_mean_coef2: np.ndarray

    def __post_init__(self):
        for field in fields(self):   # all traces share the arrays, so they are read-only
            getattr(self, field.name).setflags(write=False)

    @property
    def num_steps(self) -> int:
        return len(self.betas)


def make_schedule(steps: int = 1000, respacing: str = '', kind: str = 'linear') -> Schedule:
    """The schedule of `steps` training timesteps (DiT: 1000), respaced.

    Args:
        respacing: '': all timesteps; '250': so many, evenly spaced; '10,20,30': so many in each third (any
            number of sections); 'ddim50': every k-th, for a whole k.
        kind: name in KINDS.

    Raises:
        UserError: more steps than the schedule has, or a respacing that cannot be read.
    """
    check_known('noise schedule', kind, KINDS)
    alphas_cumprod = np.cumprod(1.0 - KINDS[kind](steps))
    timesteps = respace(steps, respacing)
    kept = alphas_cumprod[timesteps]
    # ᾱ at the kept timesteps stays; their β follow from it.
    return _tables(1.0 - kept / np.append(1.0, kept[:-1]), timesteps)


def spread_levels(steps: int, levels: int, kind: str = 'linear') -> Schedule:
    """`levels` evenly spaced levels, from the first to the last of `steps` training timesteps.

    Between timesteps, log ᾱ is interpolated linearly; `timestep_map` is float64. This is the time axis of
    DPM-Solver's own code (Lu et al. 2022, `time_uniform` on a discrete schedule), in units of timesteps."""
    check_known('noise schedule', kind, KINDS)
    timesteps = np.linspace(0, steps - 1, levels)
    kept = np.exp(np.interp(timesteps, np.arange(steps), np.cumsum(np.log1p(-KINDS[kind](steps)))))
    return _tables(1.0 - kept / np.append(1.0, kept[:-1]), timesteps)


def linear_betas(steps: int) -> np.ndarray:
    """β from 1e-4 to 0.02, scaled by 1000/steps, so that the last ᾱ is about the same for any `steps`."""
    if steps < 21:   # with fewer, the last β reaches 1 and ᾱ reaches 0
        raise UserError(f'a linear noise schedule needs at least 21 steps, got {steps}; DiT has 1000')
    return np.linspace(1e-4, 2e-2, steps, dtype=np.float64) * (1000 / steps)


KINDS = {'linear': linear_betas}


def respace(steps: int, respacing: str) -> np.ndarray:
    """The timesteps of 0..steps-1 that `respacing` keeps (see `make_schedule`), int32 [n], ascending."""
    if respacing.startswith('ddim'):
        return _even_stride(steps, _parse_counts(respacing.removeprefix('ddim'), respacing), respacing)
    counts = _parse_counts(respacing, respacing) if respacing else [steps]
    size, larger = divmod(steps, len(counts))
    kept, start = [], 0
    for section, count in enumerate(counts):
        length = size + (section < larger)
        if count > length:
            where = 'the schedule' if len(counts) == 1 else f'section {section + 1} of {len(counts)}'
            raise UserError(f'cannot take {count} steps: {where} has {length} (respacing '
                            f'{shown(respacing)} of '
                            f'{steps} timesteps); ask for at most {length}')
        # A sum, because a product rounds exact halves differently from the sum behind published samples.
        stride, position = (length - 1) / max(count - 1, 1), 0.0
        for _ in range(count):
            kept.append(start + round(position))
            position += stride
        start += length
    if len(kept) < 2:
        raise UserError(f'respacing {shown(respacing)} leaves one step of {steps}; sampling needs at least 2')
    return np.array(kept, np.int32)


def _even_stride(steps: int, counts: list[int], respacing: str) -> np.ndarray:
    if len(counts) != 1:
        raise UserError(f"respacing {shown(respacing)}: 'ddim' takes one number, such as 'ddim50'")
    strides = {-(-steps // k): k for k in range(steps - 1, 0, -1)}       # by the number of timesteps kept
    if counts[0] not in strides:
        near = sorted(sorted(strides, key=lambda n: abs(n - counts[0]))[:2])
        raise UserError(f'respacing {shown(respacing)}: no whole stride keeps {counts[0]} of {steps} '
                        f'timesteps; '
                        f'use {" or ".join(f"ddim{n}" for n in near)}, or a plain number')
    return np.arange(0, steps, strides[counts[0]], dtype=np.int32)


def _parse_counts(text: str, respacing: str) -> list[int]:
    parts = text.split(',')
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise UserError(f"cannot read the respacing {shown(respacing)}; expected '' (all steps), a number of "
                        f"steps such as '250', numbers for sections such as '10,20,30', or 'ddim50'")
    return [int(part) for part in parts]


def _tables(betas: np.ndarray, timesteps: np.ndarray) -> Schedule:
    """All tables from β (improved DDPM, eqs. 10-12)."""
    total = np.cumprod(1.0 - betas)
    before = np.append(1.0, total[:-1])
    variance = betas * (1.0 - before) / (1.0 - total)
    return Schedule(
        timestep_map=timesteps, betas=betas, log_betas=np.log(betas), alphas_cumprod=total,
        alphas_cumprod_prev=before, alphas_cumprod_next=np.append(total[1:], 0.0),
        sqrt_alphas_cumprod=np.sqrt(total), sqrt_one_minus_alphas_cumprod=np.sqrt(1.0 - total),
        sqrt_recip_alphas_cumprod=np.sqrt(1.0 / total),
        sqrt_recipm1_alphas_cumprod=np.sqrt(1.0 / total - 1.0), posterior_variance=variance,
        posterior_log_variance=np.log(np.append(variance[1], variance[1:])),
        posterior_mean_coef1=betas * np.sqrt(before) / (1.0 - total),
        posterior_mean_coef2=(1.0 - before) * np.sqrt(1.0 - betas) / (1.0 - total))


def look_up(table: np.ndarray, t_B: jax.Array, like: jax.Array) -> jax.Array:
    """table[t] as [B, 1, ..., 1], to multiply with `like` [B, ...], rounded only here, to its accumulator."""
    values = jnp.asarray(table, accumulator(like))[t_B]
    return values.reshape(values.shape + (1,) * (like.ndim - 1))
