"""A network without its weights (`Network`), and a model with them (`Model`). Code outside this package works
with nested dicts of arrays and `Network.apply`."""
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lit_jax.models import layers
from lit_jax.models.arch import FAMILIES, check_arch, conditioning, count_tokens, mixers_of, shown_by
from lit_jax.models.facts import NO_NULL_CLASS, has_null_class
from lit_jax.models.functional import Functional
from lit_jax.models.layers import REMAT_POLICIES, Array, map_stack
from lit_jax.models.probe import watching
from lit_jax.runtime.compiler import without_ynnpack
from lit_jax.runtime.errors import UserError, check_known, shown

DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16, 'float64': jnp.float64}


class Network(Functional):
    """An architecture as functions of its parameters: `init`, `abstract`, `apply`, and `observe`.

    Args:
        arch: JSON-able, e.g. {'family': 'dit', 'depth': 12, 'width': 384, 'patch': 2, 'input_size': [32, 32],
            'channels': 4, 'num_classes': 1000, 'mixer': {'name': 'softmax', 'heads': 6}}.
        dtype: compute dtype; parameters are always float32.
        scan_layers, remat: see `lit_jax.models.layers.run_stack`.
        wide_gradients: of kernels in float32 whatever the dtype (`lit_jax.models.layers.wide_gradients`);
            without `tensor` and `seq`."""

    def __init__(self, arch: Mapping, *, dtype=jnp.float32, scan_layers: bool = True, remat: str = 'none',
                 wide_gradients: bool = False):
        self.arch = check_arch(arch)
        check_known('remat policy', remat, REMAT_POLICIES)
        options = {k: v for k, v in self.arch.items() if k not in ('family', 'null_class')}
        family = FAMILIES[self.arch['family']]
        self.dtype, self.wide_gradients = dtype, wide_gradients
        super().__init__(lambda rngs: family(**options, dtype=dtype, scan_layers=scan_layers, remat=remat,
                                             rngs=rngs))

    @property
    def conditioning(self) -> str:
        """'label': cond is {'label': int [B]}. 'text': {'text': [B, L, C], 'text_mask': [B, L]}."""
        return conditioning(self.arch)

    @property
    def null_label(self) -> int:
        """The label of "no class" in classifier-free guidance."""
        if self.conditioning != 'label':
            raise UserError('this model draws from captions, not from classes: give it prompts')
        return self.arch['num_classes']

    def guidance_pair(self, cond: Mapping[str, Array]) -> tuple[dict, dict]:
        """(cond, unconditional cond) for classifier-free guidance, with the same keys. The second has the
        null class; or the features of the empty caption (or a negative prompt) in cond's 'null_text', [B, L,
        C] or [L, C], with the mask 'null_text_mask' (diffusers) or the caption's (PixArt). UserError for a
        model whose null class was never trained."""
        if not has_null_class(self.arch):
            raise UserError(NO_NULL_CLASS)
        if self.conditioning == 'label':
            return dict(cond), {**cond, 'label': jnp.full_like(cond['label'], self.null_label)}
        given = {name: value for name, value in cond.items() if not name.startswith('null_')}
        if 'null_text' not in cond:
            raise UserError("guidance leads away from the empty caption: give its features as "
                            "cond['null_text'] (lit_jax.checkpoint.load.read_null_caption, or the text "
                            "encoder's)")
        text = jnp.broadcast_to(cond['null_text'], given['text'].shape).astype(given['text'].dtype)
        null = {**given, 'text': text}
        return given, null | ({'text_mask': cond['null_text_mask']} if 'null_text_mask' in cond else {})

    def describe(self) -> str:
        """'dit, softmax attention, 1.2 M parameters'."""
        count = count_parameters(self)
        mixers = ' and '.join(dict.fromkeys(mixer['name'] for mixer in mixers_of(self.arch)))
        size = f'{count / 1e6:,.{0 if count >= 1e7 else 2}f} M' if count >= 1e5 else f'{count:,}'
        return f'{self.arch["family"]}, {mixers} attention, {size} parameters'

    def example_inputs(self, batch: int = 1) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct, dict]:
        """(x, t, cond) of `apply` at the architecture's own size, as ShapeDtypeStructs."""
        def array(*shape, dtype=jnp.float32):
            return jax.ShapeDtypeStruct((batch, *shape), dtype)

        arch = self.arch
        if self.conditioning == 'label':
            cond = {'label': array(dtype=jnp.int32)}
        else:
            cond = {'text': array(arch['caption_tokens'], arch['caption_channels']),
                    'text_mask': array(arch['caption_tokens'], dtype=jnp.int32)}
        return array(*arch['input_size'], arch['channels']), array(dtype=jnp.int32), cond

    def inference_options(self) -> dict:
        """`compiler_options` of jax.jit for a program of this network without gradients."""
        return inference_options(self.arch['mixer']['name'], count_tokens(self.arch), self.arch['width'])

    def apply(self, params: dict, x_BHWC: Array, t_B: Array, cond: Mapping[str, Array]) -> Array:
        """The model function: [B, H, W, 2C], C channels of noise, then the raw variance channels, unless
        learn_sigma is False."""
        with layers.wide_gradients(self.wide_gradients):
            return self._merge(params)(x_BHWC, t_B, cond['label'] if self.conditioning == 'label' else cond)

    def observe(self, params: dict, x_BHWC: Array, t_B: Array, cond: Mapping[str, Array],
                names: Sequence[str]) -> tuple[Array, dict[str, list]]:
        """`apply`, and what layers show (`lit_jax.models.probe`): {name: [array [layers, ...]]}."""
        with watching(*names) as seen:
            output = self.apply(params, x_BHWC, t_B, cond)
        return output, seen

    def project(self, params: dict, x_BND: Array) -> list[Array]:
        """What the projectors (`model.projectors`) make of the tokens behind their block, [B, N, features]
        each."""
        return self._merge(params).projectors(x_BND)

    def map_mixers(self, params: dict, function: Callable, *layered: Array) -> dict[str, dict]:
        """{'blocks': {'attn': function(parameters, build, *arrays)}} of each block's mixer on its own, see
        `lit_jax.models.layers.map_stack`. layered: arrays [depth, ...]."""
        model, results, first = self._merge(params), {}, 0
        for name in model.stacks:
            mixers = getattr(model, name).attn
            last = first + jax.tree.leaves(params[name])[0].shape[0]
            results[name] = {'attn': map_stack(function, mixers, *(x[first:last] for x in layered),
                                               scan=model.scan_layers)}
            first = last
        return results

    @property
    def losses(self) -> tuple[str, ...]:
        """Names of the losses that the mixers show: scalars a layer, each with its own weight."""
        return shown_by(self.arch, 'losses')

    @property
    def statistics(self) -> tuple[str, ...]:
        """Names of the scalars a layer that the mixers show for the log."""
        return shown_by(self.arch, 'statistics')


