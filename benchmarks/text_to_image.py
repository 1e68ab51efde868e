"""Draws at full size on a machine with little memory: LiT-0.6B, T5-XXL in int8, SDXL's VAE, random weights.

    python -m benchmarks.text_to_image --folder=/tmp/t2i     # 1024 pixels, 2 steps, one network at a time
    python -m benchmarks.text_to_image --folder=/tmp/t2i --dtype=bfloat16 --size=512x512 --steps=1
    python -m benchmarks.text_to_image --folder=/tmp/t2i --text_encoder=DIR     # of `text_encoder --save`

Missing folders are written first (8 GB: encoder 4.8, backbone 2.4, VAE 0.3), each in its own process. Then
sample.py draws, and logs memory and time of each phase.
"""
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.timing import make_parser

ROOT = Path(__file__).resolve().parent.parent

def parse_arguments():
    parser = make_parser(__doc__)
    parser.add_argument('--folder', required=True, help='of the random networks; missing ones are written')
    parser.add_argument('--text_encoder', help='default: FOLDER/t5')
    parser.add_argument('--recipe', default='lit_t2i_1024', help='recipe of the backbone')
    parser.add_argument('--size', default='1024x1024')
    parser.add_argument('--steps', type=int, default=2)
    parser.add_argument('--dtype', default='float32')
    parser.add_argument('--tile', type=int, default=64)
    parser.add_argument('--keep', action='store_true', help='all networks in memory at once')
    parser.add_argument('--make', choices=('model', 'vae'), help='only write this network')
    return parser.parse_args()


def make_model(arguments) -> None:
    """LiT-0.6B of the recipe; weights that are initially zero are random too, so that the output is noise."""
    import numpy as np

    from lit_jax.checkpoint.model_folder import save_model_folder
    from lit_jax.checkpoint.text_encoder_folder import read_text_encoder_config
    from lit_jax.models.network import Network
    from lit_jax.recipes.recipe import load_recipe
    from lit_jax.runtime.leaves import map_named
    from lit_jax.training.setup import describe
    config = {**describe(load_recipe(arguments.recipe), None), 'provenance': {'source': 'random'}}
    config['text'] = {**config['text'], 'encoder': read_text_encoder_config(arguments.text_encoder)['id']}
    config['latent'] = {**config['latent'], 'vae': 'random'}
    rng = np.random.default_rng(0)
    params = map_named(lambda _, leaf: rng.standard_normal(leaf.shape, np.float32) * np.float32(0.02),
                       Network(config['model']).abstract())
    save_model_folder(f'{arguments.folder}/model', config, params)


def make_vae(arguments) -> None:
    import jax

    from lit_jax.checkpoint.vae_folder import save_vae_folder
    from lit_jax.models.vae import SD_ARCH, VaeNetwork
    config = {'vae': SD_ARCH, 'id': 'random', 'scale': 0.13025, 'provenance': {'source': 'random'}}
    save_vae_folder(f'{arguments.folder}/vae', config, VaeNetwork(SD_ARCH).init(jax.random.key(0)))


def make_missing(arguments) -> None:
    """Writes each network in its own process, which frees its memory."""
    me = ['benchmarks.text_to_image', f'--folder={arguments.folder}',
          f'--text_encoder={arguments.text_encoder}', f'--recipe={arguments.recipe}']
    commands = {arguments.text_encoder: ['benchmarks.text_encoder', '--save', arguments.text_encoder],
                f'{arguments.folder}/model': [*me, '--make=model'],
                f'{arguments.folder}/vae': [*me, '--make=vae']}
    for path, command in commands.items():
        if not Path(path).is_dir():
            print(f'writing {path}', flush=True)
            subprocess.run([sys.executable, '-m', *command], check=True)


def main() -> None:
    arguments = parse_arguments()
    arguments.text_encoder = arguments.text_encoder or f'{arguments.folder}/t5'
    if arguments.make:
        return {'model': make_model, 'vae': make_vae}[arguments.make](arguments)
    Path(arguments.folder).mkdir(parents=True, exist_ok=True)
    make_missing(arguments)
    began = time.perf_counter()
    out = Path(arguments.folder) / 'image.png'
    command = ['sample.py', f'--from={arguments.folder}/model', f'--text_encoder={arguments.text_encoder}',
               f'--vae={arguments.folder}/vae', '--prompt=a red fox in the snow', f'--size={arguments.size}',
               f'--steps={arguments.steps}', f'--dtype={arguments.dtype}', f'--tile={arguments.tile}',
               *([] if arguments.keep else ['--low_memory']), f'--out={out}']
    print('python ' + ' '.join(command), flush=True)
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    print(f'{time.perf_counter() - began:.0f} s with start and compilation')


if __name__ == '__main__':
    main()
