"""Virtual CPU devices have threads enough to wait for each other."""
import os
import sys
from pathlib import Path

import jax
import pytest

from lit_jax.runtime import virtual_devices

ASKS = '--xla_force_host_platform_device_count='


@pytest.fixture
def environment(monkeypatch):
    """Sets the variables that count, and only those."""
    def become(**variables):
        for name in ('XLA_FLAGS', 'PJRT_NPROC', 'NPROC'):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, 'cpu_count', lambda: 2)
    return become


@pytest.mark.parametrize('flags, devices', [('', 1), (f'{ASKS}8', 8), (f'--xla_a=true {ASKS}2 --xla_b=3', 2),
                                            (f'{ASKS}8 {ASKS}4', 4)])
def test_the_last_word_of_the_flags_counts(environment, flags, devices):
    environment(XLA_FLAGS=flags)
    assert virtual_devices.requested() == devices


def test_several_devices_get_threads(environment):
    environment(XLA_FLAGS=f'{ASKS}4')
    virtual_devices.give_threads()
    assert os.environ['PJRT_NPROC'] == '32'


@pytest.mark.parametrize('variables',
                         [{}, {'XLA_FLAGS': f'{ASKS}1'}, {'XLA_FLAGS': f'{ASKS}4', 'NPROC': '3'}])
def test_one_device_and_a_number_that_was_set_stay_as_they_are(environment, variables):
    environment(**variables)
    virtual_devices.give_threads()
    assert 'PJRT_NPROC' not in os.environ


@pytest.mark.skipif(sys.platform != 'linux', reason='threads are counted in /proc')
@pytest.mark.skipif(virtual_devices.requested() < 2, reason='no virtual devices were asked for')
def test_the_pool_of_this_process_has_them():
    """jaxlib takes the variable as it did when this was written: a smaller pool may lock up in any test on
    several devices."""
    jax.device_put(1.0).block_until_ready()
    names = [(task / 'comm').read_text().strip() for task in Path('/proc/self/task').iterdir()]
    assert names.count('tf_XLAEigen') >= int(os.environ.get('PJRT_NPROC') or os.environ['NPROC'])
