"""Reading cached latents: what comes out, and what is refused."""
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from buckets import bucket  # noqa: F401
from latent_sets import moments_of, write_latents

from lit_jax.data import latents
from lit_jax.data.augment import random_flip
from lit_jax.data.base import random_generator
from lit_jax.data.latent_space import LatentSpace
from lit_jax.data.latents import check_latents, choose_mirror, first_of_both, open_latents, record_bytes
from lit_jax.data.pipeline import make_pipeline
from lit_jax.data.sources import open_source
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.paths import file_sha256


@pytest.fixture
def folder(tmp_path):
    write_latents(tmp_path / 'latents')
    return tmp_path / 'latents'


def test_elements_and_batches_are_what_was_written(folder):
    source = open_latents(folder)
    assert len(source) == 20
    assert (source.spec.image_size, source.spec.channels,
            source.class_names) == (4, 3, [f'class {i}' for i in range(5)])
    element = source[13]
    assert element['moments'].dtype == np.float32 and element['label'].dtype == np.int32 and element[
        'label'] == 3
    np.testing.assert_array_equal(element['moments'], moments_of(13))
    batch = source.take([19, 0, 6, 6])
    assert batch['moments'].flags['C_CONTIGUOUS'] and batch['moments'].flags['WRITEABLE']
    assert batch['label'].dtype == np.int32 and batch['label'].tolist() == [4, 0, 1, 1]
    np.testing.assert_array_equal(batch['moments'], [moments_of(i) for i in (19, 0, 6, 6)])


@pytest.mark.parametrize('index', [-1, 20])
def test_there_is_nothing_outside(folder, index):
    source = open_latents(folder)
    for read in (source.__getitem__, lambda i: source.take([i])):
        with pytest.raises(IndexError, match='source of 20'):
            read(index)


def test_half_precision_takes_half_the_bytes(tmp_path):
    single = write_latents(tmp_path / 'single')
    half = write_latents(tmp_path / 'half', dtype='float16')
    assert record_bytes(single) == 2 * 4 * 4 * 6 * 4 + 4 and record_bytes(half) == 2 * 4 * 4 * 6 * 2 + 4
    element = open_latents(tmp_path / 'half')[5]
    assert element['moments'].dtype == np.float32
    np.testing.assert_array_equal(element['moments'], moments_of(5).astype(np.float16))


def test_examples_are_dense_where_bad_images_were_left_out(tmp_path):
    """A shard with a gap, and one in which nothing is left."""
    write_latents(tmp_path / 'latents', bad=(2, *range(6, 12)))
    source = open_latents(tmp_path / 'latents')
    left = [i for i in range(20) if i not in (2, *range(6, 12))]
    assert len(source) == len(left) == 13 and source.metadata['bad'] == 7
    np.testing.assert_array_equal(source.take(range(13))['moments'], [moments_of(i) for i in left])
    assert source.take(range(13))['label'].tolist() == [i % 5 for i in left]


def test_threads_may_read_at_once(folder):
    source = open_latents(folder)
    with ThreadPoolExecutor(8) as pool:
        for index, element in zip([*range(20)] * 20, pool.map(source.__getitem__, [*range(20)] * 20),
                                  strict=True):
            np.testing.assert_array_equal(element['moments'], moments_of(index))


def test_mirror_and_image_are_chosen_alike_often_and_as_flips_are(folder):
    element = open_latents(folder)[3]
    chosen = []
    for position in range(400):
        out = choose_mirror(element, random_generator(0, 'augment', position))
        view = next(v for v in range(2) if np.array_equal(out['moments'], element['moments'][v]))
        image = np.arange(2, dtype=np.float32).reshape(1, 2, 1)
        flipped = random_flip({'image': image},
                              random_generator(0, 'augment', position))['image'][0, 0, 0] == 1
        assert out['label'] == element['label'] and flipped == view
        chosen.append(view)
    assert 160 < sum(chosen) < 240
    np.testing.assert_array_equal(first_of_both(element)['moments'], moments_of(3)[0])


def test_the_pipeline_gives_one_of_both(folder):
    source = open_latents(folder)
    pipeline = make_pipeline(source, global_batch=8, seed=1, augment=choose_mirror)
    batch = pipeline.batch(2)
    assert batch['moments'].shape == (8, 4, 4, 6)
    for index, moments in zip(pipeline.indices(16 + np.arange(8)), batch['moments'], strict=True):
        assert any(np.array_equal(moments, view) for view in moments_of(index))


def test_it_is_opened_by_name(folder, tmp_path):
    assert len(open_source('latents', path=folder, image_size=4, channels=3, num_classes=5)) == 20
    write_latents(tmp_path / 'imagenet_latents_4x4x3', 9)
    assert len(open_source('latents', data_dir=tmp_path, image_size=4, channels=3)) == 9
    with pytest.raises(UserError, match=r'(?s)num_classes: 5 in the data set, 7 in the recipe'):
        open_source('latents', path=folder, num_classes=7)
    with pytest.raises(UserError, match=r'prepare_latents.py .*--config.data.name=synthetic'):
        open_source('latents', path=tmp_path / 'nothing')


def test_the_identity_is_that_of_the_content(tmp_path):
    for name, count in (('a', 20), ('b', 20), ('c', 19)):
        write_latents(tmp_path / name, count)
    a, b, c = (open_latents(tmp_path / name).identity for name in 'abc')
    assert a == b and a['count'] == 20 and a['sha256'] != c['sha256']


def test_a_half_written_set_is_refused_with_the_command_that_goes_on(folder):
    (folder / 'metadata.json').unlink()
    with pytest.raises(UserError, match='not finished') as caught:
        open_latents(folder)
    assert f'python prepare_latents.py --data=folder --out={folder}' in str(caught.value)


