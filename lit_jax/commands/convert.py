"""PyTorch weights in and out.

    python convert_torch_ckpt.py DiT-XL-2-256x256.pt --out models/dit_xl
    # a training checkpoint of DiT
    python convert_torch_ckpt.py runs/0123456.pt --weights model --out models/mine
    python convert_torch_ckpt.py facebook_DiT-XL-2-256/ --arch dit_xl --image_size 256 --out models/dit_xl
    python convert_torch_ckpt.py DiG-S-2.pt --arch dig_s --out models/dig_s  # DiG and MoH-DiT as well
    python convert_torch_ckpt.py sd-vae-ft-ema/ --out models/sd_vae  # an AutoencoderKL of diffusers
    # T5 and its tokenizer (transformers)
    python convert_torch_ckpt.py PixArt-Sigma/text_encoder --out models/t5
    # what FID is measured with
    python convert_torch_ckpt.py pt_inception-2015-12-05-6726825d.pth --out models/inception
    # or the diffusers folder
    python convert_torch_ckpt.py PixArt-Sigma-XL-2-512-MS.pth --image_size 512 --out models/pixart_512
    python convert_torch_ckpt.py models/lit_xl --to_torch --out lit_xl.safetensors
    python convert_torch_ckpt.py models/pixart_512 --to_torch --layout diffusers --out pixart_512/transformer

SRC is a .pt or .safetensors file, a Hugging Face folder (its config.json says which: a diffusion model, a
VAE, a T5), a file of Inception's weights ("inception" in its name: pytorch-fid's .pth, jax-fid's .pickle), or
with --to_torch a model folder or workdir.
"""
import argparse
from pathlib import Path

from lit_jax.recipes.find import find_asset

# Flags that tell or ask something of a diffusion model; None unless given.
DIFFUSION_FLAGS = ('arch', 'image_size', 'input_size', 'num_classes', 'heads', 'cross_heads', 'activation',
                   'focus_power', 'routed', 'space', 'vae', 'latent_scale')


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('src', metavar='SRC', help='checkpoint file or folder')
    parser.add_argument('--out', required=True, help='model folder to write; with --to_torch a .safetensors '
                                                     'file')
    parser.add_argument('--to_torch', action='store_true',
                        help='write a .safetensors file in the original names')
    parser.add_argument('--layout', choices=('original', 'diffusers'),
                        help='with --to_torch: diffusers writes a folder for diffusers, of PixArt-Σ only')
    parser.add_argument('--overwrite', action='store_true', help='replace an output that is there already')
    parser.add_argument('--weights', choices=('ema', 'model'), default='ema',
                        help='which weights of a training checkpoint (default: ema)')
    expected = parser.add_argument_group('what the file must hold (an error if it does not)')
    expected.add_argument('--arch', help='system and size, patch optional: dit_xl, lit_s_4, dig_b, '
                                         'moh_dit_xl, pixart_xl, lit_t2i')
    expected.add_argument('--image_size', type=int, help='pixels of a side; needed where the file does not '
                                                         'show it')
    expected.add_argument('--input_size', type=parse_sides, help='H,W of the latent, where it is not square')
    expected.add_argument('--num_classes', type=int)
    unseen = parser.add_argument_group('what tensors do not show')
    unseen.add_argument('--heads', type=int, help='attention heads; known for DiT-S/B/L/XL and for our own '
                                                  'files')
    unseen.add_argument('--cross_heads', type=int, help='of the attention to captions; known for PixArt-Σ '
                                                        'and LiT-0.6B')
    unseen.add_argument('--activation', choices=('relu', 'gelu'), help='of linear attention (default: relu)')
    unseen.add_argument('--focus_power', type=int, help='of linear attention (default: 0, off)')
    unseen.add_argument('--routed', type=parse_numbers, help='N or N,N,...: routed heads of MoH-DiT that a '
                                                             'token uses, of all layers or of each; known '
                                                             'for the published sizes')
    unseen.add_argument('--space', choices=('vae', 'pixels'), help='default: vae for 4 channels, else pixels')
    unseen.add_argument('--vae', help='that the model was trained with (default: stabilityai/sd-vae-ft-ema; '
                                      'text: sdxl-vae)')
    unseen.add_argument('--vae_id', help='name of the VAE that is converted (default: by the name of its '
                                         'folder)')
    unseen.add_argument('--text_id', help='name of the text encoder that is converted (default: by the name '
                                          'of its folder)')
    unseen.add_argument('--text_dtype', choices=('bfloat16', 'float32', 'int8'), default='bfloat16',
                        help='how the weights of a text encoder are stored (default: bfloat16)')
    unseen.add_argument('--sha256', default='', help='first digits, for Inception files that are not the '
                                                     'published ones')
    unseen.add_argument('--latent_scale', type=float, help='default: 0.18215 for vae (text: 0.13025), 1 for '
                                                           'pixels')
    args = parser.parse_args()
    if args.layout and not args.to_torch:
        parser.error('--layout goes with --to_torch; what is read shows its layout itself')
    return args


