"""Models whose null class was never trained, and models without a variance, from training to images."""
import json
import sys

import numpy as np
import pytest
from sampling_models import save_model
from tiny import tiny_recipe

from lit_jax import recipes
from lit_jax.checkpoint.load import load, load_weights, read_weights_config
from lit_jax.checkpoint.workdir import claim_workdir, read_workdir
from lit_jax.commands import sample
from lit_jax.models.network import Network
from lit_jax.plan.dry_run import describe_recipe
from lit_jax.runtime.errors import UserError
from lit_jax.sampling.pipelines import open_pipeline
from lit_jax.training import setup
from lit_jax.training.loop import train


def claimed(workdir, **changes):
    recipe = recipes.finalize(tiny_recipe(**changes), 1)
    claim_workdir(workdir, recipe.to_dict(), setup.describe(recipe, [str(i) for i in range(10)]))
    return workdir


@pytest.mark.parametrize('dropout', [0.0, 0.1])
def test_a_run_that_drops_no_classes_says_so(tmp_path, dropout):
    config = read_weights_config(claimed(tmp_path, label_dropout=dropout))
    assert config['model'].get('null_class', True) == (dropout > 0)
    assert Network(config['model']).null_label == 10


def test_a_damaged_config_of_a_workdir_is_refused(tmp_path):
    path = claimed(tmp_path) / 'config.json'
    text = path.read_text()
    path.write_text(text.replace('"scale": 2.0', '"scale": 2.5'))
    assert path.read_text() != text
    with pytest.raises(UserError, match=r'config\.json is damaged: .* own checksum'):
        read_weights_config(tmp_path)
    edited = json.loads(path.read_text())
    del edited['checksum']
    path.write_text(json.dumps(edited))
    assert read_workdir(tmp_path)['latent']['scale'] == 2.5


def test_a_teacher_without_a_null_class_teaches_without_dropping(tmp_path):
    teacher = save_model(tmp_path / 'teacher', null_class=False)
    recipe = tiny_recipe(label_dropout=0.1)
    recipe.teacher.path = str(teacher)
    recipe.latent.scale = 300.0
    with pytest.raises(UserError, match=r'null class: set train\.label_dropout to 0'):
        setup.read_teacher_config(recipes.finalize(recipe, 1))
    recipe.train.label_dropout = 0.0
    setup.read_teacher_config(recipes.finalize(recipe, 1))


def test_it_is_drawn_without_guidance_unless_told(tmp_path, monkeypatch):
    pipeline = open_pipeline(save_model(tmp_path / 'model', null_class=False))
    assert pipeline.defaults.cfg_scale == 1.0
    with pytest.raises(UserError, match='--cfg_scale 1'):
        pipeline.sample(classes=[1], steps=2, cfg_scale=2.0)
    monkeypatch.setattr(sys, 'argv', ['sample.py', f'--from={tmp_path / "model"}', '--classes=1',
                                      '--cfg_scale=4', f'--out={tmp_path / "x.png"}'])
    with pytest.raises(UserError, match='--cfg_scale 1'):
        sample.main()


@pytest.mark.slow
def test_a_model_that_predicts_noise_alone_trains_and_draws(tmp_path):
    """With a teacher of its kind; by every sampler, ddpm with the fixed variance."""
    teacher = save_model(tmp_path / 'teacher', learn_sigma=False)
    recipe = tiny_recipe(steps=3)
    recipe.model.learn_sigma, recipe.teacher.path, recipe.latent.scale = False, str(teacher), 300.0
    assert describe_recipe(recipe)[1]
    train(recipe, tmp_path / 'run')
    records = [json.loads(line) for line in (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()]
    assert all('loss/mse' in record and 'loss/distill_noise' in record for record in records)
    assert not any('vb' in name or 'variance' in name for record in records for name in record)
    assert load(tmp_path / 'run').arch['learn_sigma'] is False
    pipeline = open_pipeline(tmp_path / 'run')
    for method in ('ddpm', 'ddim', 'dpm++', 'dpm++original'):
        drawn = pipeline.sample(classes=[1], steps=3, method=method, cfg_scale=2.0)
        assert drawn.shape == (1, 8, 8, 1) and np.isfinite(drawn).all()


def test_its_weights_are_read_as_any(tmp_path):
    config, _ = load_weights(save_model(tmp_path / 'model', null_class=False))
    assert config['model']['null_class'] is False
