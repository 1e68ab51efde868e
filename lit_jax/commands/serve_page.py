"""Serves a local web page that draws images from classes or prompts; no data leaves this machine.

    python app.py                                               # the digits teacher in assets/
    python app.py --from=runs/digits_lit --teacher=models/digits_dit             # both, from the same noise
    python app.py --from=runs/lit_xl --vae=models/sd_vae
    python app.py --from=runs/lit_t2i --text_encoder=models/t5 --vae=models/sdxl_vae --low_memory

It needs Gradio: pip install "lit_jax[demo]". docs/start/page.md has more.
"""
import dataclasses
from dataclasses import dataclass

from lit_jax.runtime.options import option, parse_options


@dataclass(frozen=True, kw_only=True)
class PageOptions:
    """The models of the page, and its address."""
    source: str | None = option('model folder or workdir (default: the digits teacher in assets/)',
                                flag='--from', default=None)
    teacher: str | None = option('second model, drawn beside it from the same noise', default=None)
    vae: str | None = option('VAE folder, for latent models', default=None)
    text_encoder: str | None = option('text encoder folder, for text-to-image models', default=None)
    dtype: str = option('compute dtype: float32 or bfloat16', default='float32')
    text_dtype: str | None = option('dtype of the text encoder: float32, bfloat16 or int8 (default: float32 '
                                    'on CPU, bfloat16 elsewhere)', default=None)
    low_memory: bool = option('keep only one network in memory at a time: text encoder, backbone, VAE',
                              default=False)
    port: int = option('port of the page', default=7860)
    host: str = option('127.0.0.1: this machine only; 0.0.0.0: everyone in its network, without a password',
                       default='127.0.0.1')


def main() -> None:
    options = parse_options(PageOptions, description=__doc__)
    # jax is imported after the flags are read, so that wrong ones are reported at once.
    from lit_jax.app.serve import serve
    serve(**dataclasses.asdict(options))
