"""What one training step costs by the model's own count: matrix products and convolutions, nothing
recomputed."""
import functools
import json

from lit_jax.models.cost import network_macs
from lit_jax.models.network import Network


def train_macs(network: Network, teacher_network: Network | None, batch_size: int) -> int:
    """Multiply-accumulates of one global step: the student's forward pass three times, its teacher's once.

    A backward pass is counted as two forward passes. What remat computes again is not counted, so that FLOP/s
    and MFU do not rise by doing more work. FLOPs are twice this number.

    Args:
        batch_size: images of a step, over all devices and micro-batches.
    """
    teacher = forward_macs(teacher_network) if teacher_network is not None else 0
    return batch_size * (3 * forward_macs(network) + teacher)


def forward_macs(network: Network) -> int:
    """`network_macs`, counted once for each architecture."""
    return _forward_macs(json.dumps(network.arch, sort_keys=True))


@functools.cache
def _forward_macs(arch: str) -> int:
    return network_macs(Network(json.loads(arch)))
