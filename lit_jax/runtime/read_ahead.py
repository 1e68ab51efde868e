"""Work started before its result is needed: on devices, or by threads that read."""
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor


def start_ahead(items: Iterable, start: Callable, count: int) -> Iterator[tuple]:
    """Yields (item, start(item)) in order, with the next `count` items already started."""
    started: deque[tuple] = deque()
    for item in items:
        started.append((item, start(item)))
        if len(started) > count:
            yield started.popleft()
    while started:
        yield started.popleft()


def read_all(read: Callable, entries: Iterable, threads: int) -> list:
    """[read(entry) for entry in entries], by threads."""
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(read, entries))


def read_ahead(read: Callable, blocks: Iterable[Sequence], threads: int, count: int = 2) -> Iterator[list]:
    """Yields [read(entry) for entry in block] for each block, read by threads `count` blocks ahead."""
    pool = ThreadPoolExecutor(threads)
    try:
        for _, futures in start_ahead(blocks, lambda block: [pool.submit(read, entry) for entry in block],
                                      count):
            yield [future.result() for future in futures]
    finally:
        pool.shutdown(cancel_futures=True)
