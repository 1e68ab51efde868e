"""A student's recipe takes everything from its teacher and its latents, and tells at once what disagrees."""
import json

import pytest
from caption_latent_sets import write_caption_latents
from latent_sets import write_latents
from tiny import PIXART

from lit_jax import recipes
from lit_jax.diffusion.kinds import default_section
from lit_jax.models.arch import mixers_of
from lit_jax.models.mixers import whole_mixer
from lit_jax.recipes.recipe import architecture
from lit_jax.recipes.students import PRESETS
from lit_jax.runtime.errors import UserError
from lit_jax.training.from_teacher import complete

SOFTMAX = {'name': 'softmax', 'heads': 4, 'qkv_bias': True}
DIT = {'family': 'dit', 'depth': 4, 'width': 32, 'patch': 2, 'input_size': [8, 8], 'channels': 3,
       'num_classes': 5, 'mlp_ratio': 3.0, 'learn_sigma': True, 'mixer': SOFTMAX, 'ffn': 'mlp', 'stages': []}
SPACE = {'space': 'vae', 'vae': 'made-up', 'scale': 0.5, 'downscale': 2}
SAMPLING = {'method': 'ddim', 'steps': 20, 'cfg_scale': 1.5}


def write_teacher(path, model=None, latent=SPACE, **more):
    """The config of a model folder; nothing here reads weights."""
    (path / 'arrays').mkdir(parents=True)
    content = {'format': 1, 'model': model or DIT, 'diffusion': {'steps': 800, 'kind': 'linear'},
               'latent': latent, 'classes': None, 'provenance': {'source': 'mine.pt'}, **more}
    (path / 'config.json').write_text(json.dumps(content))
    return path


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp('mine')
    write_teacher(root / 'teacher', sampling=SAMPLING)
    write_teacher(root / 'sit', diffusion=SIT)
    captions = {'encoder': 'made-up t5', 'channels': 6, 'tokens': 10}
    pixart = {**PIXART, 'input_size': [4, 4], 'channels': 3, 'caption_channels': 6, 'caption_tokens': 10,
              'base_size': 2, 'pe_interpolation': 0.125, 'mixer': SOFTMAX}
    write_teacher(root / 'pixart', pixart, text=captions)
    write_latents(root / 'latents', size=8)
    write_caption_latents(root / 'captions', shapes=((8, 8),))
    return root


SIT = {'kind': 'flow', 'path': 'gvp', 'prediction': 'velocity', 'noise_at': 1, 'times': 'log_normal'}


def make(folders, row='linear', teacher='teacher', data='latents', **fields):
    config = recipes.load_recipe(f'student:{row}')
    config.teacher.path, config.data.path = str(folders / teacher), str(folders / data)
    config.update_from_flattened_dict({name.replace('__', '.'): value for name, value in fields.items()})
    return complete(config)


def test_a_class_student_takes_all_from_teacher_and_latents(folders):
    config = make(folders)
    arch = architecture(config)
    assert {name: arch[name] for name in DIT if name not in ('mixer', 'input_size', 'stages')} == {
        name: DIT[name] for name in DIT if name not in ('mixer', 'input_size', 'stages')}
    assert arch['input_size'] == (8, 8) and arch['mixer'] == {
        **recipes.linear_mixer(2).to_dict(), 'dwc_kernel': 3, 'focus_scale': False, 'key_grid': None,
        'rope': False}
    assert (config.data.name, config.data.image_size, config.data.num_classes) == ('latents', 16, 5)
    assert config.latent.to_dict() == {**SPACE, 'channels': 3, 'vae_path': config.latent.vae_path}
    assert config.diffusion.to_dict() == {**default_section(), 'steps': 800}
    assert {name: config.sample[name] for name in SAMPLING} == SAMPLING
    assert config.inherit.path == config.teacher.path == str(folders / 'teacher')
    assert config.train.to_dict() == recipes.default().train.to_dict()
    assert recipes.finalize(config, 1).is_locked and complete(config) is config


