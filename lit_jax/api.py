"""The public names of lit_jax, for notebooks and programs; docs/start/python.md shows each in use."""
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from lit_jax import commands  # noqa: F401 (it says how models on the hub are opened)
from lit_jax.checkpoint import load as loading
from lit_jax.convert.torch_import import convert
from lit_jax.evaluation.evaluate_options import ScoreOptions
from lit_jax.evaluation.evaluation import score_rows
from lit_jax.models.network import Model
from lit_jax.recipes.recipe import finalize, load_recipe
from lit_jax.report.grids import to_pil
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.shipped import find_asset
from lit_jax.sampling.model_pipeline import Pipeline
from lit_jax.sampling.pipelines import find_part, open_pipeline
from lit_jax.training import setup
from lit_jax.training.from_teacher import complete
from lit_jax.training.mesh import make_mesh

__all__ = ['TrainedModel', 'convert_checkpoint', 'evaluate', 'inherit', 'load', 'recipe', 'to_pil']


class TrainedModel(Model):
    """A model with its weights: `model.sample(...)` draws images, `model(x, t, y)` calls the network.

    Attributes: network, params (a nested dict of arrays), config (of its model folder), arch."""
    _opened: tuple[tuple, Pipeline] | None = None
    _folder = None      # where it was loaded from, which may hold its VAE and its text encoder

    def sample(self, classes: Sequence[int | str] | None = None,
               prompts: Sequence[str] | str | None = None, *,
               seed: int | Sequence[int] = 0, vae: str | None = None,
               text_encoder: str | None = None, **options) -> np.ndarray:
        """Images uint8 [N, H, W, 1 or 3], the same as `sample.py` draws for this seed and these settings.

        Args:
            classes, prompts: one entry per image; whichever this model takes. Classes by number or name.
            seed: one for all images; with prompts also one per image.
            vae: VAE folder, for models of latents; without it latents are shown in false colours.
            text_encoder: text encoder folder, for models of prompts. A folder of `lit-jax bundle` has both.
            options: steps, cfg_scale, method, eta, cfg_channels, cfg_interval (`SamplerSettings`); for
                prompts also negative_prompt and size=(height, width).

        Raises:
            UserError: a setting or a folder that does not fit this model."""
        if self._folder is not None:
            vae = vae or find_part(self._folder, 'vae')
            text_encoder = text_encoder or find_part(self._folder, 'text_encoder')
        if self._opened is None or self._opened[0] != (vae, text_encoder):
            self._opened = (vae, text_encoder), open_pipeline(self, vae, text_encoder)
        return self._opened[1].sample(classes, prompts, seed=seed, **options)

    def __repr__(self) -> str:
        pixels = 'x'.join(map(str, self.arch['input_size']))
        shown = 'prompts' if self.network.conditioning == 'text' else f'{self.network.null_label} classes'
        space = self.config['latent']['space']
        return f'<{self.network.describe()}: {pixels}x{self.arch["channels"]} {space}, {shown}>'


def load(path, **options) -> TrainedModel:
    """A model from a model folder or a workdir of `train.py` (newest checkpoint, EMA weights).

    Args:
        path: local, in a bucket (gs://...), or on the hub (hf://OWNER/NAME).
        options: `step`, a checkpoint of a workdir other than the newest; `dtype` of the computation,
            'float32' or 'bfloat16'; `scan_layers=False` unrolls the blocks (longer to compile, often faster
            on a CPU).

    Raises:
        UserError: nothing to load there, damaged files, or an unknown dtype."""
    model = loading.load(path, **options)
    loaded = TrainedModel(model.network, model.params, model.config)
    loaded._folder = path
    return loaded


def convert_checkpoint(source, out, **options) -> Path:
    """Writes the model folder `out` from a PyTorch checkpoint of a diffusion transformer; returns its path.

    Args:
        source: a .pt or .safetensors file, a diffusers folder, or 'assets/NAME' for a shipped model.
        options: of `lit_jax.convert.torch_import.convert`, such as overwrite=True or heads=16.

    Raises:
        UserError: an unreadable or unknown file, or an output that exists; nothing is written then."""
    shipped = str(source).startswith('assets/') and not Path(source).exists()
    convert(find_asset(str(source)) if shipped else source, out, **options)
    return Path(out)


def recipe(name: str | Path) -> ConfigDict:
    """An editable recipe: 'lit_xl', 'baselines:dig_xl', 'paper/table4:ROW', or the path of a file."""
    return load_recipe(name)


def inherit(config: ConfigDict) -> TrainedModel:
    """The student of a recipe before its first step (LiT §3.3): weights inherited from `config.inherit.path`,
    the rest random.

    Raises:
        UserError: a recipe without `inherit.path`, or a teacher of another size."""
    config = complete(config)
    if not config.inherit.path:
        raise UserError('inherit.path is empty: set config.inherit.path to a model folder or a workdir')
    config = finalize(config, 1)
    mesh = make_mesh(config.mesh.to_dict(), jax.local_devices()[:1])
    network = setup.build_network(config)
    state, _ = setup.init_state(config, network, setup.build_optimizer(config), mesh)
    provenance = {'source': config.inherit.path, 'weights': 'inherited'}
    return TrainedModel(network, state['params'], {**setup.describe(config, None), 'provenance': provenance})


def evaluate(**options) -> list[dict]:
    """Scores image sets or models, like `evaluate.py`: one row per set, with 'scores' and its card.

    Args:
        options: fields of `ScoreOptions`: reference, samples or sources, metrics, features, ...

    Raises:
        UserError: an invalid request, before any image is drawn."""
    return score_rows(ScoreOptions(**options))
