"""Cost of a training step by the model's own count: matrix products and convolutions, no recomputation."""
import functools
import json

from lit_jax.models.cost import network_macs
from lit_jax.models.network import Network


def train_macs(network: Network, teacher_network: Network | None, batch_size: int) -> int:
    """Multiply-accumulates of one global step: the student's forward pass three times, its teacher's once.
    A backward pass counts as two forward passes; recomputation by remat is not counted, so it cannot raise
    FLOP/s or MFU. FLOPs are twice this number. batch_size: over all devices and micro-batches."""
    teacher = forward_macs(teacher_network) if teacher_network is not None else 0
    return batch_size * (3 * forward_macs(network) + teacher)


def forward_macs(network: Network) -> int:
    """`network_macs`, counted once per architecture."""
    return _forward_macs(json.dumps(network.arch, sort_keys=True))


@functools.cache
def _forward_macs(arch: str) -> int:
    return network_macs(Network(json.loads(arch)))
