"""The VAE that belongs to a model's latents, and the names of its classes."""
import math

from lit_jax.runtime.errors import UserError

# Fine-tuned with the encoder held fixed: their latents are the same, each may decode what the other encoded.
ONE_ENCODER = ({'stabilityai/sd-vae-ft-ema', 'stabilityai/sd-vae-ft-mse'},)


def check_decoder(vae, config: dict, vae_path, source) -> None:
    """Raises one UserError that lists in what a VAE differs from the one of a model's latents."""
    latent, arch = config['latent'], config['model']
    wanted = latent['vae'] or vae.id
    same_encoder = vae.id == wanted or any({vae.id, wanted} <= family for family in ONE_ENCODER)
    problems = [] if same_encoder else [f'VAE id: {vae.id!r} in {vae_path}, {wanted!r} in {source}']
    if not math.isclose(vae.scale, latent['scale'], rel_tol=1e-6):
        problems.append(f'latent scale: {vae.scale:g} in {vae_path}, {latent["scale"]:g} in {source}')
    if vae.network.channels != arch['channels']:
        problems.append(f'latent channels: {vae.network.channels} in {vae_path}, {arch["channels"]} in '
                        f'{source}')
    if latent.get('downscale', vae.network.downscale) != vae.network.downscale:
        problems.append(
            f'downscale: {vae.network.downscale} in {vae_path}, {latent["downscale"]} in {source}')
    if problems:
        raise UserError('the VAE does not fit the model:\n  ' + '\n  '.join(problems) +
                        '\nGive --vae the folder of the VAE that made the latents of the training.')


def class_names(config: dict, labels) -> list[str]:
    """The model's names of classes; 'class 207' where it knows none."""
    names = config.get('classes')
    return [names[label] if names and names[label] else f'class {label}' for label in labels]
