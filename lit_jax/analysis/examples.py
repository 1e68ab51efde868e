"""Loads the examples of an analysis: clean inputs as in training, each with one fixed noise."""
from dataclasses import dataclass

import jax
import numpy as np
from ml_collections import ConfigDict

from lit_jax.analysis.measures import same_time, spread
from lit_jax.data.latents import first_of_both
from lit_jax.data.sources import SOURCES, is_own
from lit_jax.diffusion.kinds import Diffusion, read_diffusion
from lit_jax.models.network import Model
from lit_jax.recipes.recipe import default
from lit_jax.report.grids import viewable
from lit_jax.runtime.errors import UserError, shown
from lit_jax.sampling.noise import initial_noise
from lit_jax.training import setup
from lit_jax.training.mesh import AXES, make_mesh
from lit_jax.training.step import Objective, clean_inputs

CHUNK = 16      # images that a VAE encodes at once
_add_noise = jax.jit(lambda diffusion, x0, t_B, noise: diffusion.add_noise(x0, t_B, noise),
                     static_argnums=0)


@dataclass(frozen=True)
class Images:
    """x0 and noise [P, H, W, C], label int32 [P], numbers [P]: indices in the data source. Can be indexed."""
    x0: np.ndarray
    noise: np.ndarray
    label: np.ndarray
    numbers: np.ndarray
    diffusion: Diffusion
    scale: float

    def __len__(self) -> int:
        return len(self.label)

    def __getitem__(self, which) -> 'Images':
        return Images(self.x0[which], self.noise[which], self.label[which], self.numbers[which],
                      self.diffusion, self.scale)

    def noised(self, t: float) -> np.ndarray:
        """x_t of all images, at a timestep or a flow's time."""
        return np.asarray(_add_noise(self.diffusion, self.x0, same_time(t, len(self)), self.noise))

    def visible(self, t: float | None = None) -> np.ndarray:
        """The images, clean or at time t, as uint8; latents in false colours."""
        return viewable((self.x0 if t is None else self.noised(t)) / self.scale)


def data_recipe(model: Model, path, data: str = '', data_path: str = '', vae: str = '') -> ConfigDict:
    """The recipe of a workdir, or one made from a model folder, with the data named here."""
    config = model.config
    name, own = find_data(config, path, data, data_path)
    recipe = _recipe_of_workdir(config) if 'recipe' in config else _recipe_of_folder(config)
    recipe.data.name, recipe.data.path = name, own.get('path', '')
    if vae:
        recipe.latent.vae_path = vae
    if setup.reads_images(recipe) and not recipe.latent.vae_path:
        raise UserError(f'{path} is a latent model, but {recipe.data.name} has images; give the VAE: '
                        f'--vae=FOLDER (id {shown(recipe.latent.vae)}), or cached latents: --data=latents')
    return recipe


def find_data(config, path, data: str = '', data_path: str = '') -> tuple[str, dict]:
    """(name, fields of the recipe's section `data`) of the data set named here, else of a workdir's own.
    config: of the model or workdir `path`."""
    if data and not data.startswith('tfds:') and data not in SOURCES and not is_own(data):
        raise UserError(f'unknown --data={data}; known: {", ".join(SOURCES)}')
    own = dict(config['recipe']['data']) if 'recipe' in config else {'name': _digits_or_none(config)}
    if not (data or own['name']):
        raise UserError(f'{path} is a model folder, which does not record its data set; give it: '
                        f'--data=latents --data_path=FOLDER, or one of {", ".join(SOURCES)}')
    if not data and is_own(own['name']):
        raise UserError(f'{path} was trained on {own["name"]}, and a workdir does not get to import a '
                        f'module: name the data set, --data={own["name"]}')
    name = data or own['name']
    if name != own['name']:
        own = {}
    return name, own | {'path': data_path} if data_path else own


def _recipe_of_workdir(config) -> ConfigDict:
    """The recipe of a workdir, with the defaults of fields that are newer than the run."""
    own, fields = config['recipe'], default().to_dict()
    return ConfigDict(own | {section: {**fields[section], **own.get(section, {})}
                             for section in ('data', 'latent', 'diffusion', 'teacher')})


def _recipe_of_folder(config) -> ConfigDict:
    arch, latent = dict(config['model']), config['latent']
    rows, columns = arch.pop('input_size')
    if rows != columns:
        raise UserError(f'this model takes inputs of {rows} x {columns}; data sets have square images only')
    downscale = latent.get('downscale') or (8 if latent['space'] == 'vae' else 1)
    recipe = default().unlock()
    recipe.data.update({'num_classes': arch.pop('num_classes'), 'image_size': rows * downscale, 'path': ''})
    recipe.latent.update({'space': latent['space'], 'vae': latent['vae'] or '',
                          'scale': float(latent['scale']), 'downscale': downscale,
                          'channels': arch.pop('channels')})
    recipe.diffusion.update(config['diffusion'])
    recipe.model = ConfigDict(arch)
    return recipe


def _digits_or_none(config) -> str:
    """A model folder does not record its data set; only digits models are recognized, by their shape."""
    arch = config['model']
    shape = (tuple(arch['input_size']), arch['channels'], arch.get('num_classes'), config['latent']['space'])
    return 'digits' if shape == ((8, 8), 1, 10, 'pixels') else ''


def open_images(model: Model, recipe: ConfigDict, count: int, *, split: str = 'train',
                seed: int = 0) -> Images:
    """`count` examples, evenly spread over the data set; the noise depends on their indices and the seed."""
    source = setup.build_source(recipe, split)
    setup.check_data(recipe, source)
    numbers = np.array(spread(len(source), count))
    vae = None
    if setup.reads_images(recipe):
        vae = setup.load_frozen_vae(recipe, make_mesh(dict.fromkeys(AXES, 1), jax.devices()[:1]))
    diffusion = read_diffusion(recipe.diffusion)
    objective, key = Objective(diffusion, recipe.latent.scale), jax.random.key(seed)
    x0, labels = [], []
    for start in range(0, len(numbers), CHUNK):
        elements = [source[int(i)] for i in numbers[start:start + CHUNK]]
        if 'moments' in elements[0]:
            elements = [first_of_both(element) for element in elements]
        batch = {name: np.stack([element[name] for element in elements]) for name in elements[0]}
        labels.append(batch['label'])
        x0.append(np.asarray(clean_inputs(batch, jax.random.fold_in(key, start), objective,
                                          vae and vae.encode)))
    noise = np.asarray(initial_noise(model.network, seed, numbers))
    return Images(np.concatenate(x0), noise, np.concatenate(labels).astype(np.int32), numbers,
                  diffusion, recipe.latent.scale)
