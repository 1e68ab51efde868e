"""The table of docs/train/systems.md: the cost of every system, as its paper counts and in full.

    python -m lit_jax.recipes.system_costs                             # prints it
    python -m lit_jax.recipes.system_costs docs/train/systems.md       # updates it in that file
"""
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lit_jax import recipes
from lit_jax.models.arch import check_partition
from lit_jax.models.cost import counted_by, macs_of, state_bytes
from lit_jax.models.network import Network, count_parameters
from lit_jax.recipes.systems import SYSTEMS, system
from lit_jax.runtime import cli
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.options import option, parse_options

BEGIN = '<!-- costs: python -m lit_jax.recipes.system_costs docs/train/systems.md -->'
END = '<!-- end of costs -->'
LARGE = {('dit', 'xl'), ('lit', 'xl'), ('dig', 'xl')}     # with recipes of 512 pixels
MOST = 256
OWN_512 = {('lit', 'xl'): 'lit_xl_512.py', ('dig', 'xl'): 'baselines.py:dig_xl_512'}


@dataclass(frozen=True)
class Cost:
    """One row: parameters with the fixed position table, multiply-accumulates of one image, bytes of state.
    `paper` is in the convention of the paper that printed `published` (None: no figure). tensor, seq: the
    largest power of two of devices that these axes of the mesh may have."""
    name: str
    size: str
    image_size: int
    parameters: int
    paper: int
    published: float | None
    full: int
    state: int
    tensor: int
    seq: int

    @property
    def difference(self) -> float | None:
        """Of `paper` from the printed figure, as a fraction."""
        return self.paper / 1e9 / self.published - 1 if self.published else None


def rows() -> Iterator[tuple[str, str, int]]:
    """(system, size, image size) of every row."""
    for name, entry in SYSTEMS.items():
        for size in entry.sizes:
            yield name, size, 256
            if (size, 512) in entry.published or (name, size) in LARGE:
                yield name, size, 512


def cost_of(name: str, size: str, image_size: int = 256) -> Cost:
    config = system(recipes.default(), name, size)
    config.data.image_size = image_size
    network, entry = Network(recipes.architecture(config)), SYSTEMS[name]
    counts = macs_of(network)
    return Cost(name, size, image_size, count_parameters(network),
                counted_by(counts, network.arch, entry.convention),
                entry.published.get((size, image_size)), counts.total(), state_bytes(network.arch) or 0,
                _most_devices(network.arch, 'tensor'), _most_devices(network.arch, 'seq'))


def _most_devices(arch: dict, axis: str) -> int:
    devices = 1
    try:
        while devices < MOST:
            check_partition(arch, {'fsdp': 1, 'tensor': 1, 'seq': 1, axis: 2 * devices})
            devices *= 2
    except UserError:
        pass
    return devices


def recipe_of(name: str, size: str, image_size: int = 256) -> str:
    """The recipe that trains it, for --config."""
    if (name, size) in OWN_512 and image_size == 512:
        return f'configs/{OWN_512[name, size]}'
    if (name, size, image_size) == ('dit', 'xl', 512):
        return 'configs/paper/table7.py:dit_xl_512_cfg_1'
    if size.startswith('dydi_') or image_size == 512:
        return f'configs/sub_imagenet.py:{name}_{size}' + ('_512' if image_size == 512 else '')
    return f'configs/{name}_{size}.py' if name in ('dit', 'lit') else f'configs/baselines.py:{name}_{size}'


def cost_table() -> str:
    """The table in Markdown."""
    lines = ['| system | size | pixels | parameters | GMACs as the paper counts | printed | difference | '
             'GMACs in full | state | `tensor`, `seq` up to | recipe |',
             '|---|---|---|---|---|---|---|---|---|---|---|']
    for name, size, image_size in rows():
        cost = cost_of(name, size, image_size)
        figure = cost.published
        printed = (f'{figure:g}' if float(figure).is_integer() else f'{figure:.2f}') if figure else '–'
        difference = '–' if cost.difference is None else f'{100 * cost.difference:+.2f} %'
        cells = [SYSTEMS[name].title, size, image_size, f'{cost.parameters:,}', f'{cost.paper / 1e9:.2f}',
                 printed, difference, f'{cost.full / 1e9:.2f}', f'{cost.state / 2 ** 20:.2f} MiB',
                 f'{cost.tensor}, {cost.seq}', f'`{recipe_of(name, size, image_size)}`']
        lines.append(f'| {" | ".join(map(str, cells))} |')
    return '\n'.join(lines)


def replace_table(text: str, table: str) -> str:
    """The text with `table` between its marks. UserError if they are missing."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f'the file lacks the marks of the table: {BEGIN} and {END}, each on its own line')
    return f'{before}{BEGIN}\n\n{table}\n\n{END}{after}'


@dataclass(frozen=True)
class TableOptions:
    file: Path | None = option('update the table in this file, between its two marks (default: print it)',
                              flag='FILE', default=None)


def main() -> None:
    file = parse_options(TableOptions, description=__doc__).file
    if file is None:
        print(cost_table())
        return
    file.write_text(replace_table(file.read_text(encoding='utf-8'), cost_table()), encoding='utf-8')


if __name__ == '__main__':
    cli.run(main)
