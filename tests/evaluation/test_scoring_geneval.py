"""`evaluate.py geneval` from prompts to scores, with detections from a file."""
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lit_jax.evaluation.evaluate_options import GenevalOptions
from lit_jax.evaluation.geneval_command import run_geneval
from lit_jax.runtime.errors import UserError


def draw(folder, wrong=()):
    """A grey image of every prompt, and detections that show what it asks for; of the prompts in `wrong`
    nothing."""
    lines = []
    for path in sorted(folder.glob('[0-9]*')):
        prompt = json.loads((path / 'metadata.jsonl').read_text())
        Image.fromarray(np.full((8, 8, 3), 99, np.uint8)).save(path / 'samples' / '0000.png')
        seen = [] if int(path.name) in wrong else _objects(prompt)
        lines.append(json.dumps({'image': f'{path.name}/samples/0000.png', 'detections': seen}))
    (folder / 'seen.jsonl').write_text('\n'.join(lines))
    return GenevalOptions(images=str(folder), detections=str(folder / 'seen.jsonl'))


def _objects(prompt):
    shift = {'left of': (-90, 0), 'right of': (90, 0), 'above': (0, -90), 'below': (0, 90)}
    objects = []
    for wanted in prompt['include']:
        x, y = shift[wanted['position'][0]] if 'position' in wanted else (0, 0)
        objects += [{'class': wanted['class'], 'box': [x, y, x + 5, y + 5], 'confidence': 0.95,
                     'color': wanted.get('color', 'red')}] * wanted['count']
    return objects


def test_from_prompts_to_scores(tmp_path):
    assert 'wrote 553 prompts' in run_geneval(GenevalOptions(prompts_out=str(tmp_path)))
    text = run_geneval(draw(tmp_path))
    found = json.loads((tmp_path / 'geneval.json').read_text())
    assert found['overall'] == 1.0 and len(found['tasks']) == 6 and '1 to 1 images of a prompt' in text
    run_geneval(draw(tmp_path, wrong=range(40)))
    found = json.loads((tmp_path / 'geneval.json').read_text())
    assert found['tasks']['single_object'] == 0.5 and found['overall'] == pytest.approx(5.5 / 6)


@pytest.mark.parametrize('change, message', [
    ({}, 'one of --prompts_out .* and --images'),
    ({'prompts_out': 'a', 'images': 'b'}, 'one of --prompts_out'),
    ({'prompts_out': 'a', 'store': 'x'}, '--store does not belong'),
    ({'images': 'a'}, 'one of --detections=FILE.jsonl'),
    ({'images': 'a', 'detections': 'x', 'store': 'y'}, 'stored already'),
    ({'images': 'a', 'detections': 'none.jsonl'}, 'none.jsonl'),
    ({'images': 'a', 'detector': ('x', 'y'), 'store': 'z', 'out': 'o'}, 'leave --out out')])
def test_requests_that_contradict_themselves(change, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        run_geneval(GenevalOptions(**change))
    assert not list(Path(tmp_path).iterdir())
