"""Everything that lit_jax writes as a set of images can be scored: each writer, read as samples and as a
reference; what is no set is told as what it is."""
import json
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from latent_sets import write_latents
from sampling_models import save_model
from scoring_samples import digits_uint8
from text_models import save_system
from tiny import tiny_recipe

from lit_jax.evaluation import evaluation
from lit_jax.evaluation.evaluate_options import ReferenceOptions, ScoreOptions
from lit_jax.evaluation.evaluation import score_rows
from lit_jax.evaluation.spaces import function_space
from lit_jax.evaluation.table import markdown, read_rows
from lit_jax.metrics.geneval.geneval_prompts import write_prompts
from lit_jax.runtime.errors import UserError
from lit_jax.sampling.draw import draw
from lit_jax.sampling.request import SampleRequest
from lit_jax.training import loop

COUNT = 4
FAST = {'steps': 2, 'method': 'ddim'}
WORDS = ('a red circle', 'two blue squares')


@pytest.fixture(scope='module')
def models(tmp_path_factory):
    """{kind: what SampleRequest takes} of pixel models of classes and of prompts, and a workdir."""
    folder = tmp_path_factory.mktemp('models')
    loop.train(tiny_recipe(steps=1), folder / 'run')
    return {'classes': {'source': str(save_model(folder / 'model'))}, 'run': {'source': str(folder / 'run')},
            'prompts': save_system(folder / 'text', space='pixels')}


@pytest.fixture(autouse=True)
def quick_space(monkeypatch):
    """Four numbers of any image, in the place of Inception's."""
    def look(params, images_BHWC):
        grid = images_BHWC[:, ::4, ::4].astype(jnp.float32).mean(-1) / 255
        return {'pool': params['one'] * grid.reshape(len(grid), -1)[:, :4]}

    space = function_space('four', look, {'one': np.float32(1)}, 4)
    monkeypatch.setattr(evaluation, 'open_space', lambda *args, **options: space)


def drawn(model: str, name: str, **options):
    def write(models, folder):
        request = SampleRequest(**models[model], out=str(folder / name), **FAST, **options)
        draw(request)
        return folder / name
    return write


def joined(models, folder):
    """Prompts drawn by two commands."""
    for seeds in ('0', '0,1'):
        path = drawn('prompts', 'joined', prompt=WORDS, seeds=seeds)(models, folder)
    return path


def of_geneval(models, folder):
    write_prompts(folder / 'geneval')
    for path in sorted((folder / 'geneval').glob('[0-9]*'))[1:]:
        for file in (path / 'metadata.jsonl', path / 'samples', path):
            file.unlink() if file.is_file() else file.rmdir()
    draw(SampleRequest(**models['prompts'], geneval=str(folder / 'geneval'), **FAST))
    return folder / 'geneval'


def kept_samples(models, folder):
    """The images that evaluate.py drew and kept."""
    np.savez(folder / 'real.npz', arr_0=digits_uint8(8)[0])
    score_rows(ScoreOptions(reference=str(folder / 'real.npz'), sources=(models['classes']['source'],),
                            num_samples=COUNT, steps=(2,), method='ddim', keep_samples=True, metrics=('fid',),
                            out=str(folder / 'scored')))
    return next((folder / 'scored').glob('samples_*.npz'))


def reference_file(models, folder):
    from lit_jax.evaluation import build_reference
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_reference, 'open_space', evaluation.open_space)
        build_reference.build_reference(ReferenceOptions(
            data='digits', data_dir=str(folder / 'data'), out=str(folder / 'real.npz'), images=COUNT))
    return folder / 'real.npz'


WRITERS = {
    'classes, npz': drawn('classes', 'set.npz', count=COUNT),
    'classes, files': drawn('classes', 'set', count=COUNT),
    'a run, npz': drawn('run', 'set.npz', per_class=1, classes='0,1,2,3'),
    'a run, files': drawn('run', 'set', per_class=1, classes='0,1,2,3'),
    'prompts': drawn('prompts', 'set', prompt=WORDS, seeds='3,4'),
    'prompts, by two commands': joined,
    'geneval': of_geneval,
    'kept samples': kept_samples,
    'reference': reference_file,
}


@pytest.mark.slow
@pytest.mark.parametrize('name', WRITERS)
def test_what_a_writer_writes_is_scored(models, tmp_path, name):
    path = WRITERS[name](models, tmp_path)
    request = ScoreOptions(samples=str(path), reference=str(path), metrics=('fid', 'kid', 'is'),
                           out=str(tmp_path / 'scores'))
    row, = score_rows(request)
    assert row['card']['samples']['count'] == COUNT and row['card']['reference']['pictures'] == COUNT
    assert abs(row['scores']['fid']) < 1e-3 or name == 'reference'       # that has statistics of more images
    few, = score_rows(replace(request, num_samples=3))
    assert few['card']['samples']['count'] == 3
    assert score_rows(request) == [row]                                  # not computed again
    assert [one['id'] for one in read_rows(request.out)] == [row['id'], few['id']]
    table = markdown(read_rows(request.out))
    assert path.name in table and ('ddim' in table) == (name != 'reference')


def features_of_evaluate(folder):
    np.savez(folder / 'real.npz', arr_0=digits_uint8(8)[0])
    score_rows(ScoreOptions(samples=str(folder / 'real.npz'), reference=str(folder / 'real.npz'),
                            metrics=('fid',), out=str(folder / 'scored')))
    return folder / 'scored'


def run_folder(folder):
    (folder / 'run' / 'samples').mkdir(parents=True)
    (folder / 'run' / 'samples' / '000000030.png').write_bytes(b'')
    (folder / 'run' / 'config.json').write_text(json.dumps({'kind': 'workdir'}))
    return folder / 'run'


def model_folder(folder):
    (folder / 'model' / 'arrays').mkdir(parents=True)
    (folder / 'model' / 'config.json').write_text('{}')
    return folder / 'model'


def latents(folder):
    write_latents(folder / 'latents')
    return folder / 'latents'


@pytest.mark.parametrize('make, message', [
    (features_of_evaluate, 'scores and features of evaluate.py'),
    (lambda folder: next((features_of_evaluate(folder) / 'features').iterdir()), 'features of evaluate.py'),
    (run_folder, 'workdir of train.py.*--from'),
    (model_folder, 'model folder.*--from'), (latents, 'cached latents'),
], ids=['scores', 'features', 'workdir', 'model', 'latents'])
def test_what_is_no_set_is_told(tmp_path, make, message):
    path = make(tmp_path)
    np.savez(tmp_path / 'real.npz', arr_0=digits_uint8(8)[0])
    for given in ({'samples': str(path)}, {'samples': str(tmp_path / 'real.npz'), 'reference': str(path)}):
        request = ScoreOptions(**{'reference': str(tmp_path / 'real.npz'), **given}, metrics=('fid',),
                               out=str(tmp_path / 'out'))
        with pytest.raises(UserError, match=message) as caught:
            score_rows(request)
        assert str(path) in str(caught.value)
