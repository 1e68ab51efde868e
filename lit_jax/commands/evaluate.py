"""Scores image sets: FID, sFID, IS, KID, sKID, precision and recall, each stored with its settings.

    python evaluate.py --samples=lit_xl.npz --reference=VIRTUAL_imagenet256_labeled.npz
    python evaluate.py --from runs/lit_xl --vae models/sd_vae --reference=VIRTUAL_imagenet256_labeled.npz \\
        --num_samples=50000 --cfg_scale 1 1.25 1.5 --checkpoints=200000,400000 --out=scores/lit_xl
    python evaluate.py reference --data=folder --path=images --image_size=256 --out=images.npz
    python evaluate.py geneval --help

Rows go to OUT/scores.json, a table to OUT/scores.md, FID over guidance, steps and training to OUT/scores.png.
An interrupted run resumes when its command is given again. On several hosts the same command runs on each of
them (docs/run/clusters.md). Definitions and pitfalls: docs/evaluate/evaluation.md.
"""
import sys
from pathlib import Path

from lit_jax.evaluation.evaluate_options import GenevalOptions, ReferenceOptions, ScoreOptions
from lit_jax.runtime import cli
from lit_jax.runtime.options import parse_options

VERBS = {
    'reference': (ReferenceOptions, "Makes a reference in ADM's layout: statistics of all images of a data "
                                    'set, and some of the images.'),
    'geneval': (GenevalOptions, 'GenEval: writes its prompts, or scores images by the objects in them.')}


def main() -> None:
    program, arguments = Path(sys.argv[0]).name, sys.argv[1:]
    verb = arguments.pop(0) if arguments and arguments[0] in VERBS else ''
    kind, description = VERBS.get(verb, (ScoreOptions, __doc__))
    options = parse_options(kind, arguments, prog=f'{program} {verb}'.strip(), description=description)
    # jax is imported after the flags are read, so that wrong ones are reported at once.
    if verb == 'geneval':
        from lit_jax.evaluation.geneval_command import run_geneval
        print(run_geneval(options))
        return
    reports = cli.join(options)
    if verb == 'reference':
        from lit_jax.evaluation.build_reference import build_reference
        text = build_reference(options)
    else:
        from lit_jax.evaluation.evaluation import evaluate
        text = evaluate(options)
    if reports:
        print(text)
