"""What a command says first. Wrong command lines get one sentence that says what was meant, before anything
is made."""
import importlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lit_jax.runtime.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def say(tmp_path, monkeypatch, capsys):
    """say('train', FLAG, ...): what the command answers, in a folder with a checkpoint, a set, a file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'file').write_text('x')
    (tmp_path / 'DiT.pt').write_bytes(b'PK')
    np.savez(tmp_path / 'set.npz', arr_0=np.zeros((2, 8, 8, 3), np.uint8))
    before = sorted(tmp_path.rglob('*'))

    def run(command, *words):
        monkeypatch.setattr(sys, 'argv', [command, *words])
        try:
            status = importlib.import_module(f'lit_jax.commands.{command}').main()
        except UserError as error:
            text = str(error)
        except SystemExit as end:
            assert end.code == 2
            text = capsys.readouterr().err
        else:
            assert status == 1
            text = capsys.readouterr().out
        assert sorted(tmp_path.rglob('*')) == before
        return text
    return run


DIGITS = '--config=digits_dit'


@pytest.mark.parametrize('words, answer', [
    (['train', 'lit_b'], 'did you mean --config=lit_b?'),
    (['train', '--config=lit_bb'], 'such as lit_b'),
    (['train', '--config=baselines'], 'has rows; give one after the file'),
    (['train', '--config=digits_dit:wide'], 'this recipe has no rows'),
    (['train', '--config=vae_tiny'], 'run python train_vae.py --config=vae_tiny'),
    (['train_vae', DIGITS], 'run python train.py --config=digits_dit'),
    (['train_vae', '--config=vae_tiny'], 'give the VAE folder to write: --out=FOLDER'),
    (['train_vae', '--config=vae_tiny', '--workdir=x'], 'did you mean --out?'),
    (['train', DIGITS, '--out=x'], 'did you mean --workdir?'),
    (['train', DIGITS, '--train.steps=5'], 'did you mean --config.train.steps=5?'),
    (['train', DIGITS, 'train.steps=5'], 'did you mean --config.train.steps=5?'),
    (['train', DIGITS, '--config.train.step=5'], 'did you mean --config.train.steps?'),
    (['train', DIGITS, '--config.train.steps', '--dry_run'], 'train.steps needs a value'),
    (['train', DIGITS, '--config.model.mixer=linear'], '--config.model.mixer.name=linear'),
    (['train', DIGITS, '--config.model.mixer.name'], 'needs a value: a mixer'),
    (['train', DIGITS, '--config.model.stages=2'], 'say what it counts: last:2'),
    (['train', DIGITS, '--config.data.name=imagenet', '--dry_run'], 'did you mean imagenet2012?'),
    (['train', DIGITS, '--workdir=file'], '--workdir=file: file is a file, where a folder is needed'),
    (['train', DIGITS, '--workdir=file/run'], '--workdir=file/run: file is a file'),
    *(([command, 'models/mine'], 'did you mean --from=models/mine?')
      for command in ('sample', 'analyze', 'evaluate', 'serve_page')),
    (['evaluate', 'set.npz'], 'did you mean --samples=set.npz?'),
    (['prepare_latents', 'photos/'], 'did you mean --path=photos/?'),
    (['sample', '--from=models/digits_dit'], 'convert_torch_ckpt.py assets/digits_dit.safetensors --out'),
    (['sample', '--from=m', '--out=a.jpg'], 'did you mean a.png?'),
    (['sample', '--from=m', '--out=.npz'], 'the file has no name; give NAME.npz'),
    (['train', DIGITS, '--workdir='], 'argument --workdir: it is empty'),
    (['train', DIGITS, '--config.model.mlp_ratio=1e-9', '--dry_run'], 'model.mlp_ratio must be'),
    (['convert', 'm', '--out=m2', '--latent_scale=nan'], '--latent_scale must be a number above 0'),
    (['convert', 'm', '--out=m2', '--downscale=0'], '--downscale must be a whole number'),
    (['convert', 'm', '--out=m2', '--image_size=99999999'], '--image_size must be a whole number'),
    (['sample', '--from=m', '--out=file/a.png'], '--out=file/a.png: file is a file'),
    (['sample', '--from=m', '--out=file'], '--out=file: file is a file'),
    (['analyze', '--from=m', '--out=file/a'], 'file is a file'),
    (['evaluate', 'reference', '--data=digits', '--features=digits', '--out=file/a.npz'], 'file is a file'),
    (['convert', 'm', '--to_torch', '--out=file/a.safetensors'], 'something else stands there'),
    *((words, 'DiT.pt --out models/DiT') for words in (
        ['sample', '--from=DiT.pt'], ['sample', '--grid_compare', 'DiT.pt', 'DiT.pt'],
        ['analyze', '--from=DiT.pt'], ['serve_page', '--from=DiT.pt'],
        ['convert', 'DiT.pt', '--to_torch', '--out=a.safetensors'],
        ['prepare_latents', '--data=folder', '--path=.', '--vae=DiT.pt', '--image_size=8', '--out=o'],
        ['train', '--config=digits_lit', '--config.teacher.path=DiT.pt', '--dry_run'],
        ['train', '--config=digits_lit', '--config.inherit.path=DiT.pt', '--dry_run'],
        ['train', '--config=lit_b', '--config.latent.vae_path=DiT.pt', '--dry_run'],
        ['train', '--config=student', '--config.teacher.path=DiT.pt', '--dry_run'])),
    *((words, 'set.npz is a set of images or a reference') for words in (
        ['sample', '--from=set.npz'], ['analyze', '--from=set.npz'], ['serve_page', '--from=set.npz'],
        ['convert', 'set.npz', '--out=m'], ['sample', '--grid_compare', 'set.npz', 'set.npz'],
        ['train', '--config=digits_lit', '--config.teacher.path=set.npz', '--dry_run'],
        ['train', '--config=digits_lit', '--config.inherit.path=set.npz', '--dry_run'],
        ['train', '--config=student', '--config.teacher.path=set.npz', '--dry_run']))])
def test_the_answer_says_what_was_meant(say, words, answer):
    assert answer in say(*words)


@pytest.mark.slow
@pytest.mark.parametrize('words', [
    ['train', DIGITS], ['train_vae', '--config=vae_tiny', '--out=vae'], ['sample', '--from=m'], ['app'],
    ['convert_torch_ckpt', 'm', '--out=m2'], ['evaluate', '--samples=s.npz', '--reference=r.npz'],
    ['prepare_latents', '--data=digits', '--vae=v', '--image_size=8', '--out=l'], ['analyze', '--from=m']],
    ids=lambda words: words[0])
def test_something_is_said_before_the_slow_imports(words, tmp_path):
    """jax stands for what is slow: here it never comes."""
    (tmp_path / 'jax').mkdir()
    (tmp_path / 'jax' / '__init__.py').write_text('import time; time.sleep(100)')
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(tmp_path), str(ROOT)])}
    with subprocess.Popen([sys.executable, str(ROOT / f'{words[0]}.py'), *words[1:]], cwd=tmp_path, env=env,
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert 'starting' in process.stderr.readline()
        finally:
            process.kill()
