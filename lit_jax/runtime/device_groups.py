"""The same bits on any number of devices: rows are computed in groups of one fixed size, each on one device.

Matrix products of another shape round differently, so the bits of a row depend on how many are computed
together. Here that number never changes: the program is compiled for one group, and every device of every
host runs it on groups of its own. No device waits for another, and nothing is exchanged.
"""
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lit_jax.runtime.leaves import placed
from lit_jax.runtime.read_ahead import start_ahead

# Not a name of lit_jax.models.partition: inside a group the models see no mesh to lay their activations on.
AXIS = 'groups'


class DeviceGroups:
    """`function(weights, rows) -> results`, trees of arrays [group, ...], on a group a device at a time.

    Args:
        weights: replaced by `place` at any time.
        group: rows computed together. Part of the result: see above.
        devices: of this process; default all of them.
        options: `compiler_options` of jax.jit.
    Attributes:
        batch: rows that all devices take at a time.
        weights: as they lie on the devices.
    """

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
        """Other weights for the program that is compiled already; None gives up the memory of the old."""
        self.weights = jax.device_put(weights, self._everywhere)

    def compile(self, weights, rows) -> jax.stages.Compiled:
        """The program for trees of such shapes and dtypes; `start` then uses it."""
        return self._program.lower(*(
            placed(tree, jax.tree.map(lambda _, place=place: place, tree))
            for tree, place in ((weights, self._everywhere), (rows, self._dealt)))).compile()

    def start(self, rows):
        """Results of at most `batch` rows, and behind them those of the copies of the last row that filled
        up; returned before they are computed."""
        return self._program(self.weights, jax.device_put(jax.tree.map(self._fill, rows), self._dealt))

    def run(self, items: Iterable, rows: Callable, in_flight: int = 0) -> Iterator[tuple]:
        """(item, numpy results of rows(item), at most `batch`) in order.

        in_flight: rows started and not yet handed out, at least a batch; default two batches, so that no
            device waits while results are fetched. Changes speed and memory, never a result.
        """
        waves = max(1, in_flight // self.batch) if in_flight else 2

        def start(item):
            these = rows(item)
            return len(jax.tree.leaves(these)[0]), self.start(these)

        for item, (count, results) in start_ahead(items, start, waves - 1):
            yield item, jax.tree.map(lambda leaf, count=count: np.asarray(leaf)[:count], results)

    def _fill(self, rows: np.ndarray) -> np.ndarray:
        short = self.batch - len(rows)
        return np.concatenate([rows, np.repeat(rows[-1:], short, axis=0)]) if short else rows
