"""Plans a recipe for devices that this machine need not have: memory, collectives and cost of a step.

    python train.py --config=configs/lit_xl.py --plan=v5e:4x4

The compiler of the slice compiles the real step of each stage (alignment, training). Memory and collectives
are read from the compiled program; MACs are counted by the model. Nothing is run.
"""
import importlib.metadata
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

from lit_jax.models.arch import check_partition, mixers_of
from lit_jax.models.network import DTYPES, Network
from lit_jax.plan.collectives import Collective, find_collectives, format_collectives
from lit_jax.plan.forecast import Forecast, forecast, forecast_json, format_forecast
from lit_jax.plan.topology import Topology, find_topology, next_larger
from lit_jax.recipes.recipe import SIZES, finalize, softmax_mixer
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.json_file import split_lines
from lit_jax.runtime.memory import is_out_of_memory
from lit_jax.runtime.paths import as_path
from lit_jax.training import setup
from lit_jax.training.flops import stage_macs
from lit_jax.training.from_teacher import complete
from lit_jax.training.frozen_features import read_features
from lit_jax.training.mesh import AXES, BATCH, make_mesh, replicated, state_shardings
from lit_jax.training.stages import Stage, plan_stages


@dataclass(frozen=True)
class Memory:
    """Bytes per device.

    Attributes:
        arguments: state, teacher, batch. outputs: results that do not reuse the memory of an argument.
        temporaries: reserved for everything else; not all of it is in use at the same time.
        peak: largest use, with arguments; the TPU compiler compares it with the memory.
        code: the program itself, in the part of the memory that programs may not use.
        parts: the arguments by name, without the padding of the device.
    """
    arguments: int
    outputs: int
    temporaries: int
    peak: int
    code: int
    parts: Mapping[str, int]


@dataclass(frozen=True)
class Plan:
    """The needs of a recipe on a topology.

    Attributes:
        config: the recipe, finalized for the topology: its mesh has sizes.
        stage: 'align' or 'train'; steps: its first and last.
        teacher: where the teacher's architecture comes from, or ''.
        macs: multiply-accumulates of a step on all devices, counted by the model.
        collectives: None if the compiler refused the program.
        trace_seconds, compile_seconds: on this machine.
        refusal: message of the compiler that refused the program, or ''.
        advice: (flags of train.py, their effect), which make it fit; empty if it fits.
        forecast: of the time of a step; None for CPUs, chips of unknown clock and refused programs.
    """
    config: ConfigDict
    stage: str
    steps: tuple[int, int]
    topology: Topology
    teacher: str
    memory: Memory
    macs: int
    collectives: Sequence[Collective] | None
    trace_seconds: float
    compile_seconds: float
    refusal: str = ''
    advice: Sequence[tuple[str, str]] = ()
    forecast: Forecast | None = None

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
        """Lower bound for a step, at the peak throughput of the chips; None if that is not known."""
        chip = self.topology.chip
        return self.flops / self.devices / chip.peak_flops if chip else None


def describe_plan(config: ConfigDict, topology: str) -> str:
    """The plans of all stages as text."""
    return format_plans(list(make_plans(config, topology)))


def format_plans(plans: Sequence[Plan]) -> str:
    """One plan, or the verdicts of several and each under its stage."""
    if len(plans) == 1:
        return format_plan(plans[0])
    sections = ['\n'.join(f'{plan.stage}: {verdict(plan)}' for plan in plans)]
    for plan in plans:
        first, last = plan.steps
        sections.append(f'== {plan.stage}: steps {first:,} to {last:,}\n{format_plan(plan)}')
    return '\n\n'.join(sections)


def make_plan(config: ConfigDict, topology: str, stage: str = 'train') -> Plan:
    """The plan of one stage, see `make_plans`."""
    return next(make_plans(config, topology, stage))


