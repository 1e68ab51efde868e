"""Serves the local page: `python app.py --help`, or `lit-jax app --help` (lit_jax/commands/serve_page.py)."""
from lit_jax.commands import serve_page
from lit_jax.runtime import cli

if __name__ == '__main__':
    cli.run(serve_page.main)
