"""Models on the hub, against a stand-in of its HTTP interface on loopback."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hub_server import hub_server
from PIL import Image
from student_archs import ARCHS, saved

from lit_jax.checkpoint.manager import Checkpoints
from lit_jax.checkpoint.model_folder import load_model_folder, save_model_folder
from lit_jax.checkpoint.workdir import claim_workdir
from lit_jax.commands.push import PushOptions
from lit_jax.convert.torch_import import convert
from lit_jax.deploy.model_card import model_card
from lit_jax.evaluation.table import keep_row
from lit_jax.runtime import paths
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.hub import hub_name
from lit_jax.runtime.leaves import named_leaves
from lit_jax.runtime.options import parse_options
from lit_jax.sampling.request import SampleRequest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize('name', ['model', 'a/b/c', '/b', 'a/', 'a b/c', '../x', 'a/..b', 'a/b--c', 'a/b.git',
                                  'a/b-', 'ä/b', 'a/' + 95 * 'b', ''])
def test_what_is_no_name_is_told(name):
    with pytest.raises(UserError, match='is no name of a model on the hub'):
        PushOptions(src='model', name=name)
    with pytest.raises(UserError, match='write OWNER/NAME'):
        paths.as_path(f'hf://{name}')
    assert hub_name('hf://a_/B-1.0_/') == 'a_/B-1.0_'


def test_nothing_is_written_to_a_name(capsys, tmp_path):
    with pytest.raises(SystemExit):
        parse_options(SampleRequest, ['--from=model', '--out=hf://me/model'])
    assert 'hf:// is for reading' in capsys.readouterr().err
    with pytest.raises(UserError, match='upload it with python push.py FOLDER OWNER/NAME'):
        convert('file.pt', 'hf://me/model')


ROW = {'id': '1', 'scores': {'fid': 2.5}, 'card': {
    'samples': {'name': 'at /home/ann/runs/x, step 5', 'count': 10, 'card': {'model': {'provenance': {
        'source': '/home/ann/runs/x'}}, 'sampler': {'steps': 20}}},
    'reference': {'id': '/home/ann/ref.npz', 'sha256': 64 * 'a', 'statistics': 'all'},
    'features': {'flavour': 'Inception', 'sha256': 64 * 'b', 'precision': 'float32'},
    'settings': {'pr_mode': 'adm', 'neighbours': 3, 'inception_score': 'splits'}}}


def test_a_card_says_what_a_model_is_and_no_places_of_this_machine():
    recipe = {'teacher': {'path': '/home/ann/models/dit_xl'}, 'inherit': {'path': ''},
              'data': {'path': 'gs://private/imagenet', 'name': 'a / b'}, 'train': {'steps': 5}}
    arch = {**ARCHS['lit'], 'input_size': [8, 8]}
    config = {'model': arch, 'latent': {'space': 'vae', 'vae': 'sd', 'scale': 1.0}, 'recipe': recipe,
              'provenance': {'source': '/home/ann/runs/x', 'step': 5, 'sha256': 64 * 'c'}}
    card = model_card('me/lit', config, 'cc-by-nc-4.0', [ROW], ['a b.png'], True)
    for said in ('license: "cc-by-nc-4.0"', '| Teacher | `dit_xl` |', '| Made from | `x`, step 5 |',
                 '| Licence of the weights | cc-by-nc-4.0 |', '![Samples](a%20b.png)', '## Recipe',
                 '"steps": 5', 'at x, step 5', '| 2.500 |', 'Recipe card of', '"pr_mode": "adm"',
                 '"path": "imagenet"', '"a / b"', "hf://me/lit')", 'linear attention'):
        assert said in card, said
    assert 'ann' not in card and 'private' not in card and 'base_model' not in card
    recipe['teacher']['path'] = 'hf://them/dit'
    card = model_card('me/lit', config, '', [], [], False)
    assert 'base_model: "them/dit"' in card and '`hf://them/dit`' in card and 'license: "other"' in card
    assert 'that of the weights of its teacher' in card and 'PyTorch alone' not in card


@pytest.fixture(scope='module')
def server():
    pytest.importorskip('huggingface_hub')
    with hub_server() as server:
        yield server


# What each line of Python says: the message of its UserError, or ''.
EACH = """
import json, sys
import numpy as np
import lit_jax
from lit_jax.deploy.hub_models import push
from lit_jax.runtime import hub
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.leaves import named_leaves

def keep(file, name):
    np.savez(file, **named_leaves(lit_jax.load('hf://' + name).params))

