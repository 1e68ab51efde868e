"""JSON that decides numbers holds its own checksum: another digit is one message that names the file; files
of earlier versions, without a checksum, are read."""
import json
import re

import numpy as np
import pytest
from latent_sets import write_latents

from lit_jax.data.latents import open_latents, read_metadata
from lit_jax.evaluation.sets import open_set
from lit_jax.evaluation.table import keep_row, read_rows
from lit_jax.latents.prepare import _check_claim, _claim
from lit_jax.metrics.geneval.detector import Detection, StoredDetections, detection_line
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.json_file import SEAL, sealed
from lit_jax.sampling.card import card_text, read_card

CARD = {'format': 1, 'kind': 'pictures', 'model': {'sha256': '12'}, 'sampler': {'method': 'ddim', 'steps': 9},
        'vae': {'scale': 0.18215}, 'pictures': {'count': 2, 'seed': 0}}
PLAN = {'format': 1, 'vae': {'scale': 0.18215}, 'shard_size': 12, 'source': {'count': 7}}


def metadata(folder):
    """As prepare_latents.py writes it."""
    content = write_latents(folder / 'latents')
    (folder / 'latents' / 'metadata.json').write_text(json.dumps(sealed(content)))
    return folder / 'latents' / 'metadata.json', lambda: read_metadata(folder / 'latents')


def note(folder):
    write_latents(folder / 'latents')
    source = open_latents(folder / 'latents')
    return folder / 'latents' / 'shards' / '00000.json', source.notes


def preparation(folder):
    _claim(folder, PLAN, 'python prepare_latents.py')
    return folder / 'preparation.json', lambda: _check_claim(folder, PLAN)


def card_of_a_set(folder):
    np.savez(folder / 'set.npz', arr_0=np.zeros((2, 4, 4, 3), np.uint8))
    (folder / 'set.json').write_text(card_text(CARD))
    return folder / 'set.json', lambda: open_set(folder / 'set.npz').card


def card_of_a_begun_set(folder):
    (folder / 'card.json').write_text(card_text(CARD))
    return folder / 'card.json', lambda: read_card(folder / 'card.json')


def scores(folder):
    card = {'samples': {'name': 'one', 'count': 6},
            'reference': {'id': 'ref.npz', 'sha256': 'ef' * 32, 'statistics': 'of its own images'},
            'features': {'flavour': 'four', 'sha256': 'cd' * 32, 'precision': 'highest'},
            'settings': {'pr_mode': 'adm', 'neighbours': 3, 'inception_score': 'no'}}
    for name in ('one', 'two'):
        keep_row(folder, {'id': name, 'scores': {'fid': 3.512}, 'card': card, 'notes': [], 'impossible': {}})
    return folder / 'scores.json', lambda: read_rows(folder)


def detections(folder):
    (folder / 'found.jsonl').write_text(''.join(
        detection_line(name, [Detection('dog', (0, 0, 14, 4), 0.91)]) for name in 'ab'))
    return folder / 'found.jsonl', lambda: StoredDetections(folder / 'found.jsonl')._found


@pytest.mark.parametrize('make', [metadata, note, preparation, card_of_a_set, card_of_a_begun_set, scores,
                                  detections])
def test_another_digit_or_letter_is_told_and_files_without_a_checksum_are_read(tmp_path, make):
    path, read = make(tmp_path)
    right, text = read(), path.read_text()
    assert SEAL in text and SEAL not in repr(right)
    found = [match.start() for match in re.finditer(r'\d', text)]
    places, refused = {found[i] for i in np.linspace(0, len(found) - 1, 40).astype(int)}, 0
    names = re.finditer(rf'"(?!{SEAL})(\w)\w*":', text)
    for at in places | {match.start(1) for match in names}:
        other = {'9': '0', 'z': 'a'}.get(text[at], chr(ord(text[at]) + 1))
        path.write_text(text[:at] + other + text[at + 1:])
        try:
            assert read() == right      # a 17th digit that makes no other number
        except UserError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 0.8 * len(places)
    path.write_text(re.sub(rf',\s*"{SEAL}": "\w+"', '', text))      # as earlier versions wrote it
    assert SEAL not in path.read_text() and read() == right
