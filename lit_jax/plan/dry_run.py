"""Describes a recipe without training it: `train.py --dry_run`."""
import json

import jax
from ml_collections import ConfigDict

from lit_jax.models.cost import format_parameters, network_macs
from lit_jax.models.network import count_parameters
from lit_jax.recipes.recipe import finalize
from lit_jax.runtime.errors import UserError, human_bytes
from lit_jax.training import setup
from lit_jax.training.flops import train_macs
from lit_jax.training.from_teacher import complete
from lit_jax.training.mesh import format_shardings, make_mesh
from lit_jax.training.state import abstract_state


def describe_recipe(config: ConfigDict, *, verbose: bool = False) -> tuple[str, bool]:
    """(text, whether the recipe can run here): what it is, how large, what it costs, what is missing.

    verbose: also all fields, the parameters, and the sharding of the state."""
    config = finalize(complete(config), jax.device_count())
    network = setup.build_network(config)
    state = abstract_state(network, setup.build_optimizer(config))
    arch, train = network.arch, config.train
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    try:
        setup.check_inputs(config)
        missing = ''
    except UserError as error:
        missing = str(error)
    macs = train_macs(network, None, train.batch_size)
    lines = [
        f'recipe   {config.name}: {arch["family"]}, {arch["depth"]} blocks of width {arch["width"]}, '
        f'{arch["mixer"]["name"]} attention, patch {arch["patch"]}',
        f'input    {"x".join(map(str, arch["input_size"]))}x{arch["channels"]} of {config.data.name}',
        f'teacher  {config.teacher.path or "none"}; inherits from {config.inherit.path or "nothing"}',
        f'size     {count_parameters(network):,} parameters, train state {human_bytes(size)}',
        f'training {train.steps:,} steps of {train.batch_size} images, {train.optimizer}, {train.dtype}',
        f'cost     {network_macs(network) / 1e9:,.4g} GMACs an image; {macs / 1e9:,.4g} GMACs a step, '
        'without the teacher',
        f'devices  {jax.device_count()} {jax.default_backend()}; --plan=SLICE compiles for others',
        f'missing  {missing or "nothing: this recipe can run here"}']
    if not verbose:
        return '\n'.join([*lines, 'tables   --verbose']), not missing
    sections = [('recipe', json.dumps(config.to_dict(), indent=1)),
                ('parameters', format_parameters(network)),
                (f'train state on {jax.device_count()} device(s)',
                 format_shardings(state, make_mesh(config.mesh.to_dict()), arch))]
    return '\n\n'.join(['\n'.join(lines), *(f'== {title}\n{body}' for title, body in sections)]), not missing
