"""One judge for all tests of scores, and no cache of the person who runs them."""
import pytest
from scoring_samples import save_judge


@pytest.fixture(scope='session')
def judge(tmp_path_factory):
    """Path of a saved judge of digits."""
    return str(save_judge(tmp_path_factory.mktemp('judge') / 'judge.npz'))


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv('LIT_JAX_CACHE', str(tmp_path_factory.mktemp('cache')))


@pytest.fixture(scope='module', autouse=True)
def few_devices(two_devices):
    """See tests/conftest.py."""
