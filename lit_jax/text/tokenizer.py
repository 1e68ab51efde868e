"""Captions -> token ids, as in T5.

Reads `tokenizer.json` (the tokenizers library) and `spiece.model` (sentencepiece). They give the same ids,
except that only the first knows special tokens in a caption (`<extra_id_0>`). The libraries are imported
where they are used: models with class labels need neither."""
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lit_jax.runtime.errors import UserError, reason_of, shown
from lit_jax.runtime.json_file import parse_json
from lit_jax.runtime.paths import as_path, explain_unreadable

PAD, END, UNKNOWN = 0, 1, 2               # ids in every T5 and mT5
FILES = ('tokenizer.json', 'spiece.model')


@dataclass(frozen=True)
class Tokens:
    """ids and mask, int32 [B, L] (mask: 1 token, 0 padding), and the indices of captions that were cut."""
    ids: np.ndarray
    mask: np.ndarray
    truncated: list[int]


def clean_caption(caption: str) -> str:
    """As in PixArt-Σ and diffusers: lower case, stripped; unpaired surrogates become question marks."""
    return caption.encode('utf-8', 'replace').decode().strip().lower()


class Tokenizer:
    """A tokenizer from the `content` (bytes) of `file`, which is one of FILES. size: number of ids."""

    def __init__(self, file: str, content: bytes, source: str | None = None):
        if file not in FILES:
            raise UserError(f'{source or file} is no tokenizer that lit_jax reads; known: {", ".join(FILES)}')
        self.file, self.content = file, content
        source = source or file
        open_file = _open_json if file == FILES[0] else _open_sentencepiece
        self._ids, self.size, special = open_file(content, source)
        for name, want in (('<pad>', PAD), ('</s>', END), ('<unk>', UNKNOWN)):
            if special[name] != want:
                found = 'is not there' if special[name] is None else f'has the id {special[name]}'
                raise UserError(f'{source} is no tokenizer of T5: {name} {found}, expected {want}')

    def __reduce__(self):
        return Tokenizer, (self.file, self.content)

    @classmethod
    def load(cls, folder) -> 'Tokenizer':
        """The tokenizer in a local or remote `folder`; tokenizer.json if it has both files."""
        folder = as_path(folder)
        for name in FILES:
            if (folder / name).is_file():
                return cls(name, _read(folder / name), str(folder / name))
        raise UserError(missing_tokenizer(folder))

    def encode(self, captions: Sequence[str], length: int) -> Tokens:
        """Each caption, cleaned, as `length` ids: its tokens (cut if too many), the end token, padding."""
        if isinstance(captions, str) or not all(isinstance(caption, str) for caption in captions):
            raise UserError(f'captions must be a list of texts, got {shown(captions)}')
        if length < 1:
            raise UserError(f'length must be at least 1, for the end token, got {length}')
        ids_BL, mask_BL = (np.zeros((len(captions), length), np.int32) for _ in range(2))
        truncated = []
        for row, caption in enumerate(captions):
            ids = self._ids(clean_caption(caption))
            if len(ids) >= length:
                truncated.append(row)
            ids = [*ids[:length - 1], END]
            ids_BL[row, :len(ids)], mask_BL[row, :len(ids)] = ids, 1
        return Tokens(ids_BL, mask_BL, truncated)


def _read(path) -> bytes:
    with explain_unreadable(path):
        return path.read_bytes()


def missing_tokenizer(*folders) -> str:
    """The message for folders without a tokenizer."""
    where = ' or '.join(str(folder) for folder in folders)
    return (f'there is no tokenizer in {where}: expected {FILES[0]} or {FILES[1]}. Get it from where the '
            f'text encoder is from (diffusers pipelines have a folder tokenizer/ beside text_encoder/)')


def _open_json(content: bytes, source: str):
    """(text -> ids, number of ids, ids of the special tokens) through the tokenizers library."""
    try:
        import tokenizers
    except ImportError as error:
        raise UserError(f'{source} needs the package tokenizers: pip install tokenizers') from error
    parse_json(content, source, {'model': {}})
    with _explain_tokenizers(source):
        tokenizer = tokenizers.Tokenizer.from_str(content.decode('utf-8-sig'))
        # The file may set a length of its own.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        special = {name: tokenizer.token_to_id(name) for name in ('<pad>', '</s>', '<unk>')}
        size = tokenizer.get_vocab_size()

    def read(text: str) -> list[int]:
        with _explain_tokenizers(source):
            return tokenizer.encode(text, add_special_tokens=False).ids

    return read, size, special


@contextlib.contextmanager
def _explain_tokenizers(source: str):
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:      # bare Exceptions, and panics of its Rust code, which are none
        raise UserError(f'{source} is damaged, or no file of the tokenizers library ({reason_of(error)}); '
                        'download it again') from error


def _open_sentencepiece(content: bytes, source: str):
    """The same through sentencepiece."""
    try:
        import sentencepiece
    except ImportError as error:
        raise UserError(f'{source} needs the package sentencepiece: pip install sentencepiece') from error
    model = sentencepiece.SentencePieceProcessor()
    try:
        model.LoadFromSerializedProto(content)
    except (RuntimeError, TypeError) as error:
        raise UserError(f'{source} is damaged, or no sentencepiece model; get it again') from error
    special = {'<pad>': model.pad_id(), '</s>': model.eos_id(), '<unk>': model.unk_id()}
    return model.EncodeAsIds, model.vocab_size(), special
