"""Checks that a VAE fits a model and that two models can be compared."""
from collections.abc import Mapping, Sequence

from lit_jax.checkpoint.vae_folder import Vae
from lit_jax.data.latent_space import LatentSpace
from lit_jax.runtime.differences import check_alike

# Fields of the architecture that must agree between two models shown side by side.
_SHARED = ('channels', 'input_size', 'num_classes', 'caption_tokens', 'caption_channels')


def check_decoder(vae: Vae, config: Mapping, vae_path, source) -> None:
    """Raises one UserError that lists in what a VAE differs from the one of a model's latents."""
    decodes, wanted = LatentSpace.of_vae(vae), LatentSpace.of_model(config)
    decodes.check(wanted.decoded_by(decodes), f'in {vae_path}', f'in {source}',
                  'the VAE does not fit the model',
                  'Give --vae the folder of the VAE that made the latents of the training.')


def check_comparable(pipelines: Sequence) -> None:
    """Raises UserError unless inputs and latents agree: one noise and one VAE then serve all `pipelines`."""
    first, last = pipelines[0], pipelines[-1]
    facts = [{**{name: one.config['model'].get(name) for name in _SHARED},
              'latent': {name: one.config['latent'].get(name) for name in ('space', 'scale', 'downscale')}}
             for one in (first, last)]
    check_alike(*facts, f'in {first.source}', f'in {last.source}',
                'these two models cannot be compared on the same noise',
                'Give two models of one latent space, size and condition.', none_fits=True)