def test_a_student_of_a_flow_is_one(folders):
    """Training of the flow and its samplers come from the teacher; what decides a sample must agree."""
    config = make(folders, teacher='sit')
    assert config.diffusion.to_dict() == {**default_section(), **SIT}
    assert (config.sample.method, config.eval.method) == ('euler', 'euler')
    recipes.finalize(config, 1)
    assert make(folders, teacher='sit', diffusion__times='uniform').diffusion.times == 'uniform'
    with pytest.raises(UserError, match=r"diffusion\.noise_at is 0, the teacher .*sit has 1.*noise_at=1"):
        make(folders, teacher='sit', diffusion__noise_at=0)
    with pytest.raises(UserError, match="diffusion.kind is 'flow', the teacher .* has 'ddpm'"):
        make(folders, diffusion__kind='flow')


def test_a_text_student_takes_all_from_teacher_and_latents(folders):
    config = make(folders, teacher='pixart', data='captions')
    arch = architecture(config)
    assert (arch['family'], arch['cross_heads'], arch['pe_interpolation'], arch['base_size']) == (
        'pixart', 4, 0.125, 2)
    assert (config.data.name, config.data.image_size, config.data.flip) == ('caption_latents', 8, False)
    assert (config.text.encoder, config.text.channels, config.text.tokens) == ('made-up t5', 6, 10)
    assert (config.sample.method, config.sample.cfg_scale) == ('dpm++', 4.5)
    text_to_image = recipes.load_recipe('lit_t2i_512')
    text_to_image.train.steps = config.train.steps       # a recipe's own
    assert config.train.to_dict() == text_to_image.train.to_dict()
    recipes.finalize(config, 1)


ROWS = ('linear', 'softmax', 'dydila', 'sana', 'edit', 'moh', 'gla', *PRESETS)


@pytest.mark.parametrize('row', ROWS)
def test_every_row_is_a_whole_recipe(folders, row):
    fields = {'model__mixer__groups': 1} if row == 'edit' else {}
    config = recipes.finalize(make(folders, row, **fields), 1)
    arch = architecture(config)
    assert config.name == f'student_{row}' and arch['depth'] == 4
    assert arch['mixer']['name'] == PRESETS.get(row, {'mixer': row})['mixer']
    if row == 'softmax':
        assert arch['mixer'] == whole_mixer(SOFTMAX)


@pytest.mark.parametrize('row, kept', [('every_4', [3]), ('linear_every_2', [1, 3]), ('dydila_last_1', [3]),
                                       ('first_2', [0, 1])])
def test_hybrids_keep_the_mixer_of_the_teacher(folders, row, kept):
    config = make(folders, row)
    blocks = [mixer for stage, mixer in zip(config.model.stages, mixers_of(architecture(config)), strict=True)
              for _ in range(stage['depth'])]
    assert [block for block, mixer in enumerate(blocks) if mixer == SOFTMAX] == kept
    assert {blocks[i]['name'] for i in range(4) if i not in kept} == {config.model.mixer.name}


def test_flags_win_where_they_may(folders):
    config = make(folders, model__mixer__heads=4, sample__cfg_scale=3.0, train__steps=7, inherit__path='')
    assert (config.model.mixer.heads, config.sample.cfg_scale, config.train.steps) == (4, 3.0, 7)
    assert config.inherit.path == ''
    assert make(folders, model__depth=2, inherit__path='').model.depth == 2     # distilled, not inherited


def test_a_recipe_of_ones_own_takes_the_short_forms_too(folders):
    config = recipes.default()
    config.model.update({'depth': 4, 'width': 32, 'stages': (0, 'last:1')})
    config.model.mixer = recipes.linear_mixer(2)
    assert [mixer['name'] for mixer in mixers_of(architecture(config))] == ['softmax', 'linear', 'softmax']
    config.teacher.path = str(folders / 'teacher')
    assert complete(config).model.stages == ({'depth': 1, 'mixer': SOFTMAX}, {'depth': 2},
                                             {'depth': 1, 'mixer': SOFTMAX})


def test_everything_that_disagrees_is_told_at_once(folders):
    with pytest.raises(UserError) as said:
        make(folders, model__depth=3, data__num_classes=10, latent__scale=0.2, diffusion__steps=1000)
    lines = str(said.value).splitlines()
    assert len(lines) == 5
    for field, given, value in (('model.depth', '3', '4'), ('data.num_classes', '10', '5'),
                                ('latent.scale', '0.2', '0.5'), ('diffusion.steps', '1000', '800')):
        line = next(line for line in lines if line.strip().startswith(field))
        assert f'is {given}, the teacher' in line and f'--config.{field}={value}, or leave it out' in line