def make_plans(config: ConfigDict, topology: str, only: str = '') -> Iterator[Plan]:
    """Compiles the step of each stage of a recipe, or of one, for 'v5e:4x4', 'cpu:8', ...; restricts jax to
    the CPU.

    Raises:
        UserError: an unknown topology, no TPU compiler, or a recipe that cannot be sharded over so many
            devices. A program that does not fit into memory is no error: see `Plan.fits`.
    """
    topology = find_topology(topology)
    config = finalize(complete(config), len(topology.devices))
    mesh = make_mesh(config.mesh.to_dict(), list(topology.devices))
    network = setup.build_network(config)
    teacher_network, teacher = find_teacher(config)
    if teacher_network is not None:
        check_partition(teacher_network.arch, config.mesh.to_dict(), f'the teacher {config.teacher.path}')
    for stage in plan_stages(config, network, teacher_network and teacher_network.arch):
        if only in ('', stage.name):
            yield _plan_stage(config, topology, stage, network, teacher_network, teacher, mesh)


def _plan_stage(config: ConfigDict, topology: Topology, stage: Stage, network: Network,
                teacher_network: Network | None, teacher: str, mesh) -> Plan:
    arguments = abstract_arguments(config, stage, network, teacher_network, mesh)
    began = time.perf_counter()
    with jax.set_mesh(mesh):
        lowered = setup.jit_stage(config, network, stage, mesh, teacher_network).lower(*arguments)
        traced = time.perf_counter()
        compiled, refusal = _compile(lowered)
    ended = time.perf_counter()
    parts = {name: _local_bytes(tree) for name, tree in _named_parts(arguments).items()}
    memory = (_refused_memory(refusal, parts) if compiled is None
              else _compiled_memory(compiled, parts, counts_peak=topology.chip is not None))
    plan = Plan(config=config, stage=stage.name, steps=(stage.first, stage.last), topology=topology,
                teacher=teacher, memory=memory, refusal=refusal,
                macs=stage_macs(stage.name, network, teacher_network, config.train.batch_size),
                collectives=None, trace_seconds=traced - began, compile_seconds=ended - traced)
    if compiled is not None:
        plan = _read_program(plan, compiled.as_text(), mesh)
    return plan if plan.fits else replace(plan, advice=advise(plan))


def _read_program(plan: Plan, text: str, mesh) -> Plan:
    """The plan with what the text of its compiled program says."""
    collectives, chip = find_collectives(text, mesh), plan.topology.chip
    found = forecast(text, chip, plan.flops / plan.devices, collectives) if chip and chip.clock else None
    return replace(plan, collectives=collectives, forecast=found)


def find_teacher(config: ConfigDict) -> tuple[Network | None, str]:
    """The network of the recipe's teacher and a text about its architecture's origin; (None, '') without one.

    Its weights are not read. If the folder is missing, the teacher is taken to be the DiT it is named after
    ('models/dit_xl'), else one of the student's depth and width."""
    path, dtype = config.teacher.path, DTYPES[config.train.dtype]
    if not path:
        return None, ''
    if _is_here(path):
        arch, origin = setup.read_teacher_config(config)['model'], path
    else:
        arch, origin = assumed_teacher(config), f'{path} not found, guessed from its name and the student'
    network = Network(arch, dtype=dtype, scan_layers=config.train.scan_layers)
    kinds = dict.fromkeys(f'{mixer["heads"]} heads of {mixer["name"]} attention'
                          for mixer in mixers_of(network.arch))
    return network, (f'{origin}: {network.arch["depth"]} blocks of width {network.arch["width"]}, '
                     f'{" and ".join(kinds)}')


def _is_here(path: str) -> bool:
    try:
        return as_path(path).exists()
    except (UserError, OSError):     # a bucket out of reach; a plan needs only the architecture
        return False


