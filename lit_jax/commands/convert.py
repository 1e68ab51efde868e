"""Converts PyTorch weights to model folders, and back.

    python convert_torch_ckpt.py DiT-XL-2-256x256.pt --out models/dit_xl
    python convert_torch_ckpt.py runs/0123456.pt --weights model --out models/mine     # DiT's own training
    python convert_torch_ckpt.py mine.pt --vae ID --latent_scale 0.9 --downscale 4 --out models/mine
    python convert_torch_ckpt.py facebook_DiT-XL-2-256/ --out models/dit_xl    # a diffusers folder
    python convert_torch_ckpt.py SiT-XL-2-256x256.pt --out models/sit_xl   # SiT and REPA
    python convert_torch_ckpt.py DiG-S-2.pt --out models/dig_s                 # DiG and MoH-DiT
    python convert_torch_ckpt.py sd-vae-ft-ema/ --out models/sd_vae       # an AutoencoderKL of diffusers
    python convert_torch_ckpt.py vavae.pt --latents_stats latents_stats.pt --out models/va_vae    # VA-VAE
    python convert_torch_ckpt.py PixArt-Sigma/text_encoder --out models/t5        # a T5 and its tokenizer
    python convert_torch_ckpt.py pt_inception-2015-12-05-6726825d.pth --out models/inception     # for FID
    python convert_torch_ckpt.py PixArt-Sigma-XL-2-512-MS.pth --image_size 512 --out models/pixart_512
    python convert_torch_ckpt.py models/lit_xl --to_torch --out lit_xl.safetensors
    python convert_torch_ckpt.py models/pixart_512 --to_torch --layout diffusers --out pixart_512/transformer

SRC is a .pt or .safetensors file, an index of shards (.index.json), a Hugging Face folder of a diffusion
model, VAE or T5 (recognized by its config.json), a file of weights in it, a file of Inception weights
("inception" in its name: pytorch-fid's .pth, jax-fid's .pickle), or with --to_torch a model folder or
workdir.
"""
import contextlib
import shlex
from dataclasses import dataclass, replace
from pathlib import Path

from lit_jax.runtime.errors import UserError, as_typed
from lit_jax.runtime.options import given, option, parse_options
from lit_jax.runtime.paths import is_remote
from lit_jax.runtime.ranges import Range, check_ranges
from lit_jax.runtime.shipped import find_asset

EXPECTED = 'checks of a diffusion model (an error if the file has another)'
UNSEEN = 'of a diffusion model, if the tensors do not show it'
OTHERS = 'other networks'


