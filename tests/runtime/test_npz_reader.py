"""What .npz files hold, read with their checksums and sizes compared."""
import numpy as np
import pytest

from lit_jax.runtime.errors import UserError
from lit_jax.runtime.npz_file import write_npz
from lit_jax.runtime.npz_reader import Npz


@pytest.mark.parametrize('order', '<>')
def test_a_text_is_read_whatever_its_byte_order_and_impossible_characters_are_told(tmp_path, order):
    text = np.array('{"a": "é 𝄞"}', f'{order}U20')
    impossible = np.frombuffer(np.array([0x7B, 0x110000], f'{order}u4').tobytes(), f'{order}U2').reshape(())
    write_npz(path := tmp_path / 'texts.npz', {'whole': text, 'impossible': impossible})
    with Npz(path) as file:
        assert file.text('whole') == str(text)
        with pytest.raises(UserError, match=r'texts\.npz.*impossible'):
            file.text('impossible')
