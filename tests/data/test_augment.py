"""Mirrored in half of the cases, by the position in the stream alone."""
import numpy as np

from lit_jax.data.augment import random_flip
from lit_jax.data.base import ArraySource, Spec, random_generator
from lit_jax.data.pipeline import make_pipeline

# Every image rises from left to right; mirrored ones fall.
RISING = np.broadcast_to(np.linspace(-1, 1, 4, dtype=np.float32)[:, None], (16, 4, 4, 1))
SOURCE = ArraySource(Spec(4, 1, 16, ()), RISING, np.arange(16))


def falls(images) -> np.ndarray:
    return images[:, 0, 0, 0] > images[:, 0, -1, 0]


def test_half_of_the_images_are_mirrored_and_nothing_else_changes():
    element, flipped = {'image': RISING[0], 'label': np.int32(3)}, 0
    for number in range(1000):
        result = random_flip(element, random_generator(0, 'augment', number))
        assert result['label'] == 3 and result['image'].dtype == np.float32
        if falls(result['image'][None])[0]:
            flipped += 1
            np.testing.assert_array_equal(result['image'], RISING[0][:, ::-1])
        else:
            np.testing.assert_array_equal(result['image'], RISING[0])
    assert 400 < flipped < 600  # 6 standard deviations
    np.testing.assert_array_equal(element['image'], RISING[0])


def test_the_choices_have_not_changed():
    """A record: other choices in another version would change runs that are resumed."""
    choices = [falls(random_flip({'image': RISING[0]}, random_generator(5, 'augment', i))['image'][None])[0]
               for i in range(16)]
    assert ''.join(str(int(choice)) for choice in choices) == RECORD


RECORD = '1000110000011001'


def test_hosts_and_resumed_runs_flip_alike_and_epochs_differ():
    def batches(rows=None, start=0):
        return make_pipeline(SOURCE, global_batch=8, seed=1, rows=rows, augment=random_flip, start_step=start)

    whole = [batches().batch(k) for k in range(6)]
    for hosts in (2, 4):
        for host in range(hosts):
            rows = np.arange(8).reshape(hosts, -1)[host]
            for k, batch in enumerate(whole):
                np.testing.assert_array_equal(batches(rows).batch(k)['image'], batch['image'][rows])
    with iter(batches(start=3)) as resumed:
        np.testing.assert_array_equal(next(resumed)['image'], whole[3]['image'])
    by_epoch = [{int(label): bool(fell) for batch in whole[2 * e:2 * e + 2]
                 for label, fell in zip(batch['label'], falls(batch['image']), strict=True)}
                for e in range(3)]
    assert all(len(epoch) == 16 for epoch in by_epoch)
    assert by_epoch[0] != by_epoch[1] != by_epoch[2]
