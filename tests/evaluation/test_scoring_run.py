"""Scores from sets and from models: right numbers, the same after any stop, and requests that are refused."""
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from processes import assert_all_good, on_cpu, run_processes
from sampling_models import save_latent_model, save_model, save_vae
from scoring_samples import digits_uint8
from tiny import tiny_recipe

from lit_jax.diffusion.flow import Flow
from lit_jax.evaluation import evaluation as run
from lit_jax.evaluation.evaluate_options import ScoreOptions
from lit_jax.evaluation.evaluation import evaluate
from lit_jax.evaluation.feature_store import FeatureStore
from lit_jax.evaluation.spaces import open_space
from lit_jax.metrics.frechet import frechet_distance, statistics
from lit_jax.metrics.inception_score import inception_score
from lit_jax.metrics.manifold import precision_recall
from lit_jax.runtime.errors import UserError
from lit_jax.sampling import model_pipeline
from lit_jax.sampling.draw import draw
from lit_jax.sampling.request import SampleRequest
from lit_jax.training import loop

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    return str(save_model(tmp_path_factory.mktemp('models') / 'model'))


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """A reference of 300 real digits without statistics, and 200 others as samples."""
    folder = tmp_path_factory.mktemp('files')
    np.savez(folder / 'reference.npz', arr_0=digits_uint8(300)[0])
    np.savez(folder / 'samples.npz', arr_0=digits_uint8(200, 500)[0])
    return folder


@pytest.fixture
def request_of(files, judge, tmp_path):
    return ScoreOptions(reference=str(files / 'reference.npz'), samples=str(files / 'samples.npz'),
                   features=f'digits:{judge}', out=str(tmp_path / 'scores'))


@pytest.fixture
def drawing(request_of, model):
    return replace(request_of, samples=None, sources=(model,), num_samples=300, steps=(3,), cfg_scale=(2.0,),
                   metrics=('fid', 'is'))


def rows_of(request):
    return json.loads((Path(request.out) / 'scores.json').read_text())


def test_where_nothing_can_be_written_nothing_is_computed(request_of, monkeypatch, read_only):
    monkeypatch.setattr(run, 'fill_from', pytest.fail)
    with pytest.raises(UserError, match='scores cannot be written: its disk is mounted read-only'):
        evaluate(request_of)


def test_scores_are_those_of_the_functions_on_the_same_features(request_of, judge):
    text = evaluate(request_of)
    row, = rows_of(request_of)
    space = open_space(f'digits:{judge}')
    fake, real = (space.extract(images).pool for images in (digits_uint8(200, 500)[0], digits_uint8(300)[0]))
    assert row['scores']['fid'] == frechet_distance(statistics(fake), statistics(real)) > 0.1
    assert (row['scores']['is'], row['scores']['is_std']) == inception_score(fake, space.head)
    assert (row['scores']['precision'], row['scores']['recall']) == precision_recall(fake, real)
    assert list(row['impossible']) == ['sfid', 'skid'] and 'no spatial features' in row['impossible']['sfid']
    assert any(note.startswith('kid: subsets of 200') for note in row['notes'])
    card = row['card']
    assert card['samples']['count'] == 200 and len(card['samples']['sha256']) == 64
    assert card['reference']['statistics'] == 'of its own images' and card['reference']['pictures'] == 300
    assert card['features']['flavour'] == 'digits judge' and len(card['features']['sha256']) == 64
    assert card['settings']['pr_mode'] == 'float32' and card['computed']['jax']
    assert 'samples.npz' in text and f'{row["scores"]["fid"]:.3f}' in text
    assert (Path(request_of.out) / 'scores.md').read_text() in text


def test_a_set_of_sample_py_brings_its_card_and_scores_as_the_model_does(drawing, request_of, tmp_path):
    evaluate(drawing)
    wanted = SampleRequest(out=str(tmp_path / 'set.npz'), source=drawing.sources[0], count=300, steps=3,
                           cfg_scale=2.0)
    draw(wanted)
    read = replace(request_of, metrics=drawing.metrics, samples=str(tmp_path / 'set.npz'))
    evaluate(read)
    drawn, found = rows_of(drawing)
    assert drawn['scores'] == found['scores'] and drawn['id'] != found['id']
    assert drawn['card']['samples']['card'] == found['card']['samples']['card']
    assert drawn['card']['samples']['card']['sampler']['steps'] == 3
    folder = replace(read, samples=str(tmp_path / 'files'))
    draw(replace(wanted, out=folder.samples))
    evaluate(folder)
    assert rows_of(drawing)[2]['scores'] == drawn['scores']


