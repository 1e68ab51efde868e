"""Base of the class and prompt pipelines: a model, its VAE, and programs that are compiled once."""
import contextlib
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace

import jax
import numpy as np

from lit_jax.checkpoint.load import load_weights, read_weights_config
from lit_jax.checkpoint.vae_folder import Vae, load_vae, read_vae_config
from lit_jax.diffusion.settings import SamplerSettings
from lit_jax.models.network import DTYPES, Model, Network
from lit_jax.models.vae import VaeNetwork
from lit_jax.report.grids import viewable
from lit_jax.runtime.errors import UserError, check_known, shown
from lit_jax.runtime.leaves import params_sha256, tree_bytes
from lit_jax.runtime.memory import explain_out_of_memory, give_back
from lit_jax.runtime.paths import as_path
from lit_jax.sampling.decoder import check_decoder
from lit_jax.sampling.groups import GroupSampler, Images
from lit_jax.sampling.labels import find_classes, parse_classes
from lit_jax.sampling.noise import check_seed

OnStep = Callable[[int, int], None]
PROGRAMS = 8                 # compiled programs that are kept


class Stopped(Exception):
    """Raised by `on_step` or `on_image` to end a drawing where it is; `draw` and `decode` pass it on."""


# JAX logs what a callback raises, with a traceback.
logging.getLogger(jax.debug.callback.__module__).addFilter(
    lambda record: not (record.exc_info and isinstance(record.exc_info[1], Stopped)))


