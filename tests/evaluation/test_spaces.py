"""The feature space of a VAE of one's own: means of latents in parts of the image, and their deviation."""
import numpy as np
import pytest
from vae_samples import ARCH, random_params

from lit_jax.checkpoint.vae_folder import load_vae, save_vae_folder
from lit_jax.evaluation.spaces import open_space
from lit_jax.runtime.errors import UserError


@pytest.mark.slow
def test_the_latents_of_a_vae_are_a_feature_space(tmp_path):
    provenance = {'source': 'made up', 'sha256': 'ab' * 32}
    save_vae_folder(tmp_path / 'vae', {'vae': ARCH, 'id': 'mine', 'scale': 1.0, 'provenance': provenance},
                    random_params())
    images = np.random.default_rng(0).integers(0, 256, (3, 24, 16, 3), np.uint8)
    space = open_space(f'vae:{tmp_path / "vae"}')
    pool = space.extract(images).pool
    vae = load_vae(tmp_path / 'vae')
    mean = np.asarray(vae.encode(images.astype(np.float32) / 127.5 - 1)[0])
    rows, columns = mean.shape[1:3]
    parts = [mean[:, i * rows // 4:(i + 1) * rows // 4, j * columns // 4:(j + 1) * columns // 4].mean((1, 2))
             for i in range(4) for j in range(4)]
    np.testing.assert_allclose(pool, np.concatenate([*parts, mean.std((1, 2))], axis=1), atol=1e-5)
    assert space.widths == (pool.shape[1], 0) and space.facts['flavour'] == 'VAE mine'
    assert space.facts['sha256'] == open_space(f'vae:{tmp_path / "vae"}').facts['sha256']


@pytest.mark.parametrize('name, says', [('vae', r'unknown --features=vae.*vae:FOLDER'),
                                        ('vae:', r'unknown --features=vae:'),
                                        ('vae:nowhere', 'nowhere is not a VAE folder')])
def test_what_is_no_vae_is_told(name, says):
    with pytest.raises(UserError, match=says):
        open_space(name)
