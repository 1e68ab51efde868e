"""Uploads a model to the Hugging Face hub, with its PyTorch code and a model card.

    python push.py runs/lit_s ME/lit-s --licence cc-by-nc-4.0 --figures scores
    python sample.py --from hf://ME/lit-s --classes 1,2 --out grid.png      # from any machine

It needs the extra `hub` (pip install "lit_jax[hub]") and a token: hf auth login, or HF_TOKEN.
"""
from dataclasses import dataclass

from lit_jax.runtime.hub import hub_name
from lit_jax.runtime.options import option, parse_options


@dataclass(frozen=True, kw_only=True)
class PushOptions:
    """A model and its place."""
    src: str = option('model folder or workdir', flag='MODEL')
    name: str = option('OWNER/NAME on the hub', flag='OWNER/NAME')
    private: bool = option('only you can see it', default=False)
    licence: str = option('of the weights, as the hub writes it, such as apache-2.0 or cc-by-nc-4.0; '
                          'default: other, and a note that it is that of the weights they come from',
                          default='')
    figures: str | None = option('folder of evaluate.py --out, whose table goes to the card', default=None,
                                 metavar='FOLDER')
    image: tuple[str, ...] = option('for the card; may be given several times; default: the newest sheet '
                                    'of a workdir', repeat=True, default=(), metavar='FILE')

    def __post_init__(self):
        hub_name(self.name)


def main() -> None:
    options = parse_options(PushOptions, description=__doc__)
    # Heavy modules come after the flags: a typing mistake is answered at once.
    from lit_jax.deploy.hub_models import push
    address = push(options.src, options.name, private=options.private, licence=options.licence,
                   figures=options.figures, images=options.image)
    print(f'pushed   {address}\nnext     lit_jax.load({f"hf://{hub_name(options.name)}"!r})')
