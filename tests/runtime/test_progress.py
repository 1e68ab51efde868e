"""Progress of long jobs in the log."""
import logging

from lit_jax.runtime.progress import Progress


def test_nothing_done_yet_is_logged_too(caplog):
    """Devices that repeat another's work report steps that do not count."""
    caplog.set_level(logging.INFO, logger='lit_jax')
    with Progress(20, 'steps', seconds=0) as progress:
        progress.add(0)
        progress.add(20)
    assert [line.split(' (')[0] for line in caplog.messages] == ['0 of 20 steps', '20 of 20 steps']
