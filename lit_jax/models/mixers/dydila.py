"""DyDi-LiT's dynamic differential linear attention (DyDiLA, §3 of the DyDi-LiT paper).

Beside the shared q and k each token gets a second pair q', k' from projectors picked by routers; all four go
through a norm-preserving power whose exponent is picked for the token; attention uses q̃ - λ·q̃' and k̃ -
λ·k̃', λ picked too; a depth-wise convolution of the values is added. There is no official code, and the paper
leaves open:

- the derivative of `argmax`: option `router`, see `lit_jax.models.mixers.routing`;
- a normaliser (none in the paper's equation 8, whose outputs would grow with the tokens): `normaliser`;
- heads: the formulas and the published GFLOPs are for one. With several, routers, norms and powers still see
  the whole token, only the sums over tokens are a head's own;
- one bank of exponents (and of λ) for all four (both) routers, as here, or one each: `separate_banks`;
- epsilon: 1e-6 is added after ReLU, as in FLatten; exponents are stored through softplus."""
import math

import jax
import jax.numpy as jnp
from flax import nnx

from lit_jax.models.facts import Leaf, product
from lit_jax.models.layers import Array, Linear, check_grid
from lit_jax.models.mixers import reparam
from lit_jax.models.mixers.linear import EPS, total_weight, weighted_sum
from lit_jax.models.mixers.mixer import Mixer, head_channels
from lit_jax.models.mixers.routing import Route, RoutedLinear, Router, entropy
from lit_jax.models.mixers.softmax import QKV_PARTS
from lit_jax.models.partition import constrain
from lit_jax.models.probe import show
from lit_jax.runtime.dtypes import accumulator
from lit_jax.runtime.errors import UserError, shown

POWER = 3.0         # exponents at the start
DIFFERENCES = ('tokens', 'maps', 'none')
NORMALISERS = ('mean', 'weights')
KINDS = ('projection', 'power', 'difference')