LARGE_PRODUCT = 2 ** 20     # tokens · width of one image


def inference_options(mixer: str, tokens: int, width: int) -> dict:
    """`compiler_options` of jax.jit for programs without gradients."""
    # XLA:CPU hands matrix products to YNNPACK. Large ones of linear attention run faster without it, small
    # ones, softmax attention and gradients with it (docs/internals/benchmarks.md).
    return without_ynnpack() if mixer == 'linear' and tokens * width >= LARGE_PRODUCT else {}


class Model:
    """A network with its weights: `model(x, t, y)` with x [B, H, W, C] -> [B, H, W, 2C]."""

    def __init__(self, network: Network, params: dict, config: Mapping):
        self.network, self.params, self.config = network, params, config
        self._apply = jax.jit(network.apply, compiler_options=network.inference_options())

    @property
    def arch(self) -> dict:
        return self.network.arch

    def __call__(self, x, t, y) -> Array:
        """x float [B, H, W, C]; t timesteps 0..999, or times 0..1 of a flow, scalar or [B].

        y: class indices, scalar or [B], null class included; of a text model a dict with 'text' [B, L, C] and
        'text_mask' [B, L], features of captions (`lit_jax.text.encoder.encode_captions`), and any H and W."""
        x = jnp.asarray(x)
        self._check_times(np.asarray(t))
        if self.network.conditioning == 'label':
            self._check_shape(x, tuple(self.arch['input_size']))
            cond = {'label': jnp.broadcast_to(self._check_labels(y), x.shape[:1])}
        else:
            self._check_shape(x, x.shape[1:3])
            cond = self._check_captions(y, len(x))
        return self._apply(self.params, x, jnp.broadcast_to(jnp.asarray(t), x.shape[:1]), cond)

    def _check_times(self, t: np.ndarray) -> None:
        if (self.config.get('diffusion') or {}).get('kind') == 'flow' and not ((t >= 0) & (t <= 1)).all():
            raise UserError(f'a flow has times t from 0 to 1, got t from {t.min():g} to {t.max():g}; '
                            f'timesteps 0 to 999 are those of models that predict noise, as DiT does')

    def _check_shape(self, x: Array, sides: tuple[int, ...]) -> None:
        expected = (*sides, self.arch['channels'])
        if x.ndim != 4 or x.shape[1:] != expected or any(side % self.arch['patch'] for side in sides):
            text = ', '.join(map(str, expected)) if self.network.conditioning == 'label' else (
                f'H, W, {self.arch["channels"]}] with H and W multiples of [{self.arch["patch"]}')
            raise UserError(f'x has shape {x.shape}, this model takes [B, {text}] (NHWC)')

    def _check_labels(self, y) -> Array:
        y = np.asarray(y)
        if not np.issubdtype(y.dtype, np.integer) or y.min() < 0 or y.max() > self.network.null_label:
            raise UserError(f'y must hold class indices 0..{self.network.null_label} (the last is the null '
                            f'class), got {y.dtype} values {y.min()}..{y.max()}')
        return jnp.asarray(y)

    def _check_captions(self, y, batch: int) -> dict:
        arch = self.arch
        tokens, channels = arch['caption_tokens'], arch['caption_channels']
        wanted = f"{{'text': [{batch}, {tokens}, {channels}], 'text_mask': [{batch}, {tokens}]}}"
        if not isinstance(y, Mapping) or 'text' not in y:
            raise UserError(f'y must hold the features of captions, {wanted}; got {shown(y)}')
        shape = np.shape(y['text'])
        if len(shape) != 3 or shape[0] != batch or shape[2] != channels:
            raise UserError(f'y has text of shape {shape}, this model takes {wanted}: an encoder of width '
                            f'{channels}')
        return {name: jnp.asarray(value) for name, value in y.items()}


def count_parameters(network: Network) -> int:
    """Parameters as the papers count them: DiT's with the fixed position table (N·D), PixArt's without."""
    return sum(leaf.size for leaf in jax.tree.leaves(network.abstract())) + count_fixed(network.arch)


def count_fixed(arch: Mapping) -> int:
    """Numbers of the fixed position table, which the papers of models of classes count."""
    return 0 if conditioning(arch) == 'text' else count_tokens(arch) * arch['width']
