"""Completes a recipe from its teacher and its data, whose configs hold every size: a student is of the same
family, width and depth, latent space, condition and noise levels.

`complete` fills the fields that a recipe leaves open (None; `lit_jax.recipes.students`), expands the short
forms of `model.stages` with the teacher's mixer, and reports at once all that disagrees."""
import inspect
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field

from ml_collections import ConfigDict

from lit_jax.checkpoint.load import read_weights_config
from lit_jax.data.latent_space import LatentSpace
from lit_jax.diffusion.kinds import deciding, read_diffusion
from lit_jax.diffusion.settings import CLASSES, PROMPTS
from lit_jax.models.arch import check_arch, conditioning, mixers_of
from lit_jax.models.mixers import import_mixer
from lit_jax.recipes.hybrids import expand_stages, is_short
from lit_jax.recipes.recipe import TEXT_TRAINING, default
from lit_jax.runtime.errors import UserError, listed, shown
from lit_jax.runtime.paths import as_path

WIDE = 1024      # from this width on, the weights are sharded over `fsdp`
CLASS_LATENTS, TEXT_LATENTS = 'latents', 'caption_latents'      # as data.name
_OWN_SIZE = ('depth', 'width', 'patch', 'mlp_ratio', 'cross_heads')     # only to inherit


@dataclass
class _Facts:
    """What the fields of a recipe must be ('model.depth': 2), and what they are without a word (`usual`)."""
    must: dict = field(default_factory=dict)
    usual: dict = field(default_factory=dict)


def complete(config: ConfigDict) -> ConfigDict:
    """The recipe without open fields and short forms; itself where there are none. Reads configs only, each
    process for itself.

    Raises:
        UserError: no teacher for open fields; everything in which recipe, teacher and data disagree."""
    opened = _open_fields(config)
    hybrid = is_short(config.model.get('stages', ()))
    path = config.teacher.path or config.inherit.path
    if not opened and not (hybrid and path and as_path(path).exists()):
        return config
    if not path:
        raise UserError(f'this is the recipe of a student of your teacher, and takes {", ".join(opened[:4])} '
                        f'... from it: give --config.teacher.path=FOLDER, a model folder (python '
                        f'convert_torch_ckpt.py CHECKPOINT --out FOLDER) or a workdir of train.py')
    config = config.copy_and_resolve_references()
    config.unlock()
    teacher = read_weights_config(path)
    arch = check_arch(teacher['model'])
    if opened:
        if config.inherit.path is None:
            config.inherit.path = path
        _fill(config, teacher, arch, path)
    if hybrid:
        config.model.stages = expand_stages(config.model.stages, config.model.depth, _kept_mixer(arch, path))
    return config.lock()


def _open_fields(config: ConfigDict) -> list[str]:
    """Paths of the fields that are None, without the options of the mixer, some of which are None."""
    found = []
    for name, value in config.items():
        if isinstance(value, ConfigDict) and name != 'mixer':
            found += [f'{name}.{inner}' for inner in _open_fields(value)]
        elif value is None:
            found.append(name)
    return found


def _fill(config: ConfigDict, teacher: Mapping, arch: Mapping, path: str) -> None:
    """Fills open fields. UserError with everything that disagrees."""
    facts = _facts_of_teacher(config, teacher, arch, path)
    pixels = facts.must['latent.space'] == 'pixels'
    unnamed = pixels and config.data.name is None and not _is_prepared(config.data.path)
    data = None if unnamed else _read_data(config, arch)
    problems = _family_problems(config, arch, path)
    if unnamed:
        problems.append(f'data.name: the teacher {path} draws pixels, so there are no latents to read: '
                        f'--config.data.name=folder --config.data.path=FOLDER, or a set that it draws: '
                        f'{_draw_command(path)}')
    for name, value in (facts.must | facts.usual).items():
        section, _, last = name.rpartition('.')
        own = _get(config, section).get(last)
        if own is None:
            if value is not None:
                _set(_get(config, section), last, value)
        elif name in facts.must and value is not None and not _same(own, value):
            size = name.removeprefix('model.') in _OWN_SIZE and config.inherit.path
            if size or not name.startswith('model.') or name == 'model.learn_sigma':
                problems.append(f'{name} is {shown(own)}, the teacher {path} has {shown(value)}: '
                                f'--config.{name}={_flag(value)}, or leave it out')
    if data is not None:
        problems += _data_problems(config, teacher, arch, path, data)
    _fill_mixer(config, arch)
    if problems:
        raise UserError(f'the student, its teacher and its data disagree:{listed(problems)}')
    for name in _open_fields(config):
        section, _, last = name.rpartition('.')
        if section == 'model':                # a field that the family of the teacher does not have
            del config.model[last]
        else:
            _set(_get(config, section), last, _get(default(), section)[last])


