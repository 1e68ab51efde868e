"""Several real jax processes on this machine, joined over loopback with the CPU collectives (gloo).

    results = run_processes(['train.py', '--coordinator={coordinator}', '--num_processes={num_processes}',
                             '--process_id={process_id}', ...], 4)
    results = run_processes([__file__], 2, devices_each=2)      # a script that calls `join()` first

Every argument may hold the three places in braces; the same values are in the environment as
TEST_COORDINATOR, TEST_NUM_PROCESSES and TEST_PROCESS_ID. What a process prints (both streams) goes to a file,
so that no pipe fills up. Processes are ended with SIGKILL, by group: jax.distributed catches SIGTERM."""
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent


def on_cpu(devices: int = 1) -> dict:
    """The environment of a process on so many virtual CPU devices that computes the bits of this one:
    compiled by the same flags, of which the last word counts."""
    return {**os.environ, 'JAX_PLATFORMS': 'cpu',
            'XLA_FLAGS':
            f'{os.environ.get("XLA_FLAGS", "")} --xla_force_host_platform_device_count={devices}'}


class Processes:
    """Started processes; `wait` collects them. A context manager: what still runs at its end is killed."""

    def __init__(self, args: list, n: int, *, devices_each: int = 1, env: dict | None = None, cwd=ROOT):
        """args: what follows `python`; n: how many processes; devices_each: virtual CPU devices of each;
        env: more variables; cwd: where they start."""
        coordinator = f'127.0.0.1:{free_port()}'
        self._files = [tempfile.NamedTemporaryFile('w+', prefix='process.', suffix='.txt') for _ in range(n)]
        self._popen = []
        try:
            for i in range(n):
                places = {'coordinator': coordinator, 'num_processes': n, 'process_id': i}
                self._popen.append(subprocess.Popen(
                    [sys.executable, *(_fill(str(arg), places) for arg in args)], cwd=cwd,
                    start_new_session=True, env=_environment(places, devices_each, env),
                    stdin=subprocess.DEVNULL, stdout=self._files[i],
                    stderr=subprocess.STDOUT))
        except BaseException:
            self.kill()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()
        for file in self._files:
            file.close()

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._popen]

    def output(self, i: int) -> str:
        """What process i has printed until now."""
        return Path(self._files[i].name).read_text(errors='replace')

    def returncode(self, i: int) -> int | None:
        """None while process i runs; -9 after SIGKILL."""
        return self._popen[i].poll()

    def signal(self, i: int, number: int) -> None:
        """Sends a signal to process i, and to no child of it."""
        self._popen[i].send_signal(number)

    def kill(self, *which: int) -> None:
        """SIGKILL to the groups of these processes (none given: all); those that have ended are left
        alone."""
        for i in which or range(len(self._popen)):
            if self._popen[i].poll() is None:
                os.killpg(self._popen[i].pid, signal.SIGKILL)
                self._popen[i].wait()

    def wait_for_output(self, i: int, text: str, timeout: float = 60) -> str:
        """Waits until process i has printed `text`; AssertionError with what it did print if it ends or time
        is up."""
        deadline = time.monotonic() + timeout
        while text not in self.output(i):
            ended = self.returncode(i) is not None and text not in self.output(i)
            assert not ended and time.monotonic() < deadline, \
                f'process {i} (status {self.returncode(i)}) did not print {text!r}:\n{self.output(i)}'
            time.sleep(0.05)
        return self.output(i)

    def wait(self, timeout: float = 120) -> list[tuple[int, str]]:
        """[(returncode, output), ...] in order. Those still running after `timeout` seconds in all are
        killed: -9, and the last line of their output says so."""
        deadline, late = time.monotonic() + timeout, set()
        for i, process in enumerate(self._popen):
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                late.add(i)
        self.kill()
        said = f'\n[killed: still running after {timeout:g} s]'
        return [(process.returncode, self.output(i) + (said if i in late else ''))
                for i, process in enumerate(self._popen)]


def start_processes(args: list, n: int, **options) -> Processes:
    """`Processes`, for a test that signals or kills some of them on the way."""
    return Processes(args, n, **options)


def run_processes(args, n: int, devices_each: int = 1, timeout: float = 120, env: dict | None = None,
                  cwd=ROOT) -> list[tuple[int, str]]:
    """Starts n processes of `python ARGS...` (a list, or one script), waits, and returns [(returncode,
    output), ...]."""
    args = [args] if isinstance(args, str | os.PathLike) else args
    with Processes(args, n, devices_each=devices_each, env=env, cwd=cwd) as processes:
        return processes.wait(timeout)


def assert_all_good(results: list[tuple[int, str]]) -> None:
    """Fails with everything that was printed unless all processes ended with 0."""
    bad = [i for i, (status, _) in enumerate(results) if status != 0]
    assert not bad, '\n'.join(f'--- process {i}: status {status}\n{output}'
                              for i, (status, output) in enumerate(results))


def join(**options) -> None:
    """In a script started by this module: joins the other processes (jax.distributed). Before any use of a
    device."""
    import jax
    jax.distributed.initialize(os.environ['TEST_COORDINATOR'], int(os.environ['TEST_NUM_PROCESSES']),
                               int(os.environ['TEST_PROCESS_ID']), initialization_timeout=60, **options)


def free_port() -> int:
    """A TCP port on loopback that nobody listens on now."""
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def _fill(arg: str, places: dict) -> str:
    for name, value in places.items():
        arg = arg.replace('{' + name + '}', str(value))
    return arg


def _environment(places: dict, devices_each: int, env: dict | None) -> dict:
    path = os.pathsep.join([str(ROOT), str(TESTS), *filter(None, [os.environ.get('PYTHONPATH')])])
    return {'JAX_COMPILATION_CACHE_DIR': str(ROOT / '.cache' / 'xla'),
            'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.1', **on_cpu(devices_each),
            'JAX_CPU_COLLECTIVES_IMPLEMENTATION': 'gloo', 'PYTHONPATH': path, 'PYTHONUNBUFFERED': '1',
            **{f'TEST_{name.upper()}': str(value) for name, value in places.items()}, **(env or {})}
