"""Optional dashboards beside `metrics.jsonl`: TensorBoard and W&B. A missing, full or unreachable one is
switched off with a warning; other errors of its package end the run."""
import contextlib
import hashlib
import logging
import os
from collections.abc import Callable, Mapping

from lit_jax.runtime.errors import reason_of
from lit_jax.runtime.paths import absolute, is_remote

LOG = logging.getLogger('lit_jax')
SINK_ERRORS = (ImportError, OSError, RuntimeError)     # missing package, full disk, unreachable service


class TensorBoardSink:
    """TensorBoard through tensorboardX, without TensorFlow. Local only: its uploads hang after a failure."""

    def __init__(self, workdir, recipe: Mapping):
        from tensorboardX import SummaryWriter
        if is_remote(workdir):
            raise RuntimeError(f'no event files in {workdir}; use W&B (log.wandb) or plot metrics.jsonl')
        self._writer = SummaryWriter(str(workdir / 'tensorboard'))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def show(self, step: int, image_HWC) -> None:
        self._writer.add_image('samples', image_HWC, step, dataformats='HWC')

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """Weights & Biases; the run is named after the workdir and resumes with it."""

    def __init__(self, workdir, recipe: Mapping):
        os.environ.setdefault('WANDB_LOGIN_TIMEOUT', '30')      # it asks on a terminal; nobody may be there
        import wandb
        identity = hashlib.sha256(str(absolute(workdir)).encode()).hexdigest()[:16]
        folder = None if is_remote(workdir) else str(workdir)   # None: ./wandb of the machine
        log = recipe.get('log', {})
        with _explain_wandb():
            self._run = wandb.init(project=log.get('wandb_project') or 'lit_jax', id=identity, dir=folder,
                                   name=log.get('wandb_name') or workdir.name, resume='allow',
                                   config=dict(recipe))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        with _explain_wandb():
            self._run.log(dict(scalars), step=step)

    def show(self, step: int, image_HWC) -> None:
        import wandb
        with _explain_wandb():
            self._run.log({'samples': wandb.Image(image_HWC)}, step=step)

    def close(self) -> None:
        with _explain_wandb():
            self._run.finish()


@contextlib.contextmanager
def _explain_wandb():
    """Not logged in, or not reachable."""
    import wandb.errors
    try:
        yield
    except wandb.errors.Error as error:
        raise RuntimeError(f'{reason_of(error)} (`wandb login`, or WANDB_MODE=offline)') from error


SINKS = {'tensorboard': TensorBoardSink, 'wandb': WandbSink}


def open_sink(name: str, workdir, recipe: Mapping | None = None):
    """A sink of SINKS, or None with a warning: a missing dashboard must not stop a run."""
    try:
        return SINKS[name](workdir, recipe or {})
    except SINK_ERRORS as error:
        install = f' (pip install "lit_jax[{name}]")' if isinstance(error, ImportError) else ''
        LOG.warning('%s is off: %s%s. The run continues; metrics.jsonl has everything.', name, error, install)
        return None


def write_all(sinks: dict[str, object], step: int, scalars: Mapping[str, float]) -> None:
    """Writes to every sink, by name, and removes those that fail."""
    _with_all(sinks, step, lambda sink: sink.write(step, scalars))


def show_all(sinks: dict[str, object], step: int, image_HWC) -> None:
    """A grid of samples, uint8 [H, W, 3], to every sink."""
    _with_all(sinks, step, lambda sink: sink.show(step, image_HWC))


def _with_all(sinks: dict[str, object], step: int, act: Callable[[object], None]) -> None:
    for name, sink in list(sinks.items()):
        try:
            act(sink)
        except SINK_ERRORS as error:
            LOG.warning('%s is off from step %s on: %s. The run continues; metrics.jsonl has everything.',
                        name, f'{step:,}', error)
            del sinks[name]


def close_all(sinks: dict[str, object]) -> None:
    """Closes every sink; one that cannot be closed is only logged."""
    for name, sink in sinks.items():
        try:
            sink.close()
        except SINK_ERRORS as error:
            LOG.warning('%s could not be closed: %s', name, error)