def stop_after(monkeypatch, parts):
    """Makes the run end, as by a kill, when it wants to write one part more; returns the parts written."""
    write, written = FeatureStore.write, []

    def stopping(self, part, images):
        if len(written) == parts:
            raise KeyboardInterrupt
        written.append(part)
        write(self, part, images)

    monkeypatch.setattr(FeatureStore, 'write', stopping)
    return written


@pytest.mark.parametrize('kept', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_stopped_run_goes_on_and_scores_the_same(drawing, tmp_path, monkeypatch, kept):
    straight = replace(drawing, out=str(tmp_path / 'straight'))
    evaluate(straight)
    drawing = replace(drawing, keep_samples=kept)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 1)
        evaluate(drawing)
    assert not (Path(drawing.out) / 'scores.json').exists()
    with monkeypatch.context() as patch:
        written = stop_after(patch, 99)
        evaluate(drawing)
    assert written == [1, 2]      # the reference's are kept since the first evaluation
    assert (Path(drawing.out) / 'scores.json').read_bytes() == (
        Path(straight.out) / 'scores.json').read_bytes()
    assert len(list(Path(drawing.out).glob('samples_*.npz'))) == kept


def test_what_is_scored_is_not_drawn_again_and_more_scores_need_no_images(drawing, monkeypatch):
    evaluate(drawing)
    before = rows_of(drawing)
    monkeypatch.setattr(model_pipeline, 'GroupSampler', None)      # nothing may be drawn
    evaluate(drawing)
    assert rows_of(drawing) == before
    evaluate(replace(drawing, metrics=('fid', 'precision', 'density')))
    row, = rows_of(drawing)
    assert {**row['scores'], **before[0]['scores']} == row['scores'] and {'precision', 'density'} < set(
        row['scores'])


@pytest.mark.slow
def test_one_row_for_every_model_checkpoint_step_count_and_scale(drawing, tmp_path, model):
    workdir = str(tmp_path / 'run')
    loop.train(tiny_recipe(steps=4), workdir)
    there = sorted(int(path.name) for path in (tmp_path / 'run' / 'checkpoints').iterdir()
                   if path.name.isdigit())
    assert len(there) == 2
    small = replace(drawing, num_samples=20, metrics=('fid',), steps=(2,), cfg_scale=(1.0, 2.0))
    text = evaluate(replace(small, sources=(workdir,), checkpoints='all'))
    evaluate(replace(small, sources=(workdir, model), steps=(2, 3), cfg_scale=(1.0,)))
    rows = rows_of(small)
    cards = [row['card']['samples']['card'] for row in rows]
    found = [(card['model']['provenance'].get('step'), card['sampler']['steps'], card['sampler']['cfg_scale'])
             for card in cards]
    assert found == [*((step, 2, scale) for step in there for scale in (1, 2)), (4, 3, 1), (None, 2, 1),
                     (None, 3, 1)]
    assert len({row['scores']['fid'] for row in rows}) == 7 and text.count('\n| ') == 5
    assert (Path(small.out) / 'scores.png').read_bytes()[:4] == b'\x89PNG'


def test_statistics_alone_serve_for_the_distance_and_say_so_for_the_rest(request_of, judge, tmp_path, files):
    real = open_space(f'digits:{judge}').extract(digits_uint8(300)[0]).pool
    mean, cov, _ = statistics(real)
    np.savez(tmp_path / 'stats.npz', mu=mean, sigma=cov)
    evaluate(replace(request_of, reference=str(tmp_path / 'stats.npz')))
    evaluate(request_of)
    stats, full = rows_of(request_of)
    assert stats['scores']['fid'] == full['scores']['fid'] and stats['scores']['is'] == full['scores']['is']
    assert set(stats['impossible']) == {'sfid', 'skid', 'kid', 'precision', 'recall'}
    assert 'needs images of the reference' in stats['impossible']['recall']
    with pytest.raises(UserError, match='none of these scores is possible:(.|\n)*kid: .*statistics only'):
        evaluate(replace(request_of, reference=str(tmp_path / 'stats.npz'), metrics=('kid', 'recall')))


