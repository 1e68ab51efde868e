"""From prompts to images: text encoder, backbone and VAE, all in memory, or one at a time.

    pipeline = TextToImage('runs/lit_t2i', text_encoder='models/t5', vae='models/sdxl_vae')
    features = pipeline.encode(['a red circle', 'two blue squares'], negative='')
    latents = pipeline.draw(features, seeds=[0, 0], size=(1024, 1024), steps=20)
    images = pipeline.decode(latents)                       # float32 [2, 1024, 1024, 3] in about [-1, 1]

A prompt and a seed make one image, bit for bit, whatever else is drawn: captions are encoded one at a time,
images are computed in groups of a fixed size (`lit_jax.sampling.groups`) and decoded one at a time.
"""
import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from lit_jax.checkpoint.load import load_weights, read_weights_config
from lit_jax.checkpoint.text_encoder_folder import TextEncoder, load_text_encoder, read_text_encoder_config
from lit_jax.checkpoint.vae_folder import Vae, load_vae, read_vae_config
from lit_jax.models.arch import conditioning
from lit_jax.models.network import DTYPES, Model, Network
from lit_jax.models.t5 import WEIGHTS, T5Network
from lit_jax.models.vae import VaeNetwork
from lit_jax.runtime import peers
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.leaves import map_named, tree_bytes
from lit_jax.runtime.memory import explain_out_of_memory, give_back, temporary_bytes
from lit_jax.sampling.decoder import check_decoder
from lit_jax.sampling.groups import GroupSampler, Images
from lit_jax.sampling.program import build_sampler
from lit_jax.sampling.prompts import (
    check_text_encoder,
    default_group,
    latent_size,
    say_unknown,
    wanted_encoder,
)
from lit_jax.text.encoder import encode_captions

LOG = logging.getLogger('lit_jax')
# PixArt-Σ's and LiT's images are drawn so: 20 steps of DPM-Solver++, guidance 4.5 on all channels of the
# noise.
SETTINGS = {'method': 'dpm++', 'steps': 20, 'eta': 0.0, 'cfg_scale': 4.5, 'cfg_channels': 'all',
            'cfg_interval': (0.0, 1.0)}
PROGRAMS = 8                 # compiled programs of `draw` that are kept
# latent pixels: the side of tiles, and the largest latent that is decoded whole by default
TILE, WHOLE = 64, 128
PARTS = ('text_encoder', 'model', 'vae')


@dataclass(frozen=True)
class PromptFeatures:
    """What the text encoder made of prompts: text [P, L, C] and mask int32 [P, L], and [1, L, C], [1, L] of
    the negative."""
    prompts: tuple[str, ...]
    negative: str
    text: np.ndarray
    mask: np.ndarray
    null_text: np.ndarray
    null_mask: np.ndarray

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True)
class _PromptImages(Images):
    """`Images.of_captions` where image i shows row `which[i]` of `cond`: features are not copied for each
    seed."""
    which: np.ndarray

    def rows(self, indices) -> dict:
        which = self.which[indices]
        cond = {name: value[np.zeros_like(which) if name.startswith('null_') else which]
                for name, value in self.cond.items()}
        return {'seed': self.seeds[indices], 'number': self.numbers[indices], 'cond': cond}


