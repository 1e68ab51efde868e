"""prepare_latents.py on images with captions: features are those of the encoders, and stopped runs end
alike."""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from buckets import Store, bucket  # noqa: F401
from caption_sets import image, lines, write_captions, write_tar
from image_files import write_folder
from latent_sets import killed_in, write_tiny_vae
from processes import assert_all_good, on_cpu, run_processes
from text_encoder_samples import TEXT, write_text_encoder

from lit_jax.checkpoint.text_encoder_folder import load_text_encoder
from lit_jax.checkpoint.vae_folder import load_vae
from lit_jax.data import latent_shards
from lit_jax.data.captions import choose_caption
from lit_jax.data.pipeline import make_pipeline
from lit_jax.data.sources import open_captioned, open_source
from lit_jax.data.text_features import check_text
from lit_jax.latents import caption_preparation
from lit_jax.latents import prepare as preparation
from lit_jax.latents.prepare import prepare_latents
from lit_jax.latents.prepare_options import PrepareOptions
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.paths import as_path, files_under
from lit_jax.text.encoder import encode_captions

ROOT = Path(__file__).parents[2]
TOKENS = 24
SIZES = [(20, 20), (40, 10), (10, 40), (21, 19), (16, 16), (64, 20)]
STANDARD = {'batch_size': 2, 'shard_size': 5, 'threads': 2, 'image_size': 16, 'caption_tokens': TOKENS,
            'text_dtype': 'float32', 'data': 'captions', 'buckets': True}
DAMAGED = 'p05.png'  # its header says a size, its pixels end early


def records(count: int) -> list[dict]:
    """Every third image has one caption."""
    return [{'image': f'p{i:02}.png', 'short': TEXT[i][:20]} | ({'long': TEXT[i]} if i % 3 else {})
            for i in range(count)]