@pytest.mark.parametrize('content, message', [
    ('{"kind": "lat', 'it is not JSON'), ('{"kind": "vae"}', 'does not describe latents'),
    ('{"kind": "latents", "format": 4}', 'format 4, this version of lit_jax reads formats 1, 2, 3')])
def test_other_metadata_is_refused(folder, content, message):
    (folder / 'metadata.json').write_text(content)
    with pytest.raises(UserError, match=message):
        open_latents(folder)


def test_a_missing_or_shortened_shard_is_refused(folder):
    path = folder / 'shards' / '00001.array_record'
    data = path.read_bytes()
    path.write_bytes(data[:-1000])
    with pytest.raises(UserError,
                       match=r'1 of 4 shards .*00001.array_record: 130072 bytes where 131072 .*--out='):
        open_latents(folder)
    path.unlink()
    with pytest.raises(UserError, match='00001.array_record: no file'):
        open_latents(folder)


def test_a_shard_of_another_set_is_refused_and_right_ones_are_compared_once(folder, tmp_path, monkeypatch):
    monkeypatch.setenv('LIT_JAX_CACHE', str(tmp_path / 'cache'))
    open_latents(folder)
    looked = []
    monkeypatch.setattr(latents, 'file_sha256', lambda path: looked.append(path) or file_sha256(path))
    open_latents(folder)
    assert not looked
    path = folder / 'shards' / '00001.array_record'
    path.write_bytes((folder / 'shards' / '00000.array_record').read_bytes())
    with pytest.raises(UserError, match='1 shards have not the sha256 .*00001.array_record'):
        open_latents(folder)
    assert looked


def test_the_note_of_another_shard_is_told(folder):
    notes = folder / 'shards'
    (notes / '00000.json').write_bytes((notes / '00001.json').read_bytes())
    with pytest.raises(UserError, match='00000.json is the note of another shard'):
        open_latents(folder).all_labels()


def test_a_damaged_record_is_an_error_not_another_image(folder):
    path = folder / 'shards' / '00001.array_record'
    data = bytearray(path.read_bytes())
    place = data.index(moments_of(7).tobytes()) + 100
    data[place] ^= 1
    source = open_latents(folder)
    path.write_bytes(data)      # later than the checksums were compared
    with pytest.raises(UserError, match=r'latents 7 of .* cannot be read: .*--out='):
        source.take([1, 7])


def test_a_bucket_must_be_copied_first(bucket):  # noqa: F811
    with pytest.raises(UserError, match='gcloud storage cp'):
        open_latents(f'{bucket}/latents')


def test_another_split_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match=r"split 'train', asked for is 'held_out'.*--split=held_out"):
        open_latents(folder, split='held_out')
    write_latents(tmp_path / 'held_out', 3, split='held_out')
    assert len(open_latents(tmp_path / 'held_out', split='held_out')) == 3


def test_every_difference_to_a_recipe_is_named(folder):
    source = open_latents(folder)
    fits = {'vae': 'made-up', 'sha256': 'ab' * 32, 'scale': 0.5, 'shift': 0.0, 'downscale': 2, 'channels': 3}
    asked = {'image_size': 8, 'classes': 5, 'crop': 'adm-center-crop'}
    check_latents(source, LatentSpace(**fits), **asked)
    check_latents(source, LatentSpace())
    others = {'vae': 'other', 'sha256': 'ef' * 32, 'scale': 0.25, 'shift': 0.1, 'downscale': 8, 'channels': 4}
    wrong = {'image_size': 16, 'classes': 10, 'crop': 'squash'}
    where = 'in the teacher models/dit'
    with pytest.raises(UserError, match=f'{folder} are not those {where}') as caught:
        check_latents(source, LatentSpace(**others), where=where, **wrong)
    for name, value in (fits | asked).items():
        line = f'{name}: {value!r} in the latents, {(others | wrong)[name]!r} in the teacher'
        assert line in str(caught.value), name
    for name in fits:
        with pytest.raises(UserError, match=f'(?s)^[^\n]*\n  {name}: [^\n]*\nMake'):
            check_latents(source, LatentSpace(**{**fits, name: others[name]}), **asked)
    for name in asked:
        with pytest.raises(UserError, match=f'(?s)^[^\n]*\n  {name}: [^\n]*\nMake'):
            check_latents(source, LatentSpace(**fits), **{**asked, name: wrong[name]})


def test_an_exact_set_is_a_quarter_as_large_and_has_no_noise(tmp_path):
    """As a teacher draws it: one view without variance, in the elements of other latents."""
    metadata = write_latents(tmp_path / 'latents', exact=True, format=2, space='pixels')
    assert record_bytes(metadata) == 4 * 4 * 3 * 4 + 4
    source = open_latents(tmp_path / 'latents')
    for element in (source[7], {'moments': source.take([7])['moments'][0]}):
        assert element['moments'].shape == (1, 4, 4, 6)
        for view in (choose_mirror(element, random_generator(0, 'augment', k)) for k in range(4)):
            np.testing.assert_array_equal(view['moments'][..., :3], moments_of(7)[0, ..., :3])
            assert (np.exp(view['moments'][..., 3:] / 2) < 1e-12).all()
    np.testing.assert_allclose(metadata['stats']['mean'],
                               source.take(range(20))['moments'][..., :3].mean((0, 1, 2, 3)), rtol=1e-5)
    assert LatentSpace.of_latents(metadata).space == 'pixels'
    with pytest.raises(UserError, match="space: 'pixels' in the latents, 'vae' in the recipe"):
        check_latents(source, LatentSpace())
