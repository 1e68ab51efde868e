"""Pipelines from a model to images: one for classes, one for prompts, used alike.

    pipeline = open_pipeline('models/dit_xl', vae='models/sd_vae')
    images = pipeline.sample(classes=[207, 360], seed=0)                 # uint8 [2, 256, 256, 3]
    pipeline = open_pipeline('runs/lit_t2i', vae='models/sdxl_vae', text_encoder='models/t5')
    images = pipeline.sample(prompts=['a red fox in the snow'], steps=20, size=(1024, 1024))

`sample.py` draws the same images for the same seed and settings. Their bits do not depend on devices, batches
or, for prompts, on what else is drawn: prompts are encoded one at a time, images are computed in groups of a
fixed size (`lit_jax.sampling.groups`) and decoded one at a time."""
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from lit_jax.checkpoint.load import find_steps, read_weights_config
from lit_jax.checkpoint.model_folder import CONFIG, is_model_folder
from lit_jax.checkpoint.text_encoder_folder import TextEncoder, load_text_encoder, read_text_encoder_config
from lit_jax.diffusion.settings import CLASSES, PROMPTS, SamplerSettings
from lit_jax.models.arch import conditioning
from lit_jax.models.network import Model
from lit_jax.models.t5 import WEIGHTS, T5Network
from lit_jax.runtime import memory, peers
from lit_jax.runtime.errors import UserError, shown
from lit_jax.runtime.leaves import map_named, placed, tree_bytes
from lit_jax.runtime.memory import explain_out_of_memory, give_back, temporary_bytes
from lit_jax.runtime.paths import as_path, file_sha256
from lit_jax.runtime.progress import Progress
from lit_jax.runtime.storage import MANIFEST
from lit_jax.sampling.groups import GROUP, Images
from lit_jax.sampling.labels import class_names
from lit_jax.sampling.model_pipeline import Pipeline
from lit_jax.sampling.prompts import check_text_encoder, default_group, latent_size, say_unknown
from lit_jax.text.encoder import encode_captions

KERNEL = 'kernel'       # leaves that are nearly all bytes of a backbone, and are cast before they are used
TILE, WHOLE = 64, 128   # latent pixels: the side of tiles, and of the largest latent decoded whole by default


def open_pipeline(source, vae=None, text_encoder=None, **options) -> 'ClassPipeline | TextPipeline':
    """The pipeline of a model; all processes call it together. Reads no weights yet.

    Args:
        source: model folder or workdir, or a loaded `Model`.
        vae, text_encoder: their folders, or a loaded `Vae` and `TextEncoder`; by default those in the model
            folder, where there are any (`lit_jax.deploy.offline`).
        options: of `ClassPipeline` or `TextPipeline`.

    Raises UserError for folders that do not belong together."""
    def part(name: str):
        return None if isinstance(source, Model) else find_part(source, name)

    def open_it():
        config = source.config if isinstance(source, Model) else read_weights_config(source)
        if conditioning(config['model']) == 'text':
            return TextPipeline(source, vae or part('vae'), text_encoder or part('text_encoder'), **options)
        texts = {name: options.pop(name, None) for name in ('text_dtype', 'low_memory')}
        if foreign := [name for name, value in {'text_encoder': text_encoder, **texts}.items() if value]:
            raise UserError(f'{", ".join(foreign)}: not for {source}, which draws classes: leave it out')
        return ClassPipeline(source, vae or part('vae'), **options)

    return peers.together(open_it)


def find_part(source, name: str):
    """The 'vae' or 'text_encoder' in a model folder that holds all its parts; None without one."""
    folder = as_path(source) / name
    return folder if (folder / CONFIG).is_file() else None


