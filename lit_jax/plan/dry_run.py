"""Describes a recipe without training it: `train.py --dry_run`."""
import json
from collections.abc import Sequence

import jax
from ml_collections import ConfigDict

from lit_jax.models.arch import mixers_of
from lit_jax.models.cost import format_parameters, network_macs
from lit_jax.models.network import DTYPES, Network, count_parameters
from lit_jax.plan.plan import assumed_teacher, find_teacher, short_count
from lit_jax.recipes.recipe import finalize
from lit_jax.runtime.errors import UserError, human_bytes
from lit_jax.runtime.leaves import named_leaves
from lit_jax.training import setup
from lit_jax.training.flops import stage_macs
from lit_jax.training.from_teacher import complete
from lit_jax.training.mesh import format_shardings, make_mesh
from lit_jax.training.stages import Stage, plan_stages
from lit_jax.training.state import abstract_state


def describe_recipe(config: ConfigDict, *, verbose: bool = False) -> tuple[str, bool]:
    """(text, whether the recipe can run here): what it is, how large, what it costs, what is missing.

    verbose: also all fields, the parameters, and the sharding of the state.
    Raises:
        UserError: a recipe that could run nowhere."""
    config = finalize(complete(config), jax.device_count())
    network = setup.build_network(config)
    teacher, missing = _find_teacher(config)
    stages = plan_stages(config, network, teacher and teacher.arch)
    state = abstract_state(network, stages[-1].optimizer, stages[-1].trained)
    arch, train = network.arch, config.train
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    try:
        setup.check_inputs(config)
    except UserError as error:
        missing = str(error)
    kinds = ' and '.join(dict.fromkeys(mixer['name'] for mixer in mixers_of(arch)))
    lines = [
        f'recipe   {config.name}: {arch["family"]}, {arch["depth"]} blocks of width {arch["width"]}, '
        f'{kinds} attention, patch {arch["patch"]}',
        f'input    {"x".join(map(str, arch["input_size"]))}x{arch["channels"]} of {config.data.name}',
        f'teacher  {config.teacher.path or "none"}; inherits from {config.inherit.path or "nothing"}',
        f'size     {count_parameters(network):,} parameters, train state {human_bytes(size)}',
        f'training {train.steps:,} steps of {train.batch_size} images, {train.optimizer}, {train.dtype}',
        f'cost     {network_macs(network) / 1e9:,.4g} GMACs an image',
        *_describe_stages(stages, network, teacher, train.batch_size),
        f'devices  {jax.device_count()} {jax.default_backend()}; --plan=SLICE compiles for others',
        f'missing  {missing or "nothing: this recipe can run here"}']
    if not verbose:
        return '\n'.join([*lines, 'tables   --verbose']), not missing
    sections = [('recipe', json.dumps(config.to_dict(), indent=1)),
                ('parameters', format_parameters(network)),
                (f'train state on {jax.device_count()} device(s)',
                 format_shardings(state, make_mesh(config.mesh.to_dict()), arch))]
    return '\n\n'.join(['\n'.join(lines), *(f'== {title}\n{body}' for title, body in sections)]), not missing


def _find_teacher(config: ConfigDict) -> tuple[Network | None, str]:
    """(its network, what is wrong with it): that of its name where it is not here or cannot be read."""
    try:
        return find_teacher(config)[0], ''
    except UserError as error:
        return Network(assumed_teacher(config), dtype=DTYPES[config.train.dtype]), str(error)


def _describe_stages(stages: Sequence[Stage], network: Network, teacher: Network | None,
                     batch_size: int) -> list[str]:
    """A line a stage: its steps, and the FLOPs of one and of all of them, with the teacher's."""
    sizes = {name: leaf.size for name, leaf in named_leaves(network.abstract()).items()}
    costs = [2 * stage_macs(stage.name, network, teacher, batch_size) for stage in stages]
    lines = []
    for stage, cost in zip(stages, costs, strict=True):
        steps = stage.last - stage.first + 1
        trained = 'all parameters' if stage.trained is None else (
            f'{sum(sizes[name] for name in stage.trained):,} parameters')
        share = '' if stage is stages[-1] else f' ({cost / costs[-1]:.2f} of a step of training)'
        lines.append(f'stage    {stage.name}: steps {stage.first:,} to {stage.last:,}, '
                     f'{short_count(cost)}FLOP a step{share}, {short_count(cost * steps)}FLOP in all; '
                     f'trains {trained}')
    return lines
