"""What the tests of the page share."""
import pytest


@pytest.fixture(scope='module', autouse=True)
def few_devices(two_devices):
    """See tests/conftest.py."""
