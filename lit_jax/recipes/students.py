"""The recipe of `configs/student.py`: a student of any teacher. What it takes from the teacher and the data
stays open (None) until `lit_jax.training.from_teacher.complete` reads them; a flag that fills it wins."""
import inspect
import re

from ml_collections import ConfigDict, config_dict

from lit_jax.diffusion.kinds import default_section
from lit_jax.models.mixers import MIXERS, import_mixer
from lit_jax.recipes.recipe import default
from lit_jax.runtime.errors import UserError, shown

# Systems of the papers as students: fields of config.model beside those of the teacher.
PRESETS = {
    'lit': {'mixer': 'linear'}, 'dydi_lit': {'mixer': 'dydila', 'ffn': 'mix'},
    'sana_dit': {'mixer': 'sana', 'ffn': 'mix'}, 'moh_dit': {'mixer': 'moh'},
    'dig': {'mixer': 'gla', 'family': 'dig', 'ffn': 'swiglu', 'order': 'official', 'local': 'identity',
            'skip': 'none'}}
_HYBRID = re.compile(r'(?:(.+)_)?(every|first|last)_([0-9]+)')
# Fields that the teacher or the data fill, and their types.
OPEN: dict[str, dict[str, type]] = {
    'model': {'family': str, 'depth': int, 'width': int, 'patch': int, 'mlp_ratio': float,
              'learn_sigma': bool, 'ffn': str, 'norm': str, 'shift': bool, 'cross_heads': int,
              'pe_interpolation': float},
    'latent': {'space': str, 'vae': str, 'downscale': int, 'channels': int, 'scale': float},
    'data': {'name': str, 'image_size': int, 'num_classes': int, 'flip': bool},
    'text': {'encoder': str, 'channels': int, 'tokens': int},
    'diffusion': {name: type(value) for name, value in default_section().items()},
    'teacher': {'lambda_noise': float, 'lambda_variance': float},
    'inherit': {'path': str},
    'train': {'optimizer': str, 'learning_rate': float, 'warmup_steps': int, 'clip_norm': float,
              'batch_size': int, 'remat': str},
    'mesh': {'fsdp': int},
    'eval': {'method': str},
    'sample': {'method': str, 'steps': int, 'cfg_scale': float, 'count': int},
}


def student(row: str = 'linear') -> ConfigDict:
    """The recipe of a student: `row` is a mixer (linear, dydila, ..., package.module:Class), a preset of
    PRESETS, or one of them with some blocks of its teacher: linear_every_4, last_2 (linear)."""
    config = default()
    base, stages = _parse_row(row)
    preset = PRESETS.get(base, {'mixer': base})
    config.unlock()
    config.name = 'student_' + re.sub(r'\W', '_', row)
    for section, fields in OPEN.items():
        for name, kind in fields.items():
            _put(config[section], name, config_dict.placeholder(kind))
    mixer = preset['mixer']
    config.model.mixer = ConfigDict({'name': mixer, **_open_options(mixer)})
    config.model.stages = stages
    for name, value in preset.items():
        if name != 'mixer':
            _put(config.model, name, value)
    if 'order' in preset:
        del config.model.stages
    return config.lock()


def fast(config: ConfigDict, row: str, *, align_steps: int, steps: int) -> ConfigDict:
    """A recipe of a student with a teacher in few steps: `align_steps` of alignment, then `steps` of training
    with a rate that falls to 0 over their last three quarters.

    row: '', or the blocks that keep the teacher's mixer: every_4, first_2, last_2."""
    config.align.steps, config.train.steps, config.train.cooldown_steps = align_steps, steps, 3 * steps // 4
    if row:
        form = _HYBRID.fullmatch(row)
        if not form or form[1]:
            raise UserError(f'{config.name}:{row} is no row; a row says which blocks keep the attention of '
                            f'the teacher: every_4, first_2, last_2')
        config.model.stages = (f'{form[2]}:{int(form[3])}',)
        config.name += f'_{row}'
    return config


def _put(section: ConfigDict, name: str, value) -> None:
    """Sets a field whose type may change."""
    if name in section:
        del section[name]
    section[name] = value


def _parse_row(row: str) -> tuple[str, tuple]:
    """('linear', ('every:4',)) of 'linear_every_4' or 'every_4'."""
    hybrid = _HYBRID.fullmatch(row)
    base, stages = (hybrid[1] or 'linear', (f'{hybrid[2]}:{int(hybrid[3])}',)) if hybrid else (row, ())
    if base not in PRESETS:
        try:
            import_mixer(base)
        except UserError as error:
            if ':' in base:
                raise
            raise UserError(f'configs/student.py has no row {shown(row)}; a row is a mixer '
                            f'({", ".join(MIXERS)}, or package.module:Class), a preset '
                            f'({", ".join(PRESETS)}), or one of them that keeps blocks of the teacher: '
                            f'linear_every_4, dydila_last_2, every_4') from error
    if stages and 'order' in PRESETS.get(base, {}):
        raise UserError(f'configs/student.py:{row}: the blocks of {base} are not those of its teacher, so it '
                        f'cannot keep some; give a mixer, such as linear_{stages[0].replace(":", "_")}')
    return base, stages


def _open_options(name: str) -> dict:
    """All options of a mixer: those that a teacher decides (`Mixer.suggest`) or that have no default are
    open."""
    kind = import_mixer(name)
    sample = {'width': 256, 'input_size': (16, 16), 'patch': 2, 'mixer': {'name': '', 'heads': 4}}
    decided = {**kind.suggest(sample), **kind.suggest(sample | {'mixer': {'name': name, 'heads': 4}})}
    return {option: config_dict.placeholder(_type_of(argument.default, decided.get(option)))
            if argument.default is inspect.Parameter.empty or option in decided else
            config_dict.placeholder(object) if argument.default is None else argument.default
            for option, argument in kind.options().items()}


def _type_of(*values) -> type:
    return next((type(value) for value in values if value not in (None, inspect.Parameter.empty)), int)
