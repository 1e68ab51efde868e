"""Images from prompts: what they depend on, what memory is held, what is written where, and what is
refused."""
import json
import logging
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from processes import assert_all_good, run_processes
from sampling_models import save_model, save_vae
from text_models import save_system, save_text_model, save_words_encoder

import lit_jax
from lit_jax.checkpoint.load import load
from lit_jax.diffusion.settings import PROMPTS as DEFAULTS
from lit_jax.evaluation.sets import open_set
from lit_jax.runtime import memory
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.leaves import tree_bytes
from lit_jax.sampling import draw as drawing
from lit_jax.sampling.draw import draw
from lit_jax.sampling.pipelines import TextPipeline, hold_narrow, open_pipeline
from lit_jax.sampling.request import SampleRequest

ROOT = Path(__file__).parents[2]
PROMPTS = ['a red circle', 'two blue squares', '']
TWICE = [prompt for prompt in PROMPTS for _ in range(2)]
FAST = {'steps': 2, 'method': 'ddim'}
QUICK = replace(DEFAULTS, **FAST)


@pytest.fixture(scope='module')
def system(tmp_path_factory):
    return save_system(tmp_path_factory.mktemp('system'))


@pytest.fixture(scope='module')
def pixels(tmp_path_factory):
    return save_system(tmp_path_factory.mktemp('pixels'), space='pixels')


@pytest.fixture(scope='module')
def pipeline(system):
    return TextPipeline(**system)


@pytest.fixture(scope='module')
def drawn(pipeline):
    """Each prompt with two seeds, [6, 8, 8, 4]."""
    return draw_from(pipeline, TWICE, [0, 1] * 3)


def draw_from(pipeline, prompts, seeds, negative='', settings=QUICK, **options):
    return pipeline.draw(pipeline.encode(prompts, seeds, negative), settings, **options)


def read(path):
    return np.asarray(Image.open(path))


# ------------------------------------------------------------------------------------------------------
# The class


def test_an_image_is_the_same_alone_and_in_company(pipeline, drawn):
    alone = draw_from(pipeline, ['two blue squares'], 1)
    assert np.array_equal(alone[0], drawn[3])
    many = draw_from(pipeline, ['two blue squares'] * 19, range(19))      # more than two groups of 8
    assert np.array_equal(many[1], drawn[3]) and len(np.unique(many[:, 0, 0, 0])) == 19


def test_prompt_seed_and_negative_prompt_each_change_the_image(pipeline, drawn):
    assert len({image.tobytes() for image in drawn}) == 6
    negative = draw_from(pipeline, ['two blue squares'], 1, negative='a red circle')
    assert not np.array_equal(negative[0], drawn[3])
    # Led away from what it is led to: no guidance at all, whatever its scale.
    same = pipeline.encode(['two blue squares'], 1, negative='two blue squares')
    assert np.allclose(*(pipeline.draw(same, replace(QUICK, cfg_scale=scale)) for scale in (9.0, 1.0)),
                       atol=1e-5)


def test_one_network_at_a_time_draws_the_same_bits(system, drawn, pipeline):
    small = TextPipeline(**system, low_memory=True)
    found = draw_from(small, TWICE, [0, 1] * 3)
    assert small._encoder is None and small._params is None and np.array_equal(found, drawn)
    assert np.array_equal(small.decode(found), pipeline.decode(drawn)) and small.vae.params is None


@pytest.mark.slow
def test_weights_that_were_given_up_are_gone_and_are_read_again(system, drawn, pipeline):
    small = TextPipeline(**system, low_memory=True)
    for _ in range(2):
        small.load('model')
        leaves = jax.tree.leaves(small._params)
        assert np.array_equal(draw_from(small, [PROMPTS[1]], 1)[0], drawn[3])
        assert all(leaf.is_deleted() for leaf in leaves)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(pipeline._params))