def parse_sides(text: str) -> tuple[int, int]:
    """'32,16' -> (32, 16)."""
    rows, columns = text.split(',')
    return int(rows), int(columns)


def parse_numbers(text: str) -> tuple[int, ...]:
    """'2,1,3' -> (2, 1, 3)."""
    return tuple(int(number) for number in text.split(','))


def main() -> int:
    args = parse_arguments()
    if args.src.startswith('assets/') and not Path(args.src).exists():
        args.src = find_asset(args.src)      # ships inside an installed package
    # The heavy imports come after the arguments: a typing mistake is answered at once.
    from lit_jax.checkpoint.text_encoder_folder import is_text_encoder_folder
    from lit_jax.convert import text_encoder_torch as t5
    from lit_jax.convert.inception_weights import convert_inception, describe_inception, is_inception_file
    from lit_jax.convert.torch_arch import parse_arch_name
    from lit_jax.convert.torch_export import export
    from lit_jax.convert.torch_import import convert, describe
    from lit_jax.convert.vae_torch import convert_vae, describe_vae, is_hub_vae
    asked = [f'--{name}' for name in DIFFUSION_FLAGS if getattr(args, name) is not None]
    if not args.to_torch and is_hub_vae(args.src):
        print(describe_vae(convert_vae(args.src, args.out, vae_id=args.vae_id, asked=asked,
                                       overwrite=args.overwrite)))
        return 0
    if not args.to_torch and t5.is_hub_text_encoder(args.src):
        print(t5.describe_text_encoder(t5.convert_text_encoder(args.src, args.out, text_dtype=args.text_dtype,
                                                               asked=asked, text_id=args.text_id,
                                                               overwrite=args.overwrite)))
        return 0
    if args.to_torch and is_text_encoder_folder(args.src):
        print(f'written  {t5.export_text_encoder(args.src, args.out, overwrite=args.overwrite)}')
        return 0
    if not args.to_torch and is_inception_file(args.src):
        print(describe_inception(convert_inception(args.src, args.out, sha256=args.sha256,
                                                   overwrite=args.overwrite, asked=asked)))
        return 0
    if args.to_torch:
        done = export(args.src, args.out, layout=args.layout or 'original', overwrite=args.overwrite)
    else:
        expected = parse_arch_name(args.arch) if args.arch else {}
        told = {'image_size': args.image_size, 'input_size': args.input_size, 'num_classes': args.num_classes}
        expected |= {name: value for name, value in told.items() if value is not None}
        done = convert(args.src, args.out, weights=args.weights, heads=args.heads, expected=expected,
                       latent={'space': args.space, 'vae': args.vae, 'scale': args.latent_scale},
                       activation=args.activation, focus_power=args.focus_power, routed=args.routed,
                       cross_heads=args.cross_heads, overwrite=args.overwrite)
    print(describe(done))
    next_command = 'python convert_torch_ckpt.py' if args.to_torch else 'python sample.py --from'
    draw = '--classes 0,1 --cfg_scale 4' if 'num_classes' in done.arch \
        else '--text_encoder DIR --prompt="a red cube"'
    rest = '--out DIR  (the way back)' if args.to_torch else f'{draw} --out grid.png'
    print(f'next     {next_command} {args.out} {rest}')
    return 0