_RANGES = {'--image_size': Range(1, 65_536), '--num_classes': Range(1, 2 ** 24),
           '--heads': Range(1, 65_536), '--cross_heads': Range(1, 65_536), '--focus_power': Range(0, 64),
           '--downscale': Range(1, 1024), '--latent_scale': Range(0, whole=False, above=True)}


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """Input, output, and facts that are not in the file itself."""
    src: str = option('checkpoint file or folder', flag='SRC')
    out: str = option('output folder; with --to_torch a .safetensors file, or a folder by its --layout')
    to_torch: bool = option('write a .safetensors file with the original names', default=False)
    layout: str | None = option('with --to_torch: lit writes a folder with weights and their PyTorch code, '
                                'diffusers a pipeline of diffusers (of PixArt-Σ its transformer alone), '
                                'peft the low-rank updates of a run as an adapter; default: original',
                                choices=('original', 'diffusers', 'lit', 'peft'), default=None)
    overwrite: bool = option('replace an existing output', default=False)
    weights: str = option('which weights of a training checkpoint', choices=('ema', 'model'), default='ema')

    arch: str | None = option('optional, the tensors show it: system and size, patch optional, such as '
                              'dit_xl, lit_s_4, dig_b, moh_dit_xl, pixart_xl, lit_t2i', default=None,
                              group=EXPECTED)
    image_size: int | None = option('side in pixels; required if the file does not show it', default=None,
                                    group=EXPECTED)
    input_size: tuple[int, int] | None = option('sides of the latent, if it is not square', default=None,
                                                metavar='H,W', group=EXPECTED)
    num_classes: int | None = option('number of classes', default=None, group=EXPECTED)

    heads: int | None = option('attention heads; known for DiT-S/B/L/XL and for our own files', default=None,
                               group=UNSEEN)
    cross_heads: int | None = option('heads of cross-attention; known for PixArt-Σ and LiT-0.6B',
                                     default=None, group=UNSEEN)
    activation: str | None = option('kernel of linear attention (default: relu)', choices=('relu', 'gelu'),
                                    default=None, group=UNSEEN)
    focus_power: int | None = option('focusing power of linear attention (default: 0, off)', default=None,
                                     group=UNSEEN)
    routed: tuple[int, ...] | None = option('routed heads per token in MoH-DiT, of all layers or of each; '
                                            'known for the published sizes', default=None, group=UNSEEN)
    system: str | None = option('what it predicts: dit (noise), sit, repa or lightningdit (velocity), where '
                                'neither the file nor its name tells', default=None, group=UNSEEN,
                                choices=('dit', 'sit', 'repa', 'lightningdit'))
    space: str | None = option('latent space (default: vae for 4 channels, else pixels)',
                               choices=('vae', 'pixels'), default=None, group=UNSEEN)
    vae: str | None = option('id of the VAE that the model was trained with (default: '
                             'stabilityai/sd-vae-ft-ema, for text models sdxl-vae); with --layout '
                             'diffusers the folder of its AutoencoderKL', default=None,
                             group=UNSEEN)
    latent_scale: float | None = option('scale of the latents (default: 0.18215 for vae, 0.13025 in text '
                                        'models, 1 for pixels)', default=None, group=UNSEEN)

    downscale: int | None = option('image pixels a latent pixel, each way (default: 8 for vae, 1 for pixels)',
                                   default=None, group=UNSEEN)

    vae_id: str | None = option("id for a converted VAE (default: from its folder's name)", default=None,
                                group=OTHERS)
    latents_stats: str | None = option('of VA-VAE: the file of mean and deviation of its latents',
                                       default=None, metavar='FILE', group=OTHERS)
    text_id: str | None = option("id for a converted text encoder (default: from its folder's name)",
                                 default=None, group=OTHERS)
    text_dtype: str = option('dtype in which the weights of a text encoder are stored',
                             choices=('bfloat16', 'float32', 'int8'), default='bfloat16', group=OTHERS)
    sha256: str = option('first digits of the checksum of an Inception file other than the published ones',
                         default='', group=OTHERS)

    def __post_init__(self):
        if self.layout and not self.to_torch:
            raise UserError('--layout requires --to_torch; the layout of an input file is detected')
        check_ranges({flag: value for flag in _RANGES
                      if (value := getattr(self, flag.removeprefix('--'))) is not None}, _RANGES)


def main() -> int:
    options = parse_options(ConvertOptions, description=__doc__)
    if options.src.startswith('assets/') and not Path(options.src).exists():
        options = replace(options, src=str(find_asset(options.src)))      # ships inside the package
    print(as_typed(_export(options) if options.to_torch else _import(options)))
    return 0


# Heavy modules are imported after the flags are read, so that wrong ones are reported at once.
def _export(options: ConvertOptions) -> str:
    from lit_jax.checkpoint.text_encoder_folder import is_text_encoder_folder
    from lit_jax.convert.text_encoder_torch import export_text_encoder
    from lit_jax.convert.torch_export import export
    from lit_jax.convert.torch_import import describe
    if is_text_encoder_folder(options.src):
        return f'written  {export_text_encoder(options.src, options.out, overwrite=options.overwrite)}'
    done = export(options.src, options.out, layout=options.layout or 'original', overwrite=options.overwrite,
                  vae=options.vae)
    if options.layout == 'peft':
        return f'{describe(done)}\nnext     peft.PeftModel.from_pretrained(TRANSFORMER, {options.out!r})'
    back = shlex.quote(f'{Path(options.out).with_suffix("")}_back')
    return (f'{describe(done)}\nnext     python convert_torch_ckpt.py {shlex.quote(options.out)} --out {back}'
            f'      # the way back')


