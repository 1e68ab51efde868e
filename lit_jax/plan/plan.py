"""What a recipe would need on devices that are not here: `train.py --plan=v5e:16x16`.

    python train.py --config=configs/lit_xl.py --plan=v5e:4x4

The real train step is compiled for the slice by its own compiler; memory and collectives are read from the
compiled program, and the cost from the model's own count. Nothing is run.
"""
import importlib.metadata
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

from lit_jax.models.arch import check_partition
from lit_jax.models.network import DTYPES, Network
from lit_jax.plan.collectives import Collective, find_collectives, format_collectives
from lit_jax.plan.topology import Topology, find_topology, next_larger
from lit_jax.recipes.recipe import SIZES, finalize, softmax_mixer
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.memory import is_out_of_memory
from lit_jax.runtime.paths import as_path
from lit_jax.training import setup
from lit_jax.training.flops import train_macs
from lit_jax.training.mesh import AXES, BATCH, make_mesh, replicated, state_shardings


@dataclass(frozen=True)
class Memory:
    """Bytes a device.

    Attributes:
        arguments: state, teacher, batch. outputs: results that do not lie in the memory of an argument.
        temporaries: set aside for everything between them; not all of it is in use at the same time.
        peak: in use at the worst moment, arguments included: what the TPU compiler compares with the memory.
        code: the program itself, which lies in the part of the memory that no program may use.
        parts: the arguments by name, before the padding that a device adds.
    """
    arguments: int
    outputs: int
    temporaries: int
    peak: int
    code: int
    parts: Mapping[str, int]


@dataclass(frozen=True)
class Plan:
    """A recipe on a topology, in numbers.

    Attributes:
        config: the recipe, finalized for the topology: its mesh has sizes. teacher: how the teacher was
            found, or ''.
        macs: multiply-accumulates of a step on all devices, by the model's own count. collectives: None if
            the compiler refused the program. trace_seconds, compile_seconds: on this machine. refusal: what
            the compiler said, or ''.
        advice: what to change, as (flags of train.py, what they do); empty if it fits.
    """
    config: ConfigDict
    topology: Topology
    teacher: str
    memory: Memory
    macs: int
    collectives: Sequence[Collective] | None
    trace_seconds: float
    compile_seconds: float
    refusal: str = ''
    advice: Sequence[tuple[str, str]] = ()

    @property
    def devices(self) -> int:
        return len(self.topology.devices)

    @property
    def mesh(self) -> dict[str, int]:
        return {axis: self.config.mesh[axis] for axis in AXES}

    @property
    def fits(self) -> bool:
        return not self.refusal and self.memory.peak <= self.topology.usable_memory

    @property
    def flops(self) -> int:
        """A multiply-accumulate is two operations."""
        return 2 * self.macs

    @property
    def peak_seconds(self) -> float | None:
        """A step at the peak speed of the chips: none is faster. None where the peak is not known."""
        chip = self.topology.chip
        return self.flops / self.devices / chip.peak_flops if chip else None


def describe_plan(config: ConfigDict, topology: str) -> str:
    """`make_plan`, for a person."""
    return format_plan(make_plan(config, topology))


def make_plan(config: ConfigDict, topology: str) -> Plan:
    """Compiles the train step of a recipe for 'v5e:4x4', 'cpu:8', ... and reads off what it needs.

    The first plan of a process turns jax to the CPU; no accelerator is looked for.

    Raises:
        UserError: an unknown topology, no TPU compiler, or a recipe that cannot be on so many devices. A
        program that
            is too large for the memory is no error: the plan says so.
    """
    topology = find_topology(topology)
    config = finalize(config, len(topology.devices))
    mesh = make_mesh(config.mesh.to_dict(), list(topology.devices))
    network = setup.build_network(config)
    teacher_network, teacher = find_teacher(config)
    if teacher_network is not None:      # one that is assumed, too
        check_partition(teacher_network.arch, config.mesh.to_dict(), f'the teacher {config.teacher.path}')
    arguments = _abstract_arguments(config, network, teacher_network, mesh)
    began = time.perf_counter()
    with jax.set_mesh(mesh):
        lowered = _lower(config, network, teacher_network, arguments, mesh)
        traced = time.perf_counter()
        compiled, refusal = _compile(lowered)
    ended = time.perf_counter()
    parts = {name: _local_bytes(tree) for name, tree in _named_parts(arguments).items()}
    memory = (_refused_memory(refusal, parts) if compiled is None
              else _compiled_memory(compiled, parts, counts_peak=topology.chip is not None))
    fields = {'config': config, 'topology': topology, 'teacher': teacher, 'memory': memory,
              'refusal': refusal,
              'macs': train_macs(network, teacher_network, config.train.batch_size),
              'collectives': find_collectives(compiled.as_text(), mesh) if compiled else None,
              'trace_seconds': traced - began, 'compile_seconds': ended - traced}
    plan = Plan(**fields)
    return plan if plan.fits else Plan(**fields, advice=advise(plan))


