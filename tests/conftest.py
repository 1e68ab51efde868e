"""One place that sets up jax for the tests: CPU, eight virtual devices, full matmul precision."""
import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
if 'xla_force_host_platform_device_count' not in os.environ.get('XLA_FLAGS', ''):
    os.environ['XLA_FLAGS'] = os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'

# Tests compile the same small programs again and again; compiled ones are kept between runs as well.
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR',
                      os.path.join(os.path.dirname(__file__), '..', '.cache', 'xla'))
# Not the caches of the person who runs the tests.
os.environ.setdefault('LIT_JAX_CACHE', os.path.join(os.path.dirname(__file__), '..', '.cache', 'lit_jax'))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.1')

import time  # noqa: E402
from pathlib import Path  # noqa: E402

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

from lit_jax.runtime import virtual_devices  # noqa: E402

virtual_devices.give_threads()

# The same tests give the same answer twice. To search for new examples: HYPOTHESIS_PROFILE=search make test
hypothesis.settings.register_profile('proof', derandomize=True)
hypothesis.settings.register_profile('search')
hypothesis.settings.load_profile(os.environ.get('HYPOTHESIS_PROFILE', 'proof'))

OPTIMIZATION = 'xla_backend_optimization_level'
GOLDENS = Path(__file__).parent / 'goldens'


_BEGAN = time.monotonic()


def pytest_addoption(parser):
    parser.addoption('--minutes', type=float, help='tests that would begin later than so many minutes are '
                                                   'skipped')


def pytest_configure(config):
    """The quick tier compiles without LLVM's optimization, which is a third of its time; everything else as
    users do."""
    if config.getoption('markexpr') == 'not slow' and OPTIMIZATION not in os.environ['XLA_FLAGS']:
        os.environ['XLA_FLAGS'] += f' --{OPTIMIZATION}=0'


def pytest_runtest_setup(item):
    minutes = item.config.getoption('minutes')
    if minutes and time.monotonic() - _BEGAN > 60 * minutes:
        pytest.skip(f'no time left: --minutes={minutes:g}')


@pytest.fixture
def x64():
    """Turns 64-bit types on for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def goldens() -> Path:
    """The folder of the golden files (see tests/goldens/README.md)."""
    return GOLDENS
