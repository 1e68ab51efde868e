"""The old name of app.py."""
from lit_jax.commands import serve_page
from lit_jax.runtime import cli

if __name__ == '__main__':
    cli.run(serve_page.main)
