"""The mixer and the ffn of a model, inferred from the tensors of a PyTorch file.

What shapes do not show (heads of softmax attention, activation, routed heads per token of MoH) comes from the
published sizes (`lit_jax.recipes.systems`), the metadata of a folder, or the caller."""
from lit_jax.convert.torch_survey import FFN_LEAVES, MIXER_LEAVES, Found, Hints
from lit_jax.models.facts import Blocks
from lit_jax.models.ffn import FFNS
from lit_jax.models.mixers import MIXERS
from lit_jax.recipes.systems import SYSTEMS

# The sizes of the papers whose files do not show all of the mixer.
PUBLISHED = [model for system in ('dit', 'moh_dit') for size, model in SYSTEMS[system].sizes.items()
             if not size.startswith('dydi_')]


def infer_ffn(found: Found) -> tuple[str, float, list[str]]:
    """(name, ratio of its inner width, problems)."""
    name = max(FFN_LEAVES, key=lambda name: found.count(FFN_LEAVES[name]))
    width, hidden = found.sizes['D'], found.sizes['F']
    if name not in ('swiglu', 'swiglu_bias'):
        return name, hidden / width, []
    kind = FFNS[name]
    # Two thirds of ratio · D, rounded: several ratios give the same width. DiG's and LightningDiT's is 4.
    for ratio in (4.0, 1.5 * hidden / width, 1.5 * (hidden + 0.5) / width):
        if kind.hidden_width(width, ratio) == hidden:
            return name, ratio, []
    return name, 4.0, [f'the SwiGLU has {hidden} inner channels; multiples of 256 are expected']


def infer_blocks(found: Found, hints: Hints) -> Blocks:
    """The mixer of every block: the one that most of the file's tensors belong to, read by its own rules."""
    ffn = infer_ffn(found)[0]
    name = max(MIXERS, key=lambda name: (found.count(MIXER_LEAVES[name]), MIXERS[name].published_ffn == ffn))
    blocks = MIXERS[name].read_torch(found, hints, PUBLISHED)
    blocks.mixer = {'name': name, **blocks.mixer}
    return blocks
