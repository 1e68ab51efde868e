"""No cache of the person who runs the tests, and two devices."""
import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv('LIT_JAX_CACHE', str(tmp_path_factory.mktemp('cache')))


@pytest.fixture(scope='module', autouse=True)
def few_devices(two_devices):
    """See tests/conftest.py."""
