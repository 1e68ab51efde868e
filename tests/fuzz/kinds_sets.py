"""Kinds of what sampling, evaluation and training write and read again: sets, parts, references, scores."""
import json
import types
from unittest import mock

import numpy as np
from fuzz.kinds import Kind
from image_files import write_folder

from lit_jax.evaluation import build_reference
from lit_jax.evaluation.evaluate_options import ReferenceOptions
from lit_jax.evaluation.feature_store import FeatureStore
from lit_jax.evaluation.reference import open_reference
from lit_jax.evaluation.sets import open_set
from lit_jax.evaluation.spaces import FeatureSpace
from lit_jax.evaluation.table import keep_row, read_rows
from lit_jax.metrics.features import Features
from lit_jax.metrics.geneval.detector import StoredDetections, detection_line
from lit_jax.metrics.geneval.geneval_folder import score_folder
from lit_jax.metrics.geneval.geneval_prompts import write_prompts
from lit_jax.metrics.toys import digits_judge
from lit_jax.report.grids import save_png
from lit_jax.report.html import write_run_report
from lit_jax.runtime.npz_file import write_npz
from lit_jax.runtime.npz_reader import Npz
from lit_jax.sampling.card import card_text
from lit_jax.sampling.stores import FolderStore, NpzStore
from lit_jax.training.metrics_log import read_lines

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
LABELS = np.arange(6) % 3
CARD = {'format': 1, 'kind': 'pictures', 'model': {'sha256': 'ab'}, 'sampler': {'method': 'ddim', 'steps': 9},
        'vae': None, 'pictures': {'count': 6, 'seed': 0, 'labels': 'balanced'}, 'computed': {'group': 2}}


def _extract(images: np.ndarray) -> Features:
    """Four numbers of each image, in the place of Inception's."""
    return Features(images.reshape(len(images), -1)[:, :4].astype(np.float32) / 255, None)


SPACE = FeatureSpace({'flavour': 'four', 'sha256': 'cd', 'precision': 'highest', 'group': 2}, _extract,
                     (4, 0), 2)


# Sets of images, whole and begun.

def _npz_set(folder):
    (folder / 'set').mkdir()
    write_npz(folder / 'set' / 'set.npz', {'arr_0': IMAGES, 'arr_1': LABELS.astype(np.int64)})
    (folder / 'set' / 'set.json').write_text(card_text(CARD))
    return folder / 'set'


def _read_npz_set(path, _):
    found = open_set(path / 'set.npz')
    return found.labels, found.card, [block for block in found.blocks([range(0, 2), range(4, 6)])]


def _without_card(path, _):
    """As other people's sets are; a damaged card is not taken for none."""
    labels, _, blocks = _read_npz_set(path, _)
    return [(labels, None, blocks)]


def _png_set(folder):
    for i, image in enumerate(IMAGES):
        save_png(folder / 'set' / f'{i:06d}_class{i % 3:04d}.png', image)
    (folder / 'set' / 'card.json').write_text(card_text(CARD))
    return folder / 'set'


def _read_png_set(path, _):
    found = open_set(path)
    return found.labels, found.card, found.sha256, [block for block in found.blocks([range(0, found.count)])]


def _npz_store(folder):
    return NpzStore(folder / 'set.npz', CARD, LABELS, (8, 8), 2)


def _begun_npz(folder):
    store = _npz_store(folder / 'begun')
    (folder / 'begun').mkdir()
    store.begin()
    for part in (0, 2):
        store.write(part, IMAGES[store.span(part).start:store.span(part).stop])
    return folder / 'begun'


def _finish(store):
    if store.begin() is not None:
        for part in store.missing():
            store.write(part, IMAGES[store.span(part).start:store.span(part).stop])
        store.finish()


def _finish_npz(path, _):
    _finish(_npz_store(path))
    with np.load(path / 'set.npz') as arrays:
        return dict(arrays)


def _finished_npz(folder):
    (folder / 'begun').mkdir()
    _finish(_npz_store(folder / 'begun'))
    return folder / 'begun'


def _folder_store(folder):
    names = [f'{i:05d}.png' for i in range(6)]
    lines = [{'file': name, 'prompt': 'a square', 'seed': 0} for name in names]
    return FolderStore(folder, CARD, names, 2, lines)


def _drawn(folder):
    _finish(_folder_store(folder / 'drawn'))
    return folder / 'drawn'


def _finish_drawn(path, _):
    store = _folder_store(path)
    _finish(store)
    return [open_set(path).labels, *open_set(path).blocks([range(0, 6)])]


# Features, references, scores.

def _feature_store(folder):
    return FeatureStore(folder, SPACE, {'name': 'set'}, 6)


def _features(folder):
    store = _feature_store(folder / 'features')
    _finish(store)
    return folder / 'features'


def _read_features(path, _):
    store = _feature_store(path)
    _finish(store)
    return store.read()


def _reference(folder):
    meta = {'format': 1, 'count': 6, 'image_size': 8, 'features': dict(SPACE.facts),
            'arrays': ['mu', 'sigma', 'arr_0']}
    write_npz(folder / 'ref.npz', {'mu': np.ones(4), 'sigma': np.eye(4), 'arr_0': IMAGES,
                                   'meta': np.asarray(json.dumps(meta))})
    return folder / 'ref.npz'


def _read_reference(path, _):
    found = open_reference(path, SPACE)
    images = found.images and [*found.images.blocks([range(0, 6)])]
    return found.statistics, found.image_shape, found.meta, images


def _reference_request(folder, out):
    return ReferenceOptions(data='folder', path=str(folder / 'images'), image_size=8, images=3, threads=1,
                            out=str(out / 'ref.npz'))


