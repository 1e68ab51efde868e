"""What follows a training: the commands to try."""
import shlex
from collections.abc import Mapping

from lit_jax.runtime.errors import as_typed


def next_commands(workdir, recipe: Mapping) -> list[str]:
    """Commands that draw, compare and look inside, of a finalized recipe; they run as they are. None for a
    model of prompts whose text encoder the recipe does not name."""
    source, latent, encoder = f'--from={workdir}', recipe['latent'], recipe['text']['encoder_path']
    vae = [f'--vae={latent["vae_path"]}'] if latent['space'] == 'vae' and latent['vae_path'] else []
    teacher = recipe['teacher']['path']
    if recipe['model']['family'] != 'pixart':
        compare = ['sample.py', '--grid_compare', teacher, str(workdir), *vae, '--out=compare.png']
        commands = [['sample.py', source, *vae, '--out=grid.png'], *([compare] if teacher else []),
                    ['analyze.py', source]]
    else:
        with_text = [source, *vae, f'--text_encoder={encoder}']
        commands = [['sample.py', *with_text, '--prompt=a red circle', '--out=grid.png'],
                    ['app.py', *with_text]] if encoder else []
    return [as_typed(f'python {shlex.join(words)}') for words in commands]