def test_latents_of_another_kind_are_told_with_what_mends_them(folders, tmp_path):
    other = {'space': 'vae', 'vae': 'stabilityai/sd-vae-ft-ema', 'scale': 0.18215, 'downscale': 8}
    write_teacher(tmp_path / 'teacher', {**DIT, 'channels': 4, 'num_classes': 3}, other)
    with pytest.raises(UserError) as said:
        make(folders, teacher=tmp_path / 'teacher')
    text = str(said.value)
    assert len(text.splitlines()) == 6
    assert (f"convert_torch_ckpt.py mine.pt --out {tmp_path / 'teacher'} --overwrite --vae made-up "
            f"--latent_scale 0.5 --downscale 2") in text
    assert 'latent.channels: 3 in the latents' in text and 'data.num_classes: 5 in the latents' in text
    write_teacher(tmp_path / 'small', {**DIT, 'input_size': [4, 4]})
    with pytest.raises(UserError, match='prepare_latents.py --image_size=8'):
        make(folders, teacher=tmp_path / 'small')


@pytest.mark.parametrize('row, says', [
    ('cubic', 'has no row .cubic.; a row is a mixer .*linear.*preset .lit'), ('dig_every_2', 'cannot keep'),
    ('no_such:Mixer', 'cannot be imported'), ('every_0', 'is no short form'), ('every_9', 'keeps nothing')])
def test_rows_that_are_none(folders, row, says):
    with pytest.raises(UserError, match=says):
        make(folders, row)


def test_what_is_missing_is_told(folders, tmp_path):
    with pytest.raises(UserError, match=r'give --config\.teacher\.path=FOLDER'):
        complete(recipes.load_recipe('student'))
    with pytest.raises(UserError, match=r'give --config\.teacher\.path=FOLDER'):
        recipes.finalize(recipes.load_recipe('student'), 1)
    with pytest.raises(UserError, match='no student of the teacher .*pixart.*captions'):
        make(folders, 'dig', teacher='pixart', data='captions')
    pixels = {'space': 'pixels', 'vae': None, 'scale': 2.0}
    write_teacher(tmp_path / 'pixels', {**DIT, 'channels': 1}, pixels)
    with pytest.raises(UserError, match='draws pixels.*--config.data.name=folder'):
        make(folders, teacher=tmp_path / 'pixels', data='')
    config = make(folders, teacher=tmp_path / 'pixels', data__name='digits')
    assert (config.data.image_size, config.latent.space, config.latent.vae) == (8, 'pixels', '')


DRAWN = {'exact': True, 'format': 2, 'crop': 'none', 'teacher': {'name': 'mine', 'sha256': 'ab' * 32}}


def test_a_set_that_the_teacher_drew_needs_no_name_also_of_pixels(folders, tmp_path):
    write_teacher(tmp_path / 'pixels', {**DIT, 'channels': 1}, {'space': 'pixels', 'vae': None, 'scale': 2.0})
    space = {'space': 'pixels', 'size': 8, 'channels': 1, 'downscale': 1, 'scale': 2.0}
    write_latents(tmp_path / 'drawn', **DRAWN, **space)
    config = make(folders, teacher=tmp_path / 'pixels', data=tmp_path / 'drawn')
    assert (config.data.name, config.data.image_size, config.latent.space) == ('latents', 8, 'pixels')
    recipes.finalize(config, 1)
    with pytest.raises(UserError, match=r'latent.space: pixels in .*drawn, vae in the teacher .*--teacher='):
        make(folders, data=tmp_path / 'drawn')
    with pytest.raises(UserError, match=r'latent.space: vae in .*latents, pixels in the teacher .*pixels'):
        make(folders, teacher=tmp_path / 'pixels')


def test_a_drawn_set_of_other_latents_is_mended_by_drawing(folders, tmp_path):
    write_latents(tmp_path / 'drawn', **DRAWN, scale=0.25, classes=3)
    with pytest.raises(UserError) as said:
        make(folders, data=tmp_path / 'drawn')
    text = str(said.value)
    for line in ('latent.scale: 0.25 in the latents', 'data.image_size: 8 in', 'data.num_classes: 3 in'):
        assert line in text
    assert 'convert_torch_ckpt' not in text and '--image_size' not in text
    assert f"--teacher={folders / 'teacher'} --count=NUMBER --out=FOLDER" in text