def test_features_of_the_reference_are_kept_for_other_evaluations(request_of, tmp_path, monkeypatch):
    evaluate(request_of)
    written = stop_after(monkeypatch, 99)
    evaluate(replace(request_of, out=str(tmp_path / 'other')))
    assert written == [0, 1]      # of the 200 samples only
    (first,), (second,) = rows_of(request_of), rows_of(replace(request_of, out=str(tmp_path / 'other')))
    assert first == second


@pytest.mark.parametrize('change, message', [
    ({'sources': ('models/x',)}, 'one of --samples .* and --from .*, got both'),
    ({'samples': None}, 'got neither'), ({'metrics': ('fid', 'lpips')}, "unknown metric 'lpips'; known: fid"),
    ({'metrics': ()}, '--metrics is empty'), ({'pr_mode': 'float16'}, 'unknown --pr_mode=float16'),
    ({'is_mode': 'sorted'}, 'unknown --is_mode=sorted'),
    ({'num_samples': 201}, 'holds 200 images, --num_samples=201 asks for more'),
    ({'num_samples': 0}, 'at least 1'),
    ({'reference': 'nowhere.npz'}, 'reference nowhere.npz does not exist(.|\n)*evaluate.py reference'),
    ({'samples': 'nowhere.npz'}, 'nowhere.npz does not exist'),
    ({'features': 'clip'}, 'unknown --features=clip'),
    ({'inception': 'x.pth'}, 'go with --features=inception'), ({'steps': (50,)}, '--steps belongs to --from'),
    ({'seed': -1}, 'seed must')])
def test_a_wrong_request_is_refused_before_anything_is_written(request_of, change, message):
    with pytest.raises(UserError, match=message):
        evaluate(replace(request_of, **change))
    assert not Path(request_of.out).exists()


@pytest.mark.parametrize('change, message', [
    ({'num_samples': None}, 'needs --num_samples'), ({'steps': (2, 2)}, '--steps names a value twice'),
    ({'checkpoints': 'all'}, 'is a model folder'),
    ({'sources': ('nowhere',)}, 'nowhere does not exist'),
    ({'steps': (3, 2000)}, '2000'), ({'method': 'euler'}, 'take ddpm'),
    ({'classes': '10'}, 'class 10 is out of range'),
    ({'labels': 'balanced', 'num_samples': 301}, 'take --count 300'),
    ({'cfg_scale': (1.0, float('nan'))}, 'guidance scale')])
def test_a_wrong_request_to_draw_is_refused_before_anything_is_drawn(drawing, change, message):
    with pytest.raises(UserError, match=message):
        evaluate(replace(drawing, **change))
    assert not Path(drawing.out).exists()


def test_images_of_another_size_are_refused(drawing, request_of, tmp_path):
    np.savez(tmp_path / 'large.npz', arr_0=np.zeros((20, 16, 16, 3), np.uint8))
    with pytest.raises(UserError, match=r'samples have 16x16 pixels, the reference .* has 8x8'):
        evaluate(replace(request_of, samples=str(tmp_path / 'large.npz')))
    with pytest.raises(UserError, match=r'samples have 16x16 pixels, digits judge takes 8x8'):
        evaluate(replace(request_of, samples=str(tmp_path / 'large.npz'),
                         reference=str(tmp_path / 'large.npz')))
    latents = str(save_latent_model(tmp_path / 'model'))
    with pytest.raises(UserError, match=r"needs? the VAE that decodes them: --vae=DIR \(id 'tiny vae'"):
        evaluate(replace(drawing, sources=(latents,)))
    with pytest.raises(UserError, match='samples have 16x16 pixels'):
        evaluate(replace(drawing, sources=(latents,), vae=str(save_vae(tmp_path / 'vae'))))


def test_checkpoints_that_are_not_there_are_named(drawing, one_step):
    for asked, message in (('7', r'no checkpoint of step 7; there are: 1\.'),
                           ('new', "neither 'all' nor steps")):
        with pytest.raises(UserError, match=message):
            evaluate(replace(drawing, sources=(str(one_step),), checkpoints=asked))


def test_another_file_in_the_place_of_the_rows_is_left_alone(request_of):
    Path(request_of.out).mkdir()
    (Path(request_of.out) / 'scores.json').write_text('{"mine": 1}')
    with pytest.raises(UserError, match='is no list of scores'):
        evaluate(request_of)
    assert (Path(request_of.out) / 'scores.json').read_text() == '{"mine": 1}'


# ------------------------------------------------------------------------------------------------------
# The script, devices and processes