def test_compiled_programs_are_used_again(pipeline, caplog):
    draw_from(pipeline, PROMPTS[:1], 0)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        draw_from(pipeline, PROMPTS[1:], [5, 6])
        pipeline.decode(np.zeros((2, 8, 8, 4), np.float32))
        caplog.clear()
        draw_from(pipeline, PROMPTS[1:2], 7)
        pipeline.decode(np.zeros((1, 8, 8, 4), np.float32))
    assert not [line for line in caplog.messages if 'Compiling jit(draw)' in line
                or 'Compiling jit(decode)' in line]


def test_progress_counts_evaluations(pipeline):
    seen = []
    draw_from(pipeline, PROMPTS[:1] * 9, range(9), on_step=lambda done, total: seen.append((done, total)))
    total = 2 * 2                              # two groups of two steps
    assert seen == [(done, total) for done in range(1, total + 1)]


def test_other_sizes_than_the_models_own(pipeline):
    assert pipeline.nominal_size == (16, 16)
    latents = draw_from(pipeline, PROMPTS[:1], 0, size=(24, 32))
    assert latents.shape == (1, 12, 16, 4) and pipeline.decode(latents).shape == (1, 24, 32, 3)
    with pytest.raises(UserError, match='multiples of 4 .*nearest size is 32x24'):
        draw_from(pipeline, PROMPTS[:1], 0, size=(25, 32))


def test_large_images_are_decoded_in_tiles(pipeline, monkeypatch):
    asked = []
    decode = pipeline._decode
    monkeypatch.setattr(pipeline, '_decode', lambda params, z, tile: asked.append(tile)
                        or decode(params, z, tile=tile))
    latents = draw_from(pipeline, PROMPTS[:1], 0, size=(32, 32))
    whole, tiled = pipeline.decode(latents), pipeline.decode(latents, tile=8)
    assert asked == [None, 8] and whole.shape == tiled.shape and not np.array_equal(whole, tiled)
    assert [pipeline.default_tile(size) for size in ((128, 128), (96, 160))] == [None, 64]


def test_bfloat16_kernels_are_held_narrow_and_draw_nearly_what_wide_ones_draw(system):
    narrow, wide = TextPipeline(**system, dtype='bfloat16'), TextPipeline(**system, dtype='bfloat16')
    wide._params = load(system['source'], dtype='bfloat16').params
    assert narrow.load('model') == narrow.weights()['model'] < 0.6 * tree_bytes(wide._params)
    # Not the same bits: XLA:CPU leaves out a rounding to bfloat16 that is followed by a product in float32.
    small, large = (draw_from(one, PROMPTS[1:2], 3, size=(16, 16)) for one in (narrow, wide))
    assert np.abs(small - large).max() < 0.05 * np.abs(large).max()


def test_casting_gives_up_each_wide_kernel():
    params = {'a': {'kernel': jax.numpy.ones((4, 4)), 'bias': jax.numpy.ones(4)}}
    narrow = hold_narrow(params)
    assert params['a']['kernel'].is_deleted() and narrow['a']['kernel'].dtype == 'bfloat16' and narrow['a'][
        'bias'].dtype == 'float32'


@pytest.mark.slow
def test_the_estimate_compiles_what_is_drawn_with_and_loads_nothing(system, caplog):
    small = TextPipeline(**system, low_memory=True)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        found = small.estimate(QUICK, (16, 16))
        assert [name for name, *_ in found] == ['text_encoder', 'model',
                                                'vae'] and all(extra > 0 for *_, extra in found)
        assert small._params is None and small._encoder is None and small.vae.params is None
        caplog.clear()
        small.decode(draw_from(small, ['a circle'], 0))
    assert not [line for line in caplog.messages if 'Compiling jit(draw)' in line
                or 'Compiling jit(decode)' in line]
    assert dict((name, weights) for name, weights, _ in found) == small.weights()


def test_pixels_need_no_vae(pixels):
    pipeline = TextPipeline(**pixels)
    images = pipeline.decode(draw_from(pipeline, ['a red circle'], 0))
    assert images.shape == (1, 8, 8, 3) and pipeline.nominal_size == (8, 8)


