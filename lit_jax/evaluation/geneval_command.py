"""Writes the prompts of GenEval, stores detections, or scores a folder of images (`evaluate.py geneval`)."""
import json

from lit_jax.evaluation.evaluate_options import GenevalOptions
from lit_jax.evaluation.table import format_table
from lit_jax.metrics.geneval.detector import Detector, StoredDetections
from lit_jax.metrics.geneval.geneval_folder import score_folder, store_detections, write_prompts
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.paths import as_path, prepare_file, write_text_atomic

RESULT = 'geneval.json'


def run_geneval(request: GenevalOptions) -> str:
    """Runs the request; returns a text for people."""
    if (request.prompts_out is None) == (request.images is None):
        raise UserError('give one of --prompts_out (writes the prompts) and --images (scores images)')
    if request.prompts_out is not None:
        if extra := [name for name in ('detections', 'detector', 'store', 'out') if getattr(request, name)]:
            raise UserError(f'--{extra[0]} does not belong to --prompts_out; it goes with --images')
        return (f'wrote {write_prompts(request.prompts_out)} prompts to {request.prompts_out}: draw four '
                f'images of each into NNNNN/samples/0000.png to 0003.png, then: python evaluate.py geneval '
                f'--images={request.prompts_out} --detections=FILE.jsonl')
    if request.store and request.out:
        raise UserError('--store writes the detections and computes no scores: leave --out out')
    detector = _open_detector(request)
    if request.store:
        prepare_file(request.store)
        count = store_detections(request.images, detector, request.store)
        return (f'wrote the detections in {count} images to {request.store}; score them: python evaluate.py '
                f'geneval --images={request.images} --detections={request.store}')
    out = prepare_file(request.out or as_path(request.images) / RESULT)
    found = score_folder(request.images, detector)
    seen = {'detections': request.detections, 'detector': request.detector}
    write_text_atomic(out, json.dumps({**found, 'seen by': seen}, indent=1) + '\n')
    return f'{_table(found)}\nin {out}'


def _open_detector(request: GenevalOptions) -> Detector:
    if (request.detections is None) == (request.detector is None):
        raise UserError('give one of --detections=FILE.jsonl (one line per image) and --detector CONFIG '
                        'CHECKPOINT (Mask2Former, needs PyTorch)')
    if request.detections is not None:
        if request.store:
            raise UserError('--store writes what --detector finds; --detections are stored already')
        return StoredDetections(request.detections)
    from lit_jax.metrics.geneval.mask2former import Mask2Former
    return Mask2Former(*request.detector)


def _table(found: dict) -> str:
    values = {**found['tasks'], 'overall': found['overall']}
    return '\n'.join([*format_table([*values], [[f'{value:.4f}' for value in values.values()]], left=0), '',
                      f'{found["pictures"]} images of {found["prompts"]} prompts; overall is the mean of the '
                      f'tasks', *found['notes']])