class TextToImage:
    """A text-to-image model with its text encoder and VAE.

    Args:
        source: model folder or workdir of a model that takes captions.
        text_encoder, vae: their folders, or a `TextEncoder` and a `Vae` that are loaded already. vae None: a
            model on pixels, or latents are what is wanted.
        dtype: what the backbone computes in; with 'bfloat16' its kernels are held in bfloat16, too.
        text_dtype: as `load_text_encoder` takes it; default float32 on CPU and bfloat16 elsewhere (int8
            weights stay int8).
        low_memory: every network is given up after its turn; False keeps all of them, and what is compiled.
        step: of a workdir, the checkpoint to take instead of the newest.

    Attributes: config (of the model), network, text_config, vae (a `Vae`; its params are None while it is not
    loaded).

    The constructor reads and checks the configs only; weights are read when they are needed first, or by
    `load`, which several processes call together. Raises UserError for folders that do not belong together.
    """

    def __init__(self, source, text_encoder, vae=None, *, dtype: str = 'float32',
                 text_dtype: str | None = None, low_memory: bool = False, step: int | None = None):
        if dtype not in DTYPES:
            raise UserError(f'unknown dtype {dtype!r}; known: {", ".join(DTYPES)}')
        self.text_dtype = text_dtype or ('float32' if jax.default_backend() == 'cpu' else 'bfloat16')
        if self.text_dtype not in WEIGHTS:
            raise UserError(f'unknown dtype {text_dtype!r} of the text encoder; known: {", ".join(WEIGHTS)}')
        self.source, self.dtype, self.low_memory, self.step = source, dtype, low_memory, step
        self.config = read_weights_config(source)
        if conditioning(self.config['model']) != 'text':
            raise UserError(f'{source} draws classes, not prompts: give it --classes')
        self.network = Network(self.config['model'], dtype=DTYPES[dtype])
        self._encoder_path, self._encoder = (None,
                                             text_encoder) if isinstance(text_encoder,
                                                                         TextEncoder) else (text_encoder,
                                                                                            None)
        self.text_config = self._open_text_config()
        self._vae_path, self.vae = (None, vae) if isinstance(vae, Vae) else (vae, self._open_vae(vae))
        self._decode = self.vae and jax.jit(self.vae.network.decode, static_argnames='tile')
        self._params, self._samplers, self._active = None, {}, None
        self._tick: Callable[[], None] | None = None

    # ------------------------------------------------------------------------------------------------------
    # What belongs together

    def _open_text_config(self) -> dict:
        if self._encoder is None and self._encoder_path is None:
            raise UserError(f'{self.source} draws what a prompt says and needs the text encoder that it was '
                            f'trained with: '
                            f'--text_encoder DIR ({wanted_encoder(self.config)}; python '
                            f'convert_torch_ckpt.py PIPELINE/text_encoder --out DIR)')
        config = self._encoder.config if self._encoder else read_text_encoder_config(self._encoder_path)
        check_text_encoder(config, self.config, self._encoder_path or 'the text encoder', self.source)
        return config

    def _open_vae(self, path) -> Vae | None:
        """The VAE without its weights, checked."""
        if self.config['latent']['space'] == 'pixels':
            if path:
                raise UserError(f'{self.source} draws pixels, there is nothing to decode: leave --vae {path} '
                                f'out')
            return None
        if not path:
            return None
        config = read_vae_config(path)
        vae = Vae(VaeNetwork(config['vae']), None, config)
        check_decoder(vae, self.config, path, self.source)
        return vae

    @property
    def downscale(self) -> int:
        """Pixels of an image to one of what the model draws, each way."""
        if self.config['latent']['space'] == 'pixels':
            return 1
        return self.vae.network.downscale if self.vae else self.config['latent'].get('downscale', 8)

    @property
    def nominal_size(self) -> tuple[int, int]:
        """(height, width) in pixels of the images that the model is meant for."""
        return tuple(side * self.downscale for side in self.config['model']['input_size'])

    def default_tile(self, size: tuple[int, int]) -> int | None:
        """Side of the tiles of latents of `size` where nobody says: None decodes them whole."""
        return TILE if self.low_memory or max(size) > WHOLE else None

    # ------------------------------------------------------------------------------------------------------
    # Weights

    def load(self, name: str) -> int:
        """Reads the weights of one of PARTS, where they are not there yet, and returns their bytes in
        memory."""
        with explain_out_of_memory(f'loading the {name.replace("_", " ")}'):
            return getattr(self, f'_load_{name}')()

    def _load_text_encoder(self) -> int:
        if self._encoder is None:
            self._encoder = load_text_encoder(self._encoder_path, dtype=self.text_dtype)
        return tree_bytes(self._encoder.params)

    def _load_model(self) -> int:
        if self._params is None:
            _, params = load_weights(self.source, step=self.step)
            self._params = hold_narrow(params) if self.dtype == 'bfloat16' else params
        return tree_bytes(self._params)

    def _load_vae(self) -> int:
        if self.vae is None:
            return 0
        if self.vae.params is None:
            self.vae.params = load_vae(self._vae_path).params
        return tree_bytes(self.vae.params)

    def free(self, name: str) -> None:
        """Gives up the weights of one of PARTS; what was handed in loaded stays."""
        given = {'text_encoder': self._encoder_path is None, 'model': False,
                 'vae': self._vae_path is None}[name]
        part = {'text_encoder': self._encoder, 'model': None, 'vae': self.vae}[name]
        held = self._params if part is None else part.params
        if given or held is None:
            return
        if name == 'text_encoder':
            self._encoder = None
        elif name == 'vae':
            self.vae.params = None
        else:
            self._params = None
            for sampler in self._samplers.values():
                sampler.replace_weights(None)
            self._active = None
        for leaf in jax.tree.leaves(held):
            leaf.delete()
        del held
        give_back()

    def give_up(self, name: str) -> None:
        """The end of a part's turn: `free` with low_memory, else nothing."""
        if self.low_memory:
            self.free(name)

    @contextlib.contextmanager
    def _turn(self, name: str, doing: str, last: bool = True):
        self.load(name)
        try:
            with explain_out_of_memory(doing):
                yield
        finally:
            if last:
                self.give_up(name)

    # ------------------------------------------------------------------------------------------------------
    # The three phases

    def encode(self, prompts: Sequence[str], negative: str = '') -> PromptFeatures:
        """Features of prompts and of the negative prompt, which the guidance leads away from."""
        if not prompts:
            raise UserError('there is no prompt to encode')
        distinct = list(dict.fromkeys([negative, *prompts]))
        with self._turn('text_encoder', 'reading the prompts'):
            length = self.config['model']['caption_tokens']
            say_unknown(distinct, self._encoder.tokenizer.encode(distinct, length))
            features = encode_captions(self._encoder, distinct, length, batch_size=1)
        rows = [distinct.index(prompt) for prompt in prompts]
        return PromptFeatures(tuple(prompts), negative, features.text[rows], features.mask[rows],
                              features.text[:1], features.mask[:1])

    def draw(self, features: PromptFeatures, seeds: Sequence[int], which: Sequence[int] | None = None, *,
             size: tuple[int, int] | None = None, group: int | None = None,
             on_step: Callable[[int, int], None] | None = None, **settings) -> np.ndarray:
        """What the model draws: float32 [N, h, w, C], latents (divided by their scale) or pixels.

        Args:
            seeds: one an image. which: the row of `features` that each image shows; default one after the
                other, or the only one for all.
            size: (height, width) of the wanted in pixels. group: wanted computed together, part of the
                result.
            on_step: called with (number, how many in all) when an evaluation of the backbone begins.
            settings: of `build_sampler`, beside SETTINGS: method, steps, cfg_scale, ...
        """
        which = np.arange(len(seeds)) % len(features) if which is None else np.asarray(which)
        size = latent_size(size, self.config['model'], self.downscale)
        group = group or default_group(size)
        wanted = self._images(features, seeds, which, group)
        with self._turn('model', 'drawing'):
            sampler = self._sampler(wanted, settings, size, group)
            groups = -(-len(seeds) // group)
            total = -(-groups // sampler.devices) * sampler.devices * {**SETTINGS, **settings}['steps']
            self._tick = None if on_step is None else _Counter(on_step, total)
            try:
                drawn = np.concatenate([images for _, images in sampler.draw(range(groups), 1)])
                jax.effects_barrier()
            finally:
                self._tick = None
        return drawn[:len(seeds)]

    def decode(self, latents: np.ndarray, tile: int | None = 0, last: bool = True) -> np.ndarray:
        """Images float32 [N, H, W, channels], not clipped, decoded one by one; pixels are returned as they
        are.

        tile: side in latent pixels of the squares decoded one after the other; None: whole; 0:
            `default_tile`.
        last: with low_memory, give the VAE up afterwards."""
        if self.vae is None:
            return latents
        tile = self.default_tile(latents.shape[1:3]) if tile == 0 else tile
        with self._turn('vae', 'decoding', last):
            return np.concatenate([np.asarray(self._decode(self.vae.params, latents[i:i + 1] + self.vae.shift,
                                                           tile=tile), np.float32)
                                   for i in range(len(latents))])

    def _images(self, features: PromptFeatures, seeds, which, group: int) -> _PromptImages:
        if len(seeds) != len(which) or not len(seeds):
            raise UserError(f'{len(seeds)} seeds for {len(which)} images: give one an image')
        have, wanted = features.text.shape[2], self.config['model']['caption_channels']
        if have != wanted:
            raise UserError(f'the features have {have} channels, the model takes {wanted}: they are of '
                            f'another text encoder')
        # A group is always full: how many are computed together is part of the bits.
        filled = np.resize(np.arange(len(seeds)), max(len(seeds), group))
        cond = {'text': features.text, 'text_mask': features.mask, 'null_text': features.null_text,
                'null_text_mask': features.null_mask}
        return _PromptImages(np.asarray(seeds, np.uint32)[filled], np.zeros(len(filled), np.uint32), cond,
                             which[filled])

    def _sampler(self, images: Images, settings: Mapping, size: tuple[int, int], group: int) -> GroupSampler:
        """The program of these settings, compiled once, on these images."""
        settings = {**SETTINGS, **settings}
        key = (tuple(sorted((name, str(value)) for name, value in settings.items())), size, group)
        sampler = self._samplers.pop(key, None)
        if sampler is None:
            model = Model(self.network, None, self.config)
            sampler = GroupSampler(model, {**settings, 'on_step': self._on_step}, images, group=group,
                                   size=size)
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

    # ------------------------------------------------------------------------------------------------------
    # Before anything is loaded

    def check(self, size: tuple[int, int] | None, **settings) -> None:
        """Raises UserError for a size or settings that cannot be drawn."""
        latent_size(size, self.config['model'], self.downscale)
        diffusion = self.config['diffusion']
        build_sampler(self.network, train_steps=diffusion['steps'], kind=diffusion['kind'],
                      **{**SETTINGS, **settings})

    def weights(self) -> dict[str, int]:
        """{part: bytes of its weights once they are loaded}, whether they are or not."""
        encoder = T5Network(self.text_config['text_encoder'], weights=self._text_weights())
        found = {'text_encoder': tree_bytes(encoder.abstract()), 'model': tree_bytes(self._abstract())}
        return found if self.vae is None else {**found, 'vae': tree_bytes(self.vae.network.abstract())}

    def estimate(self, size: tuple[int, int] | None = None, group: int | None = None, tile: int | None = 0,
                 **settings) -> list[tuple[str, int, int]]:
        """[(part, bytes of its weights, bytes of results and temporaries)]: the programs are compiled,
        nothing is loaded."""
        size = latent_size(size, self.config['model'], self.downscale)
        length, channels = (self.config['model'][name] for name in ('caption_tokens', 'caption_channels'))
        wide = self.text_dtype == 'float32' or self.text_dtype == 'int8' and jax.default_backend() == 'cpu'
        compute = jnp.float32 if wide else jnp.bfloat16
        encoder = T5Network(self.text_config['text_encoder'], compute, self._text_weights())
        ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
        program = jax.jit(encoder.apply, compiler_options=encoder.inference_options())
        programs = {'text_encoder': program.lower(encoder.abstract(), ids, ids).compile()}
        group = group or default_group(size)
        blank = PromptFeatures(('',), '',
                               *(np.zeros((1, length, channels), compute), np.zeros((1, length), np.int32))
                               * 2)
        images = self._images(blank, [0] * group, np.zeros(group, np.int64), group)
        programs['model'] = self._sampler(images, settings, size, group).compile(self._abstract())
        if self.vae is not None:
            latent = jax.ShapeDtypeStruct((1, *size, self.config['model']['channels']), jnp.float32)
            tile = self.default_tile(size) if tile == 0 else tile
            # as loaded weights are: so the program is used again
            here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            weights = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
                                   self.vae.network.abstract())
            programs['vae'] = self._decode.lower(weights, latent, tile=tile).compile()
        found = [(name, weights, temporary_bytes(programs[name])) for name, weights in self.weights().items()]
        give_back()      # what the compiler took, 0.2 GB that the text encoder would otherwise come on top of
        return found

    def _text_weights(self) -> str:
        """How the text encoder's weights will be held (`load_text_encoder`)."""
        stored = self.text_config['weights']
        return self.text_dtype if self.text_dtype == 'int8' or (stored,
                                                                self.text_dtype) == ('float32',
                                                                                     'bfloat16') else stored

    def _abstract(self) -> dict:
        narrow = jnp.bfloat16 if self.dtype == 'bfloat16' else None
        return map_named(lambda name, leaf: jax.ShapeDtypeStruct(leaf.shape, narrow) if narrow
                         and is_kernel(name) else leaf, self.network.abstract())


class _Counter:
    """Calls `on_step` with how many evaluations are done."""

    def __init__(self, on_step: Callable[[int, int], None], total: int):
        self._on_step, self._total, self._done = on_step, total, 0

    def __call__(self) -> None:
        self._done += 1
        self._on_step(min(self._done, self._total), self._total)


def is_kernel(name: str) -> bool:
    """Whether a leaf is one of those that make nearly all bytes of a backbone, and that are cast before they
    are used."""
    return name.endswith('kernel')


def hold_narrow(params: dict) -> dict:
    """Kernels in bfloat16, each float32 one given up when it is cast: never two whole copies."""
    def cast(name, leaf):
        if not is_kernel(name):
            return leaf
        narrow = leaf.astype(jnp.bfloat16)
        narrow.block_until_ready()
        leaf.delete()
        return narrow

    return map_named(cast, params)


def open_text_to_image(*args, **options) -> TextToImage:
    """`TextToImage`, by all processes together: what one cannot read, all refuse."""
    return peers.together(lambda: TextToImage(*args, **options))
