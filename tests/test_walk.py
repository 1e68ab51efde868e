"""The walk from a folder of images to a linear student, by the commands of docs/start/own_dit.md."""
import json

import numpy as np
import pytest
from pages import ROOT, as_lines, blocks, clone, run
from PIL import Image

CLASSES = ('cats', 'dogs', 'birds')
PAGE = ROOT / 'docs' / 'start' / 'own_dit.md'
pytestmark = pytest.mark.slow


def write_images(folder, count=24) -> None:
    """Images of unlike sizes: a square of the class's colour on noise."""
    rng = np.random.default_rng(0)
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (70 + i, 90 - i, 3), np.uint8)
            pixels[20:50, 20:50] = np.eye(3, dtype=np.uint8)[label] * 200
            Image.fromarray(pixels).save(folder / name / f'{i}.png')


@pytest.fixture(scope='module')
def walked(tmp_path_factory):
    """(the clone after the walk, what was printed)."""
    where = clone(tmp_path_factory.mktemp('walk'))
    write_images(where / 'images')
    return where, run(as_lines(blocks(PAGE)), where)


def test_every_step_leaves_what_the_page_says(walked):
    where, printed = walked
    assert 'missing  nothing: this recipe can run here' in printed
    assert '<dit, linear attention' in printed
    for run_folder in ('my_dit', 'my_lit', 'pixel_lit'):
        records = [json.loads(line) for line in (where / 'runs' / run_folder / 'metrics.jsonl').open()]
        assert records and all(np.isfinite(value) for record in records for value in record.values()
                               if isinstance(value, float))
        assert (where / 'runs' / run_folder / 'report.html').stat().st_size > 1_000
    model = json.loads((where / 'runs' / 'my_lit' / 'config.json').read_text())['model']
    assert [model[name] for name in ('depth', 'width', 'num_classes')] == [2, 64, 3]
    assert model['mixer']['name'] == 'linear'
    for name in ('grid.png', 'compare.png', 'first.png', 'pixels.png'):
        with Image.open(where / name) as image:
            assert np.asarray(image).std() > 1, name
    rows = json.loads((where / 'scores' / 'scores.json').read_text())
    assert len(rows) == 2
    scores = ('fid', 'kid', 'precision', 'recall')
    assert all(np.isfinite(row['scores'][name]) for row in rows for name in scores)


def test_a_pt_file_that_says_nothing_of_itself_is_as_good(walked):
    """The reader's own checkpoint: PyTorch's, with nothing but tensors in it."""
    torch = pytest.importorskip('torch')
    from safetensors.numpy import load_file
    where, _ = walked
    state = {name: torch.from_numpy(value) for name, value in load_file(where / 'my_dit.safetensors').items()}
    torch.save({'ema': state}, where / 'mine.pt')
    command = next(command for block in blocks(PAGE) for command in block.commands
                   if 'convert_torch_ckpt.py my_dit.safetensors' in command)
    run([command.replace('my_dit.safetensors', 'mine.pt').replace('models/my_dit', 'models/mine')], where)
    one, other = (json.loads((where / 'models' / name / 'config.json').read_text())
                  for name in ('my_dit', 'mine'))
    for name in ('model', 'latent', 'diffusion'):
        assert one[name] == other[name], name
