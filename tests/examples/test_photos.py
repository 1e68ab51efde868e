"""The stages from a folder of images to images, with trainings cut short."""
import json

import numpy as np
import pytest
from PIL import Image

from examples.photos import __main__ as photos
from lit_jax.data.toys.photos import find_photos, write_photos
from lit_jax.runtime.errors import UserError

pytest.importorskip('skimage')


def test_photos_are_cut_the_same_way_each_time_and_no_pixel_is_in_both_splits(tmp_path):
    for name in ('one', 'two'):
        write_photos(tmp_path / name, size=16, per_photo=2, held_out=1)
    files = sorted(path.relative_to(tmp_path / 'one') for path in (tmp_path / 'one').rglob('*.png'))
    assert len(files) == 3 * len(find_photos()) == 48
    for path in files:
        assert (tmp_path / 'one' / path).read_bytes() == (tmp_path / 'two' / path).read_bytes()
    with pytest.raises(UserError, match='exists and is not empty'):
        write_photos(tmp_path / 'one')


@pytest.mark.slow
def test_the_whole_road_with_short_trainings(tmp_path):
    figures = photos.run(tmp_path, steps=0.01)
    assert list(figures) == list(photos.stages(tmp_path)) and figures['vae']['psnr_db'] > 5
    assert (figures['dit']['steps'], figures['lit']['steps']) == (20, 4)
    assert Image.open(tmp_path / 'compare.png').size > (256, 256)
    with np.load(tmp_path / 'lit.npz') as archive:
        assert archive['arr_0'].shape == (128, 64, 64, 3) and archive['arr_0'].dtype == np.uint8
    metadata = json.loads((tmp_path / 'latents' / 'metadata.json').read_text())
    assert metadata['vae']['id'] == 'vae_tiny'
    assert photos.run(tmp_path, steps=0.01) == figures      # nothing is done twice
