"""Work that is started before it is asked for: in order, as far ahead as was said, ended with its reader."""
import threading

import pytest

from lit_jax.runtime.read_ahead import read_ahead, start_ahead


@pytest.mark.parametrize('count', [0, 1, 3, 9])
def test_items_are_started_ahead_and_come_in_order(count):
    started = []

    def start(item):
        started.append(item)
        return 10 * item

    for number, (item, result) in enumerate(start_ahead(iter(range(6)), start, count)):
        assert (item, result) == (number, 10 * number)
        assert started == list(range(min(6, number + count + 1)))


def test_blocks_are_read_by_threads_and_an_error_comes_where_it_is_met():
    def read(entry):
        if entry == 5:
            raise ValueError('five')
        return entry, threading.current_thread() is threading.main_thread()

    blocks = read_ahead(read, [[0, 1], [2], [], [4, 5]], threads=2)
    assert [next(blocks) for _ in range(3)] == [[(0, False), (1, False)], [(2, False)], []]
    with pytest.raises(ValueError, match='five'):
        next(blocks)


def test_no_thread_stays_when_the_reader_is_closed():
    before = threading.active_count()
    blocks = read_ahead(abs, [[-1], [-2], [-3], [-4]], threads=3)
    assert next(blocks) == [1] and threading.active_count() > before
    blocks.close()
    assert threading.active_count() == before