def _facts_of_teacher(config: ConfigDict, teacher: Mapping, arch: Mapping, path: str) -> _Facts:
    space, text = LatentSpace.of_model(teacher), conditioning(arch) == 'text'
    downscale = space.downscale or (1 if space.space == 'pixels' else default().latent.downscale)
    rows, columns = arch['input_size']
    if rows != columns:
        raise UserError(f'the teacher {path} draws {rows}x{columns}: recipes train on squares')
    side = config.data.image_size or rows * downscale
    must = {f'model.{name}': arch.get(name) for name in
            ('depth', 'width', 'patch', 'mlp_ratio', 'learn_sigma', 'cross_heads', 'norm', 'shift')}
    must |= {'latent.space': space.space, 'latent.vae': space.vae or '', 'latent.scale': space.scale,
             'latent.downscale': downscale, 'latent.channels': arch['channels'],
             'data.image_size': rows * downscale,
             **{f'diffusion.{name}': value for name, value in deciding(teacher['diffusion']).items()}}
    sampler, told = (PROMPTS if text else CLASSES).of_kind(teacher), teacher.get('sampling') or {}
    usual = {'model.family': arch['family'], 'model.ffn': arch['ffn'],
             'mesh.fsdp': -1 if arch['width'] >= WIDE else 1,
             'eval.method': CLASSES.of_kind(teacher).method,
             **{f'diffusion.{name}': value
                for name, value in read_diffusion(teacher['diffusion']).to_json().items()},
             **{f'sample.{name}': told.get(name, getattr(sampler, name))
                for name in ('method', 'steps', 'cfg_scale')}}
    if text:
        captions = teacher.get('text') or {}
        must |= {'text.encoder': captions.get('encoder'), 'text.channels': arch['caption_channels'],
                 'text.tokens': arch['caption_tokens']}
        # The same coordinates at the ends of the grid, whatever the base is called.
        base = side // (downscale * arch['patch'])
        usual |= {'model.pe_interpolation': arch['pe_interpolation'] * base / arch['base_size'],
                  'data.name': TEXT_LATENTS, 'data.flip': False, **TEXT_TRAINING}
    else:
        must['data.num_classes'] = arch['num_classes']
        usual['data.name'] = CLASS_LATENTS
    if isinstance(recipe := teacher.get('recipe'), Mapping) and isinstance(recipe.get('data'), Mapping):
        usual['data.flip'] = recipe['data'].get('flip')
    return _Facts(must, usual)


def _family_problems(config: ConfigDict, arch: Mapping, path: str) -> list[str]:
    own = config.model.family
    if own is None or conditioning({'family': own}) == conditioning(arch):
        return []
    return [f'model.family {own} is no student of the teacher {path} ({arch["family"]}), which draws from '
            f'{"captions" if conditioning(arch) == "text" else "classes"}: take a row with its blocks, such '
            f'as configs/student.py:linear']


def _read_data(config: ConfigDict, arch: Mapping) -> Mapping | None:
    """metadata.json of cached latents; None for other data."""
    kind = config.data.name or (TEXT_LATENTS if conditioning(arch) == 'text' else CLASS_LATENTS)
    if kind not in (TEXT_LATENTS, CLASS_LATENTS) or not config.data.path:
        return None
    from lit_jax.data.latents import read_metadata
    return read_metadata(config.data.path, kind)


def _is_prepared(path: str) -> bool:
    """Whether cached latents (or pixels that a teacher drew) lie there, finished or not."""
    if not path:
        return False
    from lit_jax.data.latents import METADATA, PREPARATION
    return any((as_path(path) / name).is_file() for name in (METADATA, PREPARATION))