class DyDiLA(Mixer):
    """[B, N, D] -> [B, N, D].

    Shows for the log, as means over the routers of a kind (`KINDS`): 'routing/<kind>/entropy' (1: equal use)
    and 'routing/<kind>/largest' (share of the most used choice); the means 'dydila/power', 'dydila/factor'.

    Args:
        heads: 1 in the paper.
        projectors: n_P of its sizes: 3 (S), 5 (B), 7 (L). 0: no second pair.
        powers: n_F, exponents to choose from: 9, 15, 21. 0: the fixed exponent 3 of focused attention.
        factors: n_D, λ to choose from: 9, 15, 21. factor_init: their initial value.
        difference: 'tokens' (the paper's default), 'maps' (its equation 10: q̃(k̃ᵀv) - λ·q̃'(k̃'ᵀv)), or
            'none' (rows 3 and 4 of its table 4: q and k come from the projectors, if any).
        router: 'straight_through' or 'frozen'.
        normaliser: 'mean' divides by N only; 'weights' also by q̃·mean(k̃) + 1e-6 of the tokens before the
            difference, which is always positive.
        separate_banks: one bank of exponents for each of q, k, q', k', and of λ for each of q, k.
        dwc: 'branches' (three kernels, `lit_jax.models.mixers.reparam`), 'single' (one), 'none'.
        qkv_bias: of the shared projections; none in the formulas."""
    statistics = (*(f'routing/{kind}/{what}' for kind in KINDS for what in ('entropy', 'largest')),
                  'dydila/power', 'dydila/factor')
    routes = ('route/query', 'route/key',
              *(f'route/power/{name}' for name in ('query', 'key', 'query2', 'key2')),
              'route/difference/query', 'route/difference/key')
    leaves = (*product('qkv', ('D', 3, 'K', 'E')), *product('value', ('D', 'K', 'E')),
              *product('proj', ('K', 'E', 'D'), 'linear_in'),
              Leaf('routed_[qk]/kernel', (None, 'D', 'K', 'E'), 'linear', banks=1),
              Leaf(r'(routed_[qk]/router|power_\w+|difference_\w+)/kernel', ('D', None), 'linear'),
              Leaf('gamma|factor', (None, None), 'copy'),
              *product('dwc', (3, 3, 1, None), 'depthwise'),
              Leaf('dwc/(square|column|row)', (None, None, 1, None), 'depthwise'))
    parts = QKV_PARTS
    usual_heads = 1

    @staticmethod
    def sets(mixer) -> int:
        return 2 if mixer.get('difference') == 'maps' else 1

    @classmethod
    def state_bytes(cls, mixer, width, grid) -> int:
        channels, size = head_channels(mixer, width)
        return 4 * channels * (cls.sets(mixer) * size + (mixer.get('normaliser') == 'weights'))

    def __init__(self, width: int, *, heads: int, projectors: int = 3, powers: int = 9, factors: int = 9,
                 factor_init: float = 0.01, difference: str = 'tokens', router: str = 'straight_through',
                 normaliser: str = 'mean', separate_banks: bool = False, dwc: str = 'branches',
                 qkv_bias: bool = False, dtype=jnp.float32, rngs: nnx.Rngs):
        _check_options(projectors, powers, factors, difference, normaliser, dwc)
        head = (heads, width // heads)
        self.dtype, self.difference, self.normaliser = dtype, difference, normaliser
        self.projectors, self.powers = projectors, powers
        routing = {'gradient': router, 'dtype': dtype, 'rngs': rngs}
        self.shared = difference != 'none' or not projectors
        if self.shared:
            self.qkv = Linear(width, (3, *head), bias=qkv_bias, dtype=dtype, rngs=rngs)
        else:
            self.value = Linear(width, head, bias=qkv_bias, dtype=dtype, rngs=rngs)
        if projectors:
            self.routed_q = RoutedLinear(width, head, projectors, **routing)
            self.routed_k = RoutedLinear(width, head, projectors, **routing)
        self.power_names = ('query', 'key') * self.shared + ('query2', 'key2') * bool(projectors)
        if powers:
            for name in self.power_names:
                setattr(self, f'power_{name}', Router(width, powers, **routing))
            start = math.log(math.expm1(POWER))         # softplus of it is POWER
            self.gamma = nnx.Param(jnp.full((len(self.power_names), powers) if separate_banks else powers,
                                            start, jnp.float32))
        self.factor_names = {'tokens': ('query', 'key'), 'maps': ('query',), 'none': ()}[difference]
        if self.factor_names:
            for name in self.factor_names:
                setattr(self, f'difference_{name}', Router(width, factors, parts=2, **routing))
            shape = (len(self.factor_names), factors) if separate_banks else factors
            self.factor = nnx.Param(jnp.full(shape, factor_init, jnp.float32))
        self.dwc = None if dwc == 'none' else reparam.BranchedConv(width, folded=dwc == 'single', rngs=rngs)
        self.proj = Linear(head, width, dtype=dtype, rngs=rngs)

    def __call__(self, x_BND: Array, grid: tuple[int, int]) -> Array:
        check_grid(x_BND, grid)
        tokens, v_BNKE = self._project(x_BND)
        tokens = self._sharpen(tokens)
        o_BNKE = self._attend(tokens, v_BNKE)
        if self.dwc is not None:
            v_BHWD = v_BNKE.reshape(v_BNKE.shape[0], *grid, -1).astype(o_BNKE.dtype)
            o_BNKE = o_BNKE + self.dwc(v_BHWD).reshape(o_BNKE.shape)
        return self.proj(o_BNKE)

    def _project(self, x_BND: Array) -> tuple[dict[str, Array], Array]:
        """{name of power_names: [B, N, K, E]} and the values."""
        tokens = {}
        if self.shared:
            qkv = constrain(self.qkv(x_BND), 'batch', 'tokens', None, 'heads', None)
            tokens['query'], tokens['key'], v_BNKE = (qkv[:, :, i] for i in range(3))
        else:
            v_BNKE = constrain(self.value(x_BND), 'batch', 'tokens', 'heads', None)
        if self.projectors:
            (tokens['query2'], for_q), (tokens['key2'], for_k) = self.routed_q(x_BND), self.routed_k(x_BND)
            _show_routes('projection', {'route/query': for_q, 'route/key': for_k})
        return tokens, v_BNKE

    def _sharpen(self, tokens: dict[str, Array]) -> dict[str, Array]:
        """The norm-preserving power of each, in the accumulator."""
        acc = accumulator(self.dtype)
        if not self.powers:
            return {name: measure(z, jnp.asarray(POWER, acc)) for name, z in tokens.items()}
        routes = {name: getattr(self, f'power_{name}')(z) for name, z in tokens.items()}
        bank = jax.nn.softplus(self.gamma[...].astype(acc))
        gammas = {name: route.pick(bank if bank.ndim == 1 else bank[i])
                  for i, (name, route) in enumerate(routes.items())}
        _show_routes('power', {f'route/power/{name}': route for name, route in routes.items()})
        show('dydila/power', lambda: jnp.stack([gamma.mean() for gamma in gammas.values()]).mean())
        return {name: measure(z, gammas[name][..., None, None]) for name, z in tokens.items()}

    def _factors(self, tokens: dict[str, Array]) -> dict[str, Array]:
        """λ of the queries, and of the keys where they have one, [B, N, 1, 1]."""
        routes = {name: getattr(self, f'difference_{name}')(tokens[name], tokens[f'{name}2'])
                  for name in self.factor_names}
        bank = self.factor[...]
        factors = {name: route.pick(bank if bank.ndim == 1 else bank[i])
                   for i, (name, route) in enumerate(routes.items())}
        _show_routes('difference', {f'route/difference/{name}': route for name, route in routes.items()})
        show('dydila/factor', lambda: jnp.stack([factor.mean() for factor in factors.values()]).mean())
        return {name: factor[..., None, None] for name, factor in factors.items()}

    def _attend(self, tokens: dict[str, Array], v_BNKE: Array) -> Array:
        """The sums over tokens, normalised, in the accumulator."""
        first, second = self.power_names[:2], self.power_names[2:]
        q, k = (tokens[name] for name in first)
        if self.difference != 'none':
            factors = self._factors(tokens)
            q2, k2 = (tokens[name] for name in second)
        weigh = (q, k)
        if self.difference == 'tokens':
            weigh = q - factors['query'] * q2, k - factors['key'] * k2
        # otherwise the map is no product of two
        if self.difference != 'maps' and self.normaliser == 'mean':
            show('sum/query', weigh[0])
            show('sum/key', weigh[1])
        o = weighted_sum(*_heads_first(*weigh, v_BNKE), shortest=True)
        if self.difference == 'maps':
            subtracted = weighted_sum(*_heads_first(q2, k2, v_BNKE), shortest=True)
            o = o - jnp.swapaxes(factors['query'], 1, 2) * subtracted
        if self.normaliser == 'weights':
            o = o / (total_weight(*_heads_first(q, k)) + EPS)[..., None]
        return jnp.swapaxes(o, 1, 2)


def _heads_first(*arrays: Array) -> list[Array]:
    """[B, N, K, E] -> [B, K, N, E], as in `linear_attention`."""
    return [jnp.swapaxes(a, 1, 2) for a in arrays]


def measure(z_BNKE: Array, power: Array) -> Array:
    """relu(z)^power, scaled back to the length of relu(z), over all heads together; in the accumulator of z.
    1e-6 is added after ReLU: a token without positive numbers would have no direction. Powers are computed
    from the logarithm relative to the largest number, so that neither they nor their sum can overflow."""
    def norm(x):
        return jnp.sqrt(jnp.square(x).sum((-2, -1), keepdims=True))

    x = jax.nn.relu(z_BNKE.astype(accumulator(z_BNKE.dtype))) + EPS
    logarithm = jnp.log(x)
    peak = jax.lax.stop_gradient(logarithm.max((-2, -1), keepdims=True))      # does not change the direction
    powered = jnp.exp(power * (logarithm - peak))
    return powered * (norm(x) / norm(powered))


def _show_routes(kind: str, routes: dict[str, Route]) -> None:
    for name, route in routes.items():
        show(name, route.index_BN)
    show(f'routing/{kind}/entropy',
         lambda: jnp.stack([entropy(route.usage()) for route in routes.values()]).mean())
    show(f'routing/{kind}/largest',
         lambda: jnp.stack([route.usage().max() for route in routes.values()]).mean())


def _check_options(projectors, powers, factors, difference, normaliser, dwc) -> None:
    for name, value, least in (('projectors', projectors, 0), ('powers', powers, 0), ('factors', factors, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UserError(f'mixer.{name} must be an integer from {least} on, got {shown(value)}')
    for name, value, known in (('difference', difference, DIFFERENCES),
                               ('normaliser', normaliser, NORMALISERS), ('dwc', dwc, reparam.FORMS)):
        if value not in known:
            raise UserError(f'unknown mixer.{name} {shown(value)}; known: {", ".join(known)}')
    if difference != 'none' and not projectors:
        raise UserError(f"mixer.difference {shown(difference)} needs the second queries and keys of the "
                        f"projectors; with mixer.projectors 0 set it to 'none'")
