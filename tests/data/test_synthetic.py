"""Made-up data: any size, the same on every machine, and something to learn in it; and how sources are
named."""
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_jax.data.sources import SOURCES, open_source
from lit_jax.runtime.errors import UserError


def open_synthetic(**options):
    return open_source('synthetic', **{'image_size': 8, 'channels': 2, 'num_classes': 5, **options})


@given(size=st.integers(1, 20), channels=st.integers(1, 5), classes=st.integers(1, 30),
       index=st.integers(0, 9999))
def test_elements_of_any_shape_keep_the_contract(size, channels, classes, index):
    source = open_source('synthetic', image_size=size, channels=channels, num_classes=classes)
    element = source[index]
    assert element['image'].shape == (size, size, channels) == source.spec.image_shape
    assert element['image'].dtype == np.float32 and element['label'].dtype == np.int32
    assert element['label'] == index % classes and len(source.class_names) == classes
    # Waves within ±1.2 and noise of 0.1: beyond 2 would be eight standard deviations.
    assert np.isfinite(element['image']).all() and np.abs(element['image']).max() < 2


def test_the_same_seed_and_number_give_the_same_example_in_any_order():
    first, second = open_synthetic(seed=3), open_synthetic(seed=3)
    batch = first.take([7, 2, 7])
    np.testing.assert_array_equal(batch['image'][0], batch['image'][2])
    np.testing.assert_array_equal(batch['image'][1], second[2]['image'])
    assert batch['label'].dtype == np.int32 and batch['label'].tolist() == [2, 2, 2]


def test_the_first_example_has_not_changed():
    """A record of the generator: data that changes from one version to the next would break exact
    comparisons."""
    image = open_source('synthetic', image_size=2, channels=1, num_classes=3)[4]['image']
    np.testing.assert_allclose(image.ravel(), RECORD, rtol=0, atol=1e-6)  # sines may differ in the last bits


RECORD = [-0.12558539, 0.60818255, 0.17554313, 0.15130864]


@pytest.mark.parametrize('other', [{'seed': 1}, {'split': 'held_out'}])
def test_seeds_and_splits_show_other_examples_of_the_same_classes(other):
    source, changed = open_synthetic(), open_synthetic(**other)
    assert not any(np.array_equal(source[i]['image'], changed[i]['image']) for i in range(20))
    assert [source[i]['label'] for i in range(20)] == [changed[i]['label'] for i in range(20)]


def test_a_simple_classifier_learns_the_classes():
    train, held_out = open_synthetic(), open_synthetic(split='held_out', seed=9)
    examples, test = train.take(range(500)), held_out.take(range(200))
    means = np.stack([examples['image'][examples['label'] == c].mean(axis=0) for c in range(5)])
    distance = ((test['image'][:, None] - means) ** 2).sum(axis=(2, 3, 4))
    # Chance is 0.2. The nearest class mean sees neither shifts nor strengths, so it is far from perfect.
    assert (distance.argmin(axis=1) == test['label']).mean() > 0.6


def test_numbers_outside_are_refused():
    source = open_synthetic()
    for index in (-1, len(source)):
        with pytest.raises(IndexError, match=f'example {index} is not in a source of 10000'):
            source[index]


def test_the_defaults_need_nothing():
    assert open_source('synthetic')[0]['image'].shape == (32, 32, 4)


@pytest.mark.parametrize('name, options, message', [
    ('imagenet', {}, "unknown data.name 'imagenet' .did you mean imagenet2012.*; known: digits, mnist, "),
    ('synthetic', {'image_size': 0}, 'image_size of the data must be at least 1, got 0'),
    ('synthetic', {'num_classes': -1}, 'num_classes of the data must be at least 1'),
    ('synthetic', {'seed': -1}, r'seed must be in \[0, 2\^63\), got -1'),
    ('synthetic', {'split': 'test'}, "no split 'test'; known: train, held_out"),
])
def test_bad_requests(name, options, message):
    with pytest.raises(UserError, match=message):
        open_source(name, **options)


def test_absent_latents_say_what_is_missing_and_what_makes_it(tmp_path):
    with pytest.raises(UserError) as caught:
        open_source('latents', image_size=64, channels=4, num_classes=1000, data_dir=tmp_path)
    for part in (str(tmp_path / 'imagenet_latents_64x64x4'), 'VAE latents of ImageNet',
                 'python prepare_latents.py', '--config.data.name=synthetic'):
        assert part in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_latents_in_a_folder_of_ones_own(tmp_path):
    with pytest.raises(UserError, match=f'{tmp_path}/mine does not exist'):
        open_source('latents', path=tmp_path / 'mine')
    with pytest.raises(UserError, match='holds no latents'):
        open_source('latents', path=tmp_path)


def test_no_folder_is_not_the_current_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match='--config.data.path=FOLDER.*prepare_latents.py.*--text_encoder=.* '
                                        '--out=FOLDER') as caught:
        open_source('caption_latents', image_size=64, channels=4)
    assert str(tmp_path) not in str(caught.value)


def test_every_known_name_answers():
    assert set(SOURCES) == {'digits', 'mnist', 'synthetic', 'latents', 'imagenet2012', 'tfds:NAME', 'folder',
                            'shapes', 'captions', 'caption_latents'}
