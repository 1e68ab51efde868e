"""DyDi-LiT's dynamic differential linear attention (arXiv 2601.13683)."""
import torch
import torch.nn.functional as F
from torch import nn

from lit_jax.convert.twins.parts_twin import Product, accumulate, depthwise

EPS_DYDI = 1e-6


class Router(nn.Module):
    """Each token's choice: the largest logit, summed in float32."""

    def __init__(self, width, choices, parts=1):
        super().__init__()
        self.kernel = nn.Parameter(torch.zeros(parts * width, choices))

    def forward(self, *parts):
        tokens = torch.cat([accumulate(part).flatten(2) for part in parts], -1)
        return (tokens @ accumulate(self.kernel)).argmax(-1)


class RoutedLinear(nn.Module):
    """x·W_u with one of several matrices picked for each token."""

    def __init__(self, width, head, choices):
        super().__init__()
        self.router = Router(width, choices)
        self.kernel = nn.Parameter(torch.zeros(choices, width, *head))

    def forward(self, x):
        choice, y = self.router(x), x.new_zeros(*x.shape[:2], *self.kernel.shape[2:])
        for number, kernel in enumerate(self.kernel):
            chosen = choice == number
            y[chosen] = (x[chosen] @ kernel.flatten(1).to(x.dtype)).reshape(-1, *kernel.shape[1:])
        return y


class BranchedConv(nn.Module):
    """A depth-wise 3x3 kernel, trained as the sum of three (ACNet) or as one."""

    def __init__(self, width, folded):
        super().__init__()
        shapes = {'kernel': (3, 3)} if folded else {'square': (3, 3), 'column': (3, 1), 'row': (1, 3)}
        for name, size in shapes.items():
            setattr(self, name, nn.Parameter(torch.zeros(*size, 1, width)))
        self.bias, self.folded = nn.Parameter(torch.zeros(width)), folded

    def forward(self, x, grid):
        if self.folded:
            kernel = self.kernel
        else:
            kernel = self.square + F.pad(self.column, (0, 0, 0, 0, 1, 1))
            kernel = kernel + F.pad(self.row, (0, 0, 0, 0, 0, 0, 1, 1))
        return depthwise(x, kernel.permute(3, 2, 0, 1), self.bias, grid)


def sharpen(z, power):
    """relu(z)^power with the length of relu(z), over all heads; from logarithms: nothing overflows."""
    x = F.relu(accumulate(z)) + EPS_DYDI
    logarithm = x.log()
    powered = torch.exp(power * (logarithm - logarithm.amax((-2, -1), keepdim=True)))
    return powered * (x.flatten(-2).norm(dim=-1) / powered.flatten(-2).norm(dim=-1))[..., None, None]


def weighted_sum(q, k, v):
    """q·(kᵀv/N) of [B, N, K, E], in float32."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, accumulate(v)))
    return (q @ (k.transpose(-1, -2) @ v / k.shape[2])).transpose(1, 2)


class DyDiLA(nn.Module):
    def __init__(self, width, grid, heads, projectors=3, powers=9, factors=9, factor_init=0.01,
                 difference='tokens', router='straight_through', normaliser='mean', separate_banks=False,
                 dwc='branches', qkv_bias=False):
        super().__init__()
        head = heads, width // heads
        self.difference, self.normaliser = difference, normaliser
        self.projectors, self.powers = projectors, powers
        self.shared = difference != 'none' or not projectors
        if self.shared:
            self.qkv = Product((width,), (3, *head), qkv_bias)
        else:
            self.value = Product((width,), head, qkv_bias)
        if projectors:
            self.routed_q, self.routed_k = (RoutedLinear(width, head, projectors) for _ in range(2))
        self.names = ('query', 'key') * self.shared + ('query2', 'key2') * bool(projectors)
        if powers:
            for name in self.names:
                setattr(self, f'power_{name}', Router(width, powers))
            self.gamma = nn.Parameter(torch.zeros((len(self.names), powers) if separate_banks else (powers,)))
        self.differing = {'tokens': ('query', 'key'), 'maps': ('query',), 'none': ()}[difference]
        if self.differing:
            for name in self.differing:
                setattr(self, f'difference_{name}', Router(width, factors, parts=2))
            shape = (len(self.differing), factors) if separate_banks else (factors,)
            self.factor = nn.Parameter(torch.zeros(shape))
        self.dwc = None if dwc == 'none' else BranchedConv(width, dwc == 'single')
        self.proj = Product(head, (width,))

    def forward(self, x, grid):
        tokens, v = self.project(x)
        tokens = self.measure(tokens)
        o = self.attend(tokens, v)
        if self.dwc is not None:
            o = o + self.dwc(v.flatten(2), grid).reshape(o.shape)
        return self.proj(o.to(x.dtype))

    def project(self, x):
        tokens = {}
        if self.shared:
            tokens['query'], tokens['key'], v = self.qkv(x).unbind(2)
        else:
            v = self.value(x)
        if self.projectors:
            tokens['query2'], tokens['key2'] = self.routed_q(x), self.routed_k(x)
        return tokens, v

    def measure(self, tokens):
        """The norm-preserving power of each, its exponent picked for the token."""
        if not self.powers:
            return {name: sharpen(z, 3.0) for name, z in tokens.items()}
        bank = F.softplus(accumulate(self.gamma))
        return {name: sharpen(z, self.pick(bank, i, getattr(self, f'power_{name}')(z)))
                for i, (name, z) in enumerate(tokens.items())}

    @staticmethod
    def pick(bank, i, choice):
        return (bank if bank.ndim == 1 else bank[i])[choice][..., None, None]

    def attend(self, tokens, v):
        first, second = self.names[:2], self.names[2:]
        q, k = (tokens[name] for name in first)
        weigh = q, k
        if self.difference != 'none':
            q2, k2 = (tokens[name] for name in second)
            factors = {name: self.pick(accumulate(self.factor), i, getattr(self, f'difference_{name}')(
                tokens[name], tokens[f'{name}2'])) for i, name in enumerate(self.differing)}
        if self.difference == 'tokens':
            weigh = q - factors['query'] * q2, k - factors['key'] * k2
        o = weighted_sum(*weigh, v)
        if self.difference == 'maps':
            o = o - factors['query'] * weighted_sum(q2, k2, v)
        if self.normaliser == 'weights':
            o = o / ((q * k.mean(1, keepdim=True)).sum(-1, keepdim=True) + EPS_DYDI)
        return o