def _import(options: ConvertOptions) -> str:
    from lit_jax.convert import text_encoder_torch as t5
    from lit_jax.convert.inception_weights import convert_inception, describe_inception, is_inception_file
    from lit_jax.convert.torch_arch import parse_arch_name
    from lit_jax.convert.torch_files import hub_parts
    from lit_jax.convert.torch_import import convert, describe
    from lit_jax.convert.vae_ldm import convert_ldm_vae, is_ldm_vae
    from lit_jax.convert.vae_torch import convert_vae, describe_vae, is_hub_vae
    files, folder = (options.src, options.out), hub_parts(options.src)[0]
    other = {'overwrite': options.overwrite, 'asked': given(options, EXPECTED, UNSEEN)}
    if is_hub_vae(folder):
        return describe_vae(convert_vae(*files, vae_id=options.vae_id, **other))
    if t5.is_hub_text_encoder(folder, any_model=folder == Path(options.src)):
        return t5.describe_text_encoder(t5.convert_text_encoder(*files, text_dtype=options.text_dtype,
                                                                text_id=options.text_id, **other))
    if is_inception_file(options.src):
        return describe_inception(convert_inception(*files, sha256=options.sha256, **other))
    if is_ldm_vae(options.src):
        return describe_vae(convert_ldm_vae(*files, vae_id=options.vae_id,
                                            latents_stats=options.latents_stats, **other))
    if options.latents_stats:
        raise UserError(f'--latents_stats {options.latents_stats} belongs to a VAE in the form of VA-VAE\'s '
                        f'file; {options.src} is none')
    expected = parse_arch_name(options.arch) if options.arch else {}
    told = {name: getattr(options, name) for name in ('image_size', 'input_size', 'num_classes')}
    expected |= {name: value for name, value in told.items() if value is not None}
    hints = {name: getattr(options, name)
             for name in ('heads', 'cross_heads', 'activation', 'focus_power', 'routed')}
    latent = {'space': options.space, 'vae': options.vae, 'scale': options.latent_scale,
              'downscale': options.downscale}
    done = convert(*files, weights=options.weights, expected=expected, latent=latent,
                   system=options.system, overwrite=options.overwrite, **hints)
    return f'{describe(done)}\n{_next(options)}'


def _next(options: ConvertOptions) -> str:
    """Commands that run as they are printed; first those that convert what belongs to the model."""
    from lit_jax.checkpoint.model_folder import read_config
    from lit_jax.convert.text_encoder_torch import is_hub_text_encoder
    from lit_jax.convert.torch_hub import pipeline_part
    config, out = read_config(options.out), shlex.quote(options.out)
    parts = {part: pipeline_part(options.src, part) for part in ('vae', 'text_encoder')}
    text = config.get('text')
    if text and not parts['text_encoder']:      # of its name, beside the file
        beside = Path(options.src).resolve().parent / (text.get('encoder') or '').rpartition('/')[2]
        parts['text_encoder'] = beside if is_hub_text_encoder(beside) else None
    commands, flags, blind = [], '', ''
    if config['latent']['space'] == 'vae' and not parts['vae']:
        flags, blind = _vae_flag(options.out, config['latent']['vae'])
    for part, folder in parts.items():
        if folder:
            ours = shlex.quote(f'{options.out.rstrip("/")}_{part}')
            commands.append(f'python convert_torch_ckpt.py {shlex.quote(str(folder))} --out {ours}')
            flags += f' --{part} {ours}'
    if not text:
        classes = ','.join(str(label) for label in range(min(2, config['model']['num_classes'])))
        commands.append(f'python sample.py --from {out}{flags} --classes {classes} --out grid.png{blind}')
    elif parts['text_encoder']:
        commands.append(f'python sample.py --from {out}{flags} --prompt "a red circle" --out grid.png'
                        f'{blind}')
    else:
        data = ' --config.data.name=captions' if config['latent']['space'] == 'pixels' else ''
        commands.append(f'python train.py --config=student:linear --config.teacher.path={out}{data} '
                        f'--dry_run')
        commands.append('python sample.py --help      # it draws with the text encoder of its training')
    return 'next     ' + '\n         '.join(commands)


def _vae_flag(out: str, vae_id: str) -> tuple[str, str]:
    """(the flag that names the model's VAE if it lies beside `out`, else what a command says without it)."""
    from lit_jax.checkpoint.vae_folder import is_vae_folder, read_vae_config
    for folder in [] if is_remote(out) else sorted(Path(out).absolute().parent.iterdir()):
        with contextlib.suppress(UserError):
            if is_vae_folder(folder) and read_vae_config(folder)['id'] == vae_id:
                return f' --vae {shlex.quote(str(Path(out).parent / folder.name))}', ''
    return '', f'      # latents in false colours; images need --vae FOLDER, {vae_id} converted'
