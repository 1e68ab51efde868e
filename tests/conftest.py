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

import errno  # noqa: E402
import gc  # noqa: E402
import importlib.abc  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from pathlib import Path  # noqa: E402

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

from lit_jax.runtime import paths, virtual_devices  # noqa: E402

virtual_devices.give_threads()

# The same tests give the same answer twice. To search for new examples: HYPOTHESIS_PROFILE=search make test
hypothesis.settings.register_profile('proof', derandomize=True)
hypothesis.settings.register_profile('search')
hypothesis.settings.load_profile(os.environ.get('HYPOTHESIS_PROFILE', 'proof'))

# The quick tier compiles without LLVM's optimization, without MLIR's fusion emitters and in one part: all of
# that is for programs that run for longer than they compile.
QUICK_FLAGS = {'xla_backend_optimization_level': 0, 'xla_cpu_parallel_codegen_split_count': 1}
if jax.__version_info__ < (0, 11):      # later there is nothing to turn off
    QUICK_FLAGS['xla_cpu_use_fusion_emitters'] = 'false'
GOLDENS = Path(__file__).parent / 'goldens'
PEERS = ('torch', 'torchvision', 'diffusers', 'transformers', 'torch_fidelity', 'cleanfid', 'prdc')
GIGABYTES = 3       # a worker that holds more after a module forgets its compiled programs


_BEGAN = time.monotonic()


def pytest_addoption(parser):
    parser.addoption('--minutes', type=float, help='tests that would begin later than so many minutes are '
                                                   'skipped')
    parser.addoption('--kills', type=int, default=20, help='of the run in test_exact_resume.py')


def pytest_configure(config):
    """`-m "not slow ..."` is the quick tier; every other compiles as users do."""
    if config.getoption('markexpr').startswith('not slow'):
        for name, value in QUICK_FLAGS.items():
            if name not in os.environ['XLA_FLAGS']:
                os.environ['XLA_FLAGS'] += f' --{name}={value}'
    if 'not peers' in config.getoption('markexpr'):
        sys.meta_path.insert(0, WithoutPeers())


class WithoutPeers(importlib.abc.MetaPathFinder):
    """Peers are not there, installed or not: `make test` passes without them."""

    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in PEERS:
            raise ModuleNotFoundError(f'{name}: mark this test `peers`', name=name)


def pytest_collection_modifyitems(items):
    """Tests that read goldens are the parity tests: `make test-peers` repeats them, optimized."""
    for item in items:
        if 'goldens' in item.fixturenames:
            item.add_marker('parity')


def pytest_collection_finish():
    gc.collect()
    gc.freeze()         # what the imports made stays: no collection looks at it again
    gc.set_threshold(20_000, 20, 20)


def pytest_runtest_setup(item):
    minutes = item.config.getoption('minutes')
    if minutes and time.monotonic() - _BEGAN > 60 * minutes:
        pytest.skip(f'no time left: --minutes={minutes:g}')


@pytest.fixture(scope='module', autouse=True)
def bounded_memory():
    """Workers grew to 7 GB of compiled programs, most of which no other module uses."""
    yield
    pages = int(Path('/proc/self/statm').read_text().split()[1])
    if pages * os.sysconf('SC_PAGE_SIZE') > GIGABYTES << 30:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope='module')
def two_devices():
    """Programs that run on every device of a host are compiled for each: two are as good as eight."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, 'local_devices', lambda *args, **options: jax.devices()[:2])
        yield


@pytest.fixture
def read_only(monkeypatch):
    """No place can be written, as far as it is tried before work is done."""
    def fail(folder, name):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), os.fspath(folder))

    monkeypatch.setattr(paths, '_try_writing', fail)


@pytest.fixture
def x64():
    """Turns 64-bit types on for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope='session')
def judge(tmp_path_factory) -> str:
    """Path of a judge of digits that was hardly trained."""
    from scoring_samples import save_judge
    return str(save_judge(tmp_path_factory.mktemp('judge') / 'judge.npz'))


@pytest.fixture(scope='session')
def one_step(tmp_path_factory) -> Path:
    """The workdir of one training step of the tiny recipe, to be read; `shutil.copytree` it to change it."""
    from tiny import tiny_recipe

    from lit_jax.training import loop
    workdir = tmp_path_factory.mktemp('one_step') / 'run'
    assert loop.train(tiny_recipe(steps=1), workdir) == 'done'
    return workdir


@pytest.fixture
def goldens() -> Path:
    """The folder of the golden files (see tests/goldens/README.md)."""
    return GOLDENS
