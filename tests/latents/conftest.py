"""What the tests of cached latents share."""
import pytest


@pytest.fixture(scope='module', autouse=True)
def few_devices(two_devices):
    """See tests/conftest.py."""