def _data_problems(config: ConfigDict, teacher: Mapping, arch: Mapping, path: str,
                   data: Mapping) -> list[str]:
    """Lines on what cached latents have and the teacher has not, each with what mends it."""
    where, ours, theirs = config.data.path, LatentSpace.of_latents(data), LatentSpace.of_model(teacher)
    if ours.space != theirs.space:
        return [f'latent.space: {ours.space} in {where}, {theirs.space} in the teacher {path}: give '
                f'--config.data.path a set of its space, such as one that it draws: {_draw_command(path)}']
    redraw = _draw_command(path) if 'teacher' in data else ''
    problems, told = [], []
    for name, flag in (('vae', 'vae'), ('scale', 'latent_scale'), ('downscale', 'downscale')):
        mine, other = getattr(ours, name), getattr(theirs, name)
        if None not in (mine, other) and not _same(mine, other):
            problems.append(f'latent.{name}: {shown(mine)} in the latents {where}, {shown(other)} in the '
                            f'teacher {path}')
            told.append(f'--{flag} {shlex.quote(_flag(mine))}')
    if problems:
        source = (teacher.get('provenance') or {}).get('source') or 'CHECKPOINT'
        problems[-1] += f': {redraw}' if redraw else (
            f'. If the teacher was trained on these latents, say so when it is converted: '
            f'python convert_torch_ckpt.py {shlex.quote(str(source))} '
            f'--out {shlex.quote(str(path))} --overwrite {" ".join(told)}; if not, make latents '
            f'with its VAE: python prepare_latents.py --vae=FOLDER')
    size = arch['input_size'][0] * (theirs.downscale or ours.downscale)
    same_sides = theirs.downscale in (None, ours.downscale)
    if data['latent_size'] != arch['input_size'][0] and same_sides:
        problems.append(f'data.image_size: {data["image_size"]} in the latents {where}, {size} in the '
                        f'teacher {path}: {redraw or f"python prepare_latents.py --image_size={size}"}')
    if ours.channels != arch['channels']:
        problems.append(f'latent.channels: {ours.channels} in the latents {where}, {arch["channels"]} in the '
                        f'teacher {path}: '
                        f'{redraw or "make latents with its VAE: python prepare_latents.py --vae=FOLDER"}')
    counted = conditioning(arch) == 'label' and not config.data.classes
    if counted and len(data['classes']) != arch['num_classes']:
        problems.append(f'data.num_classes: {len(data["classes"])} in the latents {where}, '
                        f'{arch["num_classes"]} in the teacher {path}: give the latents of its classes '
                        f'(--config.data.path), or choose some: --config.data.classes=FILE')
    text = data.get('text') or {}
    for name, own in (('encoder', 'text.encoder'), ('width', 'text.channels'), ('tokens', 'text.tokens')):
        have, want = text.get(name), config.text.get(own.removeprefix('text.'))
        if None not in (have, want) and have != want:
            option = f'--caption_tokens={want}' if name == 'tokens' else '--text_encoder=FOLDER'
            problems.append(f'{own}: {shown(have)} in the latents {where}, {shown(want)} in the teacher '
                            f'{path}: {redraw or f"python prepare_latents.py {option}"}')
    return problems


def _draw_command(path: str) -> str:
    return f'python prepare_latents.py --teacher={shlex.quote(path)} --count=NUMBER --out=FOLDER'


def _fill_mixer(config: ConfigDict, arch: Mapping) -> None:
    """Options that the recipe leaves open: what the mixer suggests for this teacher, else its default."""
    mixer = config.model.mixer
    kind = import_mixer(mixer.name)
    suggested, options = kind.suggest(arch), kind.options()
    for name in [name for name in mixer if mixer[name] is None]:
        value = suggested.get(name)
        if value is None and name in options and options[name].default is not inspect.Parameter.empty:
            value = options[name].default
        if value is None and (name not in options or options[name].default is inspect.Parameter.empty):
            raise UserError(f'the mixer {shown(mixer.name)} needs {name}: --config.model.mixer.{name}=VALUE')
        _set(mixer, name, value)


def _kept_mixer(arch: Mapping, path: str) -> dict:
    """The mixer of the blocks that short forms keep."""
    mixers = mixers_of(arch)
    if any(mixer != mixers[0] for mixer in mixers):
        raise UserError(f'the blocks of the teacher {path} have different mixers; give model.stages as runs '
                        f'of blocks, such as ({{"depth": 2}}, {{"depth": 1, "mixer": {{...}}}})')
    return dict(mixers[0])


def _get(config: ConfigDict, section: str):
    for part in section.split('.') if section else ():
        config = config[part]
    return config


def _set(section: ConfigDict, name: str, value) -> None:
    """Sets a field that may hold None, whose type then is not checked."""
    if name in section:
        del section[name]
    section[name] = value


def _same(a, b) -> bool:
    if all(isinstance(value, int | float) for value in (a, b)):
        return abs(a - b) <= 1e-6 * max(abs(a), abs(b))
    return a == b


def _flag(value) -> str:
    return f'{value:g}' if isinstance(value, float) else str(value)
