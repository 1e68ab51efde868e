"""What a command says while it works, and that it ends with its parent."""
import logging
import os
import signal
import subprocess
import sys
import time
import types

import pytest

from lit_jax.runtime import progress
from lit_jax.runtime.alive import PARENT, Alive
from lit_jax.runtime.chips import has_tpu


def test_work_and_long_compilations_are_said(caplog):
    caplog.set_level(logging.INFO, 'lit_jax')
    alive = Alive(quiet=0, compile_seconds=0)
    with progress.working(lambda: 'image 3 of 5'):
        alive.look()
        alive.on_event('/jax/jaxpr_to_mlir_module_duration', 0, fun_name='jit(train_step)')
        alive.look()
        alive.on_event('/jax/backend_compile_duration', 12.0, fun_name='jit(train_step)')
    with progress.unwatched():
        alive.look()
    assert caplog.messages == ['image 3 of 5', 'compiling train_step, 0s so far',
                               'compiling train_step, 0s so far; image 3 of 5', 'compiled train_step in 12s']


def test_a_start_is_said_unless_something_else_was(monkeypatch, caplog):
    caplog.set_level(logging.INFO, 'lit_jax')
    monkeypatch.setattr('lit_jax.runtime.alive.GREETING_SECONDS', 0.2)
    for quiet in (True, False):
        progress.heard()
        Alive().start(f'starting {quiet}')
        for _ in range(5):
            time.sleep(0.08)
            quiet or progress.heard()
    assert caplog.messages == ['starting True']


def test_jax_is_listened_to_once_it_is_imported_and_never_imported_by_the_watching_thread(monkeypatch):
    alive, heard = Alive(), []
    for module in (None, types.ModuleType('jax.monitoring')):      # not yet, and half imported
        monkeypatch.setitem(sys.modules, 'jax.monitoring', module)
        alive.look()
    sys.modules['jax.monitoring'].register_event_duration_secs_listener = heard.append
    alive.look()
    alive.look()
    assert heard == [alive.on_event]


@pytest.mark.slow
def test_a_command_ends_with_its_parent():
    child = ('import time; from lit_jax.runtime.alive import stop_with_parent as stop; stop(); '
             'print(1, flush=True); time.sleep(60)')
    parent = f"""import os, subprocess, sys
child = subprocess.Popen([sys.executable, '-c', {child!r}], env=os.environ | {{{PARENT!r}: str(os.getpid())}},
                         stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
child.wait()
"""
    with subprocess.Popen([sys.executable, '-c', parent], stdout=subprocess.PIPE, text=True) as process:
        pid = int(process.stdout.readline())
        process.kill()
    for _ in range(50):
        time.sleep(0.1)
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
    os.kill(pid, signal.SIGKILL)
    pytest.fail('the child went on')


def test_tpus_are_told_from_disks_and_network_cards(tmp_path):
    folder = tmp_path / 'sys/bus/pci/devices/0'
    folder.mkdir(parents=True)
    for kind, found in (('0x020000', False), ('0x088000', True)):
        (folder / 'vendor').write_text('0x1ae0\n')
        (folder / 'class').write_text(kind)
        assert has_tpu(tmp_path) == found
