"""The public names, as README and docs/start/python.md show them: every example of both runs, in order."""
import re
from pathlib import Path

import numpy as np
import pytest

import lit_jax
from lit_jax import api

ROOT = Path(__file__).parents[1]


def examples(page: str) -> list[str]:
    return re.findall(r'```python\n(.*?)```', (ROOT / page).read_text(), re.S)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp('notebook')


def test_what_the_package_offers_is_what_the_api_defines():
    assert sorted([*api.__all__, 'UserError', '__version__']) == sorted(lit_jax.__all__) == dir(lit_jax)
    assert all(getattr(lit_jax, name).__doc__ for name in api.__all__)


def test_the_examples_of_the_readme_run(folder, monkeypatch):
    (folder / 'readme').mkdir()
    monkeypatch.chdir(folder / 'readme')
    scope = {}
    for example in examples('README.md'):
        exec(example, scope)
    assert scope['images'].shape == (4, 8, 8, 1) and scope['images'].dtype == np.uint8
    assert all(Path(f'{name}.png').is_file() for name in '0378')


@pytest.mark.slow
def test_the_examples_of_the_page_run_in_order(folder, monkeypatch):
    monkeypatch.chdir(folder)
    scope, found = {}, examples('docs/start/python.md')
    assert len(found) >= 6 and max(len(example.splitlines()) for example in found) <= 10
    for example in found:
        exec(example, scope)
    assert scope['y'].shape == (2, 8, 8, 2)
    assert np.isfinite(scope['rows'][0]['scores']['fid'])
    assert Path('three.png').is_file()
    assert repr(scope['model']) == '<dit, softmax attention, 0.33 M parameters: 8x8x1 pixels, 10 classes>'
    for wrong, said in (({'prompts': ['a three']}, 'draws classes: give classes'), ({}, 'give classes'),
                        ({'classes': 3}, r'a list of their numbers, such as \[3, 7\], or names, got 3'),
                        ({'classes': ['three']}, 'unknown class'), ({'classes': [10]}, 'out of range'),
                        ({'classes': [3], 'seed': [1]}, 'seed must be a whole number, got')):
        with pytest.raises(lit_jax.UserError, match=said):
            scope['model'].sample(**wrong)