def command(request, *extra):
    return ['evaluate.py', '--reference', request.reference, '--features', request.features, '--out',
            request.out, '--from',
            *request.sources, '--num_samples', str(request.num_samples), '--steps', *map(str, request.steps),
            '--cfg_scale', *map(str, request.cfg_scale), '--metrics', ','.join(request.metrics), *extra]


def call(*arguments, devices=1):
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=280,
                          env=on_cpu(devices))
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_one_device_and_another_batch_score_the_same(drawing, tmp_path):
    """Here there are eight devices."""
    wanted = replace(drawing, metrics=('fid', 'is', 'kid', 'precision', 'recall'))
    evaluate(wanted)
    alone = replace(wanted, out=str(tmp_path / 'alone'))
    status, out, errors = call(*command(alone, '--batch_size', '7'))
    assert status == 0 and '| 300 |' in out, errors
    assert (Path(alone.out) / 'scores.json').read_bytes() == (Path(wanted.out) / 'scores.json').read_bytes()


def test_the_script_names_what_is_wrong_without_a_traceback(request_of, tmp_path):
    status, _, errors = call('evaluate.py', '--samples', str(tmp_path / 'no.npz'), '--reference',
                             request_of.reference, '--features', request_of.features)
    assert status == 1 and errors.strip().splitlines()[-1].startswith('error: ') and 'Traceback' not in errors


@pytest.mark.slow
def test_two_processes_write_the_rows_of_one(drawing, request_of, tmp_path):
    wanted = replace(drawing, metrics=('fid', 'is', 'precision'))
    evaluate(wanted)
    for samples in (False, True):
        together = replace(wanted, out=str(tmp_path / f'together_{samples}'))
        arguments = command(together, '--coordinator={coordinator}', '--num_processes={num_processes}',
                            '--process_id={process_id}')
        if samples:
            # the metrics and the three flags of the processes
            start, rest = arguments.index('--from'), arguments[-5:]
            arguments = [*arguments[:start], '--samples', request_of.samples, *rest]
            evaluate(replace(request_of, out=str(tmp_path / 'samples'), metrics=wanted.metrics))
        results = run_processes(arguments, 2, devices_each=2, timeout=200,
                                env={'LIT_JAX_CACHE': str(tmp_path / f'cache_{samples}')})
        assert_all_good(results)
        assert 'FID' in results[0][1] and '| FID' not in results[1][1]
        alone = tmp_path / 'samples' if samples else Path(wanted.out)
        assert (Path(together.out) / 'scores.json').read_bytes() == (alone / 'scores.json').read_bytes()


def test_images_whose_features_are_not_numbers_are_named(request_of, monkeypatch):
    space = open_space(request_of.features)

    def broken(images):
        found = space.extract(images)
        found.pool[3] = np.nan
        return found

    monkeypatch.setattr(run, 'open_space', lambda *_, **__: replace(space, extract=broken))
    with pytest.raises(UserError, match='features of image 3 and 0 more of its part are not finite'):
        evaluate(request_of)
    assert not (Path(request_of.out) / 'scores.json').exists()


def test_a_preset_draws_as_published_and_flags_make_rows_of_it(tmp_path):
    """Of a flow; nothing here reads weights."""
    (tmp_path / 'sit' / 'arrays').mkdir(parents=True)
    model = {'family': 'dit', 'depth': 1, 'width': 16, 'patch': 2, 'input_size': [8, 8], 'channels': 1,
             'num_classes': 10, 'mixer': {'name': 'softmax', 'heads': 2, 'qkv_bias': True}}
    (tmp_path / 'sit' / 'config.json').write_text(json.dumps({
        'format': 1, 'model': model, 'diffusion': Flow().to_json(), 'classes': None, 'provenance': {},
        'latent': {'space': 'pixels', 'vae': None, 'scale': 1.0}}))

    def rows(**more):
        request = ScoreOptions(reference='ref.npz', sources=(str(tmp_path / 'sit'),), num_samples=4, **more)
        jobs = run._plan_jobs(request, SimpleNamespace(check=lambda *sizes: None))
        return [(job.request.method, job.request.steps, job.request.cfg_scale, job.request.cfg_channels)
                for job in jobs]

    assert rows(preset='repa') == [('sde', 250, 1.8, 'all')]
    assert rows(preset='sit_ode', steps=(5, 9), cfg_channels='all') == [('heun2', 5, 1.5, 'all'),
                                                                       ('heun2', 9, 1.5, 'all')]
    assert rows() == [('euler', 250, 1.0, 3)]
