"""From what a model draws to images: the VAE that belongs to its latents, checked, or none for pixels."""
from collections.abc import Mapping, Sequence

from lit_jax.checkpoint.vae_folder import Vae, load_vae
from lit_jax.data.latent_space import LatentSpace
from lit_jax.models.network import Model
from lit_jax.runtime.differences import check_alike
from lit_jax.runtime.errors import UserError

# Of the architecture: what two models that are shown side by side have in common.
_SHARED = ('channels', 'input_size', 'num_classes', 'caption_tokens', 'caption_channels')


def open_decoder(model: Model, vae_path: str | None, source) -> Vae | None:
    """The VAE of a model on latents, None for a model on pixels; several processes call it together.

    Raises UserError where one is missing, superfluous, or another than that of the latents the model was
    trained on.
    """
    latent = model.config['latent']
    if latent['space'] == 'pixels':
        if vae_path:
            raise UserError(f'{source} draws pixels, there is nothing to decode: leave --vae {vae_path} out')
        return None
    if not vae_path:
        return None
    vae = load_vae(vae_path)
    check_decoder(vae, model.config, vae_path, source)
    return vae


def check_decoder(vae: Vae, config: Mapping, vae_path, source) -> None:
    """Raises one UserError that lists in what a VAE differs from the one of a model's latents."""
    decodes, wanted = LatentSpace.of_vae(vae), LatentSpace.of_model(config)
    decodes.check(wanted.decoded_by(decodes), f'in {vae_path}', f'in {source}',
                  'the VAE does not fit the model',
                  'Give --vae the folder of the VAE that made the latents of the training.')


def check_comparable(configs: Sequence[Mapping], sources: Sequence) -> None:
    """Two models can start from the same noise and be decoded by one VAE if their inputs and latents agree;
    else UserError. configs: of one model or two."""
    facts = [{**{name: config['model'].get(name) for name in _SHARED},
              'latent': {name: config['latent'].get(name) for name in ('space', 'scale')}}
             for config in configs]
    check_alike(facts[0], facts[-1], f'in {sources[0]}', f'in {sources[-1]}',
                'these two models cannot be compared on the same noise',
                'Give two models of one latent space, size and condition.')


def class_names(config: dict, labels) -> list[str]:
    """The model's names of classes; 'class 207' where it knows none."""
    names = config.get('classes')
    return [names[label] if names and names[label] else f'class {label}' for label in labels]
