"""Draws images: `python sample.py --help`, or `lit-jax sample --help` (lit_jax/commands/sample.py)."""
if __name__ == '__main__':
    import signal
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))      # until they are caught
    from lit_jax.runtime import signals
    signals.catch()
    from lit_jax.commands import sample
    from lit_jax.runtime import cli
    cli.run(sample.main)