# ------------------------------------------------------------------------------------------------------
# The command


def command(system, **options):
    return draw(SampleRequest(**{**system, **FAST, **options}))


def test_one_image_and_a_sheet(system, tmp_path):
    line = command(system, prompt=['a red circle'], seed=3, out=str(tmp_path / 'one.png'))
    # shown larger: 4 x 16
    assert read(tmp_path / 'one.png').shape == (64, 64, 3) and 'peak memory' in line
    command(system, prompt=['a red circle', 'two blue squares'], seeds='3,4,5',
            out=str(tmp_path / 'sheet.png'))
    sheet = read(tmp_path / 'sheet.png')
    assert sheet.shape[0] == 2 * (64 + 4) + 4 and sheet.shape[1] > 3 * (64 + 4) + 4
    assert np.array_equal(sheet[4:68, -3 * 68:-2 * 68 - 4], read(tmp_path / 'one.png'))


@pytest.mark.slow
def test_a_folder_goes_on_where_it_was_stopped(system, tmp_path, monkeypatch):
    file = tmp_path / 'prompts.txt'
    file.write_text('a red circle\n\ntwo blue squares\n')
    options = {'prompts': str(file), 'seeds': '0,1', 'out': str(tmp_path / 'out')}
    command(system, **options)
    names = ['00000_seed0.png', '00000_seed1.png', '00001_seed0.png', '00001_seed1.png']
    before = {name: (tmp_path / 'out' / name).read_bytes() for name in names}
    assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == sorted(
        [*names, 'card.json', 'prompts.jsonl'])
    lines = [json.loads(line) for line in (tmp_path / 'out/prompts.jsonl').read_text().splitlines()]
    assert [(line['file'], line['prompt'], line['seed'])
            for line in lines][2] == (names[2], 'two blue squares', 0)
    (tmp_path / 'out' / names[1]).unlink()
    (tmp_path / 'out' / names[2]).unlink()
    kept = (tmp_path / 'out' / names[0]).stat().st_mtime_ns
    assert '2 images now' in command(system, **options, low_memory=True)
    assert {name: (tmp_path / 'out' / name).read_bytes() for name in names} == before
    assert (tmp_path / 'out' / names[0]).stat().st_mtime_ns == kept
    monkeypatch.setattr(TextPipeline, 'load', lambda *_: pytest.fail('nothing is left to draw'))
    assert 'whole already' in command(system, **options)
    for other, field in (({'cfg_scale': 2.0}, 'sampler.cfg_scale'),
                         ({'negative_prompt': 'a circle'}, 'pictures.negative_prompt'),
                         ({'prompt': ['more']}, 'pictures.prompts'), ({'size': '24'}, 'pictures.size'),
                         ({'tile': 4}, 'vae.tile')):
        with pytest.raises(UserError, match=f'(?s)another recipe.*{field}'):
            command(system, **{**options, **other})


def test_another_seed_joins_the_folder(pixels, tmp_path):
    for seeds in ('0', '4'):
        command(pixels, prompt=['a circle'], seeds=seeds, out=str(tmp_path / 'out'))
    lines = [json.loads(line) for line in (tmp_path / 'out/prompts.jsonl').read_text().splitlines()]
    assert [line['seed'] for line in lines] == [0, 4]


