"""The recipe card of a set of images: everything that decides its bytes, as JSON beside it."""
import functools
import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import jax

from lit_jax.diffusion.settings import SamplerSettings
from lit_jax.runtime.differences import check_alike
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.json_file import check_shape, plain, read_json, sealed, unsealed

FORMAT = 1
PACKAGES = ('jax', 'jaxlib', 'flax')
# Folders and files of lit_jax that decide an image's numbers.
CODE = ('models', 'diffusion', 'sampling', 'text', 'runtime/compiler.py', 'runtime/device_groups.py',
        'runtime/dtypes.py')
# What readers of a card need of it; `make_card` writes more.
SHAPE = {'kind?': str, 'pictures?': {'count?': int}, 'vae?': {},
         'model?': {'provenance?': {'step?': float}, 'weights?': {'step?': float}},
         'sampler?': {'steps?': int, 'cfg_scale?': float, 'cfg_interval?': [float]}}
UINT8 = 'clip(127.5 x + 128, 0, 255), fraction cut off (DiT)'


def make_card(pipeline, settings: SamplerSettings, images: Mapping, *, group: int,
              decoding: Mapping = MappingProxyType({})) -> dict:
    """{'model', 'sampler', 'pictures', 'vae', 'computed'} and, of prompts, 'text_encoder', JSON-able.
    images: what they show. decoding: what, beside the VAE, decides how latents become images."""
    config, vae = pipeline.config, pipeline.vae
    text = {'text_encoder': pipeline.text_facts()} if pipeline.takes == 'text' else {}
    return plain({
        'format': FORMAT, 'kind': 'pictures',
        'model': {**pipeline.weights_facts(), 'architecture': config['model'],
                  'diffusion': config['diffusion'], 'latent': config['latent']},
        'sampler': settings.to_json(), **text,
        'vae': vae and {'id': vae.id, 'sha256': vae.sha256, 'scale': vae.scale, 'shift': vae.shift,
                        **decoding},
        'pictures': {**images, 'uint8': UINT8},
        'computed': computed_facts(pipeline, group),
    })


def computed_facts(pipeline, group: int) -> dict:
    """Everything beside weights and settings that decides how numbers are rounded."""
    return {'dtype': pipeline.dtype, 'group': group, 'device': jax.local_devices()[0].device_kind,
            'matmul_precision': jax.config.jax_default_matmul_precision or 'default',
            **{name: importlib.metadata.version(name) for name in PACKAGES}, 'lit_jax': _code_sum()}


@functools.cache      # of the code that runs: files may change under a run
def _code_sum() -> str:
    """A checksum of the code that draws: changes elsewhere do not stop a set from being resumed."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(path for name in CODE for path in (
            [root / name] if name.endswith('.py') else (root / name).rglob('*.py'))):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def check_same_card(there: dict, mine: dict, where) -> None:
    """Raises UserError that names what differs between the card of a set begun earlier and this command's."""
    check_alike(there, mine, 'there', 'now', f'{where} belongs to another recipe',
                'Give another --out, or repeat the command that began it, or delete what is there.')


def read_card(path) -> dict | None:
    """The card in a file; None where there is no file. UserError where it is no card."""
    if (content := read_json(path, absent=None)) is None and not path.exists():
        return None
    if (card := as_card(content, path)) is None:
        raise UserError(f'{path} is in the way: it is no recipe card of sample.py. Give another --out.')
    return card


def as_card(content, path) -> dict | None:
    """The card in the content of a JSON file, None where it is none. UserError for a damaged card."""
    content = unsealed(content, path)       # first: what is damaged may be its kind
    if not isinstance(content, dict) or content.get('kind') != 'pictures':
        return None
    check_shape(content, SHAPE, path)
    return content


def card_text(card: dict) -> str:
    """The content of its file, with a checksum."""
    return json.dumps(sealed(card), indent=1) + '\n'