said = []
for line in json.load(sys.stdin):
    try:
        exec(line)
        said.append('')
    except UserError as error:
        said.append(str(error))
print(json.dumps(said))
"""


def each(server, folder, *lines, **env):
    """What each line says in a fresh process, whose caches lie in `folder`."""
    done = subprocess.run([sys.executable, '-c', EACH], cwd=folder, env=environment(server, folder, **env),
                          input=json.dumps(lines), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def environment(server, folder, **env):
    return {**os.environ, **server.env, 'LIT_JAX_CACHE': str(folder / 'cache'), 'PYTHONPATH': str(ROOT),
            'HF_HOME': str(folder / 'home'), 'JAX_PLATFORMS': 'cpu', **env}


PUSH = "push('model', 'me/student', licence='mit', images=['grid.png'])"


@pytest.mark.peers
@pytest.mark.slow
def test_a_model_goes_up_and_comes_back_bit_for_bit(server, tmp_path):
    saved(tmp_path, ARCHS['hybrid'])
    Image.new('RGB', (8, 8)).save(tmp_path / 'grid.png')
    (tmp_path / 'second').mkdir()
    flow = saved(tmp_path / 'second', ARCHS['dit'], diffusion={'kind': 'flow', 'path': 'linear',
                                                              'prediction': 'velocity', 'noise_at': 1})
    server.refuse = 1
    said = each(server, tmp_path, PUSH, PUSH, PUSH, f'push({str(flow)!r}, "me/flow")')
    assert 'it goes on where it stopped' in said[0] and said[1:] == ['', '', '']
    files = server.repos['me/student']
    assert set(files) == {'config.json', 'model.safetensors', 'modeling_lit.py', 'README.md', 'grid.png'}
    assert set(server.repos['me/flow']) == set(files) - {'grid.png'}
    card = files['README.md'].decode()
    assert 'license: "mit"' in card and "lit_jax.load('hf://me/student')" in card and '(grid.png)' in card
    assert len(server.puts) == len(set(server.puts))      # nothing twice
    assert not [path for path in (tmp_path / 'cache').rglob('*') if 'push' in path.name and path.is_file()]
    # Damaged, then whole; of a model of others the weights are not even asked for.
    server.repos['me/other'] = {'config.json': b'{"model_type": "bert"}', 'model.safetensors': bytes(5000)}
    server.spoil = 1
    said = each(server, tmp_path, "keep('back.npz', 'me/student')", "keep('back.npz', 'me/student')",
                "keep('flow.npz', 'me/flow')", "lit_jax.load('hf://me/other')",
                "assert lit_jax.load('hf://me/student').config['provenance']['source'] == 'hf://me/student'")
    assert 'arrived damaged and was removed' in said[0] and said[1:3] == ['', '']
    assert 'me/other is no model of lit_jax' in said[3] and said[4] == ''
    assert not list((tmp_path / 'cache' / 'hub' / 'models').glob('me--other*'))
    for model, back in ((tmp_path / 'model', 'back.npz'), (flow, 'flow.npz')):
        before = named_leaves(load_model_folder(model)[1])
        with np.load(tmp_path / back) as found:
            assert set(found) == set(before)
            assert all(np.array_equal(found[name], before[name]) for name in before)
    # A stopped download goes on; what was loaded is read without the hub.
    server.repos['me/big'], server.cut = {**files, 'model.safetensors': bytes(24_000_000)}, 1
    said = each(server, tmp_path, "from lit_jax.deploy.hub_client import download; download('me/big')")
    assert said == ['']
    assert server.ranges and server.ranges[0] > 0
    offline = each(server, tmp_path, "keep('off.npz', 'me/student')", "lit_jax.load('hf://me/nothing')",
                   HF_HUB_OFFLINE='1')
    assert offline[0] == '' and 'HF_HUB_OFFLINE is set' in offline[1]


@pytest.mark.peers
@pytest.mark.slow
def test_what_goes_wrong_is_one_message(server, tmp_path):
    model = saved(tmp_path, ARCHS['gelu'])
    Image.new('RGB', (8, 8)).save(tmp_path / 'grid.png')
    config, params = load_model_folder(model)
    params['final_layer']['linear']['bias'] = np.full(12, np.nan, np.float32)
    save_model_folder(tmp_path / 'broken', config, params)
    server.repos['me/full'] = {'pytorch_model.bin': b'', 'README.md': b''}
    refused, no_token = 'the hub does not take the token', 'this machine is not logged in to the hub'
    cases = {
        "push('broken', 'me/nothing')": 'holds NaN or infinity',
        "push('gone', 'me/nothing')": 'gone does not exist',
        "push('model', 'me/nothing', images=['none.png'])": 'none.png is no image file',
        "push('model', 'me/nothing', figures='model')": 'holds no scores.json of evaluate.py',
        "push('model', 'them/model')": refused,
        "push('model', 'me/full')": 'holds files that push.py did not write',
        "lit_jax.load('hf://me/nothing')": 'there is no model me/nothing on the hub',
        "lit_jax.load('hf://nothing')": 'is no name of a model on the hub',
        "import os; os.environ['HF_TOKEN'] = 'hf_wrong'; push('model', 'me/nothing')": refused,
        "os.environ['HF_TOKEN'] = ''; push('model', 'me/nothing')": no_token}
    said = each(server, tmp_path, *cases)
    for line, message, wanted in zip(cases, said, cases.values(), strict=True):
        assert wanted in message and '\n' not in message.replace('\n  ', ''), (line, message)
        assert 'Error' not in message, message
    assert 'me/nothing' not in server.repos and server.repos['me/full'].keys() == {'pytorch_model.bin',
                                                                                  'README.md'}
    away = each(server, tmp_path, "lit_jax.load('hf://me/nothing')", "push('model', 'me/nothing')",
                HF_ENDPOINT='http://127.0.0.1:9')
    assert 'the hub is not reachable' in away[0] and 'me/nothing cannot be pushed' in away[1]


@pytest.mark.peers
@pytest.mark.slow
def test_the_commands_push_and_draw(server, tmp_path):
    def run(*words):
        done = subprocess.run([sys.executable, '-m', 'lit_jax', *words], cwd=tmp_path, text=True, timeout=300,
                              env=environment(server, tmp_path), capture_output=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    saved(tmp_path, {**ARCHS['dit'], 'num_classes': 10})
    said = run('push', 'model', 'me/typed', '--private')
    assert f'pushed   {server.url}/me/typed' in said and "lit_jax.load('hf://me/typed')" in said
    run('sample', '--from', 'hf://me/typed', '--classes', '1', '--steps', '2', '--out', 'grid.png')
    assert Image.open(tmp_path / 'grid.png').size >= (8, 8)


@pytest.mark.peers
@pytest.mark.slow
def test_a_workdir_is_pushed_with_its_recipe_figures_and_newest_sheet(server, tmp_path):
    (config, params), run = load_model_folder(saved(tmp_path, ARCHS['lit'])), tmp_path / 'run'
    about = {name: config[name] for name in ('model', 'diffusion', 'latent', 'classes')}
    claim_workdir(run, {'teacher': {'path': '/home/ann/dit'}, 'train': {'label_dropout': 0.1}}, about)
    with Checkpoints(run) as checkpoints:
        checkpoints.save(3, {'params': params, 'ema': params, 'step': np.int32(3)}, {'seen': 3})
    save_model_folder(run / 'best', {**about, 'provenance': {'source': str(run), 'step': 3}}, params)
    (run / 'samples').mkdir()
    for step in (1, 3):
        Image.new('RGB', (8, 8)).save(run / 'samples' / f'{step:09d}.png')
    (tmp_path / 'scores').mkdir()
    keep_row(tmp_path / 'scores', ROW)
    without_code = ("import lit_jax.deploy.hub_models as models; models._has_code = lambda config: False; "
                    "push('run', 'me/plain'); keep('plain.npz', 'me/plain')")
    said = each(server, tmp_path, "push('run', 'me/run', figures='scores')", "push('run/best', 'me/best')",
                without_code)
    assert said == ['', '', '']
    run, best = (server.repos[name]['README.md'].decode() for name in ('me/run', 'me/best'))
    for card in (run, best):
        assert '| Teacher | `dit` |' in card and '"label_dropout": 0.1' in card and 'ann' not in card
        assert '| Made from | `run`, step 3 |' in card and 'that of the weights of its teacher' in card
    assert '(000000003.png)' in run and '| 2.500 |' in run and 'Recipe card of' in run
    plain = server.repos['me/plain']
    assert '| Made from | `run`, step 3 |' in plain['README.md'].decode() and 'modeling_lit.py' not in plain
    with np.load(tmp_path / 'plain.npz') as found:
        assert all(np.array_equal(found[name], leaf) for name, leaf in named_leaves(params).items())
    assert set(server.repos['me/run']) == {'config.json', 'model.safetensors', 'modeling_lit.py', 'README.md',
                                           '000000003.png'}
