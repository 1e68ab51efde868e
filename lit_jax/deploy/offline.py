"""One folder with everything that drawing needs, for a machine without a network.

It is a model folder with the parts beside its arrays, where `sample.py` and `app.py` find them:

    vae/            the VAE
    text_encoder/   of a text model, int8 unless another dtype is asked for
    README.md       the commands"""
from pathlib import Path

import numpy as np

from lit_jax.checkpoint.load import read_null_caption, read_weights_config
from lit_jax.checkpoint.model_folder import check_target, is_model_folder, save_model_folder
from lit_jax.checkpoint.text_encoder_folder import load_text_encoder, save_text_encoder_folder
from lit_jax.checkpoint.vae_folder import load_vae, save_vae_folder
from lit_jax.convert.torch_export import check_finite, load_arrays_of, published, write_whole
from lit_jax.models.arch import conditioning
from lit_jax.runtime.claim import claims_out
from lit_jax.runtime.errors import human_bytes
from lit_jax.runtime.leaves import named_leaves, tree_bytes
from lit_jax.runtime.paths import as_path, check_folder, files_under, local_path
from lit_jax.runtime.storage import check_free_space
from lit_jax.sampling.pipelines import find_part, open_pipeline

PARTS = 'vae', 'text_encoder'
README = '''# {title}

Everything is in this folder; no command below needs a network.

    lit-jax app --from {title}{low}
    lit-jax sample --from {title} {what} --out drawn.png{low}
'''


@claims_out
def make_bundle(src, out, *, vae=None, text_encoder=None, text_dtype: str = 'int8',
                overwrite: bool = False) -> str:
    """Writes the folder, all of it or nothing; returns a line for each part. UserError where the parts do not
    belong together, one is missing, or weights are not finite.

    src: model folder or workdir. vae, text_encoder: their folders; those in `src` by default."""
    out = local_path(out)
    check_folder(out.parent, f'--out {out}')
    check_target(out, overwrite, 'model', is_model_folder)
    text = conditioning(read_weights_config(src)['model']) == 'text'
    options = {'text_dtype': text_dtype} if text else {}
    vae, text_encoder = vae or find_part(src, 'vae'), text_encoder or find_part(src, 'text_encoder')
    pipeline = open_pipeline(src, vae, text_encoder, **options)
    pipeline.check_decodes()
    config, params = load_arrays_of(as_path(src))
    for name, leaf in named_leaves(params).items():
        check_finite(name, np.asarray(leaf))
    weights = pipeline.weights() if text else {'model': tree_bytes(params)}
    check_free_space(out, sum(weights.values()))

    def write(folder: Path) -> None:
        null_caption = read_null_caption(src, config['provenance'].get('step')) if text else None
        save_model_folder(folder, published(config), params, null_caption=null_caption)
        if vae:
            found = load_vae(vae)
            save_vae_folder(folder / 'vae', found.config, found.params)
        if text:
            encoder = load_text_encoder(text_encoder, dtype=text_dtype)
            about = {**encoder.config, 'weights': encoder.network.weights}
            save_text_encoder_folder(folder / 'text_encoder', about, encoder.params, encoder.tokenizer)
        what = '--prompt "a red circle"' if text else '--classes 0,1'
        (folder / 'README.md').write_text(README.format(title=out.name, what=what,
                                                        low=' --low_memory' if text else ''))

    write_whole(out, params, write)
    return describe(out)


def describe(out: Path) -> str:
    """A line for the model and each part, with its size."""
    sizes: dict[str, int] = {}
    for name, size in files_under(out).items():
        part = name.partition('/')[0]
        part = part if part in PARTS else 'model'
        sizes[part] = sizes.get(part, 0) + size
    return '\n'.join([f'written  {out}', *(f'{part:<13}{human_bytes(size)}' for part, size in sizes.items())])
