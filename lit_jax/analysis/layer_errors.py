"""Relative error by layer: each mixer of a student against its block of the teacher's attention."""
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from lit_jax.analysis.examples import Images
from lit_jax.analysis.measures import same_time
from lit_jax.models.network import Model
from lit_jax.runtime.errors import UserError
from lit_jax.training.align import block_errors, check_alignable


def why_not_comparable(models: Mapping[str, Model]) -> str:
    """Why the layers of these models have no errors; '' where they have."""
    if set(models) != {'student', 'teacher'}:
        return 'the errors of layers are those of a student against its teacher: give --teacher=PATH'
    try:
        check_alignable(models['teacher'].arch, models['student'].arch)
    except UserError as error:
        return str(error)
    return ''


def layer_errors(models: Mapping[str, Model], images: Images, times: Sequence[float], batch_size: int,
                 progress) -> dict:
    """`{'timesteps', 'error': [times][layers]}`: squared error over the variance of the target, as training
    logs it; means over batches of images. Both see what enters the teacher's attention."""
    student, teacher = models['student'], models['teacher']

    @jax.jit
    def errors(params, teacher_params, x, t, label):
        inputs = {'x_t': x, 't': t, 'cond': {'label': label}}
        return block_errors(student.network, params, teacher.network, teacher_params, inputs)

    rows = []
    for t in times:
        found, sizes = [], []
        for start in range(0, len(images), batch_size):
            some = images[start:start + batch_size]
            found.append(errors(student.params, teacher.params, some.noised(t),
                                same_time(t, len(some)), some.label))
            sizes.append(len(some))
            progress.add(len(some))
        rows.append(np.average(jax.device_get(found), axis=0, weights=sizes).tolist())
    return {'timesteps': list(times), 'error': rows}