# ------------------------------------------------------------------------------------------------------
# The program


def find_teacher(config: ConfigDict) -> tuple[Network | None, str]:
    """The network of the recipe's teacher and, in words, where its architecture comes from; (None, '')
    without one.

    Its weights are not looked at. Where the folder is missing, DiT of the size that it is named after
    ('models/dit_xl') is taken, else of the student's depth and width.
    """
    path, dtype = config.teacher.path, DTYPES[config.train.dtype]
    if not path:
        return None, ''
    if _is_here(path):
        arch, origin = setup.read_teacher_config(config)['model'], path
    else:
        arch, origin = _assumed_teacher(config), f'{path} is not here, a guess by its name and the student'
    network = Network(arch, dtype=dtype, scan_layers=config.train.scan_layers)
    mixer = network.arch['mixer']
    return network, (f'{origin}: {network.arch["depth"]} blocks of width {network.arch["width"]}, '
                     f'{mixer["heads"]} heads of {mixer["name"]} attention')


def _is_here(path: str) -> bool:
    try:
        return as_path(path).exists()
    # a bucket that this machine cannot ask; the plan needs the architecture only
    except (UserError, OSError):
        return False


def _assumed_teacher(config: ConfigDict) -> dict:
    arch = dict(setup.build_network(config).arch)
    if arch['family'] == 'pixart':       # PixArt-Σ has as many heads of one kind as of the other
        return arch | {'mixer': softmax_mixer(arch['cross_heads']).to_dict(), 'stages': ()}
    named = re.search(rf'(?:^|[/_\-])dit[_\-]({"|".join(SIZES)})(?:[_\-]|$)',
                      config.teacher.path.lower().rstrip('/'))
    same_width = [size for size in SIZES.values() if size['width'] == arch['width']]
    size = SIZES[named[1]] if named else same_width[0] if same_width else None
    heads = size['softmax_heads'] if size else arch['mixer']['heads']
    if named:
        arch |= {'depth': size['depth'], 'width': size['width']}
    return arch | {'mixer': softmax_mixer(heads).to_dict()}


def _abstract_arguments(config, network, teacher_network, mesh) -> tuple:
    """(state, frozen, batch, key) as ShapeDtypeStructs with shardings, as the loop makes them."""
    state = setup.abstract_sharded_state(network, setup.build_optimizer(config), mesh)
    frozen = {}
    if teacher_network is not None:
        abstract = teacher_network.abstract()
        frozen['teacher'] = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, teacher_network.dtype, sharding=sharding),
            abstract, state_shardings(abstract, mesh, teacher_network.arch))
    if network.conditioning == 'text':
        shape = network.arch['caption_tokens'], network.arch['caption_channels']
        frozen['null_text'] = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=replicated(mesh))
    batch = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, BATCH))
             for name, leaf in _abstract_batch(config, network).items()}
    key = jax.eval_shape(lambda: jax.random.key(0))
    return state, frozen, batch, jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=replicated(mesh))


def _abstract_batch(config: ConfigDict, network: Network) -> dict:
    """The arrays of a batch; captions as features, also those that are encoded in the step."""
    size, (_, _, cond) = config.train.batch_size, network.example_inputs(config.train.batch_size)
    # Cached latents come as the mean and log-variance of the VAE's posterior.
    name, parts = ('moments', 2) if config.data.name in ('latents', 'caption_latents') else ('image', 1)
    shape = (size, *network.arch['input_size'], parts * network.arch['channels'])
    if network.conditioning == 'text':      # as they are stored
        cond['text'] = jax.ShapeDtypeStruct(cond['text'].shape, jnp.bfloat16)
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32), **cond}


def _lower(config, network, teacher_network, arguments, mesh):
    step = setup.jit_step(config, network, setup.build_optimizer(config), mesh, arguments[0], teacher_network)
    return step.lower(*arguments)


def _compile(lowered):
    """(compiled, '') or (None, what the compiler said when the program was too large)."""
    try:
        return lowered.compile(), ''
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None, str(error)


# ------------------------------------------------------------------------------------------------------
# Memory


def _named_parts(arguments) -> dict:
    state, frozen, batch, _ = arguments
    return {'weights': state['params'], 'EMA': state['ema'], 'optimizer': state['opt'],
            'teacher': frozen.get('teacher', {}), 'batch': (batch, frozen.get('null_text'))}


