"""Looks inside a model: `python analyze.py --help`, or `lit-jax analyze --help`
(lit_jax/commands/analyze.py)."""
if __name__ == '__main__':
    import signal
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))      # until they are caught
    from lit_jax.runtime import signals
    signals.catch()
    from lit_jax.commands import analyze
    from lit_jax.runtime import cli
    cli.run(analyze.main)
