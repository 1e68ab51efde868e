"""What the page draws, without a browser: the images of sample.py, progress, timing, and messages."""
import json
import logging
import shlex
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from sampling_models import save_latent_model, save_model, save_vae

from lit_jax.app.drawing import EACH, DrawRequest, Panel, State, Timing, _summary, enlarge, open_studio
from lit_jax.app.serve import shipped_teacher
from lit_jax.checkpoint.load import load
from lit_jax.diffusion.settings import SamplerSettings
from lit_jax.report.grids import viewable
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.options import parse_options
from lit_jax.sampling.groups import GroupSampler, Images
from lit_jax.sampling.pipelines import ClassPipeline
from lit_jax.sampling.request import SampleRequest

QUICK = {'count': 2, 'settings': SamplerSettings(method='ddim', steps=3, cfg_scale=2.0)}


def wanted(**changes):
    """A quick request; steps, method and cfg_scale are changed in its settings."""
    settings = {name: changes.pop(name) for name in ('steps', 'method', 'cfg_scale') if name in changes}
    return DrawRequest(**{**QUICK, 'settings': replace(QUICK['settings'], **settings), **changes})


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp('models') / 'tiny')


@pytest.fixture(scope='module')
def student(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp('models') / 'tiny_lit', mixer='linear', seed=1)


@pytest.fixture(scope='module')
def studio(folder):
    return open_studio(folder)


@pytest.fixture(scope='module')
def pair(folder, student):
    return open_studio(student, teacher=folder)


def draw(studio, **changes):
    """(the states, the finished one) of a quick request."""
    states = list(studio.draw(wanted(**changes)))
    assert states[-1].finished and not any(state.finished for state in states[:-1])
    return states, states[-1]


def test_images_are_those_of_the_sampler(studio, folder):
    _, last = draw(studio, label=7, seed=5)
    (_, alone), = GroupSampler(load(folder), QUICK['settings'], Images.of_classes([7, 7], 5)).draw([0])
    np.testing.assert_array_equal(last.panels[0].images, viewable(alone))
    assert last.panels[0].captions == ('name 7', 'name 7')


def test_the_seed_and_the_class_decide_the_images(studio):
    images = {key: draw(studio, seed=key[0], label=key[1])[1].panels[0].images
              for key in [(1, 3), (2, 3), (1, 4)]}
    np.testing.assert_array_equal(draw(studio, seed=1, label=3)[1].panels[0].images, images[1, 3])
    assert (images[1, 3] != images[2, 3]).any() and (images[1, 3] != images[1, 4]).any()


def test_each_class_in_turn(studio):
    assert draw(studio, label=EACH,
                count=12)[1].panels[0].captions == tuple(f'name {i % 10}' for i in range(12))


def test_compiling_is_told_apart_and_happens_once(folder):
    studio = open_studio(folder)
    states, first = draw(studio)
    assert any('compiling' in state.text for state in states)
    timing = first.panels[0].timing
    assert timing.compiling > 10 * timing.per_step and 'compiled once' in timing.describe()
    _, again = draw(studio, seed=9, label=2)           # neither is part of the program
    assert again.panels[0].timing.compiling is None and 'compiled' not in again.panels[0].timing.describe()
    assert draw(studio, cfg_scale=3.0)[1].panels[0].timing.compiling is not None


def test_every_step_is_told(studio):
    told, pipeline = [], studio.pipeline
    for _ in range(2):
        pipeline.draw(pipeline.encode([0, 1], 0), QUICK['settings'],
                      on_step=lambda done, total: told.append((done, total)))
    assert told == 2 * [(1, 3), (2, 3), (3, 3)]


def test_progress_rises_over_both_models(pair):
    states = []
    pair._draw_all(wanted(), states.append, [])
    fractions = [state.fraction for state in states if state.fraction is not None]
    assert fractions == sorted(fractions) and 0.5 in fractions and fractions[-1] == 1
    texts = [state.text for state in states]
    assert 'teacher: tiny: step 2 of 3' in texts and 'student: tiny_lit: step 2 of 3' in texts
    assert len(states[-1].panels) == 1                # the teacher's are there while the student draws


