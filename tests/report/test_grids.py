"""Images: bytes as DiT makes them, layout of grids, files that are whole or absent."""
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lit_jax.report.grids import false_colour, make_grid, make_sheet, save_png, to_uint8, viewable
from lit_jax.runtime.errors import UserError


def test_to_uint8_is_truncated_127_5_x_plus_128():
    x = np.float32([-7.0, -1.0, -0.5, 0.0, 0.5, 0.996, 1.0, 3.0]).reshape(2, 2, 2, 1)
    # -1 -> 0.5 -> 0;  -0.5 -> 64.25;  0 -> 128;  0.5 -> 191.75;  0.996 -> 254.99;  1 -> 255.5 clamped to 255
    assert to_uint8(x).ravel().tolist() == [0, 0, 64, 128, 191, 254, 255, 255]
    assert to_uint8(x).shape == x.shape


def test_to_uint8_of_another_range_is_the_same_image():
    x = np.linspace(-1.2, 1.2, 24, dtype=np.float32).reshape(1, 4, 6, 1)
    unit = (x + 1) / 2
    # Rounding of the shifted input may move a value over the edge of a byte.
    assert np.abs(to_uint8(unit, 0, 1).astype(int) - to_uint8(x)).max() <= 1


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_what_is_not_a_number_is_refused_by_name(bad):
    x = np.zeros((3, 2, 2, 1), np.float32)
    x[1, 0, 0] = bad
    with pytest.raises(UserError, match=r'image\(s\) 1 of 3 contain NaN'):
        to_uint8(x)


def test_an_empty_range_is_refused():
    with pytest.raises(UserError, match='low must be below high'):
        to_uint8(np.zeros((1, 1, 1, 1)), 1, 1)


