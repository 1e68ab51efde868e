"""A checkpoint of another library, given where one of our folders is wanted, is told apart everywhere."""
import json

import pytest

from lit_jax import recipes
from lit_jax.checkpoint.foreign import conversion_hint
from lit_jax.checkpoint.load import load, read_weights_config
from lit_jax.checkpoint.text_encoder_folder import read_text_encoder_config
from lit_jax.checkpoint.vae_folder import load_vae, read_vae_config
from lit_jax.runtime.errors import UserError
from lit_jax.training import setup
from lit_jax.training.from_teacher import complete


@pytest.fixture
def foreign(tmp_path):
    """{what: path} of checkpoints that the converter reads."""
    (tmp_path / 'DiT.pt').write_bytes(b'PK')
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / '0100.pt').write_bytes(b'PK')
    pipeline = tmp_path / 'pipeline'
    for part, field in (('transformer', {'_class_name': 'DiTTransformer2DModel'}),
                        ('vae', {'_class_name': 'AutoencoderKL'}), ('text_encoder', {'model_type': 't5'})):
        (pipeline / part).mkdir(parents=True)
        (pipeline / part / 'config.json').write_text(json.dumps(field))
    (pipeline / 'model_index.json').write_text('{}')
    return {'file': tmp_path / 'DiT.pt', 'folder': tmp_path / 'run', 'hub': pipeline / 'transformer',
            'pipeline': pipeline}


PLACES = (read_weights_config, load, read_vae_config, load_vae, read_text_encoder_config)


@pytest.mark.parametrize('what', ['file', 'folder', 'hub', 'pipeline'])
def test_it_is_told_apart_wherever_a_folder_is_read(foreign, what):
    for read in PLACES:
        with pytest.raises(UserError, match='(convert it first|makes one).*|not yet a') as said:
            read(foreign[what])
        assert 'python convert_torch_ckpt.py' in str(said.value)


def test_it_is_told_apart_in_a_recipe(foreign):
    path = str(foreign['file'])
    config = recipes.digits(recipes.default())
    config.teacher.path = config.inherit.path = path
    config.latent.update({'space': 'vae', 'vae_path': path})
    with pytest.raises(UserError) as said:
        setup.check_inputs(config)
    assert str(said.value).count('convert it first: python convert_torch_ckpt.py') == 2
    assert f'teacher.path and inherit.path: {path} is neither' in str(said.value)
    student = recipes.load_recipe('student')
    student.teacher.path = path
    with pytest.raises(UserError, match=r'convert it first: python \S* \S*DiT.pt --out models/DiT'):
        complete(student)


def test_a_pipeline_is_converted_network_by_network(foreign):
    hint = conversion_hint(foreign['pipeline'])
    for part in ('transformer', 'vae', 'text_encoder'):
        assert f'{foreign["pipeline"] / part} --out models/pipeline_{part}' in hint


def test_a_name_near_to_that_of_a_model_is_told(tmp_path):
    (tmp_path / 'lit_digits' / 'arrays').mkdir(parents=True)
    (tmp_path / 'lit_digits' / 'config.json').write_text('{}')
    (tmp_path / 'lit_digit').mkdir()      # no model
    with pytest.raises(UserError, match=rf'did you mean {tmp_path}/lit_digits\?'):
        read_weights_config(tmp_path / 'lit_digist')
    with pytest.raises(UserError, match='convert_torch_ckpt.py SRC --out') as said:
        read_weights_config(tmp_path / 'other')
    assert 'did you mean' not in str(said.value)


def test_other_things_get_no_hint(tmp_path):
    (tmp_path / 'notes.txt').write_text('x')
    (tmp_path / 'damaged').mkdir()
    (tmp_path / 'damaged' / 'config.json').write_text('{')
    for path in (tmp_path, tmp_path / 'notes.txt', tmp_path / 'damaged', tmp_path / 'nothing.pt'):
        assert conversion_hint(path) == ''
