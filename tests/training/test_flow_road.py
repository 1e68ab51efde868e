"""The whole road of a flow: teacher, its pictures, aligned and distilled student, drawing, files."""
import json

import jax
import numpy as np
import pytest
from tiny import tiny_recipe

import lit_jax
from lit_jax import recipes
from lit_jax.checkpoint.model_folder import load_model_folder
from lit_jax.convert.torch_export import export
from lit_jax.convert.torch_import import convert
from lit_jax.latents.prepare import prepare_latents
from lit_jax.latents.prepare_options import PrepareOptions
from lit_jax.runtime.errors import UserError
from lit_jax.training import loop


def recipe(mixer, **train):
    config = recipes.flow(tiny_recipe(mixer, **train))
    config.log.every = 1
    return config


@pytest.mark.slow
def test_a_student_of_a_flow_is_aligned_distilled_drawn_and_exported(tmp_path):
    assert loop.train(recipe('softmax', steps=3), tmp_path / 'teacher') == 'done'
    teacher = str(tmp_path / 'teacher')
    prepare_latents(PrepareOptions(teacher=teacher, count=32, out=str(tmp_path / 'set'), method='heun2',
                                   steps=2, group=8))
    config = recipe('linear', steps=2)
    config.teacher.path = config.inherit.path = teacher
    config.align.steps, config.data.name, config.data.path = 2, 'latents', str(tmp_path / 'set')
    assert loop.train(config, tmp_path / 'student') == 'done'
    records = [json.loads(line) for line in (tmp_path / 'student' / 'metrics.jsonl').open()]
    assert all('loss/align' in record for record in records[:2])
    assert all({'loss/mse', 'loss/distill_velocity', 'loss/distill_velocity_q4'} <= set(record)
               for record in records[2:4])
    model = lit_jax.load(str(tmp_path / 'student'))
    images = [model.sample(classes=[3, 7], seed=0, method=method, steps=3) for method in ('euler', 'sde')]
    assert images[0].dtype == np.uint8 and images[0].shape[:3] == (2, 8, 8)
    assert not np.array_equal(*images)
    export(tmp_path / 'student', tmp_path / 'student.safetensors')
    convert(tmp_path / 'student.safetensors', tmp_path / 'back')
    back, params = load_model_folder(tmp_path / 'back')
    assert back['diffusion'] == model.config['diffusion'] and back['diffusion']['kind'] == 'flow'
    jax.tree.map(np.testing.assert_array_equal, params, jax.device_get(model.params))
    other = tiny_recipe('linear')
    other.teacher.path = teacher
    with pytest.raises(UserError, match=r"diffusion\.kind: 'flow' in the teacher, 'ddpm' in the recipe"):
        loop.train(other, tmp_path / 'other')