def assumed_teacher(config: ConfigDict) -> dict:
    """The architecture that a teacher that is not here has by its name, or by the student's sizes."""
    arch = dict(setup.build_network(config).arch)
    if arch['family'] == 'pixart':       # PixArt-Σ has as many heads in self- as in cross-attention
        return arch | {'mixer': softmax_mixer(arch['cross_heads']).to_dict(), 'stages': ()}
    arch.pop('projectors', None)
    named = re.search(rf'(?:^|[/_\-])(?:dit|sit|lightningdit)[_\-]({"|".join(SIZES)})(?:[_\-]|$)',
                      config.teacher.path.lower().rstrip('/'))
    same_width = [size for size in SIZES.values() if size['width'] == arch['width']]
    size = SIZES[named[1]] if named else same_width[0] if same_width else None
    heads = size['softmax_heads'] if size else arch['mixer']['heads']
    if named:
        arch |= {'depth': size['depth'], 'width': size['width']}
    turned = {'rope': True} if arch['mixer'].get('rope') else {}
    mixer = softmax_mixer(heads).to_dict() | turned
    return arch | {'mixer': mixer} | ({'stages': ()} if 'stages' in arch else {})


def abstract_arguments(config, stage, network, teacher_network, mesh) -> tuple:
    """(state, frozen, batch, key) as ShapeDtypeStructs, sharded as in training."""
    state, frozen = stage.abstract(network, mesh), {}
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
    if features := read_features(config):
        frozen['features'] = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated(mesh)),
            features.params)
    return state, frozen, batch, jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=replicated(mesh))


def _abstract_batch(config: ConfigDict, network: Network) -> dict:
    """The arrays of a batch; captions as features, even if the step encodes them."""
    size, (_, _, cond) = config.train.batch_size, network.example_inputs(config.train.batch_size)
    # Cached latents come as the mean and log-variance of the VAE's posterior.
    name, parts = ('moments', 2) if config.data.name in ('latents', 'caption_latents') else ('image', 1)
    shape = (size, *network.arch['input_size'], parts * network.arch['channels'])
    if network.conditioning == 'text':      # as they are stored
        cond['text'] = jax.ShapeDtypeStruct(cond['text'].shape, jnp.bfloat16)
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32), **cond}


def _compile(lowered):
    """(compiled, ''), or (None, the compiler's message) if the program does not fit into memory."""
    try:
        return lowered.compile(), ''
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None, str(error)


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
    """Of a refused program: the arguments, and the need in the compiler's message."""
    arguments, needed = sum(parts.values()), parse_refusal(refusal)
    return Memory(arguments=arguments, outputs=0, temporaries=max(needed - arguments, 0), code=0,
                  peak=max(needed, arguments), parts=parts)


def parse_refusal(message: str) -> int:
    """Bytes that a program needs, with arguments, from a message of the TPU compiler; 0 if it has none.

    '... total memory required for HLO temporaries (20.70G) exceeds available HBM (15.75G).' (these include
    the arguments), or '... Used 20.70G of 15.75G hbm.'"""
    match = re.search(r'(?:temporaries \(|\bUsed )([\d.]+)\s*([KMGT]?)', message)
    return round(float(match[1]) * 1024 ** ' KMGT'.index(match[2] or ' ')) if match else 0


def advise(plan: Plan) -> list[tuple[str, str]]:
    """Changes to a recipe that does not fit, the most promising first: (flags, their effect)."""
    memory, limit = plan.memory, plan.topology.usable_memory
    lines = _reduce_arguments(plan)
    if memory.arguments < limit:       # else the arguments alone do not fit
        others = _reduce_temporaries(plan)
        lines = lines + others if memory.arguments > memory.temporaries else others + lines
    larger = next_larger(plan.topology)
    return [*lines, (f'--plan={larger}', 'a larger slice')] if larger else lines


