"""Where no accelerator is, jax is told to take the CPU, in commands and in programs."""
import os
import sys
import types

import pytest

import lit_jax
from lit_jax.runtime import chips


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """machine(tpu=True, gpu=..., jax=...): what there is beside libtpu; nothing without a word."""
    monkeypatch.delenv('JAX_PLATFORMS', raising=False)
    (tmp_path / 'libtpu').mkdir()
    (tmp_path / 'libtpu' / '__init__.py').touch()
    monkeypatch.syspath_prepend(tmp_path)

    def be(tpu=False, gpu=False, jax=None):
        monkeypatch.setattr(chips, 'has_tpu', lambda: tpu)
        monkeypatch.setattr(chips, 'has_gpu', lambda: gpu)
        monkeypatch.setitem(sys.modules, 'jax', jax)
    return be


def jax_with(platforms):
    config = types.SimpleNamespace(jax_platforms=platforms)
    config.update = lambda name, value: setattr(config, name, value)
    return types.SimpleNamespace(config=config)


def test_cpu_is_chosen_where_libtpu_is_and_no_accelerator(machine):
    for more in ({'tpu': True}, {'gpu': True}, {'jax': jax_with('cuda')}):
        machine(**more)
        chips.choose_cpu()
        assert 'JAX_PLATFORMS' not in os.environ, more
    machine()
    chips.choose_cpu()
    assert os.environ['JAX_PLATFORMS'] == 'cpu'


def test_from_python_too_when_jax_is_imported_already(machine, monkeypatch):
    jax = jax_with(None)
    machine(jax=jax)
    monkeypatch.setitem(sys.modules, 'lit_jax.api', types.SimpleNamespace(load=3))
    assert lit_jax.load == 3
    assert jax.config.jax_platforms == os.environ['JAX_PLATFORMS'] == 'cpu'


def test_what_is_set_stays(machine, monkeypatch):
    monkeypatch.setenv('JAX_PLATFORMS', 'tpu')
    machine()
    chips.choose_cpu()
    assert os.environ['JAX_PLATFORMS'] == 'tpu'


def test_without_libtpu_jax_decides(machine, monkeypatch):
    machine()
    monkeypatch.setattr(chips.importlib.util, 'find_spec', lambda name: None)
    chips.choose_cpu()
    assert 'JAX_PLATFORMS' not in os.environ