def _local_bytes(tree) -> int:
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
               for leaf in jax.tree.leaves(tree))


def _compiled_memory(compiled, parts: Mapping[str, int], *, counts_peak: bool) -> Memory:
    """counts_peak: whether the compiler's own peak counts the arguments; the CPU's does not."""
    stats = compiled.memory_analysis()
    outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
    peak = stats.peak_memory_in_bytes if counts_peak else 0
    peak = peak or stats.argument_size_in_bytes + outputs + stats.temp_size_in_bytes
    return Memory(arguments=stats.argument_size_in_bytes, outputs=outputs,
                  temporaries=stats.temp_size_in_bytes, code=stats.generated_code_size_in_bytes, peak=peak,
                  parts=parts)


def _refused_memory(refusal: str, parts: Mapping[str, int]) -> Memory:
    """Of a program that was refused: the arguments, and what the compiler asked for."""
    arguments, needed = sum(parts.values()), parse_refusal(refusal)
    return Memory(arguments=arguments, outputs=0, temporaries=max(needed - arguments, 0), code=0,
                  peak=max(needed, arguments), parts=parts)


def parse_refusal(message: str) -> int:
    """Bytes that a program needs, arguments included, by a message of the TPU compiler; 0 if it does not say.

    '... total memory required for HLO temporaries (20.70G) exceeds available HBM (15.75G).' (what it calls
    temporaries has the arguments in it), or '... Used 20.70G of 15.75G hbm.'
    """
    match = re.search(r'(?:temporaries \(|\bUsed )([\d.]+)\s*([KMGT]?)', message)
    return round(float(match[1]) * 1024 ** ' KMGT'.index(match[2] or ' ')) if match else 0


# ------------------------------------------------------------------------------------------------------
# Advice


def advise(plan: Plan) -> list[tuple[str, str]]:
    """What to change in a recipe that does not fit, the likeliest first: (flags, what they do)."""
    memory, limit = plan.memory, plan.topology.usable_memory
    for_arguments, for_temporaries = _cut_arguments(plan), _cut_temporaries(plan)
    if memory.arguments >= limit:                       # no temporaries are small enough then
        lines = for_arguments
    elif memory.arguments > memory.temporaries:
        lines = for_arguments + for_temporaries
    else:
        lines = for_temporaries + for_arguments
    larger = next_larger(plan.topology)
    return [*lines, (f'--plan={larger}', 'a larger slice')] if larger else lines


def _cut_arguments(plan: Plan) -> list[tuple[str, str]]:
    mesh, width = plan.mesh, plan.config.model.width
    ways = mesh['data'] * mesh['fsdp']
    fsdp = math.gcd(ways, width)
    arguments = plan.memory.arguments * mesh['fsdp'] / fsdp
    excess = plan.memory.peak - plan.topology.usable_memory
    if plan.memory.arguments - arguments < excess / 4:      # would not be felt, or cannot be cut further
        return []
    return [(f'--config.mesh.data={ways // fsdp} --config.mesh.fsdp={fsdp}',
             f'state and teacher cut over {fsdp} devices, not {mesh["fsdp"]}: arguments about '
             f'{_size(arguments)}')]


