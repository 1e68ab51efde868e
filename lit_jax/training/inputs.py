"""What a run is trained on and from, so that a workdir is not resumed with other data or weights."""
from collections.abc import Mapping

from ml_collections import ConfigDict

from lit_jax.checkpoint.identity import weights_identity
from lit_jax.checkpoint.text_encoder_folder import read_text_encoder_config
from lit_jax.checkpoint.vae_folder import read_vae_config
from lit_jax.data.sources import Source
from lit_jax.runtime.storage import read_manifest
from lit_jax.text.tokenizer import FILES
from lit_jax.training.setup import reads_images
from lit_jax.training.text_conditioning import reads_captions


def identify_inputs(config: ConfigDict, source: Source, known: Mapping) -> dict:
    """{'data', 'teacher', 'inherit', 'vae', 'text_encoder': identity} of those that a recipe has; JSON-able,
    equal wherever they lie. Called by one process.

    known: those of the workdir. Its steps of a teacher that is a workdir itself, and trains on, are kept."""
    found = {'data': _identify_data(config.data.name, source)}
    if path := config.teacher.path:
        found['teacher'] = weights_identity(path, known.get('teacher'))
    if path := config.inherit.path:
        found['inherit'] = weights_identity(path, known.get('inherit'), needed=False)
    if reads_images(config):
        vae = read_vae_config(config.latent.vae_path)
        found['vae'] = {'sha256': vae['provenance']['sha256']}
    if reads_captions(config):
        path = config.text.encoder_path
        encoder, files = read_text_encoder_config(path), read_manifest(path) or {}
        found['text_encoder'] = {'sha256': encoder['provenance']['sha256'], 'weights': encoder['weights'],
                                 'tokenizer': [files[name] for name in FILES if name in files]}
    return found


def _identify_data(name: str, source: Source) -> dict:
    """The source's content, else its identity, else its name and numbers."""
    images = getattr(source, 'images', source)
    if hasattr(images, 'content'):      # an ImageSource, whose module others need not import
        own = images.content()
    else:
        own = getattr(source, 'identity', {'classes': source.spec.num_classes})
    return {'name': name, 'count': len(source), **own}
