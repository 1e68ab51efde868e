"""Fits a recipe: `python train.py --help`, or `lit-jax train --help` (lit_jax/commands/train.py)."""
if __name__ == '__main__':
    import signal
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))      # until they are caught
    from lit_jax.runtime import signals
    signals.catch()
    from lit_jax.commands import train
    from lit_jax.runtime import cli
    cli.run(train.main)
