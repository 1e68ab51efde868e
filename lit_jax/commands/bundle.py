"""Writes one folder with everything that drawing needs: the model, its VAE, its text encoder in int8.

    python bundle.py --from runs/lit_t2i --vae models/sdxl_vae --text_encoder models/t5 --out laptop
    python app.py --from laptop --low_memory            # no network needed
    python sample.py --from laptop --prompt "a red circle" --out grid.png --low_memory
"""
from dataclasses import dataclass

from lit_jax.runtime.errors import as_typed
from lit_jax.runtime.options import option, parse_options


@dataclass(frozen=True, kw_only=True)
class BundleOptions:
    """The parts."""
    source: str = option('model folder or workdir', flag='--from')
    out: str = option('output folder')
    vae: str | None = option('VAE folder, of a model of latents', default=None)
    text_encoder: str | None = option('text encoder folder, of a text model', default=None)
    text_dtype: str = option('of the text encoder in the folder', choices=('int8', 'bfloat16', 'float32'),
                             default='int8')
    overwrite: bool = option('replace an existing output', default=False)


def main() -> None:
    options = parse_options(BundleOptions, description=__doc__)
    # jax comes after the flags: a typing mistake is answered at once.
    from lit_jax.deploy.offline import make_bundle
    said = make_bundle(options.source, options.out, vae=options.vae, text_encoder=options.text_encoder,
                       text_dtype=options.text_dtype, overwrite=options.overwrite)
    print(as_typed(f'{said}\nnext     python app.py --from {options.out}'))