def test_teacher_and_student_start_from_the_same_noise(pair, studio, student):
    """Each draws what it would draw alone for this seed."""
    last = draw(pair, seed=4)[1]
    assert [panel.title for panel in last.panels] == ['teacher: tiny', 'student: tiny_lit']
    for panel, alone in zip(last.panels, (studio, open_studio(student)), strict=True):
        np.testing.assert_array_equal(panel.images, draw(alone, seed=4)[1].panels[0].images)
    assert (last.panels[0].images != last.panels[1].images).any()


def test_times_are_compared_where_nothing_was_compiled():
    def panels(*compiling):
        times = zip(compiling, (2.0, 0.5), strict=True)
        return tuple(Panel('', np.zeros((1, 8, 8, 1)), ('',), Timing(first, seconds, 0.0, 10))
                     for first, seconds in times)

    assert 'takes 0.25 times as long' in _summary(State('', panels=panels(None, None)), None)
    assert 'draw again' in _summary(State('', panels=panels(None, 3.0)), None)


def test_latents_are_decoded(tmp_path):
    model, vae = save_latent_model(tmp_path / 'latent'), save_vae(tmp_path / 'vae')
    decoded = draw(open_studio(model, vae=str(vae)))[1]
    assert decoded.panels[0].images.shape == (2, 16, 16, 3) and decoded.notices == ()


def test_latents_without_a_vae_are_shown_in_false_colours(tmp_path):
    plain = draw(open_studio(save_latent_model(tmp_path / 'latent')))[1]
    assert plain.panels[0].images.shape == (2, 8, 8, 3) and '--vae' in plain.notices[0]


@pytest.mark.parametrize('changes, message', [
    ({'steps': 0}, 'at least 1 step'), ({'steps': 5000}, '5000'),
    ({'count': 0}, 'between 1 and 16'), ({'count': 17}, 'between 1 and 16'),
    ({'seed': -1}, 'seed'), ({'label': 10}, 'class 10'), ({'cfg_scale': float('nan')}, 'guidance'),
    ({'method': 'magic'}, 'magic')])
def test_requests_that_cannot_be_met(pair, changes, message):
    with pytest.raises(UserError, match=message):
        next(pair.draw(wanted(**changes)))


def test_models_that_do_not_belong_together(folder, tmp_path):
    with pytest.raises(UserError, match='input_size: .8, 8. in .*tiny, .16, 16. in .*large'):
        open_studio(save_model(tmp_path / 'large', input_size=(16, 16)), teacher=folder)
    with pytest.raises(UserError, match='text_encoder: not for .*draws classes'):
        open_studio(folder, text_encoder='t5')
    with pytest.raises(UserError, match='does not exist'):
        open_studio(tmp_path / 'nothing')


def test_what_goes_wrong_in_the_thread_reaches_who_waits(studio, monkeypatch):
    def fail(self, latents, **_):
        raise UserError('the model has diverged')

    monkeypatch.setattr(ClassPipeline, 'decode', fail)
    with pytest.raises(UserError, match='diverged'):
        draw(studio)
    monkeypatch.undo()
    draw(studio)                                      # the next one has its turn


def test_a_program_that_failed_counts_as_not_compiled(folder, monkeypatch):
    studio = open_studio(folder)
    monkeypatch.setattr(GroupSampler, 'draw',
                        lambda *_: (_ for _ in ()).throw(ValueError('RESOURCE_EXHAUSTED: too much')))
    with pytest.raises(UserError, match='out of memory while drawing'):
        draw(studio)
    assert not studio.pipeline.is_compiled(2, QUICK['settings'])


