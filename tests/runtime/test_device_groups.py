"""The same program on every device: any tree of rows, any number of devices, the same bits."""
import jax
import numpy as np
import pytest

from lit_jax.runtime.device_groups import DeviceGroups

ROWS = np.random.default_rng(0).normal(size=(23, 7)).astype(np.float32)
WEIGHTS = np.random.default_rng(1).normal(size=(7, 5)).astype(np.float32)


def product(weights, rows):
    return {'y': rows['x'] @ weights, 'twice': 2 * rows['x']}


def computed(devices, in_flight=0, group=3):
    groups = DeviceGroups(product, WEIGHTS, group, devices=jax.devices()[:devices])
    waves = [ROWS[start:start + groups.batch] for start in range(0, len(ROWS), groups.batch)]
    found = list(groups.run(waves, lambda wave: {'x': wave}, in_flight))
    assert [len(wave) for wave, _ in found] == [len(results['y']) for _, results in found]
    return {name: np.concatenate([results[name] for _, results in found]) for name in ('y', 'twice')}


@pytest.mark.parametrize('devices, in_flight', [(1, 0), (3, 1), (8, 0), (8, 100)])
def test_neither_devices_nor_what_is_in_flight_change_a_bit(devices, in_flight):
    one, found = computed(1, 3), computed(devices, in_flight)
    assert all(np.array_equal(one[name], found[name]) for name in one)
    np.testing.assert_allclose(found['y'], ROWS @ WEIGHTS, rtol=1e-5, atol=1e-5)
    assert np.array_equal(found['twice'], 2 * ROWS)


def test_what_is_compiled_ahead_is_used_and_weights_can_be_replaced(caplog):
    groups = DeviceGroups(product, None, 2, devices=jax.devices()[:4])
    assert groups.weights is None
    groups.compile(WEIGHTS, {'x': ROWS[:8]})
    groups.place(WEIGHTS)
    with jax.log_compiles():
        first = np.asarray(groups.start({'x': ROWS[:5]})['y'])
        groups.place(2 * WEIGHTS)
        second = np.asarray(groups.start({'x': ROWS[:8]})['y'])
    assert 'compil' not in ' '.join(record.getMessage().lower() for record in caplog.records
                                    if 'product' in record.getMessage())
    assert first.shape == second.shape == (8, 5) and np.array_equal(2 * first[:5], second[:5])