def _cut_temporaries(plan: Plan) -> list[tuple[str, str]]:
    train, memory, lines = plan.config.train, plan.memory, []
    ways, room = plan.mesh['data'] * plan.mesh['fsdp'], plan.topology.usable_memory - plan.memory.arguments
    if train.remat != 'full':
        milder = ' (dots: fewer of both)' if train.remat == 'none' else ''
        lines.append(('--config.train.remat=full', 'keeps the input of each block only, for one more forward '
                                                   f'pass of the student{milder}'))
    parts = [n for n in range(train.accumulate + 1, train.batch_size // ways + 1)
             if n % train.accumulate == 0 and train.batch_size % (ways * n) == 0]
    if parts:
        enough = [n for n in parts if memory.temporaries * train.accumulate / n <= room]
        n = enough[0] if enough else parts[-1]
        lines.append((f'--config.train.accumulate={n}',
                      f'the same batch in {n} parts of {train.batch_size // n}: temporaries about '
                      f'{_size(memory.temporaries * train.accumulate / n)}'))
    unit = ways * train.accumulate
    batch = int(train.batch_size * room / max(memory.temporaries, 1)) // unit * unit
    if 0 < batch < train.batch_size:
        lines.append((f'--config.train.batch_size={batch}', 'fits in proportion, but trains another recipe'))
    return lines


# ------------------------------------------------------------------------------------------------------
# Words


def format_plan(plan: Plan) -> str:
    """The verdict first, then what it rests on."""
    sections = [verdict(plan), _format_recipe(plan)]
    if plan.advice:
        sections.append('\n'.join(['what to change, one or several of',
                                   *(f'  {flags:46} {what}' for flags, what in plan.advice)]))
    sections += [_format_memory(plan), _format_compute(plan)]
    table = format_collectives(plan.collectives).splitlines() if plan.collectives is not None else [
        'not known: the compiler stopped before it had placed them']
    sections.append('\n'.join(['collectives of a step', *(f'  {line}' for line in table)]))
    compiler = [f'jax {jax.__version__}'] + ([f'libtpu {_version("libtpu")}'] if plan.topology.chip else [])
    sections.append(f'traced in {plan.trace_seconds:.1f} s, compiled in {plan.compile_seconds:.1f} s by '
                    f'{", ".join(compiler)}')
    return '\n\n'.join(sections)


def verdict(plan: Plan) -> str:
    """One line: 'fits: 9.8 of 15.8 GiB a device (62 %)'."""
    limit = plan.topology.usable_memory
    if plan.refusal and not parse_refusal(plan.refusal):
        return f'does not fit: the compiler says {plan.refusal.splitlines()[0]}'
    peak = plan.memory.peak
    return (f'{"fits" if plan.fits else "does not fit"}: {_size(peak)} of {_size(limit)} a device '
            f'({peak / limit:.0%})')


def _format_recipe(plan: Plan) -> str:
    train, topology = plan.config.train, plan.topology
    hosts = f' on {topology.hosts} host{"s" if topology.hosts > 1 else ""}' if topology.hosts else ''
    chip = f', {_size(topology.memory)} each' + (f' of which a program may have '
                                                 f'{_size(topology.usable_memory)}'
                                                 if topology.usable_memory < topology.memory else '')
    layers = 'layers scanned' if train.scan_layers else 'layers unrolled'
    images, sharing = train.batch_size // (plan.mesh['data']
                                           * plan.mesh['fsdp']), plan.mesh['tensor'] * plan.mesh['seq']
    holders = f'{sharing} devices together' if sharing > 1 else 'a device'
    rows = [('recipe', f'{plan.config.name}: batch {train.batch_size}, {train.dtype}, remat {train.remat}, '
                       f'accumulate '
                       f'{train.accumulate}, {layers}'),
            ('teacher', plan.teacher or 'none'),
            ('slice', f'{topology.name}: {plan.devices} devices{hosts}{chip}'),
            ('mesh', '  '.join(f'{axis} {n}' for axis, n in plan.mesh.items()) + f'   ({images} of the batch '
                                                                                 f'on {holders})')]
    return '\n'.join(f'{name:9}{text}' for name, text in rows)


def _format_memory(plan: Plan) -> str:
    memory, limit = plan.memory, plan.topology.usable_memory
    rows = [('arguments', memory.arguments)]
    rows += [(f'  {name}', size) for name, size in memory.parts.items() if size]
    if plan.refusal:
        rows += [('temporaries and outputs', memory.temporaries)]
    else:
        rows += [('outputs not in place', memory.outputs), ('temporaries', memory.temporaries)]
    rows.append(('peak', memory.peak))
    return '\n'.join([f'{"memory a device":40}{"of " + _size(limit):>11}',
                      *(f'  {name:26}{_size(size):>12}{size / limit:11.1%}' for name, size in rows)])


def _format_compute(plan: Plan) -> str:
    lines = ["compute of a step (the model's own count: student forward x 3, teacher forward x 1)"]
    lines += [f'  {name:8}{_count(count):>10}{_count(count / plan.devices):>10} a device'
              for name, count in (('MACs', plan.macs), ('FLOPs', plan.flops))]
    if plan.peak_seconds is not None:
        lines.append(f'  lower bound at peak throughput ({plan.topology.chip.peak_flops / 1e12:g} TFLOP/s a '
                     f'chip): {1e3 * plan.peak_seconds:.1f} ms a step')
    return '\n'.join(lines)


def _size(size: float) -> str:
    """Bytes as '9.8 GiB', small ones as '12.3 MiB'."""
    return f'{size / 2**30:,.1f} GiB' if size >= 0.1 * 2**30 else f'{size / 2**20:.1f} MiB'


def _count(number: float) -> str:
    power = min(max(int(math.log10(max(number, 1)) // 3), 0), 6)
    return f'{number / 1000**power:.3g} {" kMGTPE"[power]}'.rstrip()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:     # given by TPU_LIBRARY_PATH
        return 'of unknown version'
