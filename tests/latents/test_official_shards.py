"""Latents that LightningDiT's own code cached become ours: values, labels, and what is refused."""
import jax
import numpy as np
import pytest
from latent_sets import VAE_ARCH
from safetensors.numpy import save_file

from lit_jax.checkpoint.vae_folder import save_vae_folder
from lit_jax.data.latent_space import LatentSpace
from lit_jax.data.latents import check_latents, choose_mirror, open_latents
from lit_jax.latents.prepare import prepare_latents
from lit_jax.latents.prepare_options import PrepareOptions
from lit_jax.models.vae import VaeNetwork
from lit_jax.runtime.errors import UserError

MEAN, STD = np.array([0.5, -1.0, 2.0]), np.array([2.0, 0.5, 1.5])


def official(count, seed=0, channels=3, **changed):
    """Arrays of one file of LightningDiT's extract_features.py, of 4 x 4 latents."""
    rng = np.random.default_rng(seed)
    latents, flipped = (rng.standard_normal((count, channels, 4, 4), np.float32) for _ in range(2))
    arrays = {'latents': latents, 'latents_flip': flipped, 'labels': rng.integers(0, 5, count)} | changed
    return {name: array for name, array in arrays.items() if array is not None}


@pytest.fixture(scope='module')
def vae(tmp_path_factory):
    network, path = VaeNetwork(VAE_ARCH), tmp_path_factory.mktemp('vaes') / 'vae'
    save_vae_folder(path, {
        'vae': network.arch, 'id': 'va', 'scale': 1.0, 'provenance': {'source': 'zeros'},
        'normalised': {'mean': MEAN.tolist(), 'std': STD.tolist()}},
        jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), network.abstract()))
    return path


@pytest.fixture
def folder(tmp_path, vae):
    """Two files, whose statistics are those of the VAE."""
    path = tmp_path / 'official'
    path.mkdir()
    (tmp_path / 'vae').symlink_to(vae)
    for number, count in enumerate((5, 4)):
        save_file(official(count, number), path / f'latents_rank00_shard{number:03d}.safetensors')
    write_stats(path, MEAN, STD)
    return path


def write_stats(folder, mean, std):
    save_file({name: np.asarray(values, np.float32).reshape(1, -1, 1, 1)
               for name, values in (('mean', mean), ('std', std))}, folder / 'latents_stats.pt')


def take_over(folder, **more):
    return prepare_latents(PrepareOptions(data='lightningdit', shard_size=3, **{
        'path': str(folder), 'vae': str(folder.parent / 'vae'), 'out': str(folder.parent / 'ours'), **more}))


def test_the_files_become_exact_latents_of_the_normalised_space(folder):
    assert '9 images, each with its mirror image' in take_over(folder)
    source = open_latents(folder.parent / 'ours', asked={'image_size': 4, 'channels': 3, 'num_classes': 5})
    files = [official(count, number) for number, count in enumerate((5, 4))]
    for name, view in (('latents', 0), ('latents_flip', 1)):
        raw = np.concatenate([arrays[name] for arrays in files]).astype(np.float64)
        want = (np.moveaxis(raw, 1, -1) - MEAN) / STD
        moments = source.take(range(9))['moments']
        np.testing.assert_allclose(moments[:, view, ..., :3], want, rtol=1e-6)
        assert (moments[..., 3:] == -60).all()
        rng = np.random.Generator(np.random.Philox(key=next(
            key for key in range(99) if np.random.Philox(key=key).random_raw() >> 63 == view)))
        np.testing.assert_array_equal(choose_mirror(source[4], rng)['moments'], moments[4, view])
    assert source.all_labels().tolist() == np.concatenate([arrays['labels'] for arrays in files]).tolist()
    assert source.metadata['image_size'] == 8 and source.metadata['vae']['id'] == 'va'
    with pytest.raises(UserError, match="vae: 'va' in the latents, 'another' in the recipe"):
        check_latents(source, LatentSpace(vae='another'))


@pytest.mark.parametrize('change, options, said', [
    (lambda path: save_file(official(5, channels=4), path / 'latents_rank00_shard000.safetensors'), {},
     r"holds latents of another VAE: 4 channels, 3 in .*vae \('va'\)"),
    (lambda path: write_stats(path, MEAN, 2 * STD), {},
     r'is not the mean and std with which .*vae was converted \(std of channel 0: 4 there, 2 in the VAE\)'),
    (lambda path: write_stats(path, [0] * 4, [1] * 4), {}, 'of 4 and 4 channels, the VAE has 3'),
    (lambda path: save_file(official(5, latents_flip=None), path / 'a.safetensors'), {},
     'has no latents_flip'),
    (lambda path: save_file(official(5, labels=np.zeros(4, np.int64)), path / 'a.safetensors'), {},
     r'labels \(4,\) \(I64\); expected'),
    (lambda path: save_file(official(5, latents=np.full((5, 3, 4, 4), np.nan, np.float32)),
                            path / 'a.safetensors'), {}, 'a.safetensors: latents 0 hold NaN'),
    (lambda path: (path / 'a.safetensors').write_bytes(b''), {}, 'is empty'),
    (lambda path: [file.unlink() for file in path.glob('*.safetensors')], {}, 'holds no .safetensors files'),
    (lambda path: None, {'num_classes': 2}, 'labels from . to 4, --num_classes=2 allows 0 to 1'),
    (lambda path: None, {'image_size': 16}, 'these latents are 4 x 4, of images of 8 pixels'),
    (lambda path: None, {'classes': 'sub_imagenet'}, 'a recipe chooses'),
    (lambda path: None, {'path': ''}, 'needs the folder of its .safetensors files')])
def test_other_files_are_refused_by_name(change, options, said, folder):
    change(folder)
    with pytest.raises(UserError, match=said):
        take_over(folder, **options)
