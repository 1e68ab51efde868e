"""Scores image sets and models: `python evaluate.py --help`, or `lit-jax evaluate --help`
(lit_jax/commands/evaluate.py)."""
if __name__ == '__main__':
    import signal
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))      # until they are caught
    from lit_jax.runtime import signals
    signals.catch()
    from lit_jax.commands import evaluate
    from lit_jax.runtime import cli
    cli.run(evaluate.main)
