"""Writes all that drawing needs to a folder: `python bundle.py --help`, or `lit-jax bundle --help`."""
if __name__ == '__main__':
    import signal
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))      # until they are caught
    from lit_jax.runtime import signals
    signals.catch()
    from lit_jax.commands import bundle
    from lit_jax.runtime import cli
    cli.run(bundle.main)
