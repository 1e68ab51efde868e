"""Converts autoencoders under the names of latent-diffusion's code (`encoder.down.0.block.0.conv1.weight`),
such as LightningDiT's VA-VAE, to VAE folders.

VA-VAE's diffusion models work with latents that are normalised channel by channel, (z - mean) / std. That is
an affine map of the channels, so it goes into the 1 x 1 convolutions at both ends of the latent: the folder's
latents are the normalised ones, with scale 1 and no shift, and everything else knows nothing of it. Mean and
deviation are written down in the folder's config."""
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from lit_jax.checkpoint.vae_folder import check_vae_target
from lit_jax.convert.torch_files import Source, open_source, source_from_arrays
from lit_jax.convert.torch_hub import hub_digests, refuse_flags
from lit_jax.convert.torch_import import VA_VAE, tool_name
from lit_jax.convert.vae_torch import ConvertedVae, read_vae_params, save_converted
from lit_jax.models.vae import check_vae_arch
from lit_jax.runtime.claim import claims_out
from lit_jax.runtime.errors import UserError, shown_name
from lit_jax.runtime.paths import local_path

FIRST = 'encoder.down.0.block.0.conv1.weight'      # tells these files
GROUPS = 32                                        # of all norms; no tensor shows it
_PARTS = 'encoder.', 'decoder.', 'quant_conv.', 'post_quant_conv.'
_NAMES = [(r'\.down\.(\d+)\.', r'.down_blocks.\1.'), (r'\.block\.(\d+)\.', r'.resnets.\1.'),
          (r'\.attn\.(\d+)\.', r'.attentions.\1.'), (r'\.downsample\.', '.downsamplers.0.'),
          (r'\.upsample\.', '.upsamplers.0.'), (r'\.mid\.attn_1\.', '.mid_block.attentions.0.'),
          (r'\.mid\.block_1\.', '.mid_block.resnets.0.'), (r'\.mid\.block_2\.', '.mid_block.resnets.1.'),
          (r'\.nin_shortcut\.', '.conv_shortcut.'), (r'^(\w+)\.norm_out\.', r'\1.conv_norm_out.'),
          (r'(attentions\.\d+)\.norm\.', r'\1.group_norm.'), (r'(attentions\.\d+)\.([qkv])\.', r'\1.to_\2.'),
          (r'(attentions\.\d+)\.proj_out\.', r'\1.to_out.0.')]


def is_ldm_vae(path) -> bool:
    """Whether `path` is a file with such names."""
    path = Path(path)
    return path.is_file() and FIRST in open_source(path).tensors


@claims_out
def convert_ldm_vae(src, out, *, vae_id: str | None = None, latents_stats: str | None = None,
                    overwrite: bool = False, asked: Iterable[str] = ()) -> ConvertedVae:
    """Reads the file `src` and writes the VAE folder `out`. UserError if it cannot; nothing is written then.

    vae_id: its name for data sets and models; default: VA-VAE's for its widths and channels, else the file's
    name. latents_stats: file of mean and deviation of the latents, {'mean', 'std'}, [1, C, 1, 1] each."""
    src, out = local_path(src), Path(out)
    refuse_flags(src, 'a VAE', asked)
    check_vae_target(out, overwrite)
    source = open_source(src)
    arch = _arch_of(source, src)
    # LightningDiT's is the one with 32 channels, at a 16th of the image.
    published = (arch['channels'], 2 ** (len(arch['widths']) - 1)) == (32, VA_VAE['downscale'])
    if published and not latents_stats:
        raise UserError(f'{src} has the latents of VA-VAE, which models see normalised by their mean and '
                        f'deviation: give --latents_stats latents_stats.pt, the file beside it')
    stats = read_stats(local_path(latents_stats), arch['channels']) if latents_stats else None
    params = read_vae_params(_renamed(source, len(arch['widths'])), arch, str(src))
    if stats:
        _normalise(params, *stats, src)
    provenance = {'source': src.name, 'tool': tool_name(), **hub_digests(source.files)}
    config = {'vae': arch, 'id': vae_id or (VA_VAE['vae'] if published else src.stem), 'scale': 1.0,
              'shift': 0.0, 'provenance': provenance}
    if stats:
        config['normalised'] = dict(zip(('mean', 'std'), (part.tolist() for part in stats), strict=True))
    return save_converted(src, out, config, params, told=vae_id is not None, overwrite=overwrite)