@given(count=st.integers(1, 9), columns=st.integers(1, 5), pad=st.integers(0, 3), scale=st.integers(1, 3))
def test_every_image_stands_at_its_place(count, columns, pad, scale):
    images = np.random.default_rng(count).integers(0, 255, (count, 2, 3, 3), dtype=np.uint8)
    grid = make_grid(images, columns, pad=pad, scale=scale, background=7)
    wide, rows = min(columns, count), -(-count // min(columns, count))
    assert grid.shape == (rows * (2 * scale + pad) + pad, wide * (3 * scale + pad) + pad, 3)
    for i, image in enumerate(images):
        top, left = pad + i // wide * (2 * scale + pad), pad + i % wide * (3 * scale + pad)
        cell = grid[top:top + 2 * scale, left:left + 3 * scale]
        np.testing.assert_array_equal(cell, np.kron(image, np.ones((scale, scale, 1), np.uint8)))
        grid[top:top + 2 * scale, left:left + 3 * scale] = 7
    assert (grid == 7).all()  # nothing but background between them


@pytest.mark.parametrize('images, options, message', [
    (np.zeros((2, 4, 4, 1), np.float32), {'columns': 2}, 'got float32'),
    (np.zeros((4, 4, 1), np.uint8), {'columns': 2}, r'\[4, 4, 1\]'),
    (np.zeros((0, 4, 4, 1), np.uint8), {'columns': 2}, 'at least one'),
    (np.zeros((2, 4, 4, 1), np.uint8), {'columns': 0}, 'columns and scale'),
    (np.zeros((2, 4, 4, 1), np.uint8), {'columns': 1, 'scale': 0}, 'columns and scale'),
])
def test_a_grid_of_something_else_is_refused(images, options, message):
    with pytest.raises(UserError, match=message):
        make_grid(images, **options)


def test_false_colours_stretch_each_image_by_itself():
    latents = np.random.default_rng(0).normal(size=(3, 4, 4, 4)).astype(np.float32)
    latents[1] *= 50
    latents[2] = 1.5
    colours = false_colour(latents)
    assert colours.shape == (3, 4, 4, 3) and colours.dtype == np.uint8
    assert colours[:2].min(axis=(1, 2, 3)).tolist() == [0,
                                                        0] and colours[:2].max(axis=(1, 2, 3)).tolist() == [
                                                            255, 255]
    assert set(colours[2].ravel().tolist()) == {128}  # one value: mid-grey, no division by zero


def test_false_colours_ignore_the_fourth_channel():
    latents = np.random.default_rng(0).normal(size=(1, 4, 4, 4)).astype(np.float32)
    other = latents.copy()
    other[..., 3] = 1e6
    np.testing.assert_array_equal(false_colour(latents), false_colour(other))


def test_viewable_chooses_by_the_channels():
    x = np.random.default_rng(0).uniform(-1, 1, (2, 4, 4, 4)).astype(np.float32)
    np.testing.assert_array_equal(viewable(x[..., :1]), to_uint8(x[..., :1]))
    np.testing.assert_array_equal(viewable(x[..., :3]), to_uint8(x[..., :3]))
    np.testing.assert_array_equal(viewable(x), false_colour(x))
    with pytest.raises(UserError, match='at least 3 channels'):
        viewable(x[..., :2])


@pytest.mark.parametrize('shape, mode', [((5, 7), 'L'), ((5, 7, 1), 'L'), ((5, 7, 3), 'RGB')])
def test_png_round_trip(tmp_path, shape, mode):
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    path = tmp_path / 'samples' / 'a.png'
    save_png(path, pixels)
    with Image.open(path) as image:
        assert image.mode == mode
        np.testing.assert_array_equal(np.asarray(image), pixels.reshape(np.asarray(image).shape))
    assert [p.name for p in path.parent.iterdir()] == ['a.png']


def test_a_png_is_not_written_from_four_channels(tmp_path):
    with pytest.raises(UserError, match=r'\[4, 4, 4\]'):
        save_png(tmp_path / 'a.png', np.zeros((4, 4, 4), np.uint8))
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_image_alone(tmp_path, monkeypatch):
    path = tmp_path / 'a.png'
    save_png(path, np.zeros((2, 2), np.uint8))
    before = path.read_bytes()

    def full(self, file, format, pnginfo):
        file.write(b'half')
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(Image.Image, 'save', full)
    with pytest.raises(OSError, match='No space left'):
        save_png(path, np.ones((2, 2), np.uint8))
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ['a.png']


# ------------------------------------------------------------------------------------------------------
# Sheets


def panel(value, count=4, channels=1):
    return np.full((count, 20, 20, channels), value, np.uint8)


def test_a_sheet_has_the_grids_side_by_side_under_titles_with_names_at_the_left():
    sheet = make_sheet([('first', panel(50)), ('second', panel(90))], 2, ['cat', 'a dog'])
    grid = make_grid(panel(50), 2)
    height, width = grid.shape[:2]
    left = sheet.shape[1] - 2 * width - 24
    assert sheet.dtype == np.uint8 and sheet.shape[0] == height + 22 and left > 10
    np.testing.assert_array_equal(sheet[22:, left:left + width], np.broadcast_to(grid, (height, width, 3)))
    assert (sheet[22:, left + width + 24:]
            == np.broadcast_to(make_grid(panel(90), 2), (height, width, 3))).all()
    for area in (sheet[:22, left:left + width], sheet[:22, left + width + 24:], sheet[22:44, :left],
                 sheet[38:, :left]):
        assert (area < 100).any()      # writing


def test_a_sheet_without_titles_and_names_is_the_grid():
    images = np.arange(4 * 20 * 20 * 3, dtype=np.uint8).reshape(4, 20, 20, 3)
    np.testing.assert_array_equal(make_sheet([('', images)], 2, ['', '']), make_grid(images, 2))


def test_letters_that_the_font_lacks_do_not_stop_a_sheet():
    for name in ('\u72ac', 'caf\u00e9', 'x' * 200):
        assert make_sheet([('', panel(0))], 4, [name]).shape[1] < 500


def test_a_sheet_needs_a_name_for_each_row_and_panels_of_one_shape():
    with pytest.raises(UserError, match='2 rows need 2 names, got 1'):
        make_sheet([('', panel(0))], 2, ['only'])
    with pytest.raises(UserError, match='panels of one shape'):
        make_sheet([('', panel(0)), ('', panel(0, 3))], 2, ['a', 'b'])


@pytest.mark.parametrize('name', ['two\nlines\tand \x1b[31m', '\u202e雪 \U0001f98a', '', ' ' * 9])
def test_any_text_can_stand_beside_a_row(name):
    assert make_sheet([('', panel(0))], 4, [name]).dtype == np.uint8
