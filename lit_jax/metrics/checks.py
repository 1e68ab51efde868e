"""Checks of features that all metrics share."""
import warnings

import numpy as np

from lit_jax.runtime.errors import UserError

CHUNK = 4096          # rows per step, so that no copy of a whole set is made


def check_features(features, name: str = 'features', least: int = 2) -> np.ndarray:
    """The features [N, d] as an array, not copied. Warns if all rows are equal.

    UserError for another shape, non-floating dtypes, fewer than `least` rows, or values not finite."""
    features = np.asarray(features)
    if features.ndim != 2 or len(features) < least or not features.shape[1]:
        raise UserError(f'{name} have shape {features.shape}, expected [N, d] with at least {least} rows; '
                        'flatten all axes but the first, or draw more samples')
    if not np.issubdtype(features.dtype, np.floating):
        raise UserError(f'{name} are {features.dtype}, expected floating point; pass the output of the '
                        'feature extractor, not images or labels')
    bad = np.concatenate([start + np.flatnonzero(~np.isfinite(features[start:start + CHUNK]).all(axis=1))
                          for start in range(0, len(features), CHUNK)])
    if len(bad):
        raise UserError(f'{len(bad)} of {len(features)} rows of {name} are not finite (first: row {bad[0]}), '
                        'so the samples they come from are not: look at those before you measure them')
    if len(features) > 1 and all((features[start:start + CHUNK] == features[0]).all()
                                 for start in range(0, len(features), CHUNK)):
        warnings.warn(f'all {len(features)} rows of {name} are equal: the samples are all the same image, '
                      'or the extractor does not see them', stacklevel=3)
    return features


def check_pair(samples, reference, least: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Both sets, checked, of equal dimension."""
    samples = check_features(samples, 'samples', least)
    reference = check_features(reference, 'reference', least)
    if samples.shape[1] != reference.shape[1]:
        raise UserError(f'samples have {samples.shape[1]} dimensions and the reference {reference.shape[1]}; '
                        'compute both with the same feature extractor')
    return samples, reference
