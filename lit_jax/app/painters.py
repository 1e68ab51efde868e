"""A model behind the page: what it is called, and how it turns a wish into what it draws, telling of every
step.

Two kinds with the same methods: `ClassPainter`, and `TextPainter` around a `TextToImage`. The images are
those of `sample.py`, for the same seed and settings.
"""
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import numpy as np

from lit_jax.checkpoint.load import load
from lit_jax.models.arch import mixers_of
from lit_jax.models.network import Network, count_parameters
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.memory import explain_out_of_memory
from lit_jax.runtime.paths import as_path
from lit_jax.sampling.decoder import check_decoder, class_names, open_decoder
from lit_jax.sampling.draw_classes import Request
from lit_jax.sampling.groups import GROUP, GroupSampler, Images
from lit_jax.sampling.noise import check_seed
from lit_jax.sampling.program import build_sampler
from lit_jax.sampling.prompts import latent_size
from lit_jax.sampling.text_to_image import PROGRAMS, SETTINGS, PromptFeatures, TextToImage

EACH = -1                  # as a label: one class after the other
MOST = GROUP               # images at once: one group
OnStep = Callable[[int, int], None]


@dataclass(frozen=True)
class Wish:
    """What the page is asked for. label: of models for classes. prompt, negative, size (height, width): of
    models for prompts."""
    label: int = EACH
    prompt: str = ''
    negative: str = ''
    seed: int = 0
    count: int = 4
    method: str = 'ddpm'
    steps: int = 50
    cfg_scale: float = 4.0
    size: tuple[int, int] | None = None

    def sampler(self) -> dict:
        """The options of `build_sampler` that a person chooses here."""
        return {'method': self.method, 'steps': self.steps, 'cfg_scale': self.cfg_scale}


class _Recent(OrderedDict):
    """The last PROGRAMS values that were used; the one that was used longest ago goes."""

    def use(self, key, make: Callable):
        self[key] = self.pop(key) if key in self else make()
        while len(self) > PROGRAMS:
            self.popitem(last=False)
        return self[key]


def describe_network(network: Network) -> str:
    """'dit, softmax attention, 1.2 M parameters'."""
    arch, count = network.arch, count_parameters(network)
    mixers = ' and '.join(dict.fromkeys(mixer['name'] for mixer in mixers_of(arch)))
    size = f'{count / 1e6:,.0f} M' if count >= 1e7 else f'{count / 1e6:.2f} M' if count >= 1e5 \
        else f'{count:,}'
    return f'{arch["family"]}, {mixers} attention, {size} parameters'


def check_wish(wish: Wish) -> None:
    """Raises UserError for numbers that no model could draw with."""
    check_seed(wish.seed)
    if not 1 <= wish.count <= MOST:
        raise UserError(f'the number of images must lie between 1 and {MOST}, got {wish.count}')


