"""Uploads a model to the hub: `python push.py --help`, or `lit-jax push --help`."""
if __name__ == '__main__':
    import signal
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))      # until they are caught
    from lit_jax.runtime import signals
    signals.catch()
    from lit_jax.commands import push
    from lit_jax.runtime import cli
    cli.run(push.main)
