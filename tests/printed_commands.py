"""Runs the commands that a program prints for a person to try, as a shell would."""
import os
import shlex
import subprocess
import sys
from pathlib import Path

from lit_jax.commands.serve_page import PageOptions
from lit_jax.runtime.options import parse_options

ROOT = Path(__file__).parents[1]


def run_printed(line: str, folder: Path) -> str:
    """What `python SCRIPT ...` prints in `folder`, after it ended well. A page is not served: only its flags
    are read."""
    python, script, *words = shlex.split(line, comments=True)
    assert python == 'python'
    if script == 'app.py':
        options = parse_options(PageOptions, words)
        assert all(Path(folder, path).is_dir() for path in (
            options.source, options.teacher, options.vae, options.text_encoder) if path)
        return ''
    done = subprocess.run([sys.executable, str(ROOT / script), *words], cwd=folder, capture_output=True,
                          text=True, timeout=300, env={**os.environ, 'PYTHONPATH': str(ROOT),
                                                       'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''})
    assert done.returncode == 0, f'{line}\n{done.stdout}\n{done.stderr}'
    return done.stdout


def printed_next(said: str) -> list[str]:
    """The commands below "Try next:" of a demo."""
    return [line.strip() for line in said.partition('Try next:')[2].splitlines() if line.startswith('  ')]
