"""Converts checkpoints: `python convert_torch_ckpt.py --help`, or `lit-jax convert --help`
(lit_jax/commands/convert.py)."""
if __name__ == '__main__':
    import signal
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))      # until they are caught
    from lit_jax.runtime import signals
    signals.catch()
    from lit_jax.commands import convert
    from lit_jax.runtime import cli
    cli.run(convert.main)