def _arch_of(source: Source, path: Path) -> dict:
    shapes = {key: info.shape for key, info in source.tensors.items()}
    levels = _count(shapes, r'encoder\.down\.(\d+)\.block')
    widths = [shapes.get(f'encoder.down.{i}.block.0.conv1.weight', (0,))[0] for i in range(levels)]
    attending = {int(found[1]) for key in shapes if (found := re.match(r'encoder\.down\.(\d+)\.attn\.', key))}
    ends = [shapes.get(key, ()) for key in ('encoder.conv_in.weight', 'decoder.conv_in.weight')]
    if any(len(shape) != 4 for shape in ends):
        raise UserError(f'{path} lacks encoder.conv_in.weight or decoder.conv_in.weight; it holds no whole '
                        f'autoencoder')
    return check_vae_arch({
        'widths': widths, 'layers': _count(shapes, r'encoder\.down\.0\.block\.(\d+)\.'), 'groups': GROUPS,
        'channels': ends[1][1], 'image_channels': ends[0][1], 'attention_levels': sorted(attending),
        'quant_conv': 'quant_conv.weight' in shapes, 'post_quant_conv': 'post_quant_conv.weight' in shapes,
        'mid_attention': any(key.startswith('encoder.mid.attn_1.') for key in shapes)})


def _count(keys: Iterable[str], pattern: str) -> int:
    return 1 + max((int(found[1]) for key in keys if (found := re.match(pattern, key))), default=-1)


def _renamed(source: Source, levels: int) -> Source:
    """The two towers under the names of diffusers; attention's 1 x 1 convolutions as matrices. What else a
    trainer kept (discriminator, other networks) is left."""
    state = {}
    for key in source.tensors:
        if not key.startswith(_PARTS):
            continue
        name = re.sub(r'\.up\.(\d+)\.', lambda found: f'.up_blocks.{levels - 1 - int(found[1])}.', key)
        for pattern, theirs in _NAMES:
            name = re.sub(pattern, theirs, name)
        values = source.read(key)
        state[name] = values[:, :, 0, 0] if '.attentions.' in name and values.ndim == 4 else values
    return source_from_arrays(state)


def read_stats(path: Path, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation [C], float64."""
    source = open_source(path)
    if not {'mean', 'std'} <= set(source.tensors):
        raise UserError(f'{path} must hold mean and std of the latents; it holds '
                        f'{", ".join(map(shown_name, list(source.tensors)[:8]))}')
    mean, std = (source.read(name).astype(np.float64).reshape(-1) for name in ('mean', 'std'))
    if len(mean) != channels or len(std) != channels:
        raise UserError(f'{path} holds mean and std of {len(mean)} and {len(std)} channels, the VAE has '
                        f'{channels}: these are the latents of another VAE')
    if not (np.isfinite(mean).all() and np.isfinite(std).all() and (std > 0).all()):
        raise UserError(f'{path}: mean must be finite, and std above 0')
    return mean, std


def _normalise(params: dict, mean: np.ndarray, std: np.ndarray, path: Path) -> None:
    """Lets the encoder give (z - mean) / std, and the decoder take it."""
    if not ('quant_conv' in params and 'post_quant_conv' in params):
        raise UserError(f'{path} has no quant_conv and post_quant_conv, which could hold --latents_stats')
    for name, change in (('quant_conv', _given), ('post_quant_conv', _taken)):
        layer = params[name]
        kernel, bias = (layer[part].astype(np.float64) for part in ('kernel', 'bias'))
        kernel, bias = change(kernel, bias, mean, std)
        params[name] = {'kernel': kernel.astype(np.float32), 'bias': bias.astype(np.float32)}


def _given(kernel: np.ndarray, bias: np.ndarray, mean: np.ndarray,
           std: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Moments: the mean divided by std, the log-variance less its log."""
    channels = len(mean)
    factor = np.concatenate([1 / std, np.ones(channels)])
    offset = np.concatenate([-mean / std, -2 * np.log(std)])
    return kernel * factor, bias * factor + offset


def _taken(kernel: np.ndarray, bias: np.ndarray, mean: np.ndarray,
           std: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """z·std + mean, then the convolution."""
    return kernel * std[:, None], bias + mean @ kernel[0, 0]
