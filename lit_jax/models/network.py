"""A network without its weights, and a model with them: the functional face of `lit_jax.models`.

Everything outside this package works with plain nested dicts of arrays and with `Network.apply`.
"""
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lit_jax.errors import UserError
from lit_jax.models.dit import DiT
from lit_jax.models.layers import REMAT_POLICIES, Array

FAMILIES = {'dit': DiT}
DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16, 'float64': jnp.float64}


class Network:
    """An architecture as three functions: `init`, `abstract` and `apply`.

    Args:
        arch: JSON-able description, e.g. {'family': 'dit', 'depth': 12, 'width': 384, 'patch': 2,
            'input_size': [32, 32], 'channels': 4, 'num_classes': 1000, 'mixer': {'name': 'softmax', 'heads': 6}}.
        dtype: compute dtype; parameters are float32 whatever it is.
        scan_layers, remat: see `lit_jax.models.layers.run_stack`.
    """

    def __init__(self, arch: Mapping, *, dtype=jnp.float32, scan_layers: bool = True, remat: str = 'none'):
        self.arch = check_arch(arch)
        if remat not in REMAT_POLICIES:
            raise UserError(f'unknown remat policy {remat!r}; known: {", ".join(REMAT_POLICIES)}')
        options = {k: v for k, v in self.arch.items() if k != 'family'}
        family = FAMILIES[self.arch['family']]
        self._build = lambda rngs: family(**options, dtype=dtype, scan_layers=scan_layers, remat=remat, rngs=rngs)
        self.dtype = dtype
        # Only shapes: nothing is allocated here.
        self._graphdef, abstract = nnx.split(nnx.eval_shape(lambda: self._build(nnx.Rngs(0))))
        # Plain structs: under `jax.set_mesh` nnx's carry a sharding of their own, which nobody must restore into.
        self._abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype),
                                      nnx.to_pure_dict(abstract))

    @property
    def null_label(self) -> int:
        """The label that stands for "no class" in classifier-free guidance."""
        return self.arch['num_classes']

    def inference_options(self) -> dict:
        """What to give jax.jit as `compiler_options` for a program without gradients of this network."""
        return inference_options(self.arch['mixer']['name'], count_tokens(self.arch), self.arch['width'])

    def abstract(self) -> dict:
        """The parameter tree as ShapeDtypeStructs."""
        return self._abstract

    def init(self, key: Array) -> dict:
        """Fresh float32 parameters. Jittable: under `jax.jit(..., out_shardings=...)` no device holds a full copy."""
        return nnx.to_pure_dict(nnx.state(self._build(nnx.Rngs(key))))

    def apply(self, params: dict, x_BHWC: Array, t_B: Array, cond: Mapping[str, Array]) -> Array:
        """The model function: noise in the first C channels of [B, H, W, 2C], raw variance channels after them."""
        return nnx.merge(self._graphdef, params)(x_BHWC, t_B, cond['label'])


LARGE_PRODUCT = 2 ** 20     # tokens · width of one image


def inference_options(mixer: str, tokens: int, width: int) -> dict:
    """`compiler_options` of jax.jit for programs without gradients.

    On CPU, XLA hands matrix products to YNNPACK. Large ones of linear attention run faster without it, small ones,
    softmax attention and gradients with it (docs/benchmarks.md). {} also where this jaxlib has no such option.
    """
    if mixer != 'linear' or tokens * width < LARGE_PRODUCT or jax.default_backend() != 'cpu':
        return {}
    return _without_ynnpack()


@functools.cache
def _without_ynnpack() -> dict:
    options = {'xla_cpu_experimental_ynn_fusion_type': ''}
    try:
        jax.jit(lambda x: x + 1, compiler_options=options)(np.float32(0))
    except (jax.errors.JaxRuntimeError, ValueError):
        return {}
    return options


class Model:
    """A network with its weights: `model(x, t, y)` with x [B, H, W, C] -> [B, H, W, 2C]."""

    def __init__(self, network: Network, params: dict, config: Mapping):
        self.network, self.params, self.config = network, params, config
        self._apply = jax.jit(network.apply, compiler_options=network.inference_options())

    @property
    def arch(self) -> dict:
        return self.network.arch

    def __call__(self, x, t, y) -> Array:
        """x float [B, H, W, C]; t timesteps 0..999, scalar or [B]; y class indices, scalar or [B], null class included."""
        x = jnp.asarray(x)
        expected = (*self.arch['input_size'], self.arch['channels'])
        if x.ndim != 4 or x.shape[1:] != expected:
            raise UserError(f'x has shape {x.shape}, this model takes [B, {", ".join(map(str, expected))}] (NHWC)')
        y = np.asarray(y)
        if not np.issubdtype(y.dtype, np.integer) or y.min() < 0 or y.max() > self.network.null_label:
            raise UserError(f'y must hold class indices 0..{self.network.null_label} (the last is the null class), '
                            f'got {y.dtype} values {y.min()}..{y.max()}')
        batch = x.shape[:1]
        return self._apply(self.params, x, jnp.broadcast_to(jnp.asarray(t), batch),
                           {'label': jnp.broadcast_to(jnp.asarray(y), batch)})


def check_arch(arch: Mapping) -> dict:
    """A plain, complete copy of `arch`, or a UserError that names the first field that cannot be."""
    arch = {k: (dict(v) if isinstance(v, Mapping) else tuple(v) if isinstance(v, (list, tuple)) else v)
            for k, v in arch.items()}
    if arch.get('family') not in FAMILIES:
        raise UserError(f'unknown model family {arch.get("family")!r}; known: {", ".join(FAMILIES)}')
    required = {'family', 'depth', 'width', 'patch', 'input_size', 'channels', 'num_classes', 'mixer'}
    known = required | {'mlp_ratio', 'learn_sigma'}
    if missing := required - set(arch):
        raise UserError(f'the architecture lacks {", ".join(sorted(missing))}')
    if unknown := set(arch) - known:
        raise UserError(f'the architecture has unknown fields {", ".join(sorted(unknown))}; known: {", ".join(sorted(known))}')
    for name in ('depth', 'width', 'patch', 'channels', 'num_classes'):
        if not isinstance(arch[name], int) or arch[name] < 1:
            raise UserError(f'model.{name} must be a positive integer, got {arch[name]!r}')
    if any(side % arch['patch'] for side in arch['input_size']):
        raise UserError(f'input size {tuple(arch["input_size"])} is not divisible by patch {arch["patch"]}')
    if arch['width'] % 4:
        raise UserError(f'model.width {arch["width"]} is not a multiple of 4, which the sin-cos position table needs')
    heads = arch['mixer'].get('heads')
    if not isinstance(heads, int) or heads < 1 or arch['width'] % heads:
        raise UserError(f'{heads!r} heads do not divide the width {arch["width"]}')
    return {'mlp_ratio': 4.0, 'learn_sigma': True, **arch}


def count_parameters(network: Network) -> int:
    """Parameters as the papers count them: with the fixed position table, which PyTorch files store (N·D)."""
    table = count_tokens(network.arch) * network.arch['width']
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(network.abstract())) + table


def count_tokens(arch: Mapping) -> int:
    """N of one image."""
    return arch['input_size'][0] * arch['input_size'][1] // arch['patch'] ** 2