class Pipeline:
    """The constructor only checks configs; weights are read when first needed, or by `load` (a collective).

    Args:
        source: model folder or workdir, or a loaded `Model`.
        vae: folder of the VAE that decodes, or a `Vae`; None for models on pixels, or to get latents.
        dtype: compute dtype of the backbone. step: of a workdir, the checkpoint; default: the newest.

    Attributes: takes ('label' or 'text'), defaults (`SamplerSettings`), config (of the model), network, vae
    (its params are None while it is not loaded), name."""
    takes: str
    defaults: SamplerSettings

    def __init__(self, source, vae=None, *, dtype: str = 'float32', step: int | None = None):
        if dtype not in DTYPES:
            raise UserError(f'unknown dtype {shown(dtype)}; known: {", ".join(DTYPES)}')
        self.dtype, self.step, self.low_memory = dtype, step, False
        self._given = isinstance(source, Model)
        if self._given:
            self.config, self.network, self._params = source.config, source.network, source.params
            self.source, self.dtype = 'the model', np.dtype(self.network.dtype).name
        else:
            self.config, self._params, self.source = read_weights_config(source), None, str(source)
            self.network = Network(self.config['model'], dtype=DTYPES[dtype])
        if self.network.conditioning != self.takes:
            raise UserError(f'{source} draws {what_is_drawn(self.network.conditioning)}, not '
                            f'{what_is_drawn(self.takes)}')
        self.name = as_path(self.source).name
        self.defaults = type(self).defaults.of_model(self.config)
        self._vae_path, self.vae = (None, vae) if isinstance(vae, Vae) else (vae, self._open_vae(vae))
        self._decode = self.vae and jax.jit(self.vae.network.decode, static_argnames='tile')
        self._samplers: dict[tuple, GroupSampler] = {}
        self._active: GroupSampler | None = None
        self._sha256: str | None = None
        self._tick: Callable[[], None] | None = None

    def _open_vae(self, path) -> Vae | None:
        """The VAE without its weights, checked."""
        if not path:
            return None
        if self.config['latent']['space'] == 'pixels':
            raise UserError(f'{self.source} draws pixels, there is nothing to decode: leave --vae {path} out')
        config = read_vae_config(path)
        vae = Vae(VaeNetwork(config['vae']), None, config)
        check_decoder(vae, self.config, path, self.source)
        return vae

    @property
    def downscale(self) -> int:
        """Side in pixels of the image area that one position of the model's output covers."""
        if self.config['latent']['space'] == 'pixels':
            return 1
        return self.vae.network.downscale if self.vae else self.config['latent'].get('downscale', 8)

    @property
    def nominal_size(self) -> tuple[int, int]:
        """(height, width) in pixels of the images that the model was trained for."""
        return tuple(side * self.downscale for side in self.config['model']['input_size'])

    @property
    def false_colours(self) -> bool:
        """Whether latents are shown because no VAE is given."""
        return self.vae is None and self.config['latent']['space'] != 'pixels'

    def check_decodes(self) -> None:
        """Raises UserError where latents would come out instead of images."""
        channels = self.vae.network.arch['image_channels'] if self.vae else self.network.arch['channels']
        if self.false_colours or channels not in (1, 3):
            raise UserError(f'{self.source} draws latents; images need the VAE that decodes them: --vae DIR '
                            f'(id {shown(self.config["latent"]["vae"])}; python convert_torch_ckpt.py '
                            f'DIFFUSERS_VAE --out DIR)')

    def check(self, settings: SamplerSettings, size: tuple[int, int] | None = None) -> None:
        """Raises UserError for settings or a size (height, width) that cannot be drawn."""
        self.latent_size(size)
        settings.check_model(self.config)

    def sample(self, classes: Sequence[int | str] | None = None, prompts: Sequence[str] | None = None, *,
               seed: int | Sequence[int] = 0, negative_prompt: str = '', size: tuple[int, int] | None = None,
               group: int | None = None, **settings) -> np.ndarray:
        """Images uint8 [N, H, W, channels] as `sample.py` draws them; latents without a VAE in false colours.

        Args:
            classes, prompts: what each image shows; the one that the model takes. Classes by number or name.
            seed: one for all images; for prompts also one per image.
            size: (height, width) in pixels, for prompts. group: images computed together; affects rounding.
            settings: fields of `SamplerSettings` that replace `defaults`: steps, cfg_scale, ..."""
        if isinstance(prompts, str):
            prompts = [prompts]
        _check_asked(classes, prompts, seed, settings)
        if classes is not None and self.takes == 'label':
            classes = parse_classes(classes, self.classes) if isinstance(classes, str) \
                else find_classes(classes, self.classes)
        shown, other = (prompts, classes) if self.takes == 'text' else (classes, prompts)
        if not len(shown if shown is not None else ()) or other is not None:
            raise UserError(f'{self.source} draws {what_is_drawn(self.takes)}: give '
                            f'{"prompts" if self.takes == "text" else "classes"}')
        settings = replace(self.defaults, **settings)
        self.check(settings, size)
        images = self.encode(shown, seed, negative_prompt)
        groups = range(-(-len(shown) // self.group(len(shown), size, group)))
        drawn = self.draw_groups(images, groups, settings, size=size, group=group)
        drawn = viewable(np.concatenate(list(drawn)))
        self.end_turn('vae')
        return drawn

    def load(self, name: str) -> int:
        """Reads weights ('model', 'vae' or 'text_encoder') unless they are loaded; returns their bytes."""
        with explain_out_of_memory(f'loading the {name.replace("_", " ")}'):
            return tree_bytes(getattr(self, f'_load_{name}')())

    def _load_model(self):
        if self._params is None:
            config, self._params = load_weights(self.source, step=self.step)
            self.config['provenance'] = config['provenance']
        return self._params

    def _load_vae(self):
        if self.vae is not None and self.vae.params is None:
            self.vae.params = load_vae(self._vae_path).params
        return self.vae and self.vae.params

    def replace_weights(self, params: dict, provenance: dict) -> None:
        """Other weights of the same network, for the compiled programs."""
        self.free('model')
        self._params, self._given, self._sha256 = params, True, None
        self.config = {**self.config, 'provenance': provenance}

    def weights_facts(self) -> dict:
        """The card's entry about the weights."""
        self.load('model')
        self._sha256 = self._sha256 or params_sha256(self._params)
        return {'provenance': self.config['provenance'], 'sha256': self._sha256}

    def free(self, name: str) -> None:
        """Deletes the weights of a part; those that the caller handed in are only released."""
        for leaf in jax.tree.leaves(self._release(name)):
            leaf.delete()
        give_back()

    def _release(self, name: str) -> dict | None:
        """The weights to delete."""
        if name == 'vae':
            if self.vae is None or self._vae_path is None:
                return None
            held, self.vae.params = self.vae.params, None
            return held
        held, self._params, self._active = None if self._given else self._params, None, None
        for sampler in self._samplers.values():
            sampler.replace_weights(None)
        return held

    def end_turn(self, name: str) -> None:
        """`free` with low_memory, else nothing; given weights cannot be read again."""
        if self.low_memory and not (name == 'model' and self._given):
            self.free(name)

    @contextlib.contextmanager
    def _turn(self, name: str, doing: str):
        self.load(name)
        try:
            with explain_out_of_memory(doing):
                yield
        finally:
            self.end_turn(name)

    def draw(self, images: Images, settings: SamplerSettings, *, size: tuple[int, int] | None = None,
             group: int | None = None, on_step: OnStep | None = None) -> np.ndarray:
        """What the model draws: float32 [N, h, w, C], latents (divided by their scale) or pixels.
        images: of `encode`. size: (height, width) of the images in pixels. on_step: called with (number,
            total) when an evaluation of the backbone begins; may raise `Stopped`."""
        with self._turn('model', 'drawing'):
            return np.concatenate(list(self._draw(images, None, settings, size, group, on_step)))

    def _draw(self, images: Images, groups: Sequence[int] | None, settings: SamplerSettings, size, group,
              on_step: OnStep | None = None) -> Iterator[np.ndarray]:
        """What the model draws of each group (None: of all), a group per device at a time."""
        key = self._key(len(images), settings, size, group)
        sampler = self._sampler(key, images)
        groups = range(sampler.count) if groups is None else groups
        total = -(-len(groups) // sampler.devices) * sampler.devices * settings.evaluations
        done, stopped = itertools.count(1), []

        def tick() -> None:
            try:
                on_step(min(next(done), total), total)
            except Stopped as stop:
                stopped.append(stop)
                raise

        self._tick = on_step and tick
        try:
            for number, drawn in sampler.draw(groups, 1):
                yield drawn[:len(images) - number * sampler.group]
            jax.effects_barrier()
        except BaseException:
            if stopped:      # the program is whole, and other devices run until their next step
                with contextlib.suppress(jax.errors.JaxRuntimeError):
                    jax.effects_barrier()
                raise stopped[0] from None
            self._samplers.pop(key, None)          # it may not be compiled
            raise
        finally:
            self._tick = None

    def is_compiled(self, count: int, settings: SamplerSettings, size: tuple[int, int] | None = None,
                    group: int | None = None) -> bool:
        """Whether an earlier `draw` compiled the program for so many images."""
        return self._key(count, settings, size, group) in self._samplers

    def _key(self, count: int, settings: SamplerSettings, size, group, decoded: bool = False) -> tuple:
        group = self.group(count, size, group)
        devices = min(len(jax.local_devices()), -(-count // group))
        return settings, self.latent_size(size), group, devices, decoded

    def _sampler(self, key: tuple, images: Images) -> GroupSampler:
        """The program of these settings, compiled once, with these images."""
        settings, size, group, devices, decoded = key
        if len(images) < group:      # always full: how many are computed together decides the bits
            images = images.take(np.resize(np.arange(len(images)), group))
        sampler = self._samplers.pop(key, None)
        if sampler is None:
            sampler = GroupSampler(Model(self.network, None, self.config), settings, images, group=group,
                                   vae=self.vae if decoded else None, size=size,
                                   devices=jax.local_devices()[:devices],
                                   on_step=None if decoded else self._on_step)
        self._samplers[key] = sampler
        while len(self._samplers) > PROGRAMS:
            del self._samplers[next(iter(self._samplers))]
        if self._params is not None and self._active is not sampler:
            if self._active is not None:
                self._active.replace_weights(None)
            sampler.replace_weights(self._params)
            self._active = sampler
        sampler.replace_images(images)
        return sampler

    def _on_step(self, timestep) -> None:
        if self._tick is not None:
            self._tick()

    def decode(self, latents: np.ndarray, tile: int | None = 0,
               on_image: Callable[[], None] | None = None) -> np.ndarray:
        """Images float32 [N, H, W, channels], not clipped, decoded one by one; pixels are returned unchanged.
        tile: side in latent pixels of the squares decoded one by one; None: whole; 0: `default_tile`.
        on_image: called before each image; may raise `Stopped`."""
        if self.vae is None:
            return latents
        with self._turn('vae', 'decoding'):
            return self._decoded(latents, tile, on_image)

    def _decoded(self, latents: np.ndarray, tile: int | None,
                 on_image: Callable[[], None] | None = None) -> np.ndarray:
        tile = self.default_tile(latents.shape[1:3]) if tile == 0 else tile

        def one(latent: np.ndarray) -> np.ndarray:
            if on_image is not None:
                on_image()
            return np.asarray(self._decode(self.vae.params, latent + self.vae.shift, tile=tile), np.float32)

        return np.concatenate([one(latents[i:i + 1]) for i in range(len(latents))])


def what_is_drawn(kind: str) -> str:
    """For messages; kind: 'label' or 'text'."""
    return 'what a prompt says' if kind == 'text' else 'classes'


def _check_asked(classes, prompts, seed, settings: Mapping) -> None:
    """UserError for values of another kind than `Pipeline.sample` takes, for unknown settings, and seeds."""
    for name in settings:
        check_known('setting', name, [field.name for field in fields(SamplerSettings)])
    for name in {'steps', 'eta', 'cfg_scale'} & settings.keys():
        if not isinstance(settings[name], int | float | np.number) or isinstance(settings[name], bool):
            raise UserError(f'{name} must be a number, got {shown(settings[name])}')
    if not (classes is None or isinstance(classes, str) or np.ndim(classes) == 1 and all(
            isinstance(one, str) or _whole(one) for one in classes)):
        raise UserError('classes must be a list of their numbers, such as [3, 7], or names, got '
                        f'{shown(classes)}')
    if prompts is not None and not all(isinstance(one, str) for one in np.atleast_1d(prompts)):
        raise UserError(f'prompts must be a list of texts, got {shown(prompts)}')
    if np.ndim(seed) > (classes is None) or not _whole(seed):
        raise UserError(f'seed must be a whole number{"" if classes else ", or one for each prompt"}, got '
                        f'{shown(seed)}')
    for one in np.unique(seed):
        check_seed(int(one))


def _whole(values) -> bool:
    return np.issubdtype(np.asarray(values).dtype, np.integer)
