"""Settings of a sampler: read from options and cards, checked, and said."""
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from lit_jax.diffusion.flow_samplers import FLOW_SAMPLERS
from lit_jax.diffusion.samplers import SAMPLERS
from lit_jax.diffusion.settings import (
    CLASSES,
    DDPM_METHODS,
    FLOW_METHODS,
    PRESETS,
    PROMPTS,
    SCORES,
    SamplerSettings,
)
from lit_jax.runtime.errors import UserError

DIFFUSION = {'steps': 1000, 'kind': 'linear'}


def test_defaults_are_those_of_dit_and_of_pixart():
    assert CLASSES.to_json() == {'method': 'ddpm', 'steps': 50, 'eta': 0.0, 'cfg_scale': 4.0,
                                 'cfg_channels': 3, 'cfg_interval': [0.0, 1.0]}
    assert PROMPTS == SamplerSettings('dpm++', 20, cfg_scale=4.5, cfg_channels='all')
    assert tuple(SAMPLERS) == DDPM_METHODS and set(FLOW_SAMPLERS) == set(FLOW_METHODS)


def test_a_card_gives_the_settings_back():
    settings = SamplerSettings('ddim', 7, 0.5, 2.0, 'all', (0.2, 0.8))
    assert SamplerSettings(**settings.to_json()) == settings and hash(settings)


def test_options_change_what_they_name():
    options = SimpleNamespace(steps=9, cfg_scale=None, size='64')
    assert CLASSES.updated(options, eta=0.5) == SamplerSettings(steps=9, eta=0.5)


@pytest.mark.parametrize('name', PRESETS)
def test_published_ways_to_draw_have_names(name):
    """Each takes 250 evaluations (LightningDiT: a grid of 250 points); flags win; a DiT has none of them."""
    settings = SCORES.updated(SimpleNamespace(preset=name)).check({'kind': 'flow'})
    assert settings.evaluations == (249 if name.startswith('lightning') else 250) and settings.cfg_scale > 1
    flag = SimpleNamespace(preset=name, cfg_scale=1.0, steps=None)
    assert SCORES.updated(flag) == replace(settings, cfg_scale=1.0)
    with pytest.raises(UserError, match='is for models of flow, this one is of ddpm'):
        settings.check(DIFFUSION)


def test_it_is_said_in_a_line():
    assert CLASSES.describe() == 'ddpm, 50 steps, cfg 4'
    assert SamplerSettings(cfg_interval=[0.25, 1]).describe() == 'ddpm, 50 steps, cfg 4 in 0.25..1'


@pytest.mark.parametrize('change, message', [
    ({'method': 'eular'}, 'unknown sampler'), ({'steps': 0}, 'at least 1 step'), ({'steps': 1001}, '1001'),
    ({'eta': 0.5}, 'belongs to ddim'), ({'method': 'ddim', 'eta': 2}, 'between 0'),
    ({'cfg_scale': float('nan')}, 'guidance scale'), ({'cfg_channels': 0}, 'guided channels'),
    ({'cfg_interval': (0.5, 0.1)}, 'guidance interval')])
def test_what_cannot_be_drawn_with_is_refused(change, message):
    assert CLASSES.check(DIFFUSION) is CLASSES
    with pytest.raises(UserError, match=message):
        SamplerSettings(**change).check(DIFFUSION)


def test_a_command_line_needs_no_jax():
    code = 'import sys, lit_jax.commands.sample; print("jax" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout == 'False\n'


def test_a_model_that_records_its_defaults_is_asked_first():
    recorded = PROMPTS.of_model({'sampling': {'method': 'ddim', 'steps': 9, 'cfg_scale': 1.5, 'other': 1}})
    assert recorded == replace(PROMPTS, method='ddim', steps=9, cfg_scale=1.5)
    for older in ({}, {'sampling': None}, {'sampling': 3}):
        assert PROMPTS.of_model(older) == PROMPTS


def test_a_model_without_a_null_class_is_not_guided():
    config = {'model': {'null_class': False}, 'diffusion': DIFFUSION,
              'sampling': {'cfg_scale': 3.0, 'steps': 7}}
    settings = CLASSES.of_model(config)
    assert (settings.steps, settings.cfg_scale) == (7, 1.0)
    settings.check_model(config)
    with pytest.raises(UserError, match='without dropping classes.*--cfg_scale 1'):
        replace(settings, cfg_scale=1.5).check_model(config)
    replace(settings, cfg_scale=1.5).check_model({**config, 'model': {}})
