"""What several tests of checkpoints share."""
import sys

import pytest

from lit_jax.commands import convert as convert_torch_ckpt


@pytest.fixture
def convert(monkeypatch):
    """Runs the script's main with command line arguments."""
    def run(*args):
        monkeypatch.setattr(sys, 'argv', ['convert_torch_ckpt.py', *map(str, args)])
        return convert_torch_ckpt.main()
    return run
