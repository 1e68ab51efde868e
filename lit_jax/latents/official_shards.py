"""Takes over latents that LightningDiT's own code has cached (`prepare_latents.py --data=lightningdit`).

    FOLDER/latents_rank00_shard000.safetensors, ...   'latents', 'latents_flip' [N, C, h, w], 'labels' [N]
    FOLDER/latents_stats.pt                           mean and std of each channel, if they are normalised

Its latents are drawn from their posterior, once for an image and once for its mirror image, and are not
normalised. What is stored is (z - mean) / std where the VAE's folder has mean and std, so that they are the
latents of that folder: exact ones (lit_jax/data/latents.py) with both mirror images."""
import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from lit_jax.checkpoint.vae_folder import read_vae_config
from lit_jax.convert.torch_files import FLOATS, open_source
from lit_jax.convert.vae_ldm import read_stats
from lit_jax.data import crop, latents
from lit_jax.data.latent_shards import ShardStore, ShardWriter, default_shard_size
from lit_jax.latents.prepare_options import PrepareOptions
from lit_jax.models.vae import VaeNetwork
from lit_jax.runtime.errors import UserError, reason_of, shown, shown_name
from lit_jax.runtime.parts import make_missing
from lit_jax.runtime.paths import absolute, explain_unreadable, explain_unwritable, is_remote

NAME, STATS = 'lightningdit', 'latents_stats.pt'
VIEWS = 'latents', 'latents_flip'
_INTEGERS = 'I64', 'I32', 'I16', 'U8'


@dataclasses.dataclass(frozen=True)
class OfficialShards:
    """A checked request. starts: the number of the first image of each file. mean, std: float64 [C]."""
    files: Sequence[Path]
    starts: Sequence[int]
    mean: np.ndarray
    std: np.ndarray
    plan: dict
    record_size: float

    def make(self, out) -> None:
        """Writes the missing shards into the folder `out`, divided among all processes."""
        make_missing(store := ShardStore(out, self.plan), lambda mine: self._write(store, mine), 'images')

    def _write(self, store: ShardStore, mine: Sequence[int]) -> Iterator[None]:
        for number in mine:
            span = store.span(number)
            with (explain_unwritable(store.out, self.record_size * len(span)),
                  ShardWriter(store.out, number, self.plan) as writer):
                for values, label in self._examples(span):
                    record = latents.pack(values, label, self.plan['dtype'])
                    writer.write(record, latents.exact_moments(values), labels=label)
                writer.commit()
            yield

    def _examples(self, span: range) -> Iterator[tuple[np.ndarray, int]]:
        """(float32 [2, h, w, C], label) of each image."""
        largest = float(np.finfo(latents.DTYPES[self.plan['dtype']]).max)
        for path, start, end in zip(self.files, self.starts, self.starts[1:], strict=False):
            rows = slice(max(span.start, start) - start, min(span.stop, end) - start)
            if rows.start >= rows.stop:
                continue
            *views, labels = _read(path, (*VIEWS, 'labels'), rows)
            both = np.stack([np.moveaxis(view.astype(np.float64), 1, -1) for view in views], axis=1)
            both = ((both - self.mean) / self.std).astype(np.float32)
            fine = np.all(np.abs(both) <= largest, axis=(1, 2, 3, 4))       # also false for NaN
            if not fine.all():
                raise UserError(f'{path}: latents {rows.start + int(np.argmin(fine))} hold NaN or more than '
                                f'{largest:.3g}: give --dtype=float32, or get the file again')
            yield from ((values, int(label)) for values, label in zip(both, labels, strict=True))


def open_official(request: PrepareOptions) -> OfficialShards:
    """Opens and checks all inputs; writes nothing."""
    if not request.path:
        raise UserError(f'--data={NAME} needs the folder of its .safetensors files: --path=FOLDER')
    if request.classes:
        raise UserError(f'--classes={request.classes}: these latents are taken over whole; a recipe chooses '
                        f'among their classes (data.classes)')
    folder, config = absolute(request.path), read_vae_config(request.vae)
    if is_remote(folder):
        raise UserError(f'{folder}: these files are read from a disk; copy them, or mount the bucket')
    with explain_unreadable(folder):
        files = sorted(Path(entry) for entry in folder.iterdir() if entry.suffix == '.safetensors')
    if not files:
        raise UserError(f'{folder} holds no .safetensors files; expected those that LightningDiT\'s '
                        f'extract_features.py writes, latents_rank00_shard000.safetensors, ...')
    network = VaeNetwork(config['vae'])
    counts, size = _check_files(files, network, config['id'], request)
    mean, std = _statistics(folder / STATS, network.channels, config, request.vae)
    labels = np.concatenate([_read(path, ('labels',), slice(None))[0] for path in files])
    classes = request.num_classes or int(labels.max()) + 1
    if labels.min() < 0 or labels.max() >= classes:
        raise UserError(f'{folder} has labels from {labels.min()} to {labels.max()}, --num_classes={classes} '
                        f'allows 0 to {classes - 1}')
    facts = '\n'.join(f'{path.name} {path.stat().st_size} {count}' for path, count in zip(files, counts,
                                                                                       strict=True))
    count = sum(counts)
    plan = {'format': latents.MIRRORED_FORMAT, 'kind': latents.KIND, 'exact': True, 'mirrored': True,
            'vae': {'id': config['id'], 'sha256': config['provenance']['sha256'], 'scale': config['scale'],
                    'shift': config['shift'], 'downscale': network.downscale, 'channels': network.channels},
            'image_size': size * network.downscale, 'latent_size': size, 'crop': crop.RULE,
            'classes': [str(label) for label in range(classes)],
            'source': {'name': NAME, 'count': count, 'classes': classes, 'split': request.split,
                       'sha256': hashlib.sha256(facts.encode() + labels.astype('<i4').tobytes()).hexdigest()},
            'dtype': request.dtype, 'shard_size': request.shard_size or default_shard_size(count)}
    starts = [0, *np.cumsum(counts).tolist()]
    return OfficialShards(files, starts, mean, std, plan, latents.record_bytes(plan))