@pytest.mark.slow
def test_rounds_of_networks_one_at_a_time(system, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(drawing, 'ROUND', 2)
    options = {'prompt': ['a red circle'], 'seeds': '0,1,2', 'group': 1}
    with caplog.at_level(logging.INFO, 'lit_jax'):
        command(system, **options, low_memory=True, out=str(tmp_path / 'rounds'))
    for said in ('memory expected, weights + temporaries: text_encoder', 'text encoder: weights',
                 'backbone: weights', 'decoder: weights'):
        assert caplog.text.count(said) == 1, said
    command(system, **options, out=str(tmp_path / 'whole'))
    for seed in range(3):
        assert np.array_equal(read(tmp_path / f'rounds/00000_seed{seed}.png'),
                              read(tmp_path / f'whole/00000_seed{seed}.png'))


def test_the_prompts_of_geneval(pixels, tmp_path):
    for number, prompt in enumerate(('a red circle', 'two blue squares')):
        (tmp_path / f'{number:05d}').mkdir()
        (tmp_path / f'{number:05d}/metadata.jsonl').write_text(json.dumps(
            {'tag': 'single_object', 'include': [{'class': 'cat', 'count': 1}], 'prompt': prompt}) + '\n')
    assert '8 images now' in command(pixels, geneval=str(tmp_path))
    assert sorted(path.name for path in (tmp_path / '00001/samples').iterdir()) == [
        '0000.png', '0001.png', '0002.png', '0003.png']
    command(pixels, prompt=['two blue squares'], seed=2, out=str(tmp_path / 'one'))
    assert np.array_equal(read(tmp_path / '00001/samples/0002.png'), read(tmp_path / 'one/00000_seed2.png'))
    with pytest.raises(UserError, match='leave --prompt'):
        command(pixels, geneval=str(tmp_path), prompt=['x'])


def test_defaults_are_those_of_pixart(pixels, tmp_path, caplog):
    draw(SampleRequest(**pixels, prompt=('a circle',), out=str(tmp_path / 'out')))
    sampler = json.loads((tmp_path / 'out/card.json').read_text())['sampler']
    assert sampler == {'method': 'dpm++', 'steps': 20, 'eta': 0.0, 'cfg_scale': 4.5, 'cfg_channels': 'all',
                       'cfg_interval': [0.0, 1.0]}


@pytest.fixture(scope='module')
def others(tmp_path_factory):
    folder = tmp_path_factory.mktemp('others')
    return {'wide': str(save_words_encoder(folder / 'wide', width=32)),
            'named': str(save_words_encoder(folder / 'named', id='another t5')),
            'vae': str(save_vae(folder / 'vae', id='another vae')),
            'classes': str(save_model(folder / 'classes'))}


REFUSED = [
    ({'text_encoder': None}, "--text_encoder DIR .id 'tiny words', width 16"),
    ({'text_encoder': 'wide'}, '(?s)does not fit.*width: 32 in .*wide, 16 in'),
    ({'text_encoder': 'named'}, "(?s)does not fit.*id: 'another t5' in .*named, 'tiny words' in"),
    ({'text_encoder': 'vae'}, 'not a text encoder'),
    ({'vae': 'vae'}, "vae: 'another vae'"),
    ({'vae': None, 'out': 'folder'}, 'need the VAE'),
    ({'classes': '1,2'}, '--classes: not for .* draws what a prompt says: give it --prompt'),
    ({'per_class': 2, 'count': 3}, '--per_class, --count: not for'),
    ({'prompt': ()}, 'no prompt is given'),
    ({'size': '15'}, 'nearest size is 16x16'),
    ({'out': 'set.npz'}, 'sets are of classes'),
    ({'out': 'image.jpg'}, '.jpg is not known'),
    ({'method': 'euler'}, 'is for models of flow'),
    ({'group': 0}, '--group must be at least 1'),
    ({'tile': -1}, '--tile not negative'),
    ({'dtype': 'float16'}, 'unknown dtype'),
    ({'text_dtype': 'int4'}, 'of the text encoder'),
    ({'source': 'classes'}, '--text_encoder, --prompt: not for .* draws classes: give it --classes'),
    ({'source': 'nowhere'}, 'does not exist'),
    ({'source': None}, 'one of --from'),
]


@pytest.mark.parametrize('change, message', REFUSED)
def test_what_cannot_be_drawn_is_refused_before_weights_are_read(change, message, system, others, tmp_path,
                                                                 monkeypatch):
    monkeypatch.setattr(TextPipeline, 'load', lambda *_: pytest.fail('weights were read'))
    options = {**system, **FAST, 'prompt': ('a circle',), 'out': 'x.png', **change}
    for name in ('source', 'text_encoder', 'vae'):
        options[name] = others.get(options[name], options[name])
    options['out'] = str(tmp_path / options['out'])
    if options['source'] == others['classes']:
        options = {name: value for name, value in options.items() if name != 'vae'}
    with pytest.raises(UserError, match=message):
        draw(SampleRequest(**{name: value for name, value in options.items() if value is not None}))
    assert not list(tmp_path.iterdir())


def test_files_of_another_kind_are_left_alone(pixels, tmp_path):
    (tmp_path / 'notes.txt').write_text('mine')
    with pytest.raises(UserError, match='notes.txt'):
        command(pixels, prompt=['a circle'], out=str(tmp_path))
    (tmp_path / 'file').write_text('mine')
    with pytest.raises(UserError, match='is a file'):
        command(pixels, prompt=['a circle'], out=str(tmp_path / 'file'))


def test_long_prompts_are_cut_with_a_notice(pixels, tmp_path, caplog):
    command(pixels, prompt=['a red circle and a blue square and a circle', 'a 😀 кот'],
            out=str(tmp_path / 'x.png'))
    assert '1 of 3 captions are longer than 5 tokens' in caplog.text \
        and '2 of 3 tokens of "a 😀 кот" are not in' in caplog.text


# ------------------------------------------------------------------------------------------------------
# Memory


@pytest.mark.parametrize('error',
                         [MemoryError(),
                          jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes')])
def test_out_of_memory_says_what_to_lower(error, pipeline, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(pipeline, '_sampler', fail)
    with pytest.raises(UserError, match='out of memory while drawing.*--low_memory.*int8.*--size'):
        draw_from(pipeline, PROMPTS[:1], 0)


def test_other_errors_pass():
    with pytest.raises(ValueError, match='something else'), memory.explain_out_of_memory('drawing'):
        raise ValueError('something else')


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='read from /proc')
@pytest.mark.parametrize('asks', [True, False])
def test_the_peak_of_each_phase_is_its_own(asks, monkeypatch):
    if not asks:
        monkeypatch.setattr(memory, '_CLEAR', Path('/nonexistent/clear_refs'))
    meter = memory.Meter()
    with meter.phase('large') as phase:
        phase.weights = 5
        held = np.ones(30_000_000)
        time.sleep(0.2)
        del held
    with meter.phase('small'):
        pass
    large, small = meter.phases['large'], meter.phases['small']
    assert large.process - small.process > 200e6 and large.weights == 5 and 'in large' in meter.summary()


# ------------------------------------------------------------------------------------------------------
# The script


def call(*arguments):
    done = subprocess.run([sys.executable, 'sample.py', *arguments], cwd=ROOT, capture_output=True, text=True,
                          timeout=240, env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''})
    return done.returncode, done.stdout, done.stderr


def test_the_script_draws_what_it_is_told(pixels, tmp_path):
    flags = [f'--from={pixels["source"]}', f'--text_encoder={pixels["text_encoder"]}', '--steps=2',
             '--prompt=a red circle', '--prompt=']
    status, out, errors = call(*flags, '--seeds=0,1', '--low_memory', f'--out={tmp_path / "out"}')
    assert (status, 'Traceback' in errors) == (0, False), errors
    assert '4 images now' in out and 'peak memory' in out and 'prompt 1 is empty' in errors \
        and 'memory expected' in errors
    status, _, errors = call(*flags, '--classes=3', f'--out={tmp_path / "x.png"}')
    assert status == 1 and errors.strip().splitlines()[-1].startswith('error: --classes: not for') \
        and 'Traceback' not in errors


@pytest.mark.slow
def test_every_method_draws_finite_images(tmp_path):
    pipeline = TextPipeline(save_text_model(tmp_path / 'm', space='pixels', mixer='softmax'),
                            text_encoder=save_words_encoder(tmp_path / 't5'))
    for method in ('ddpm', 'ddim', 'dpm++', 'dpm++original'):
        settings = replace(DEFAULTS, method=method, steps=10)
        assert np.isfinite(draw_from(pipeline, ['a red circle'], 0, settings=settings)).all()


@pytest.mark.slow
def test_two_processes_deal_the_images_out(pixels, tmp_path):
    """Three images in groups of one, with networks one at a time; and a sheet, which process 0 draws."""
    command(pixels, prompt=['a red circle'], seeds='0,1,2', group=1, out=str(tmp_path / 'one'))
    flags = ['sample.py', f'--from={pixels["source"]}', f'--text_encoder={pixels["text_encoder"]}',
             '--steps=2', '--method=ddim',
             '--prompt=a red circle', '--seeds=0,1,2', '--group=1', '--low_memory',
             '--coordinator={coordinator}', '--num_processes={num_processes}', '--process_id={process_id}']
    results = run_processes([*flags, f'--out={tmp_path / "two"}'], 2, timeout=240)
    assert_all_good(results)
    assert '3 images now' in results[0][1] and 'wrote' not in results[1][1]
    for name in ('00000_seed0.png', '00000_seed1.png', '00000_seed2.png', 'prompts.jsonl'):
        assert (tmp_path / 'two' / name).read_bytes() == (tmp_path / 'one' / name).read_bytes()
    assert_all_good(run_processes([*flags, f'--out={tmp_path / "sheet.png"}'], 2, timeout=240))
    assert read(tmp_path / 'sheet.png').ndim == 3


def test_images_from_python_are_those_of_the_command(pixels, tmp_path):
    pipeline = open_pipeline(pixels['source'], text_encoder=pixels['text_encoder'])
    images = pipeline.sample(prompts=TWICE[:4], seed=[0, 4, 0, 4], **FAST)
    command(pixels, prompt=PROMPTS[:2], seeds='0,4', out=str(tmp_path / 'out'))
    files = [f'{number:05d}_seed{seed}.png' for number in (0, 1) for seed in (0, 4)]
    np.testing.assert_array_equal(images, [read(tmp_path / 'out' / name) for name in files])
    for wrong, said in (({'classes': [1]}, 'draws what a prompt says: give prompts'),
                        ({'prompts': [3]}, 'must be a list of texts'),
                        ({'prompts': 'a', 'seed': 'b'}, 'a whole number, or one for each prompt'),
                        ({'prompts': 'a', 'seed': [0, -1]}, 'whole number from 0 to'),
                        ({'prompts': 'a', 'step': 3}, r"unknown setting 'step' \(did you mean steps\?\)"),
                        ({'prompts': 'a', 'steps': '3'}, 'steps must be a number')):
        with pytest.raises(UserError, match=said):
            pipeline.sample(**wrong)


def test_a_loaded_model_draws_prompts_and_says_what_it_is(pixels):
    model = lit_jax.load(pixels['source'])
    images = model.sample(prompts=TWICE[:2], text_encoder=pixels['text_encoder'], seed=[0, 4], **FAST)
    pipeline = open_pipeline(pixels['source'], text_encoder=pixels['text_encoder'])
    np.testing.assert_array_equal(images, pipeline.sample(prompts=TWICE[:2], seed=[0, 4], **FAST))
    assert images.dtype == np.uint8 and len(images) == 2
    said = r'<pixart, linear attention, \S+( M)? parameters: \d+x\d+x3 pixels, prompts>'
    assert re.fullmatch(said, repr(model))


def test_a_folder_drawn_from_prompts_is_a_set_with_its_card(pixels, tmp_path):
    command(pixels, prompt=PROMPTS[:2], out=str(tmp_path / 'out'))
    images = open_set(tmp_path / 'out')
    assert images.count == 2 and images.card['pictures']['prompts'] == PROMPTS[:2]