def write_images(folder, count: int = 13):
    files = {f'p{i:02}.png': image(*SIZES[i % len(SIZES)], seed=i) for i in range(count)}
    if DAMAGED in files:
        files[DAMAGED] = files[DAMAGED][:len(files[DAMAGED]) // 2]
    return write_captions(folder, **files, **{'captions.jsonl': lines(*records(count))})


@pytest.fixture(scope='module', autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('LIT_JAX_CACHE', str(tmp_path_factory.mktemp('cache')))
        yield


@pytest.fixture(scope='module')
def parts(tmp_path_factory):
    """The folders of the images, the VAE and the text encoder, as flags."""
    root = tmp_path_factory.mktemp('parts')
    return {'path': str(write_images(root / 'images')), 'vae': str(write_tiny_vae(root / 'vae')),
            'text_encoder': str(write_text_encoder(root / 't5'))}


@pytest.fixture
def request_for(parts):
    return lambda out, **options: PrepareOptions(**{**parts, **STANDARD, **options}, out=str(out))


@pytest.fixture(scope='module')
def whole(tmp_path_factory, parts):
    out = tmp_path_factory.mktemp('whole') / 'latents'
    prepare_latents(PrepareOptions(**parts, **STANDARD, out=str(out)))
    return out


def contents(folder) -> dict[str, bytes]:
    return {name: (Path(folder) / name).read_bytes() for name in files_under(folder)}


def test_moments_and_features_are_those_of_the_encoders(whole, parts):
    source = open_source('caption_latents', path=whole, image_size=8, channels=3, buckets=True,
                         caption_tokens=TOKENS)
    images = open_captioned('captions', path=parts['path'], image_size=16, buckets=True, multiple=4)
    order = [i for i in np.argsort(images.bucket_of, kind='stable') if images.files[i] != DAMAGED]
    assert len(source) == len(order) == 12 and len(set(source.bucket_of.tolist())) == 4
    vae, encoder = load_vae(parts['vae']), load_text_encoder(parts['text_encoder'], 'float32')
    for element, i in zip((source[n] for n in range(12)), order, strict=True):
        mean, logvar = vae.encode(images.load(int(i))['image'][None])
        np.testing.assert_allclose(element['moments'], np.concatenate([mean[0], logvar[0]], -1), rtol=1e-4,
                                   atol=1e-5)
        captions = images.captions(int(i))
        for row, caption in ((0, captions[-1]), (1, captions[0])):
            features = encode_captions(encoder, [caption], TOKENS)
            np.testing.assert_array_equal(element['text_mask'][row], features.mask[0])
            want = features.text[0] * features.mask[0][:, None]
            # Half a unit in the last place of bfloat16, and what float32 leaves.
            np.testing.assert_allclose(element['text'][row].astype(np.float32), want, rtol=2**-8, atol=1e-5)
    text, mask = source.null_features
    null = encode_captions(encoder, [''], TOKENS)
    np.testing.assert_array_equal(mask, null.mask[0])
    np.testing.assert_allclose(text.astype(np.float32), null.text[0], rtol=2**-8, atol=1e-5)


def test_the_metadata_say_what_it_is(whole, parts):
    metadata = json.loads((whole / 'metadata.json').read_text())
    encoder = load_text_encoder(parts['text_encoder'], 'float32')
    text = metadata['text']
    assert {name: text[name] for name in ('encoder', 'sha256', 'tokens', 'width', 'dtype',
                                          'computed_in')} == {
'encoder': 'tiny-t5', 'sha256': encoder.sha256, 'tokens': TOKENS, 'width': 16, 'dtype': 'bfloat16',
'computed_in': 'float32'}
    check_text(whole, metadata, encoder=encoder.id, sha256=encoder.sha256, tokens=TOKENS, width=16)
    assert (metadata['kind'], metadata['image_size'], metadata['latent_size'], metadata['crop']) == (
        'caption_latents', 16, 8, 'cover-center-crop')
    assert metadata['count'] == 12 and metadata['bad'] == 1 and sum(metadata['bucket_counts']) == 13
    mask = [n for note in sorted(whole.glob('shards/*.json'))
            for pair in json.loads(note.read_text())['tokens'] for n in pair]
    assert text['captions'] == sum(n > 0 for n in mask) == 19 and text['mean_tokens'] == sum(mask) / 19
    # No padding is stored: head, moments, and the true tokens.
    source = open_source('caption_latents', path=whole, buckets=True)
    pixels = sum(h * w for h, w in (source.buckets[b] for b in source.bucket_of))
    records_bytes = 12 * 16 + pixels * 6 * 4 + sum(mask) * 16 * 2
    assert sum(len(source._read(i)) for i in range(12)) == records_bytes
    assert DAMAGED in (whole / 'bad_pictures.txt').read_text()


def test_training_batches(whole):
    source = open_source('caption_latents', path=whole, buckets=True)
    batch = make_pipeline(source, global_batch=4, seed=0, augment=choose_caption).batch(5)
    assert batch['text'].shape == (4, TOKENS, 16) and batch['text'].dtype == ml_dtypes.bfloat16
    assert batch['moments'].shape[1:3] in source.buckets and batch['moments'].shape[3] == 6


def test_cut_captions_are_counted_in_one_notice(request_for, tmp_path, caplog):
    caplog.set_level('WARNING', 'lit_jax')
    prepare_latents(request_for(tmp_path / 'latents', caption_tokens=16))
    said = [record.message for record in caplog.records if 'tokens' in record.message]
    text = json.loads((tmp_path / 'latents' / 'metadata.json').read_text())['text']
    assert said == [f'{text["truncated"]} of 19 captions have more than 16 tokens and were cut there '
                    f'(--caption_tokens)']
    assert 7 < text['truncated'] < 19


def test_squares_from_tar_shards(request_for, parts, whole, tmp_path):
    """The same images in tar files, without buckets: squares of the same features, in the order of the
    files."""
    images = Path(parts['path'])
    members = {}
    for record in records(13):
        key = record.pop('image').removesuffix('.png')
        members |= {f'{key}.png': (images / f'{key}.png').read_bytes(), f'{key}.json': json.dumps(record)}
    write_tar(tmp_path / 'tars' / '0.tar', **members)
    prepare_latents(request_for(tmp_path / 'latents', path=str(tmp_path / 'tars'), buckets=False))
    squares = open_source('caption_latents', path=tmp_path / 'latents', image_size=8)
    bucketed = open_source('caption_latents', path=whole, buckets=True)
    assert len(squares) == 12 and squares.buckets == () and squares.metadata['crop'] == 'adm-center-crop'
    texts = {bucketed[i]['text'].tobytes() for i in range(12)}
    assert {squares[i]['text'].tobytes() for i in range(12)} == texts and len(texts) == 12


def test_shapes_are_prepared_too(request_for, tmp_path, monkeypatch):
    from lit_jax.data.toys import shapes
    monkeypatch.setitem(shapes.LENGTHS, 'train', 7)
    prepare_latents(request_for(tmp_path / 'latents', data='shapes', path='', image_size=32, buckets=False,
                                caption_tokens=40))
    source = open_source('caption_latents', path=tmp_path / 'latents', image_size=16)
    assert len(source) == 7 and source.metadata['crop'] == 'none' and source[0]['text'].shape == (2, 40, 16)


# ------------------------------------------------------------------------------------------------------
# Interruptions


STEPS = {'null': (caption_preparation, 'make_null', 0), 'first shard': (latent_shards, 'count_records', 0),
         'a shard without its note': (latent_shards, 'write_text_atomic', 1),
         'metadata': (preparation, 'write_text_atomic', 2)}


@pytest.mark.parametrize('step', [pytest.param(step, marks=pytest.mark.slow if 'shard' in step else [])
                                  for step in STEPS])
def test_stopped_anywhere_it_goes_on_to_the_same_bytes(step, whole, request_for, tmp_path, monkeypatch):
    out, (module, name, after) = tmp_path / 'latents', STEPS[step]
    with killed_in(monkeypatch, module, name, after):
        prepare_latents(request_for(out))
    assert not (out / 'metadata.json').exists()
    prepare_latents(request_for(out))
    assert contents(out) == contents(whole)


def test_the_same_command_checks_a_whole_set_and_changes_nothing(whole, request_for, tmp_path, monkeypatch):
    out = shutil.copytree(whole, tmp_path / 'latents')
    monkeypatch.setattr(preparation, 'load_vae', None)  # no encoder is read
    monkeypatch.setattr(caption_preparation, 'load_text_encoder', None)
    said = prepare_latents(request_for(out))
    assert '12 images, 19 captions of ' in said and '4 shapes used of' in said \
        and 'all shards checked' in said
    assert contents(out) == contents(whole)


@pytest.mark.parametrize('name', ['null_text.bin', 'shards/00001.array_record'])
@pytest.mark.parametrize('how', ['missing', 'damaged'])
def test_what_is_missing_or_damaged_is_made_again(name, how, whole, request_for, tmp_path):
    out = shutil.copytree(whole, tmp_path / 'latents')
    data = bytearray((out / name).read_bytes())
    data[len(data) // 2] ^= 1
    (out / name).unlink()
    if how == 'damaged':
        (out / name).write_bytes(data)
        if name.startswith('shards'):
            with pytest.raises(UserError, match='are damaged'):
                prepare_latents(request_for(out))
    prepare_latents(request_for(out))
    assert contents(out) == contents(whole)


def test_from_and_into_a_bucket_goes_the_same(whole, request_for, parts, bucket):  # noqa: F811
    for name, data in contents(parts['path']).items():
        (as_path(bucket) / 'images' / name).write_bytes(data)
    prepare_latents(request_for(f'{bucket}/latents', path=f'{bucket}/images'))
    root = f'{bucket}/latents/'.removeprefix('gs://')
    made = {name.removeprefix(root): data for name, data in Store.objects.items() if name.startswith(root)}
    assert made.keys() == contents(whole).keys()
    # The notes and the list of bad images name where they lie.
    assert all(made[name] == data for name, data in contents(whole).items()
               if name.endswith(('.array_record', '.bin')))


# ------------------------------------------------------------------------------------------------------
# Refused


def test_latents_of_another_encoder_are_not_continued(whole, request_for, tmp_path):
    other = write_text_encoder(tmp_path / 'other', id='other-t5', provenance={'sha256': '0' * 64})
    with pytest.raises(UserError, match='has other latents') as caught:
        prepare_latents(request_for(whole, text_encoder=str(other), caption_tokens=30, buckets=False))
    for line in ("text.encoder: 'tiny-t5' there, 'other-t5' now", 'text.sha256: ',
                 'text.tokens: 24 there, 30 now', 'buckets: '):
        assert line in str(caught.value), line


def test_captions_that_changed_are_another_data_set(request_for, tmp_path):
    images = write_images(tmp_path / 'pictures', 3)
    prepare_latents(request_for(tmp_path / 'latents', path=str(images)))
    (images / 'captions.jsonl').write_text(lines(*records(3)).replace(TEXT[0][:20], 'changed'))
    with pytest.raises(UserError, match='source.sha256: '):
        prepare_latents(request_for(tmp_path / 'latents', path=str(images)))


@pytest.mark.parametrize('options, message', [
    ({'text_encoder': ''}, 'captions has captions: give a text encoder, --text_encoder=FOLDER'),
    ({'text_encoder': 'no/such'}, 'not a text encoder folder'),
    ({'image_size': 18}, 'multiples of 4.*nearest: 16 and 20'),
    ({'data': 'folder'}, '--data=folder has labels, but --text_encoder'),
    ({'caption_tokens': 0}, 'must be at least 1'),
    ({'text_dtype': 'int4'}, 'unknown --text_dtype=int4'), ({'num_classes': 3}, 'no classes'),
    ({'data': 'caption_latents'}, 'are latents already'), ({'path': 'no/such/folder'}, 'does not exist')])
def test_wrong_options_are_refused_before_anything_is_written(options, message, request_for, tmp_path):
    with pytest.raises(UserError, match=message):
        prepare_latents(request_for(tmp_path / 'latents', **options))
    assert not (tmp_path / 'latents').exists()


def test_a_missing_tokenizer_is_named(request_for, parts, tmp_path):
    folder = shutil.copytree(parts['text_encoder'], tmp_path / 't5')
    (folder / 'tokenizer.json').unlink()
    with pytest.raises(UserError, match='there is no tokenizer in .*t5'):
        prepare_latents(request_for(tmp_path / 'latents', text_encoder=str(folder)))


def test_features_that_are_no_numbers_are_refused(request_for, tmp_path, monkeypatch):
    original = caption_preparation.load_text_encoder

    def broken(*arguments):
        encoder = original(*arguments)
        encoder.params['embed']['table'] = encoder.params['embed']['table'] * np.nan
        return encoder

    monkeypatch.setattr(caption_preparation, 'load_text_encoder', broken)
    with pytest.raises(UserError, match='the text encoder encodes a caption .* to NaN'):
        prepare_latents(request_for(tmp_path / 'latents'))
    assert not files_under(tmp_path / 'latents' / 'shards')


def test_labels_take_no_text_encoder(parts, tmp_path):
    folder = write_folder(tmp_path / 'labels', **{'a.png': None})
    with pytest.raises(UserError, match='has labels, but --text_encoder'):
        prepare_latents(PrepareOptions(data='folder', path=str(folder), vae=parts['vae'], image_size=8,
                                text_encoder=parts['text_encoder'], out=str(tmp_path / 'latents')))


def test_the_space_that_is_checked_is_about_what_is_taken(request_for, tmp_path, monkeypatch):
    needed = []
    monkeypatch.setattr(preparation.storage, 'check_free_space', lambda path, size: needed.append(size))
    images = write_images(tmp_path / 'many', 60)
    (images / DAMAGED).write_bytes(image())
    prepare_latents(request_for(tmp_path / 'latents', path=str(images), image_size=32, buckets=False,
                                shard_size=30))
    taken = sum(files_under(tmp_path / 'latents' / 'shards').values())
    assert 0.9 * taken < needed[0] < 1.2 * taken


# ------------------------------------------------------------------------------------------------------
# The script


def command(request: PrepareOptions) -> list[str]:
    return ['prepare_latents.py', *request.command().split()[2:], f'--out={request.out}']


@pytest.mark.slow
def test_the_script_makes_the_same_bytes_on_one_device(whole, request_for, tmp_path):
    out = tmp_path / 'latents'
    done = subprocess.run([sys.executable, *command(request_for(out))], cwd=ROOT, env=on_cpu(),
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert '13 of 13 images (100 %)' in done.stderr and 'all shards checked' in done.stdout
    assert contents(out) == contents(whole)


@pytest.mark.slow
def test_two_processes_make_the_same_bytes(whole, request_for, tmp_path):
    several = ['--coordinator={coordinator}', '--num_processes={num_processes}', '--process_id={process_id}']
    results = run_processes([*command(request_for(tmp_path / 'latents')), *several], 2, devices_each=2)
    assert_all_good(results)
    assert contents(tmp_path / 'latents') == contents(whole)


@pytest.mark.slow
def test_killed_at_random_it_ends_with_the_same_bytes(request_for, tmp_path):
    """SIGKILL while shards are made: each run gets a few shards further, and leaves what it was at."""
    images = write_images(tmp_path / 'many', 60)
    request = request_for(tmp_path / 'reference', path=str(images), shard_size=2)
    prepare_latents(request)
    out = tmp_path / 'latents'
    arguments = command(request)[:-1] + [f'--out={out}']
    rng, unfinished = random.Random(), 0
    for _ in range(6):
        before, wanted = shard_count(out), rng.randint(0, 4)
        process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=on_cpu(),
                                   stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while process.poll() is None and shard_count(out) < before + wanted:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02 if wanted else 3))
        process.send_signal(signal.SIGKILL)
        process.wait()
        unfinished += not (out / 'metadata.json').exists()
    assert unfinished >= 3, 'the kills came too late to show anything'
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=on_cpu(), capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    assert contents(out) == contents(tmp_path / 'reference')


def shard_count(out) -> int:
    return sum(name.endswith('.json') and not name.startswith('.') for name in os.listdir(out / 'shards')) \
        if (out / 'shards').exists() else 0
