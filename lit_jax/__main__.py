"""The command `lit-jax`: a verb for each script of a checkout.

    lit-jax train --config=lit_xl --workdir=runs/lit_xl
    lit-jax sample --help
"""
import sys

import lit_jax
from lit_jax.runtime import signals

# verb: (file of lit_jax/commands/, description)
VERBS = {
    'convert': ('convert', 'read or write PyTorch, safetensors and diffusers checkpoints'),
    'prepare-latents': ('prepare_latents', 'encode a data set once, so that training reads latents'),
    'train': ('train', 'train a recipe; --dry_run and --plan show its cost'),
    'train-vae': ('train_vae', 'train a small VAE to a folder of images'),
    'sample': ('sample', 'draw images of classes or prompts'),
    'evaluate': ('evaluate', 'score images: FID, sFID, IS, KID, precision, recall; GenEval'),
    'analyze': ('analyze', 'look inside a model: attention maps, rank, loss by timestep'),
    'export': ('export', 'write a model as ONNX or StableHLO, for other programs'),
    'bundle': ('bundle', 'write a folder with everything that drawing needs, for offline use'),
    'push': ('push', 'upload a model to the Hugging Face hub'),
    'app': ('serve_page', 'serve a local page that draws images'),
}


def usage() -> str:
    lines = [f'  {verb:<16} {line}' for verb, (_, line) in VERBS.items()]
    return '\n'.join(['usage: lit-jax VERB [FLAGS], lit-jax VERB --help, lit-jax --version', '', *lines])


def run_verb() -> int | None:
    """Runs the command of the verb in sys.argv with the arguments after it."""
    import difflib
    import importlib

    from lit_jax.runtime.errors import UserError, shown
    verb = sys.argv[1] if len(sys.argv) > 1 else ''
    if verb in ('', '-h', '--help'):
        print(usage())
        return 0 if verb else 2
    if verb == '--version':
        print(f'lit_jax {lit_jax.__version__}')
        return 0
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f'did you mean {near[0]}?' if near else f'known: {", ".join(VERBS)}'
        raise UserError(f'unknown verb {shown(verb)}; {hint}')
    sys.argv[:2] = [f'lit-jax {verb}']
    return importlib.import_module(f'lit_jax.commands.{VERBS[verb][0]}').main()


def main() -> None:
    signals.catch()      # before the slower imports
    from lit_jax.runtime import cli
    cli.run(run_verb)


if __name__ == '__main__':
    main()