def test_a_drawing_that_nobody_waits_for_stops_at_its_next_step_and_the_program_stays(studio, caplog):
    def began(states):
        while 'step' not in next(states).text:
            pass

    whole = draw(studio, steps=900)[1].panels[0]
    for stop in (True, False):
        gone = threading.Event()
        states = studio.draw(wanted(steps=900), gone.is_set)
        began(states)
        if stop:
            gone.set()
            with pytest.raises(UserError, match='stopped'):
                list(states)
        else:
            states.close()
        for _ in range(100):
            if not studio.drawing:
                break
            time.sleep(0.01)
        assert not studio.drawing
    again = draw(studio, steps=900)[1].panels[0]
    assert again.timing.compiling is None
    np.testing.assert_array_equal(again.images, whole.images)
    assert not [record for record in caplog.records if record.exc_info]


def test_a_closed_studio_draws_nothing(folder):
    studio = open_studio(folder)
    studio.close()
    with pytest.raises(UserError, match='stopped'):
        draw(studio)


def test_names_and_sheet_come_from_whichever_model_knows(pair):
    classes = [f'name {i}' for i in range(10)]
    pair.pipelines[1].config['classes'], known = None, pair.pipelines[1].config['classes']
    try:
        assert pair.classes == classes
        last = draw(pair, label=EACH, count=3)[1]
        assert [panel.captions for panel in last.panels] == [('name 0', 'name 1', 'name 2')] * 2
        sheet = pair.sheet(wanted(label=EACH, count=3), last.panels)
        wide = pair.sheet(wanted(label=3, count=3), last.panels)
        assert sheet.shape[0] > sheet.shape[1] / 4 and wide.shape[0] < sheet.shape[0]
    finally:
        pair.pipelines[1].config['classes'] = known


def test_one_request_after_the_other(studio):
    results, seeds = {}, range(4)
    threads = [threading.Thread(
        target=lambda seed=seed: results.__setitem__(seed, draw(studio, seed=seed)[1])) for seed in seeds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in seeds:
        np.testing.assert_array_equal(results[seed].panels[0].images,
                                      draw(studio, seed=seed)[1].panels[0].images)


def test_warnings_of_the_drawing_become_notices(studio, monkeypatch):
    def warn(self, latents, **_):
        logging.getLogger('lit_jax').warning('%d tokens are cut', 5)
        return latents

    monkeypatch.setattr(ClassPipeline, 'decode', warn)
    assert '5 tokens are cut' in draw(studio)[1].notices


def test_small_images_are_enlarged_with_hard_pixels():
    image = np.arange(64, dtype=np.uint8).reshape(8, 8, 1)
    large = enlarge(image)
    assert large.shape == (256, 256, 3)
    np.testing.assert_array_equal(large[::32, ::32], np.repeat(image, 3, axis=2))
    np.testing.assert_array_equal(large[31::32, 31::32], large[::32, ::32])
    assert enlarge(np.zeros((512, 256, 3), np.uint8)).shape == (512, 256, 3)


def test_the_command_line_draws_the_same_images(studio, tmp_path, monkeypatch):
    from lit_jax.sampling import draw as run
    arguments = shlex.split(studio.command(wanted(label=3, seed=11)))
    assert arguments[:2] == ['python', 'sample.py']
    drawn = {}
    monkeypatch.setattr(run, 'make_sheet', lambda panels, *args, **more: drawn.update(panels)
                        or np.zeros((8, 8, 3), np.uint8))
    monkeypatch.setattr(run, 'save_png', lambda path, image: None)
    run.draw(parse_options(SampleRequest, arguments[2:]))
    np.testing.assert_array_equal(next(iter(drawn.values())),
                                  draw(studio, label=3, seed=11)[1].panels[0].images)


def test_the_shipped_teacher_is_converted_once(tmp_path):
    folder = shipped_teacher(tmp_path)
    config = folder / 'config.json'
    assert folder.name == 'digits_dit' and json.loads(config.read_text())['model']['input_size'] == [8, 8]
    config.touch()
    before = config.stat().st_mtime_ns
    assert shipped_teacher(tmp_path) == folder and config.stat().st_mtime_ns == before
    studio = open_studio(folder)
    assert studio.titles == ['digits_dit'] and studio.facts == [studio.pipeline.network.describe()]
    images = draw(studio, label=EACH, count=10, steps=8, method='dpm++')[1].panels[0].images
    assert images.shape == (10, 8, 8, 1) and images.std() > 50
