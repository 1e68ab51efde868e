"""The gated linear attention of DiG (arXiv 2405.18428), as its plain recurrence over tokens."""
import torch
import torch.nn.functional as F
from torch import nn

from lit_jax.convert.twins.parts_twin import Named, Product, accumulate

DIRECTIONS = {'causal': ((False, False),), 'bidirectional': ((False, False), (False, True)),
              'four': ((False, False), (False, True), (True, False), (True, True))}


def transpose_tokens(x, grid):
    """Tokens of a grid, rows first -> those of its transpose."""
    return x.reshape(len(x), *grid, *x.shape[2:]).transpose(1, 2).reshape(x.shape)


def turn(x, grid, columns, backwards):
    x = transpose_tokens(x, grid) if columns else x
    return x.flip(1) if backwards else x


def turn_back(x, grid, columns, backwards):
    x = x.flip(1) if backwards else x
    return transpose_tokens(x, grid[::-1]) if columns else x


def recurrent_gla(q, k, v, decay, value_decay=None):
    """S_t = diag(α_t)·S_{t-1} + k_tᵀ·v_t, o_t = q_t·S_t of [B, N, K, E], in float32."""
    q, k, v = (accumulate(x) for x in (q, k, v))
    state, outputs = q.new_zeros(*q[:, 0].shape, v.shape[-1]), []
    for t in range(q.shape[1]):
        gates = decay[:, t, :, :, None]
        if value_decay is not None:
            gates = gates * value_decay[:, t, :, None, :]
        state = gates * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append((q[:, t, :, None, :] @ state)[:, :, 0])
    return torch.stack(outputs, 1)


class GatedLinearAttention(nn.Module):
    """proj(norm(o)·swish(gate(x)))."""

    def __init__(self, width, grid, heads, expand_k=0.5, directions='causal', value_gate=False, norm='rms',
                 gate_bias=False, chunk=0):
        super().__init__()
        self.heads, self.directions = heads, DIRECTIONS[directions]
        size = width // heads
        keys = heads * int(size * expand_k)
        self.q_proj, self.k_proj = (nn.Linear(width, keys, bias=False) for _ in range(2))
        self.v_proj, self.g_proj = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.gate = Bias(heads, size) if gate_bias else None
        self.gk_proj = nn.Sequential(nn.Linear(width, 16, bias=False), nn.Linear(16, keys))
        self.value_decay = Product((width,), (heads, size)) if value_gate else None
        self.g_norm_swish_gate = Named()
        self.g_norm_swish_gate.weight = nn.Parameter(torch.ones(size))
        self.norm_bias = nn.Parameter(torch.zeros(size)) if norm == 'layer' else None
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x, grid):
        def split(y):
            return y.reshape(*y.shape[:2], self.heads, -1)

        wide = accumulate(x)
        first, second = self.gk_proj
        decay = accumulate(F.linear(wide, accumulate(first.weight)).to(x.dtype))
        decay = F.linear(decay, accumulate(second.weight), accumulate(second.bias))
        inputs = [split(linear(x)) for linear in (self.q_proj, self.k_proj, self.v_proj)]
        inputs.append(torch.exp(F.logsigmoid(split(decay)) / 16))
        if self.value_decay is not None:
            kernel = accumulate(self.value_decay.kernel)
            logits = torch.tensordot(wide, kernel, 1) + accumulate(self.value_decay.bias)
            inputs.append(torch.exp(F.logsigmoid(logits) / 16))
        o = sum(turn_back(self.norm(self.attend(*(turn(a, grid, *way) for a in inputs))), grid, *way)
                for way in self.directions)
        gate = split(self.g_proj(x))
        gate = gate if self.gate is None else gate + self.gate.bias.to(x.dtype)
        return self.o_proj((o * F.silu(accumulate(gate))).flatten(2).to(x.dtype))

    @staticmethod
    def attend(q, *rest):
        return recurrent_gla(q, *rest) * q.shape[-1] ** -0.5

    def norm(self, o):
        gain = accumulate(self.g_norm_swish_gate.weight)
        if self.norm_bias is not None:
            return F.layer_norm(o, o.shape[-1:], gain, accumulate(self.norm_bias), 1e-6)
        return o * torch.rsqrt(o.square().mean(-1, keepdim=True) + 1e-6) * gain


class Bias(nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(*shape))