class ClassPipeline(Pipeline):
    """A class-conditional model."""
    takes, defaults = 'label', CLASSES

    @property
    def classes(self) -> list[str]:
        return class_names(self.config, range(self.network.null_label))

    def latent_size(self, size: None = None) -> None:
        if size is not None:
            raise UserError(f'{self.source} draws classes, at one size: {self.nominal_size}')

    def group(self, count: int, size=None, group: int | None = None) -> int:
        return min(group or GROUP, count)

    def default_tile(self, size: tuple[int, int]) -> None:
        """Decoded whole."""

    def encode(self, labels: Sequence[int], seed: int, negative: str = '') -> Images:
        if wrong := [label for label in np.unique(labels) if not 0 <= label < self.network.null_label]:
            raise UserError(f'class {", ".join(map(str, wrong))} is out of range; this model knows '
                            f'0..{self.network.null_label - 1}')
        return Images.of_classes(labels, seed)

    def captions(self, labels: Sequence[int], seeds=None) -> list[str]:
        return class_names(self.config, labels)

    def draw_groups(self, images: Images, groups: Sequence[int], settings: SamplerSettings, *, size=None,
                    group: int | None = None, tile=None, batch_size: int = 0) -> Iterator[np.ndarray]:
        """Images float32 of each group in turn, `batch_size` in flight; called by all processes together."""
        self.load('model')
        self.load('vae')
        if not groups:
            return iter(())
        sampler = self._sampler(self._key(len(images), settings, size, group, decoded=True), images)
        return (drawn for _, drawn in sampler.draw(groups, batch_size))


@dataclass(frozen=True)
class _PromptImages(Images):
    """Image i shows row which[i] of `cond`: features are not copied for each seed."""
    which: np.ndarray

    def take(self, rows: np.ndarray) -> Images:
        return replace(self, seeds=self.seeds[rows], numbers=self.numbers[rows], which=self.which[rows])

    def rows(self, indices) -> dict:
        which = self.which[indices]
        cond = {name: value[np.zeros_like(which) if name.startswith('null_') else which]
                for name, value in self.cond.items()}
        return {'seed': self.seeds[indices], 'number': self.numbers[indices], 'cond': cond}


