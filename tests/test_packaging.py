"""The package and its one command: verbs, versions in one place, what is shipped beside the code."""
import ast
import importlib
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import lit_jax
from lit_jax import __main__ as command
from lit_jax.runtime.errors import UserError, as_typed

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())


def call(*arguments, folder=ROOT):
    """(exit status, stdout, stderr) of `lit-jax ARGUMENTS`, in a process of its own."""
    done = subprocess.run([sys.executable, '-m', 'lit_jax', *arguments], cwd=folder, capture_output=True,
                          text=True, timeout=60, env={**os.environ, 'PYTHONPATH': str(ROOT)})
    return done.returncode, done.stdout, done.stderr


def test_help_lists_every_verb_and_each_runs_a_command():
    status, out, _ = call('--help')
    assert status == 0
    for verb, (module, line) in command.VERBS.items():
        assert re.search(rf'^  {verb} +{re.escape(line)}$', out, re.M)
        assert callable(importlib.import_module(f'lit_jax.commands.{module}').main)


def test_every_command_has_a_verb_and_a_script():
    commands = {path.stem for path in (ROOT / 'lit_jax' / 'commands').glob('*.py')
                if '\ndef main(' in path.read_text()}
    scripts = {imported for path in ROOT.glob('*.py')
               for imported in re.findall(r'^ *from lit_jax\.commands import (\w+)', path.read_text(), re.M)}
    assert {module for module, _ in command.VERBS.values()} == commands == scripts


@pytest.mark.parametrize('arguments, status, said', [
    (['--version'], 0, f'lit_jax {lit_jax.__version__}'), ([], 2, 'usage: lit-jax VERB'),
    (['sample', '--help'], 0, 'usage: lit-jax sample '),
    (['trian'], 1, "unknown verb 'trian'; did you mean train?"),
    (['fly'], 1, "unknown verb 'fly'; known: convert, prepare-latents"),
    (['train', '--config=configs/sana_b.py'], 1, 'configs/sana_b.py is now configs/baselines.py:sana_b'),
    (['train', '--config', 'lit_xxl'], 1, 'the recipe lit_xxl does not exist')])
def test_what_the_command_says(arguments, status, said):
    done, out, errors = call(*arguments)
    assert done == status and said in out + errors and 'Traceback' not in errors


def test_a_verb_sees_its_own_arguments(monkeypatch):
    seen = []
    monkeypatch.setattr('lit_jax.commands.sample.main', lambda: seen.append(list(sys.argv)))
    monkeypatch.setattr(sys, 'argv', ['lit-jax', 'sample', '--out', 'x.png'])
    command.run_verb()
    assert seen == [['lit-jax sample', '--out', 'x.png']]
    monkeypatch.setattr(sys, 'argv', ['lit-jax', 'samples'])
    with pytest.raises(UserError, match='did you mean sample'):
        command.run_verb()


@pytest.mark.parametrize('started', ['/usr/bin/lit-jax', 'lit-jax train'])
def test_commands_in_messages_are_those_that_were_installed(monkeypatch, started):
    text = 'run python train_vae.py --config=x, or `python convert_torch_ckpt.py SRC`; python mine.py'
    assert as_typed(text) == text
    monkeypatch.setattr(sys, 'argv', [started])
    assert as_typed(text) == 'run lit-jax train-vae --config=x, or `lit-jax convert SRC`; python mine.py'
    scripts = {path.stem for path in ROOT.glob('*.py')} - {'demo'}
    assert {as_typed(f'python {name}.py').removeprefix('lit-jax ') for name in scripts} == {*command.VERBS}


@pytest.mark.slow
def test_a_recipe_is_found_by_name_from_any_folder(tmp_path):
    status, out, errors = call('train', '--config=lit_xl', '--dry_run', folder=tmp_path)
    assert status == 1, errors           # its latents are not here
    assert '675,242,528 parameters' in out and 'cannot run here yet' in out


def test_versions_are_pinned_in_one_place_and_the_tests_need_no_pytorch():
    assert [path.name for path in ROOT.glob('requirements*.txt')] == ['requirements.txt']
    assert re.findall(r'^[^#\n].*', (ROOT / 'requirements.txt').read_text(), re.M) == ['-e .']
    extras = PROJECT['project']['optional-dependencies']
    assert {'torch', 'tpu', 'gcs', 'cuda12', 'cuda13', 'demo', 'test', 'peers', 'docs', 'wandb',
            'tensorboard'} <= set(extras)
    heavy = re.compile(r'torch|diffusers|transformers|lit_jax\[(torch|peers)')
    assert [name for name in extras['test'] if heavy.match(name)] == []
    pinned = re.compile(r'^(lit_jax\[[\w,]+\]|hatchling\b.*|.+[=<>]=?\d.*)$')
    assert [name for names in ([PROJECT['project']['dependencies'], *extras.values()]) for name in names
            if not pinned.match(name)] == []


def test_every_room_has_its_place_in_the_order():
    (contract,) = PROJECT['tool']['importlinter']['contracts']
    rooms = {path.parent.name for path in (ROOT / 'lit_jax').glob('*/__init__.py')}
    assert rooms | {'__main__', 'api'} == set(contract['layers']) and 'ignore_imports' not in contract


def test_the_package_root_imports_rooms_only_when_asked():
    """Its lazy names are strings: no arrow upwards for the rooms that ask for `lit_jax.__version__`."""
    tree = ast.parse((ROOT / 'lit_jax' / '__init__.py').read_text())
    at_once = [node.module for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert at_once == []      # `lit_jax.api` is for type checkers


MENTIONED = re.compile(r'\b(?:configs/[\w/]+\.py|requirements[\w-]*\.txt|assets/\w+\.\w+)')


def test_files_that_code_names_exist():
    """Of the pages, tests/test_docs.py knows more."""
    suffixes = ('.py', '.sh', '.sbatch', '.Dockerfile')
    sources = [path for folder in ('lit_jax', 'configs', 'examples', 'benchmarks', 'docker', 'launch')
               for path in (ROOT / folder).rglob('*') if path.suffix in suffixes]
    missing = {f'{path.relative_to(ROOT)}: {name}' for path in sources
               for name in MENTIONED.findall(path.read_text(encoding='utf-8')) if not (ROOT / name).exists()}
    assert len(sources) > 200 and missing == set()
