"""What the page draws from prompts, without a browser."""
import shlex
import time
from dataclasses import replace

import numpy as np
import pytest
from sampling_models import save_model
from text_models import save_system, save_text_model

from lit_jax.app.drawing import DrawRequest, open_studio
from lit_jax.diffusion.settings import PROMPTS
from lit_jax.report.grids import viewable
from lit_jax.runtime.errors import UserError
from lit_jax.sampling.pipelines import open_pipeline

QUICK = {'prompt': 'a red circle', 'count': 2, 'settings': replace(PROMPTS, steps=2, cfg_scale=3.0)}


@pytest.fixture(scope='module')
def system(tmp_path_factory):
    """{'source', 'text_encoder'} of a system on pixels."""
    return save_system(tmp_path_factory.mktemp('t2i'), space='pixels')


@pytest.fixture(scope='module')
def studio(system):
    return open_studio(**system)


def draw(studio, **changes):
    return list(studio.draw(DrawRequest(**{**QUICK, **changes})))


def test_images_are_those_of_the_pipeline(studio, system):
    assert studio.takes == 'text' and studio.default.size == (8, 8)
    states = draw(studio, seed=5, negative='a blue square')
    panel = states[-1].panels[0]
    pipeline = open_pipeline(**system)
    images = pipeline.encode(['a red circle'] * 2, [5, 6], 'a blue square')
    np.testing.assert_array_equal(panel.images, viewable(pipeline.draw(images, QUICK['settings'])))
    assert panel.captions == ('seed 5', 'seed 6') and panel.timing.compiling is not None
    assert 'the prompt read in' in states[-1].text
    again = draw(studio, seed=6, prompt='two blue squares')[-1].panels[0]
    assert again.timing.compiling is None and (again.images[0] != panel.images[1]).any()


def test_the_last_seed_is_followed_by_the_first():
    assert DrawRequest(seed=(1 << 32) - 1, count=2).seeds == [(1 << 32) - 1, 0]


@pytest.mark.parametrize('prompt, notice',
                         [('  ', 'is empty'), ('a red zebra', 'vocabulary'),
                          ('a red circle ' * 9, 'is not read')])
def test_prompts_that_need_a_word(studio, prompt, notice):
    assert any(notice in said for said in draw(studio, prompt=prompt)[-1].notices)


def test_prompts_of_any_characters(studio):
    odd = 'a\x00 red\ncircle \u202e雪 \U0001f98a <b>&amp;</b>'
    last = draw(studio, prompt=odd)[-1]
    assert studio.sheet(DrawRequest(prompt=odd, count=2), last.panels).ndim == 3
    for wrong, message in (('\ud800', 'half a character at place 1'), ('a' * 10_001, '10,001 characters')):
        for name in ('prompt', 'negative'):
            with pytest.raises(UserError, match=message):
                draw(studio, **{name: wrong})


def test_sizes(studio):
    assert draw(studio, size=(8, 12))[-1].panels[0].images.shape == (2, 8, 12, 3)
    with pytest.raises(UserError, match='multiples of 2.*nearest size is 12x8'):
        draw(studio, size=(8, 11))


@pytest.mark.slow
def test_a_drawing_on_several_devices_stops_too(studio):
    many = {'count': 16, 'settings': replace(PROMPTS, steps=500, method='ddim')}
    whole = draw(studio, **many)[-1].panels[0]
    states = studio.draw(DrawRequest(**{**QUICK, **many}))
    while 'step' not in next(states).text:
        pass
    states.close()
    time.sleep(0.5)
    assert not studio.drawing
    again = draw(studio, **many)[-1].panels[0]
    assert again.timing.compiling is None and (again.images == whole.images).all()


@pytest.mark.slow
def test_teacher_and_student_with_one_network_in_memory_at_a_time(studio, system, tmp_path):
    teacher = save_text_model(tmp_path / 'teacher', space='pixels', mixer='softmax')
    pair = open_studio(**system, teacher=teacher, low_memory=True)
    last = draw(pair, seed=1)[-1]
    assert [panel.title for panel in last.panels] == ['teacher: teacher', 'student: model']
    np.testing.assert_array_equal(last.panels[1].images, draw(studio, seed=1)[-1].panels[0].images)
    assert (last.panels[0].images != last.panels[1].images).any()
    np.testing.assert_array_equal(draw(pair, seed=1)[-1].panels[0].images, last.panels[0].images)


def test_the_command_line(studio, system):
    arguments = shlex.split(studio.command(DrawRequest(**QUICK, seed=3, negative="no 'square'", size=(8, 8))))
    for wanted in (f'--from={system["source"]}', f'--text_encoder={system["text_encoder"]}',
                   '--prompt=a red circle', '--seeds=3,4', "--negative_prompt=no 'square'", '--size=8x8',
                   '--method=dpm++'):
        assert wanted in arguments


def test_prompts_and_classes_do_not_stand_side_by_side(system, tmp_path):
    with pytest.raises(UserError, match='draws what a prompt says, .* draws classes'):
        open_studio(**system, teacher=save_model(tmp_path / 'classes'))
    with pytest.raises(UserError, match='--text_encoder DIR'):
        open_studio(system['source'])
