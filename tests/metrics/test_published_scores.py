"""The published numbers, with the published weights. Skipped where the files are not there: they cannot come
with a repository.

    LIT_JAX_INCEPTION   pt_inception-2015-12-05-6726825d.pth, or what convert_torch_ckpt.py makes of it
    LIT_JAX_ADM         folder with VIRTUAL_imagenet256_labeled.npz and
                        admnet_guided_upsampled_imagenet256.npz, the reference and the samples that
                        guided-diffusion's evaluations/README.md links to

The second needs features of 60,000 images: minutes on an accelerator, more than an hour on a few CPU cores.
"""
import os
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from inception_samples import pixels
from torchvision_shim import import_oracle

from lit_jax.convert import inception_weights
from lit_jax.metrics.features import FeatureExtractor, Features
from lit_jax.metrics.frechet import Statistics, frechet_distance, statistics
from lit_jax.metrics.inception_score import inception_score
from lit_jax.metrics.manifold import precision_recall
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.npz_reader import Npz

REFERENCE, SAMPLES = 'VIRTUAL_imagenet256_labeled.npz', 'admnet_guided_upsampled_imagenet256.npz'
PART = 512


def skip_loudly(reason: str) -> None:
    """A warning stands in pytest's summary also where skips are not listed."""
    warnings.warn(f'PUBLISHED NUMBERS NOT CHECKED: {reason}', stacklevel=2)
    pytest.skip(reason)


@pytest.fixture(scope='module')
def inception():
    def refuse(flags):
        raise UserError(f'not fetched in tests; name it with {flags}')

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception_weights, 'download', refuse)
        try:
            found = inception_weights.load_inception()
        except UserError as error:
            skip_loudly(f'no weights of Inception ({error})')
    assert found.published
    return found


@pytest.fixture(scope='module')
def files(inception) -> dict[str, Path]:
    folder = os.environ.get('LIT_JAX_ADM', '')
    found = {name: Path(folder) / name for name in (REFERENCE, SAMPLES)}
    if not folder or not all(path.is_file() for path in found.values()):
        skip_loudly(f'LIT_JAX_ADM is {folder!r}, expected a folder with {REFERENCE} and {SAMPLES}')
    return found


def features_of(inception, path: Path) -> Features:
    with Npz(path) as file:
        count = file.header('arr_0').shape[0]
        spans = (range(start, min(start + PART, count)) for start in range(0, count, PART))
        return FeatureExtractor(inception, group=64).extract(file.rows('arr_0', spans))


@pytest.mark.slow
@pytest.mark.peers
def test_the_real_weights_give_torch_fidelitys_features(inception, tmp_path):
    """Only where the weights are a file that PyTorch reads."""
    oracle = import_oracle('torch_fidelity.feature_extractor_inceptionv3')
    import torch
    file = Path(inception_weights.find_inception())
    if file.suffix != '.pth':
        skip_loudly(f'{file} cannot be given to torch-fidelity; LIT_JAX_INCEPTION must name the .pth')
    state = torch.load(file, map_location='cpu', weights_only=True)
    torch.save(state, tmp_path / 'weights.pth')
    peer = oracle.FeatureExtractorInceptionV3('peer', ['2048', 'logits_unbiased'],
                                              feature_extractor_weights_path=str(tmp_path / 'weights.pth'))
    images = pixels(256)
    with torch.no_grad():
        pool, logits = peer(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    ours = jax.jit(inception.network.features)(inception.params, images)
    for got, want in ((ours['pool'], pool.numpy()), (ours['logits'], logits.numpy())):
        assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()


@pytest.mark.slow
def test_the_scores_of_adm(inception, files):
    """What guided-diffusion's README gives for ADM-G, ADM-U at 256 pixels, with its own TensorFlow
    evaluator."""
    samples, reference = (features_of(inception, files[name]) for name in (SAMPLES, REFERENCE))
    with Npz(files[REFERENCE]) as file:
        stored = [Statistics(file.array(mean), file.array(cov))
                  for mean, cov in (('mu', 'sigma'), ('mu_s', 'sigma_s'))]
    assert len(samples.pool) == 50_000 and len(reference.pool) == 10_000
    fid, sfid = (frechet_distance(statistics(found, float32_mean=True), wanted)
                 for found, wanted in zip(samples, stored, strict=True))
    score, _ = inception_score(samples.pool, inception.params['fc']['kernel'])
    precision, recall = precision_recall(samples.pool, reference.pool, mode='adm_float16')
    assert fid == pytest.approx(3.9426, abs=0.005) and sfid == pytest.approx(6.1404, abs=0.005)
    assert score == pytest.approx(215.84, abs=0.3)
    assert precision == pytest.approx(0.8265, abs=0.002) and recall == pytest.approx(0.5309, abs=0.003)