def _build_reference(request, keep_parts=False):
    finish = mock.patch.object(build_reference._Builder, 'finish', lambda self: '')
    with mock.patch.object(build_reference, 'open_space', lambda *args, **options: SPACE):
        if keep_parts:
            with finish:
                return build_reference.build_reference(request)
        return build_reference.build_reference(request)


def _begun_reference(folder):
    write_folder(folder / 'images', **{f'cat/{i}.png': None for i in range(5)})
    (folder / 'begun').mkdir()
    _build_reference(_reference_request(folder, folder / 'begun'), keep_parts=True)
    return folder / 'begun'


def _finish_reference(path, folder):
    _build_reference(_reference_request(folder, path))
    with Npz(path / 'ref.npz') as file:      # as evaluations read it
        return {name: file.array(name) for name in file.names if name != 'meta'}


def _finished_reference(folder):
    path = _begun_reference(folder)
    _build_reference(_reference_request(folder, path))
    return path


def _row(name: str) -> dict:
    card = {'samples': {'name': name, 'count': 6, 'card': CARD},
            'reference': {'id': 'ref.npz', 'sha256': 'ef' * 32, 'statistics': 'of its own images'},
            'features': {'flavour': 'four', 'sha256': 'cd' * 32, 'precision': 'highest'},
            'settings': {'pr_mode': 'adm', 'neighbours': 3, 'inception_score': 'no'}}
    return {'id': name, 'scores': {'fid': 3.5, 'is': 2.0}, 'card': card, 'notes': [], 'impossible': {}}


def _scores(folder):
    (folder / 'scores').mkdir()
    for name in ('one', 'two'):
        keep_row(folder / 'scores', _row(name))
    return folder / 'scores'


def _read_scores(path, _):
    keep_row(path, _row('three'))
    return read_rows(path), (path / 'scores.md').read_text()


def _first_scores(path, folder):
    """Of a folder that had none."""
    (folder / 'none').mkdir(exist_ok=True)
    return [_read_scores(folder / 'none', folder)]


def _judge(folder):
    rng = np.random.default_rng(0)
    params = {name: rng.standard_normal(shape).astype(np.float32)
              for name, shape in digits_judge._shapes().items()}
    judge = digits_judge.Judge(params, 1.5, rng.standard_normal((10, digits_judge.FEATURES)))
    judge.save(folder / 'judge.npz')
    return folder / 'judge.npz'


def _read_judge(path, _):
    judge = digits_judge.load_judge(path)
    return judge.params, judge.feature_scale, judge.reference


# What training writes.

def _run(folder):
    run = folder / 'run'
    (run / 'samples').mkdir(parents=True)
    records = [{'step': i, 'loss/total': 1 / (i + 1), 'loss/mse': 0.5, 'loss/mse_q1': 0.1} for i in range(4)]
    (run / 'metrics.jsonl').write_text(''.join(json.dumps(record) + '\n' for record in records))
    save_png(run / 'samples' / '000000003.png', IMAGES[0])
    row = {'path': 'a', 'shape': [2, 3], 'count': 6, 'status': 'inherited', 'source': 'b'}
    rows = [row, {**row, 'status': 'fresh', 'source': None}]
    (run / 'inheritance.json').write_text(json.dumps({'rows': rows}))
    return run


def _read_run(path, _):
    records = read_lines(path / 'metrics.jsonl')
    write_run_report(path, records, {'recipe': {'name': 'tiny'}})
    return records


# GenEval.

def _geneval(folder):
    write_prompts(folder / 'geneval')
    for number, prompt in enumerate(sorted((folder / 'geneval').iterdir())):
        if prompt.is_dir() and number >= 2:
            for file in prompt.rglob('*'):
                file.unlink() if file.is_file() else None
            for inner in sorted(prompt.rglob('*'), reverse=True):
                inner.rmdir()
            prompt.rmdir()
        elif prompt.is_dir():
            save_png(prompt / 'samples' / '0000.png', IMAGES[number])
    return folder / 'geneval'


def _read_geneval(path, _):
    detector = types.SimpleNamespace(detect=lambda image: [], colours=lambda *args: [])
    return score_folder(path, detector)


def _detections(folder):
    _geneval(folder)
    found = types.SimpleNamespace(class_name='dog', box=(0, 0, 4, 4), confidence=0.9, colour='red')
    (folder / 'found.jsonl').write_text(''.join(
        detection_line(f'{number:05d}/samples/0000.png', [found]) for number in range(2)))
    return folder / 'found.jsonl'


def _read_detections(path, folder):
    return score_folder(folder / 'geneval', StoredDetections(path))


KINDS = (
    Kind('npz set', _npz_set, _read_npz_set, 'bytes', also=_without_card),
    Kind('PNG set', _png_set, _read_png_set),
    Kind('begun npz set', _begun_npz, _finish_npz, 'whole'),
    Kind('finished npz set', _finished_npz, _finish_npz, 'bytes'),
    Kind('begun PNG set', _drawn, _finish_drawn),
    Kind('features', _features, _read_features, 'whole'),
    Kind('reference', _reference, _read_reference, 'bytes'),
    Kind('begun reference', _begun_reference, _finish_reference, 'bytes', 3),
    Kind('finished reference', _finished_reference, _finish_reference, 'bytes', 3),
    Kind('scores', _scores, _read_scores, 'bytes', weight=1, also=_first_scores),
    Kind('judge', _judge, _read_judge, 'bytes'),
    Kind('run report', _run, _read_run, weight=1),
    Kind('GenEval folder', _geneval, _read_geneval),
    Kind('detections', _detections, _read_detections, 'bytes'),
)