def _reduce_arguments(plan: Plan) -> list[tuple[str, str]]:
    mesh, width = plan.mesh, plan.config.model.width
    ways = mesh['data'] * mesh['fsdp']
    fsdp = math.gcd(ways, width)
    arguments = plan.memory.arguments * mesh['fsdp'] / fsdp
    excess = plan.memory.peak - plan.topology.usable_memory
    if plan.memory.arguments - arguments < excess / 4:      # would help too little, or not at all
        return []
    return [(f'--config.mesh.data={ways // fsdp} --config.mesh.fsdp={fsdp}',
             f'state and teacher sharded over {fsdp} devices instead of {mesh["fsdp"]}: arguments about '
             f'{_size(arguments)}')]


def _reduce_temporaries(plan: Plan) -> list[tuple[str, str]]:
    train, memory, lines = plan.config.train, plan.memory, []
    ways, room = plan.mesh['data'] * plan.mesh['fsdp'], plan.topology.usable_memory - plan.memory.arguments
    if train.remat != 'full' and plan.stage == 'train':
        milder = ' (dots: saves less, costs less)' if train.remat == 'none' else ''
        lines.append(('--config.train.remat=full', 'stores only the input of each block, for one more '
                                                   f'forward pass of the student{milder}'))
    parts = [n for n in range(train.accumulate + 1, train.batch_size // ways + 1)
             if n % train.accumulate == 0 and train.batch_size % (ways * n) == 0]
    if parts:
        n = next((n for n in parts if memory.temporaries * train.accumulate / n <= room), parts[-1])
        lines.append((f'--config.train.accumulate={n}',
                      f'the same batch in {n} parts of {train.batch_size // n}: temporaries about '
                      f'{_size(memory.temporaries * train.accumulate / n)}'))
    unit = ways * train.accumulate
    batch = int(train.batch_size * room / max(memory.temporaries, 1)) // unit * unit
    if 0 < batch < train.batch_size:
        lines.append((f'--config.train.batch_size={batch}', 'about fits, but changes the recipe'))
    return lines


def format_plan(plan: Plan) -> str:
    """The verdict, then recipe, advice, memory, compute and collectives."""
    sections = [verdict(plan), _format_recipe(plan)]
    if plan.advice:
        sections.append('\n'.join(['what to change (one or several)',
                                   *(f'  {flags:46} {what}' for flags, what in plan.advice)]))
    sections += [_format_memory(plan), _format_compute(plan)]
    table = 'unknown: the compiler stopped before it had placed them' if plan.collectives is None else \
        format_collectives(plan.collectives)
    sections.append('\n'.join(['collectives of a step', *(f'  {line}' for line in split_lines(table))]))
    if plan.forecast is not None:
        sections.append(format_forecast(plan.forecast, plan.topology.chip))
    compiler = [f'jax {jax.__version__}'] + ([f'libtpu {_version("libtpu")}'] if plan.topology.chip else [])
    sections.append(f'traced in {plan.trace_seconds:.1f} s, compiled in {plan.compile_seconds:.1f} s by '
                    f'{", ".join(compiler)}')
    return '\n\n'.join(sections)


def verdict(plan: Plan) -> str:
    """One line: 'fits: 9.8 GiB of 15.8 GiB per device (62%)'."""
    limit = plan.topology.usable_memory
    if plan.refusal and not parse_refusal(plan.refusal):
        return f'does not fit; the compiler: {split_lines(plan.refusal)[0]}'
    peak = plan.memory.peak
    return (f'{"fits" if plan.fits else "does not fit"}: {_size(peak)} of {_size(limit)} per device '
            f'({peak / limit:.0%})')


def _format_recipe(plan: Plan) -> str:
    train, topology = plan.config.train, plan.topology
    hosts = f' on {topology.hosts} host{"s" if topology.hosts > 1 else ""}' if topology.hosts else ''
    usable = f' ({_size(topology.usable_memory)} usable)' if topology.usable_memory < topology.memory else ''
    layers = 'layers scanned' if train.scan_layers else 'layers unrolled'
    images = train.batch_size // (plan.mesh['data'] * plan.mesh['fsdp'])
    sharing = plan.mesh['tensor'] * plan.mesh['seq']
    axes = '  '.join(f'{axis} {n}' for axis, n in plan.mesh.items())
    rows = [('recipe', f'{plan.config.name}: batch {train.batch_size}, {train.dtype}, remat {train.remat}, '
                       f'accumulate {train.accumulate}, {layers}'),
            ('teacher', plan.teacher or 'none'),
            ('slice', f'{topology.name}: {plan.devices} devices{hosts}, {_size(topology.memory)} '
                      f'each{usable}'),
            ('mesh', f'{axes}   ({images} of the batch per '
                     f'{f"{sharing} devices" if sharing > 1 else "device"})')]
    return '\n'.join(f'{name:9}{text}' for name, text in rows)


def _format_memory(plan: Plan) -> str:
    memory, limit = plan.memory, plan.topology.usable_memory
    others = [('temporaries and outputs', memory.temporaries)] if plan.refusal else [
        ('outputs not in place', memory.outputs), ('temporaries', memory.temporaries)]
    rows = [('arguments', memory.arguments),
            *((f'  {name}', size) for name, size in memory.parts.items() if size), *others,
            ('peak', memory.peak)]
    return '\n'.join([f'{"memory per device":40}{"of " + _size(limit):>11}',
                      *(f'  {name:26}{_size(size):>12}{size / limit:11.1%}' for name, size in rows)])


def _format_compute(plan: Plan) -> str:
    students = 'student' if plan.stage == 'train' else "the student's mixers"
    lines = [f'compute of a step (counted by the model: {students} forward x 3, teacher forward x 1)']
    lines += [f'  {name:8}{short_count(count):>10}{short_count(count / plan.devices):>10} per device'
              for name, count in (('MACs', plan.macs), ('FLOPs', plan.flops))]
    if plan.peak_seconds is not None:
        lines.append(f'  lower bound at peak throughput ({plan.topology.chip.peak_flops / 1e12:g} TFLOP/s a '
                     f'chip): {1e3 * plan.peak_seconds:.1f} ms a step')
    return '\n'.join(lines)


def plan_json(plan: Plan) -> dict:
    """The plan as plain data: bytes, seconds, FLOPs."""
    memory = plan.memory
    return {'recipe': plan.config.name, 'stage': plan.stage, 'slice': plan.topology.name, 'mesh': plan.mesh,
            'devices': plan.devices, 'batch_size': plan.config.train.batch_size, 'teacher': plan.teacher,
            'fits': plan.fits, 'usable_bytes': plan.topology.usable_memory,
            'memory': {**vars(memory), 'parts': dict(memory.parts)}, 'flops': plan.flops,
            'peak_seconds': plan.peak_seconds,
            'collectives': None if plan.collectives is None else [
                {'kind': one.kind, 'axes': list(one.axes), 'bytes': one.bytes, 'count': one.count,
                 'source': one.source} for one in plan.collectives],
            'forecast': plan.forecast and forecast_json(plan.forecast),
            'advice': [list(line) for line in plan.advice],
            'compiler': {'jax': jax.__version__} | (
                {'libtpu': _version('libtpu')} if plan.topology.chip else {})}


def _size(size: float) -> str:
    """'9.8 GiB', or '12.3 MiB' for small sizes."""
    return f'{size / 2**30:,.1f} GiB' if size >= 0.1 * 2**30 else f'{size / 2**20:.1f} MiB'


def short_count(number: float) -> str:
    """'244 T' of 2.44e14."""
    power = min(max(int(math.log10(max(number, 1)) // 3), 0), 6)
    return f'{number / 1000**power:.3g} {" kMGTPE"[power]}'.rstrip()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:     # loaded from TPU_LIBRARY_PATH
        return 'of unknown version'
