"""Caches latents: `python prepare_latents.py --help`, or `lit-jax prepare-latents --help`
(lit_jax/commands/prepare_latents.py)."""
if __name__ == '__main__':
    import signal
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))      # until they are caught
    from lit_jax.runtime import signals
    signals.catch()
    from lit_jax.commands import prepare_latents
    from lit_jax.runtime import cli
    cli.run(prepare_latents.main)
