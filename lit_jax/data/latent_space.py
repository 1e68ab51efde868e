"""The space that a diffusion model denoises: VAE latents or pixels. x0 = scale · (latent - shift)."""
import dataclasses
from collections.abc import Mapping

from lit_jax.runtime.differences import check_alike

# Fine-tuned with a fixed encoder: their latents are the same, each may decode what the other encoded.
ONE_ENCODER = ({'stabilityai/sd-vae-ft-ema', 'stabilityai/sd-vae-ft-mse'},)


@dataclasses.dataclass(frozen=True)
class LatentSpace:
    """None: not known, fits any."""
    space: str = 'vae'                # or 'pixels'
    vae: str | None = None            # id
    sha256: str | None = None         # of its weights
    scale: float | None = None
    shift: float | None = None
    downscale: int | None = None      # image side / latent side
    channels: int | None = None

    @classmethod
    def of_model(cls, config: Mapping) -> 'LatentSpace':
        """Of the config of a model folder or workdir."""
        return cls(**{name: config['latent'].get(name) for name in ('space', 'vae', 'scale', 'downscale')},
                   channels=config['model']['channels'])

    @classmethod
    def of_recipe(cls, latent: Mapping) -> 'LatentSpace':
        """Of the latent section of a recipe; training knows no shift."""
        return cls(**{name: latent[name] for name in ('space', 'scale', 'downscale', 'channels')},
                   vae=latent['vae'] or None, shift=0.0)

    @classmethod
    def of_vae(cls, vae) -> 'LatentSpace':
        """Of a `lit_jax.checkpoint.vae_folder.Vae`."""
        return cls(vae=vae.id, sha256=vae.sha256, scale=vae.scale, shift=vae.shift,
                   downscale=vae.network.downscale, channels=vae.network.channels)

    @classmethod
    def of_latents(cls, metadata: Mapping) -> 'LatentSpace':
        """Of cached latents."""
        vae = metadata['vae']
        return cls(metadata.get('space', 'vae'), vae['id'], **{
            name: vae[name] for name in ('sha256', 'scale', 'shift', 'downscale', 'channels')})

    def published(self) -> dict:
        """The latent section of a model's config."""
        return {name: getattr(self, name) for name in ('space', 'vae', 'scale', 'downscale')}

    def decoded_by(self, vae: 'LatentSpace') -> 'LatentSpace':
        """This space, with the id of `vae` where both have one encoder."""
        family = any({self.vae, vae.vae} <= family for family in ONE_ENCODER)
        return dataclasses.replace(self, vae=vae.vae) if family else self

    def check(self, other: 'LatentSpace', where: str, where_other: str, problem: str, advice: str) -> None:
        """Raises UserError that lists what differs; names of the places as for `check_alike`."""
        check_alike(self, other, where, where_other, problem, advice, rel_tol=1e-6, none_fits=True)
