"""Kinds of training data: images, captions, tar shards, cached latents, lists, caches of facts."""
import json
import shutil

from caption_latent_sets import write_caption_latents
from caption_sets import Letters, lines, write_tar
from caption_sets import image as png
from fuzz.kinds import Kind
from image_files import encoded, noise, write_folder
from latent_sets import write_latents

from lit_jax.data.base import Spec
from lit_jax.data.caption_latents import open_caption_latents
from lit_jax.data.latents import open_latents
from lit_jax.data.sources import open_source
from lit_jax.data.subset import choose_classes, class_list
from lit_jax.data.synthetic import SyntheticSource
from lit_jax.runtime.json_file import sealed
from lit_jax.runtime.paths import cache_folder
from lit_jax.sampling.prompts import collect_prompts

# Of the note of a shard, what is used; a name that is misspelt, be it that of the checksum, is none of these.
NOTED = ('count', 'bytes', 'sha256', 'values', 'sums', 'squares', 'bad', 'labels', 'buckets')


def _all(source):
    return [source[i] for i in range(len(source))]


def _images(folder):
    """PNG, JPEG and WebP in two classes."""
    root = write_folder(folder / 'images', **{'cat/a.png': None, 'cat/b.png': None, 'dog/c.png': None})
    (root / 'dog' / 'd.jpg').write_bytes(encoded(noise(12, 10, seed=7), 'JPEG'))
    (root / 'dog' / 'e.webp').write_bytes(encoded(noise(12, 10, seed=8), 'WEBP'))
    return root


def _read_images(path, _):
    source = open_source('folder', path=path, image_size=8)
    return source.identity, source.class_names, _all(source)


def _captions(folder):
    root = folder / 'captions'
    for i, text in enumerate(('a red square', 'two circles', 'ünïcode')):
        write_folder(root, **{f'{i}.png': png(seed=i), f'{i}.txt': text.encode()})
    return root


def _caption_list(folder):
    root = write_folder(folder / 'captions', **{f'{i}.png': png(seed=i) for i in range(3)})
    records = [{'image': f'{i}.png', 'short': f'square {i}', 'long': f'the square {i}'} for i in range(3)]
    (root / 'captions.jsonl').write_text(lines(*records))
    return root


def _shards(folder):
    for number in range(2):
        members = {f'{number}{i}.png': png(seed=i) for i in range(2)} | {
            f'{number}0.txt': 'a square', f'{number}1.json': json.dumps({'caption': 'a circle'})}
        write_tar(folder / 'shards' / f'{number}.tar', **members)
    return folder / 'shards'


def _read_captions(path, _):
    source = open_source('captions', path=path, image_size=16, tokenizer=Letters(), caption_tokens=12,
                         buckets=True)
    return source.identity, [source.captions(i) for i in range(len(source))], _all(source)


def _facts(folder):
    """The caches that reading tar shards and folders leaves; what is cached lies beside them."""
    _shards(folder), _captions(folder)
    shutil.rmtree(cache_folder(), ignore_errors=True)
    for name in ('shards', 'captions'):
        _read_captions(folder / name, folder)
    shutil.copytree(cache_folder(), folder / 'cache')
    return folder / 'cache'


def _read_through(path, folder):
    shutil.rmtree(cache_folder(), ignore_errors=True)
    shutil.copytree(path, cache_folder(), symlinks=True, dirs_exist_ok=True)
    return [_read_captions(folder / name, folder) for name in ('shards', 'captions')]


def _latents(folder):
    _seal(folder / 'latents', write_latents(folder / 'latents', 8, shard_size=4, bad=(5,)))
    return folder / 'latents'


def _seal(folder, metadata):
    """metadata.json as prepare_latents.py writes it."""
    (folder / 'metadata.json').write_text(json.dumps(sealed(metadata)))


def _read_latents(path, _):
    source = open_latents(path)
    return source.metadata, _notes(source), source.take(range(len(source))), source.all_labels()


def _notes(source):
    return [{name: note.get(name) for name in NOTED} for note in source.notes()]


def _caption_latents(folder):
    _seal(folder / 'latents', write_caption_latents(folder / 'latents', 8, shard_size=4))
    return folder / 'latents'


def _read_caption_latents(path, _):
    source = open_caption_latents(path)
    return source.metadata, _notes(source), _all(source), source.null_features


def _file(name: str, text: str):
    def make(folder):
        (folder / name).write_text(text)
        return folder / name
    return make


def _read_classes(path, _):
    source = SyntheticSource(Spec(4, 1, 3, tuple(f'class {i}' for i in range(3))), length=9)
    return class_list(str(path)), choose_classes(source, str(path)).class_names


def _read_prompts(path, _):
    return collect_prompts(['first'], str(path))


KINDS = (
    Kind('folder of images', _images, _read_images),
    Kind('folder of captions', _captions, _read_captions),
    Kind('captions.jsonl', _caption_list, _read_captions),
    Kind('tar shards', _shards, _read_captions),
    Kind('cached facts', _facts, _read_through, 'bytes'),
    Kind('latents', _latents, _read_latents, 'whole'),
    Kind('caption latents', _caption_latents, _read_caption_latents, 'whole'),
    Kind('list of classes', _file('classes.txt', 'class 0\nclass 2\n'), _read_classes),
    Kind('prompts', _file('prompts.txt', 'a red square\n\ntwo circles\n'), _read_prompts),
)