class TextPipeline(Pipeline):
    """A text-to-image model with its text encoder: all networks in memory, or one at a time.

    Arguments beside those of `Pipeline` (dtype 'bfloat16' also holds the backbone's kernels in bfloat16):
        text_encoder: its folder, or a `TextEncoder`.
        text_dtype: of `load_text_encoder`; default float32 on CPU, bfloat16 elsewhere (int8 weights stay).
        low_memory: frees each network after its turn; False keeps them all, and what is compiled.
    Attributes: text_config; meter: memory and seconds of the phases of `draw_groups`."""
    takes, defaults = 'text', PROMPTS

    def __init__(self, source, vae=None, text_encoder=None, *, text_dtype: str | None = None,
                 low_memory: bool = False, **options):
        super().__init__(source, vae, **options)
        self.text_dtype = text_dtype or ('float32' if jax.default_backend() == 'cpu' else 'bfloat16')
        if self.text_dtype not in WEIGHTS:
            raise UserError(f'unknown dtype {shown(text_dtype)} of the text encoder; known: '
                            f'{", ".join(WEIGHTS)}')
        self.low_memory, self.meter = low_memory, memory.Meter()
        given = isinstance(text_encoder, TextEncoder)
        self._encoder_path, self._encoder = (None, text_encoder) if given else (text_encoder, None)
        self.text_config = self._open_text_config()
        if self.step is None and not self._given and not is_model_folder(as_path(source)):
            self.step = max(find_steps(source), default=None)      # part of the card, so chosen first

    def _open_text_config(self) -> dict:
        if self._encoder is None and self._encoder_path is None:
            known = (self.config.get('text') or {}).get('encoder')
            raise UserError(f'{self.source} draws what a prompt says and needs the text encoder that it was '
                            f'trained with: --text_encoder DIR '
                            f'({f"id {shown(known)}, " if known else ""}width '
                            f'{self.config["model"]["caption_channels"]}; python convert_torch_ckpt.py '
                            f'PIPELINE/text_encoder --out DIR)')
        config = self._encoder.config if self._encoder else read_text_encoder_config(self._encoder_path)
        check_text_encoder(config, self.config, self._encoder_path or 'the text encoder', self.source)
        return config

    def latent_size(self, size: tuple[int, int] | None = None) -> tuple[int, int]:
        """See `lit_jax.sampling.prompts.latent_size`."""
        return latent_size(size, self.config['model'], self.downscale)

    def group(self, count: int, size=None, group: int | None = None) -> int:
        """Images computed together, however many are drawn."""
        return group or default_group(self.latent_size(size))

    def default_tile(self, size: tuple[int, int]) -> int | None:
        """Side of the tiles for latents of `size` by default; None decodes them whole."""
        return TILE if self.low_memory or max(size) > WHOLE else None

    def captions(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[str]:
        return [f'seed {seed}' for seed in seeds]

    def _load_text_encoder(self):
        if self._encoder is None:
            self._encoder = load_text_encoder(self._encoder_path, dtype=self.text_dtype)
        return self._encoder.params

    def _load_model(self):
        if self._params is None:
            super()._load_model()
            if self.dtype == 'bfloat16':
                self._params = hold_narrow(self._params)
        return self._params

    def _release(self, name: str) -> dict | None:
        if name != 'text_encoder':
            return super()._release(name)
        if self._encoder_path is None or self._encoder is None:
            return None
        held, self._encoder = self._encoder.params, None
        return held

    def weights_facts(self) -> dict:
        """Identifies weights without reading them: a model folder's list of checksums, a workdir's step."""
        if self.step is None:
            path = as_path(self.source) / MANIFEST
            if not path.is_file():
                raise UserError(f'{path} is missing: copy the folder again, or convert the checkpoint again')
            return {'weights': {'manifest_sha256': file_sha256(path)}}
        return {'weights': {'workdir': self.source, 'step': self.step}}

    def encode(self, prompts: Sequence[str], seeds: int | Sequence[int], negative: str = '',
               wanted: Sequence[int] | None = None) -> Images:
        """What to draw: an image per prompt, with one seed or its own; guidance leads away from `negative`.
        wanted: numbers of the images to draw; prompts of others are not encoded. All processes call it
            together, each with its own numbers."""
        if np.size(seeds) not in (1, len(prompts)):
            raise UserError(f'{np.size(seeds)} seeds for {len(prompts)} images: give one, or one an image')
        seeds = np.broadcast_to(np.asarray(seeds, np.uint32), len(prompts))
        mine = range(len(prompts)) if wanted is None else wanted
        texts = list(dict.fromkeys([negative, *(prompts[i] for i in mine)]))
        with self.meter.phase('text encoder') as phase:
            phase.weights = self.load('text_encoder')
            features = peers.together(lambda: self._encode(texts) if len(mine) else None)
            self.end_turn('text_encoder')
        if features is None:
            return Images(seeds, seeds, {})          # nothing is drawn here
        row = {text: i for i, text in enumerate(texts)}
        cond = {'text': features.text, 'text_mask': features.mask, 'null_text': features.text[:1],
                'null_text_mask': features.mask[:1]}
        which = np.array([row.get(prompt, 0) for prompt in prompts])
        return _PromptImages(seeds, np.zeros_like(seeds), cond, which)

    def _encode(self, texts: list[str]):
        with explain_out_of_memory('reading the prompts'):
            length = self.config['model']['caption_tokens']
            say_unknown(texts, self._encoder.tokenizer.encode(texts, length))
            return encode_captions(self._encoder, texts, length, batch_size=1)

    def draw_groups(self, images: Images, groups: Sequence[int], settings: SamplerSettings, *, size=None,
                    group: int | None = None, tile: int | None = 0,
                    batch_size: int = 0) -> Iterator[np.ndarray]:
        """Images float32 of each group in turn, all drawn before the first is decoded; called by all
        processes together. The VAE is kept until `end_turn('vae')`."""
        steps, seen = len(groups) * settings.evaluations, [0]

        def on_step(done: int, total: int) -> None:
            now = done * steps // total     # devices without a group repeat another's and do not count
            if now > seen[0]:
                progress.add(now - seen[0])
                seen[0] = now

        def draw_all() -> list[np.ndarray]:
            with explain_out_of_memory('drawing'):
                return list(self._draw(images, groups, settings, size, group, on_step)) if groups else []

        with (self.meter.phase('backbone') as phase,
              Progress(max(1, steps), 'steps', seconds=10) as progress):
            phase.weights = self.load('model')
            latents = peers.together(draw_all)
            self.end_turn('model')
        self.load('vae')
        return self._decode_groups(latents, tile)

    def _decode_groups(self, latents: list[np.ndarray], tile: int | None) -> Iterator[np.ndarray]:
        for one in latents:
            with self.meter.phase('decoder') as phase, explain_out_of_memory('decoding'):
                phase.weights = self.load('vae')
                images = one if self.vae is None else self._decoded(one, tile)
            yield images

    def weights(self) -> dict[str, int]:
        """{part: bytes of its weights when loaded}."""
        encoder = T5Network(self.text_config['text_encoder'], weights=self._text_weights())
        found = {'text_encoder': tree_bytes(encoder.abstract()), 'model': tree_bytes(self._abstract())}
        return found if self.vae is None else {**found, 'vae': tree_bytes(self.vae.network.abstract())}

    def estimate(self, settings: SamplerSettings, size: tuple[int, int] | None = None,
                 group: int | None = None, tile: int | None = 0) -> list[tuple[str, int, int]]:
        """[(part, bytes of its weights, of results and temporaries)], from compiling; nothing is loaded."""
        length, channels = (self.config['model'][name] for name in ('caption_tokens', 'caption_channels'))
        wide = self.text_dtype == 'float32' or self.text_dtype == 'int8' and jax.default_backend() == 'cpu'
        compute = jnp.float32 if wide else jnp.bfloat16
        encoder = T5Network(self.text_config['text_encoder'], compute, self._text_weights())
        ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
        program = jax.jit(encoder.apply, compiler_options=encoder.inference_options())
        programs = {'text_encoder': program.lower(encoder.abstract(), ids, ids).compile()}
        text, mask = np.zeros((1, length, channels), compute), np.zeros((1, length), np.int32)
        nothing = np.zeros(self.group(1, size, group), np.uint32)
        images = _PromptImages(nothing, nothing, {'text': text, 'text_mask': mask, 'null_text': text,
                                                  'null_text_mask': mask}, nothing.astype(np.int64))
        sampler = self._sampler(self._key(len(images), settings, size, group), images)
        programs['model'] = sampler.compile(self._abstract())
        if self.vae is not None:
            height, width = self.latent_size(size)
            latent = jax.ShapeDtypeStruct((1, height, width, self.config['model']['channels']), jnp.float32)
            tile = self.default_tile((height, width)) if tile == 0 else tile
            here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])    # as loaded: so it is reused
            abstract = self.vae.network.abstract()
            weights = placed(abstract, jax.tree.map(lambda _: here, abstract))
            programs['vae'] = self._decode.lower(weights, latent, tile=tile).compile()
        found = [(name, weights, temporary_bytes(programs[name])) for name, weights in self.weights().items()]
        give_back()      # 0.2 GB that the compiler took, before the text encoder needs memory
        return found

    def text_facts(self) -> dict:
        """The card's entry about the text encoder."""
        config = self.text_config
        return {'id': config['id'], 'sha256': config['provenance']['sha256'], 'weights': config['weights'],
                'dtype': self.text_dtype}

    def _text_weights(self) -> str:
        """How the text encoder's weights will be held (`load_text_encoder`)."""
        stored, wanted = self.text_config['weights'], self.text_dtype
        return wanted if wanted == 'int8' or (stored, wanted) == ('float32', 'bfloat16') else stored

    def _abstract(self) -> dict:
        abstract = self.network.abstract()
        return abstract if self.dtype != 'bfloat16' else map_named(
            lambda name, leaf: leaf.update(dtype=jnp.bfloat16) if name.endswith(KERNEL) else leaf, abstract)


def hold_narrow(params: dict) -> dict:
    """Casts kernels to bfloat16 and deletes each float32 one at once: never two whole copies."""
    def cast(name, leaf):
        if not name.endswith(KERNEL):
            return leaf
        narrow = leaf.astype(jnp.bfloat16)
        narrow.block_until_ready()
        leaf.delete()
        return narrow

    return map_named(cast, params)
