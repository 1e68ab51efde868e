"""Writes models for other programs: `python export.py --help`, or `lit-jax export --help`."""
if __name__ == '__main__':
    import signal
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))      # until they are caught
    from lit_jax.runtime import signals
    signals.catch()
    from lit_jax.commands import export
    from lit_jax.runtime import cli
    cli.run(export.main)
