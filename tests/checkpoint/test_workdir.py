"""A workdir belongs to its recipe, and to the data and weights that it was trained with."""
import json
import re

import pytest

from lit_jax.checkpoint.workdir import check_workdir, claim_workdir, read_inputs
from lit_jax.diffusion.kinds import default_section
from lit_jax.runtime.errors import UserError

RECIPE = {'seed': 1, 'data': {'path': 'a', 'classes': 'a.txt'}, 'latent': {'vae_path': 'a'}}
INPUTS = {'data': {'name': 'folder', 'count': 8, 'sha256': 'aa'}, 'teacher': {'sha256': 'bb'},
          'inherit': {'run': 1.5, 'step': 3, 'sha256': 'cc'}}
CLASSES = ['cat', 'dog']


@pytest.fixture
def run(tmp_path):
    claim_workdir(tmp_path, RECIPE, {'classes': CLASSES}, inputs=INPUTS)
    (tmp_path / 'checkpoints').mkdir()
    return tmp_path


def test_what_differs_is_told_at_once(run):
    others = {'data': {'name': 'folder', 'count': 8, 'sha256': 'xx'}, 'teacher': {'sha256': 'yy'},
              'inherit': {'run': 1.5, 'step': 9, 'sha256': 'zz'}}
    with pytest.raises(UserError) as caught:
        check_workdir(run, RECIPE, others, ['cat', 'fox'])
    for part in (str(run), "data.sha256: 'aa' there, 'xx' now", 'teacher.sha256',
                 'inherit.step: 3 there, 9 now', "class 1: 'dog' there, 'fox' now",
                 '--config.inherit.path', 'another --workdir'):
        assert part in str(caught.value)
    with pytest.raises(UserError, match="another recipe:\n  seed: 1 there, 2 in this recipe\n  data.sha256"):
        check_workdir(run, {**RECIPE, 'seed': 2}, {**INPUTS, 'data': others['data']}, CLASSES)
    with pytest.raises(UserError, match='teacher.sha256: .bb. there, None now'):
        check_workdir(run, RECIPE, {'data': INPUTS['data'], 'inherit': INPUTS['inherit']}, CLASSES)


def test_the_same_elsewhere_is_the_same(run):
    check_workdir(run, {'seed': 1, 'data': {'path': 'b', 'classes': 'b.txt'}, 'latent': {'vae_path': 'b'}},
                  INPUTS, CLASSES)


def test_before_the_first_checkpoint_nothing_is_lost(run):
    (run / 'checkpoints').rmdir()
    check_workdir(run, RECIPE, {'data': {'name': 'digits'}}, None)


def test_a_workdir_of_an_older_version_is_not_compared_until_it_says_what_it_has(run):
    claim_workdir(run, RECIPE, {'classes': CLASSES})
    assert read_inputs(run) == {}
    check_workdir(run, RECIPE, {'data': {'name': 'digits'}}, ['one'])
    with pytest.raises(UserError, match='vae_path'):
        check_workdir(run, {**RECIPE, 'latent': {'vae_path': 'b'}}, INPUTS, CLASSES)
    claim_workdir(run, RECIPE, {'classes': CLASSES}, inputs=INPUTS)
    with pytest.raises(UserError, match='data.name'):
        check_workdir(run, RECIPE, {'data': {'name': 'digits'}}, ['one'])


def test_a_recipe_from_before_an_option_or_another_kind_of_diffusion_is_the_same(run):
    claim_workdir(run, RECIPE | {'model': {'mixer': {'name': 'linear', 'heads': 2}},
                                 'diffusion': {'steps': 1000, 'kind': 'linear'}}, {'classes': CLASSES})
    now = RECIPE | {'model': {'mixer': {'name': 'linear', 'heads': 2, 'rope': False}},
                    'diffusion': default_section()}
    check_workdir(run, now, {}, CLASSES)
    with pytest.raises(UserError, match=r"model\.mixer\.rope: False there, True in this recipe"):
        turned = {'name': 'linear', 'heads': 2, 'rope': True}
        check_workdir(run, now | {'model': {'mixer': turned}}, {}, CLASSES)
    with pytest.raises(UserError, match="diffusion.kind: 'ddpm' there, 'flow' in this recipe"):
        check_workdir(run, now | {'diffusion': {'kind': 'flow'}}, {}, CLASSES)


@pytest.mark.parametrize('name', ['checkpoints', 'samples', 'metrics.jsonl', 'config.json'])
@pytest.mark.parametrize('what', ['dead link', 'circular link', 'the other'])
def test_something_else_where_a_run_writes_is_told_before_it_begins(tmp_path, name, what):
    place = tmp_path / name
    if what == 'the other':
        place.mkdir() if '.' in name else place.write_bytes(b'')
    else:
        place.symlink_to(place if what == 'circular link' else tmp_path / 'nowhere')
    with pytest.raises(UserError, match=re.escape(str(place))):
        check_workdir(tmp_path, RECIPE)


def test_inputs_of_a_wrong_shape_are_one_message(run):
    content = json.loads((run / 'config.json').read_text())
    del content['checksum']
    (run / 'config.json').write_text(json.dumps({**content, 'inputs': [3]}))
    with pytest.raises(UserError, match=re.escape(f'{run}/config.json is damaged: inputs is [3]')):
        read_inputs(run)
