"""One place that sets up jax for the tests: CPU, eight virtual devices, full matmul precision."""
import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
if 'xla_force_host_platform_device_count' not in os.environ.get('XLA_FLAGS', ''):
    os.environ['XLA_FLAGS'] = os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'

# Tests compile the same small programs again and again; compiled ones are kept between runs as well.
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', os.path.join(os.path.dirname(__file__), '..', '.cache', 'xla'))
# Not the caches of the person who runs the tests.
os.environ.setdefault('LIT_JAX_CACHE', os.path.join(os.path.dirname(__file__), '..', '.cache', 'lit_jax'))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.1')

from pathlib import Path  # noqa: E402

import jax  # noqa: E402
import pytest  # noqa: E402

GOLDENS = Path(__file__).parent / 'goldens'


@pytest.fixture
def x64():
    """Turns 64-bit types on for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def goldens() -> Path:
    """The folder of the golden files (see tests/goldens/README.md)."""
    return GOLDENS
