"""Fits a small VAE: `python train_vae.py --help`, or `lit-jax train-vae --help`
(lit_jax/commands/train_vae.py)."""
if __name__ == '__main__':
    import signal
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))      # until they are caught
    from lit_jax.runtime import signals
    signals.catch()
    from lit_jax.commands import train_vae
    from lit_jax.runtime import cli
    cli.run(train_vae.main)