def _check_files(files: Sequence[Path], network: VaeNetwork, vae: str,
                 request: PrepareOptions) -> tuple[list[int], int]:
    """(images of each file, the side of all latents). UserError for what is not such a file of this VAE."""
    counts, sides = [], set()
    for path in files:
        found = open_source(path).tensors
        if missing := [name for name in (*VIEWS, 'labels') if name not in found]:
            raise UserError(f'{path} has no {", ".join(missing)} (it has '
                            f'{", ".join(map(shown_name, list(found)[:4]))}): it is no file of latents that '
                            f'LightningDiT\'s extract_features.py wrote')
        shapes = [found[name].shape for name in VIEWS]
        count = found['labels'].shape[0] if len(found['labels'].shape) == 1 else -1
        kinds = {found[name].dtype for name in VIEWS}
        if (shapes[0] != shapes[1] or len(shapes[0]) != 4 or shapes[0][0] != count or not kinds <= {*FLOATS}
                or found['labels'].dtype not in _INTEGERS):
            raise UserError(f'{path} holds latents {shapes[0]}, latents_flip {shapes[1]} '
                            f'({", ".join(sorted(kinds))}) and labels {found["labels"].shape} '
                            f'({found["labels"].dtype}); expected [N, C, h, w] twice, in floating point, and '
                            f'[N] whole numbers')
        _, channels, *side = shapes[0]
        if channels != network.channels:
            raise UserError(f'{path} holds latents of another VAE: {channels} channels, '
                            f'{network.channels} in {request.vae} ({shown(vae)})')
        counts.append(count)
        sides.add(tuple(side))
    if len(sides) > 1 or len(set(*sides)) > 1:
        raise UserError(f'{files[0].parent} holds latents of the sides '
                        f'{", ".join(f"{h} x {w}" for h, w in sorted(sides))}; a data set has one, square')
    if not sum(counts):
        raise UserError(f'{files[0].parent}: its .safetensors files hold no latents')
    size = min(sides)[0]
    if request.image_size not in (None, size * network.downscale):
        raise UserError(f'--image_size={request.image_size}: these latents are {size} x {size}, of images of '
                        f'{size * network.downscale} pixels ({network.downscale} to a side of {request.vae})')
    return counts, size


def _statistics(path: Path, channels: int, config: dict, vae: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean and std [C] that the VAE's folder has; 0 and 1 where its latents are not normalised."""
    own = config.get('normalised')
    mean, std = (np.array(own[name]) if own else np.full(channels, usual)
                 for name, usual in (('mean', 0.0), ('std', 1.0)))
    if path.exists():
        told = read_stats(path, channels)
        if not own:
            raise UserError(f'{path} normalises these latents, and those of {vae} are not: convert the VAE '
                            f'again with --latents_stats {path}')
        if not (np.allclose(told[0], mean, rtol=1e-4, atol=1e-5) and np.allclose(told[1], std, rtol=1e-4)):
            raise UserError(f'{path} is not the mean and std with which {vae} was converted (std of channel '
                            f'0: {told[1][0]:.6g} there, {std[0]:.6g} in the VAE): these are latents of '
                            f'another VAE, or convert it again with --latents_stats {path}')
    return mean, std


def _read(path: Path, names: Sequence[str], rows: slice) -> list[np.ndarray]:
    try:
        with explain_unreadable(path), safe_open(path, framework='numpy') as file:
            return [file.get_slice(name)[rows] for name in names]
    except (SafetensorError, ValueError, TypeError) as error:
        raise UserError(f'{path} cannot be read: {reason_of(error)}; get it again') from error
