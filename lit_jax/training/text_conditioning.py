"""Text conditioning of a run: the frozen text encoder and the features of the empty caption."""
import numpy as np
from ml_collections import ConfigDict

from lit_jax.checkpoint import text_encoder_folder as folder
from lit_jax.checkpoint.foreign import conversion_hint
from lit_jax.checkpoint.text_encoder_folder import TextEncoder
from lit_jax.data.sources import CAPTIONED, Source
from lit_jax.recipes.recipe import is_text
from lit_jax.runtime.differences import find_differences
from lit_jax.runtime.errors import UserError
from lit_jax.text.encoder import encode_captions
from lit_jax.training.mesh import state_shardings


def reads_captions(config: ConfigDict) -> bool:
    """Whether batches hold captions as tokens that the step encodes with a text encoder."""
    return config.data.name in CAPTIONED


def find_text_problems(config: ConfigDict) -> list[str]:
    """Messages about a text encoder that is missing or does not fit."""
    if not reads_captions(config) or not is_text(config):
        return []
    path, text = config.text.encoder_path, config.text
    if not path or not folder.is_text_encoder_folder(path):
        if path and (hint := conversion_hint(path)):
            return [f'text.encoder_path: {path} is not a text encoder folder.{hint}']
        return [f'text.encoder_path: {path or "not given"}; to train from the captions of {config.data.name} '
                f'give the folder of {text.encoder or "the text encoder"} (python convert_torch_ckpt.py '
                f'PIPELINE/text_encoder --out models/t5), or cache their features first: python '
                f'prepare_latents.py --text_encoder=...']
    encoder = folder.read_text_encoder_config(path)
    return find_differences({'width': encoder['text_encoder']['width'], 'id': encoder['id']},
                            {'width': text.channels, 'id': text.encoder or None},
                            f'in text.encoder_path={path}', 'in the recipe', none_fits=True)


def text_encoder_path(config: ConfigDict) -> str:
    if problems := find_text_problems(config):
        raise UserError('\n'.join(problems))
    return config.text.encoder_path


def load_frozen_text_encoder(config: ConfigDict, mesh) -> TextEncoder | None:
    """The recipe's text encoder, sharded over the mesh; None unless batches hold captions."""
    if not reads_captions(config):
        return None
    dtype = 'bfloat16' if config.train.dtype == 'bfloat16' else 'float32'
    return folder.load_text_encoder(text_encoder_path(config), dtype,
                                    lambda abstract: state_shardings(abstract, mesh))


def null_features(config: ConfigDict, source: Source, encoder: TextEncoder | None) -> np.ndarray | None:
    """Features float32 [L, C] of the empty caption, in place of dropped ones; None for class models."""
    if not is_text(config):
        return None
    if encoder is None:
        return np.asarray(source.null_features[0], np.float32)
    return np.asarray(encode_captions(encoder, [''], config.text.tokens, batch_size=1).text[0], np.float32)


def caption_examples(config: ConfigDict, source: Source, encoder: TextEncoder | None,
                     null_text: np.ndarray | None) -> dict | None:
    """{'text', 'text_mask', 'null_text'} of the first captions, for the sample grids; None without those."""
    if not is_text(config) or not config.sample.every:
        return None
    elements = [source[index] for index in range(min(config.sample.count, len(source)))]
    mask, found = (np.stack([element[name][0] for element in elements])
                   for name in ('text_mask', 'text' if encoder is None else 'tokens'))
    text = np.asarray(found if encoder is None else encoder.encode(found, mask), np.float32)
    return {'text': text, 'text_mask': mask, 'null_text': null_text[None]}