class ClassPainter:
    """A model for classes, loaded. vae: folder of the VAE that decodes what it draws."""
    takes = 'label'
    default = Wish(method=Request.method, steps=Request.steps, cfg_scale=Request.cfg_scale)

    def __init__(self, source, vae: str | None = None, *, dtype: str = 'float32'):
        self.source, self.name = str(source), as_path(source).name
        self.model = load(source, dtype=dtype)
        self.config, self.network = self.model.config, self.model.network
        self.vae = open_decoder(self.model, vae, source)
        self._programs, self._tick = _Recent(), None

    @property
    def classes(self) -> list[str]:
        """A name for every class."""
        return class_names(self.config, range(self.network.null_label))

    def labels(self, wish: Wish) -> np.ndarray:
        """int32 [N]: the class of each image."""
        return np.arange(wish.count, dtype=np.int32) % self.network.null_label if wish.label == EACH else \
            np.full(wish.count, wish.label, np.int32)

    def captions(self, wish: Wish) -> list[str]:
        return class_names(self.config, self.labels(wish))

    def check(self, wish: Wish) -> None:
        """Raises UserError for what this model cannot draw."""
        check_wish(wish)
        if wish.label != EACH and not 0 <= wish.label < self.network.null_label:
            raise UserError(f'class {wish.label} is out of range; this model knows '
                            f'0..{self.network.null_label - 1}')
        build_sampler(self.network, **self._settings(wish))

    def _settings(self, wish: Wish) -> dict:
        diffusion: Mapping = self.config['diffusion']
        return {'train_steps': diffusion['steps'], 'kind': diffusion['kind'], **wish.sampler()}

    def load(self) -> None:
        """Nothing is left to load."""

    def encode(self, wish: Wish) -> None:
        """There is nothing to read."""

    def is_compiled(self, wish: Wish) -> bool:
        """Whether an earlier wish has left the program for this one."""
        return self._key(wish) in self._programs

    def _key(self, wish: Wish):
        return (*wish.sampler().values(), wish.count)

    def draw(self, wish: Wish, features: None, on_step: OnStep) -> np.ndarray:
        """What the model draws, float32 [N, h, w, C]. on_step is called with (steps begun, steps in all)."""
        images = Images.of_classes(self.labels(wish), wish.seed)
        done = iter(range(1, wish.steps + 1))
        sampler = self._programs.use(self._key(wish), lambda: GroupSampler(
            self.model, {**wish.sampler(), 'on_step': self._on_step}, images,
            devices=jax.local_devices()[:1]))
        sampler.replace_images(images)
        self._tick = lambda: on_step(next(done, wish.steps), wish.steps)
        try:
            with explain_out_of_memory('drawing'):
                drawn = sampler.draw_all()
                jax.effects_barrier()
        except BaseException:
            del self._programs[self._key(wish)]        # it may not be compiled
            raise
        finally:
            self._tick = None
        return drawn

    def _on_step(self, timestep) -> None:
        if self._tick is not None:
            self._tick()

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Images float32 [N, H, W, C] of latents; one by one, since an image's decoding takes much memory."""
        if self.vae is None:
            return latents
        decoded = [self.vae.decode(latents[i:i + 1] + self.vae.shift) for i in range(len(latents))]
        return np.concatenate([np.asarray(image, np.float32) for image in decoded])

    def check_teacher(self, teacher: 'ClassPainter') -> None:
        if self.vae is not None:
            check_decoder(self.vae, teacher.config, 'the VAE of the student', teacher.source)

    def arguments(self, wish: Wish) -> list[str]:
        """Of `sample.py`, for the same images."""
        if wish.label == EACH:
            return ['--classes=' + ','.join(map(str, self.labels(wish))), '--per_class=1',
                    f'--seed={wish.seed}']
        return [f'--classes={wish.label}', f'--per_class={wish.count}', f'--seed={wish.seed}']


class TextPainter:
    """A model for prompts; its weights, and those of its text encoder and VAE, are read when they are needed
    first."""
    takes = 'text'

    def __init__(self, source, vae: str | None = None, text_encoder: str | None = None, **options):
        self.source, self.name = str(source), as_path(source).name
        self.pipeline = TextToImage(source, text_encoder, vae, **options)
        self.config, self.network, self.vae = self.pipeline.config, self.pipeline.network, self.pipeline.vae
        self._programs = _Recent()

    @property
    def default(self) -> Wish:
        return Wish(**{name: SETTINGS[name] for name in ('method', 'steps', 'cfg_scale')},
                    count=1 if self._is_large() else 4, size=self.pipeline.nominal_size)

    def _is_large(self) -> bool:
        return max(self.pipeline.nominal_size) > 256

    def seeds(self, wish: Wish) -> list[int]:
        """Of each image: the wish's, and those that follow."""
        return [(wish.seed + i) % (1 << 32) for i in range(wish.count)]

    def captions(self, wish: Wish) -> list[str]:
        return [f'seed {seed}' for seed in self.seeds(wish)]

    def check(self, wish: Wish) -> None:
        check_wish(wish)
        self.pipeline.check(wish.size, **wish.sampler())

    def load(self) -> None:
        self.pipeline.load('model')

    def encode(self, wish: Wish) -> PromptFeatures:
        return self.pipeline.encode([wish.prompt], wish.negative)

    def is_compiled(self, wish: Wish) -> bool:
        return self._key(wish) in self._programs

    def _key(self, wish: Wish):
        return (*wish.sampler().values(),
                latent_size(wish.size, self.config['model'], self.pipeline.downscale))

    def draw(self, wish: Wish, features: PromptFeatures, on_step: OnStep) -> np.ndarray:
        drawn = self.pipeline.draw(features, self.seeds(wish), size=wish.size, on_step=on_step,
                                   **wish.sampler())
        self._programs.use(self._key(wish), lambda: True)      # the pipeline keeps as many, in the same order
        return drawn

    def decode(self, latents: np.ndarray) -> np.ndarray:
        return self.pipeline.decode(latents)

    def check_teacher(self, teacher: 'TextPainter') -> None:
        """Its own pipeline has compared it with the text encoder and the VAE."""

    def arguments(self, wish: Wish) -> list[str]:
        height, width = wish.size or self.pipeline.nominal_size
        negative = [f'--negative_prompt={wish.negative}'] if wish.negative else []
        return [f'--prompt={wish.prompt}', *negative, '--seeds=' + ','.join(map(str, self.seeds(wish))),
                f'--size={width}x{height}']
