"""Results with the same bits on any number of devices: rows are computed in groups of a fixed size.

The bits of a row depend on how many rows a program computes together, as matrix products of other shapes
round differently. So the program is compiled for one group, and every device of every host runs it on groups
of its own. Devices exchange nothing and do not wait for each other."""
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lit_jax.runtime.leaves import placed
from lit_jax.runtime.read_ahead import start_ahead

# Unknown to lit_jax.models.partition, so models inside a group do not shard their activations.
AXIS = 'groups'


class DeviceGroups:
    """Runs `function(weights, rows) -> results` (trees of arrays [group, ...]) on one group per device.

    Args:
        weights: may be replaced later with `place`.
        group: rows computed together; changes the bits of the results, see above.
        devices: of this process, default all.
        options: `compiler_options` of jax.jit.
    Attributes:
        batch: rows per call on all devices.
        weights: on the devices."""

    def __init__(self, function: Callable, weights, group: int, *, devices: Sequence | None = None,
                 options: dict | None = None):
        devices = jax.local_devices() if devices is None else devices
        self.devices, self.batch = len(devices), group * len(devices)
        mesh = Mesh(np.asarray(devices), (AXIS,), axis_types=(AxisType.Auto,))
        self._everywhere, self._dealt = NamedSharding(mesh, P()), NamedSharding(mesh, P(AXIS))
        self._program = jax.jit(
            jax.shard_map(function, mesh=mesh, in_specs=(P(), P(AXIS)), out_specs=P(AXIS), check_vma=False),
            compiler_options=options)
        self.place(weights)

    def place(self, weights) -> None:
        """Replaces the weights of the compiled program; None frees their memory."""
        self.weights = jax.device_put(weights, self._everywhere)

    def compile(self, weights, rows) -> jax.stages.Compiled:
        """Compiles for trees of these shapes and dtypes; `start` then uses the program."""
        return self._program.lower(*(
            placed(tree, jax.tree.map(lambda _, place=place: place, tree))
            for tree, place in ((weights, self._everywhere), (rows, self._dealt)))).compile()

    def start(self, rows):
        """Results of at most `batch` rows, returned before they are computed; padding rows come last."""
        return self._program(self.weights, jax.device_put(jax.tree.map(self._fill, rows), self._dealt))

    def run(self, items: Iterable, rows: Callable, in_flight: int = 0) -> Iterator[tuple]:
        """Yields (item, numpy results of rows(item), at most `batch`) in order.

        in_flight: rows started and not yet returned, at least a batch; default two batches, so that no device
            waits while results are fetched. Changes only speed and memory."""
        waves = max(1, in_flight // self.batch) if in_flight else 2

        def start(item):
            these = rows(item)
            return len(jax.tree.leaves(these)[0]), self.start(these)

        for item, (count, results) in start_ahead(items, start, waves - 1):
            yield item, jax.tree.map(lambda leaf, count=count: np.asarray(leaf)[:count], results)

    def _fill(self, rows: np.ndarray) -> np.ndarray:
        short = self.batch - len(rows)
        return np.concatenate([rows, np.repeat(rows[-1:], short, axis=0)]) if short else rows
