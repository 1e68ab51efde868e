"""Cost of a training step by the model's own count: matrix products and convolutions, no recomputation."""
import functools
import json
import math

import jax

from lit_jax.models.arch import mixing_layers
from lit_jax.models.cost import network_macs
from lit_jax.models.macs import count_macs
from lit_jax.models.network import Network
from lit_jax.runtime.json_file import parse_json


def train_macs(network: Network, teacher_network: Network | None, batch_size: int) -> int:
    """Multiply-accumulates of one global step: the student's forward pass three times, its teacher's once.
    A backward pass counts as two forward passes; recomputation by remat is not counted, so it cannot raise
    FLOP/s or MFU. FLOPs are twice this number. batch_size: over all devices and micro-batches."""
    teacher = forward_macs(teacher_network) if teacher_network is not None else 0
    return batch_size * (3 * forward_macs(network) + teacher)


def stage_macs(stage: str, network: Network, teacher_network: Network | None, batch_size: int) -> int:
    """Multiply-accumulates of one global step of a stage: 'train', or 'align', where only the mixers of the
    student run."""
    if stage == 'train':
        return train_macs(network, teacher_network, batch_size)
    return batch_size * (3 * mixer_macs(network) + forward_macs(teacher_network))


def mixer_macs(network: Network) -> int:
    """Multiply-accumulates of all mixers in one forward pass for one image."""
    layers = sum(blocks for blocks, *_ in mixing_layers(network.arch))
    grid = tuple(side // network.arch['patch'] for side in network.arch['input_size'])
    tokens = jax.ShapeDtypeStruct((layers, 1, math.prod(grid), network.arch['width']), network.dtype)

    def run(params, tokens):
        return network.map_mixers(params, lambda own, build, x: build(own)(x, grid), tokens)

    return count_macs(run, network.abstract(), tokens)


def forward_macs(network: Network) -> int:
    """`network_macs`, counted once per architecture."""
    return _forward_macs(json.dumps(network.arch, sort_keys=True))


@functools.cache
def _forward_macs(arch: str) -> int:
    return network_macs(Network(parse_json(arch, 'an architecture')))
