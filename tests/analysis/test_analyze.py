"""`analyze.py` as a person meets it: what it writes, and one clear message for what cannot be."""
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from sampling_models import randomised, save_model

from lit_jax.analysis import analysis
from lit_jax.analysis.analysis import analyze
from lit_jax.analysis.analyze_options import AnalyzeOptions
from lit_jax.analysis.routing_shares import most_frequent, route_names
from lit_jax.checkpoint.load import load
from lit_jax.checkpoint.model_folder import save_model_folder
from lit_jax.diffusion.flow import Flow
from lit_jax.models.mixers import MIXERS, SoftmaxAttention
from lit_jax.models.network import Network
from lit_jax.models.probe import show
from lit_jax.runtime.errors import UserError

pytestmark = pytest.mark.usefixtures('two_devices')

ROOT = Path(__file__).parents[2]
SHORT = {'images': 6, 'map_images': 2, 'timesteps': 2, 'loss_timesteps': 3, 'batch_size': 6}


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """A student, its teacher, and a teacher of another task."""
    folder = tmp_path_factory.mktemp('models')
    save_model(folder / 'student', mixer='linear', classes=False)
    save_model(folder / 'teacher', seed=1)
    save_model(folder / 'other', num_classes=3, classes=False)
    return folder


def save_folder(path, mixer):
    """A model folder of one block with any mixer."""
    network = Network({'family': 'dit', 'depth': 1, 'width': 32, 'patch': 2, 'input_size': (8, 8),
                       'channels': 1, 'num_classes': 10, 'mixer': mixer})
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), network.abstract())
    config = {'model': {**network.arch, 'input_size': [8, 8]}, 'classes': None,
              'diffusion': {'steps': 1000, 'kind': 'linear'},
              'provenance': {'source': 'random'}, 'latent': {'space': 'pixels', 'vae': None, 'scale': 2.0}}
    save_model_folder(path, config, randomised(zeros, 0.3))


def test_where_nothing_can_be_written_nothing_is_computed(folders, tmp_path, monkeypatch, read_only):
    monkeypatch.setattr(analysis, 'loss_by_time', pytest.fail)
    with pytest.raises(UserError, match='out cannot be written: its disk is mounted read-only'):
        analysis.analyze(AnalyzeOptions(source=str(folders / 'student'), parts='loss', data='digits',
                                        out=str(tmp_path / 'out'), **SHORT))


def test_a_student_beside_its_teacher(folders, tmp_path):
    line = analyze(AnalyzeOptions(source=str(folders / 'student'), teacher=str(folders / 'teacher'),
                           out=str(tmp_path / 'out'), **SHORT))
    for part in ('cosine similarity of heads: student', 'student with convolution', 'teacher mse',
                 f'wrote {tmp_path / "out"}'):
        assert part in line
    found = json.loads((tmp_path / 'out' / 'analysis.json').read_text(), parse_constant=pytest.fail)
    assert found['classes'] == [f'name {label}' for label in range(10)]      # the teacher knows them
    assert found['loss']['timesteps'] == [0, 500, 999] and found['similarity']['timesteps'] == [0, 999]
    assert set(found['rank']['student']) > {'map',
                                            'with_convolution'} and 'with_convolution' not in found['rank'][
                                                'teacher']
    assert np.array(found['tokens']['student']['maps']).shape == (2, 2, 4, 4)
    assert np.array(found['tokens']['teacher']['maps']).sum((-2, -1)) == pytest.approx(
        np.ones((2, 2)), abs=1e-4)
    images = sorted(path.name for path in (tmp_path / 'out').glob('*.png'))
    assert images == ['loss.png', 'rank.png', 'similarity.png', 'token_heads.png', 'token_maps.png']
    for name in images:
        assert np.asarray(Image.open(tmp_path / 'out' / name).convert('L')).std() > 5
    report = (tmp_path / 'out' / 'report.html').read_text()
    assert report.count('data:image/png;base64,') == 5 and 'student / teacher' not in report
    for heading in ('Loss by timestep', 'Similarity of the heads', 'Rank of the mixer',
                    'Where one token looks'):
        assert heading in report


@pytest.mark.slow
def test_a_flow_beside_its_teacher(tmp_path):
    """All parts, at times of the flow; a time that it has not is refused."""
    flow = Flow(noise_at=1).to_json()
    save_model(tmp_path / 'student', mixer='linear', diffusion=flow)
    save_model(tmp_path / 'teacher', seed=1, diffusion=flow)
    options = {'source': str(tmp_path / 'student'), 'teacher': str(tmp_path / 'teacher'),
               'out': str(tmp_path / 'out'), **SHORT}
    with pytest.raises(UserError, match=r'--timestep=250: this flow has the times 0 to 1 \(1: pure noise\)'):
        analyze(AnalyzeOptions(timestep=250, **options))
    assert 'loss, mean over times: student mse' in analyze(AnalyzeOptions(**options))
    found = json.loads((tmp_path / 'out' / 'analysis.json').read_text(), parse_constant=pytest.fail)
    assert found['loss']['timesteps'] == [0, 0.5, 1] and found['tokens']['timestep'] == 0.25
    assert found['similarity']['timesteps'] == found['alignment']['timesteps'] == [0, 1]
    report = (tmp_path / 'out' / 'report.html').read_text()
    assert 'Loss by time' in report and 'fixed times (1: pure noise)' in report and 'timestep' not in report


def test_one_model_and_one_head(tmp_path):
    """Without pairs of heads there is no similarity: null in the file, a sentence in the report."""
    save_folder(tmp_path / 'single', {'name': 'linear', 'heads': 1, 'dwc_kernel': 0})
    analyze(AnalyzeOptions(source=str(tmp_path / 'single'), out=str(tmp_path / 'out'),
                           parts='similarity,rank', **SHORT))
    found = json.loads((tmp_path / 'out' / 'analysis.json').read_text(), parse_constant=pytest.fail)
    assert found['similarity']['model']['cosine'] == [[None], [None]]
    assert 'with_convolution' not in found['rank']['model']
    assert 'one head, there are no pairs' in (tmp_path / 'out' / 'report.html').read_text()


@pytest.mark.parametrize('change, message', [
    ({'source': 'nowhere'}, 'nowhere does not exist'), ({'teacher': 'nowhere'}, 'nowhere does not exist'),
    ({'teacher': '{}/other'},
     r'the teacher .*other does not fit this recipe:\n  num_classes: 3 in the teacher, 10'),
    ({'token': '9,0'}, 'outside the grid of 4 x 4'), ({'layers': '7'}, 'has the layers 0 to 1'),
    ({'parts': 'similarity,colour'}, "unknown 'colour'; known: all, similarity"),
    ({'memory': 0.0}, '--memory is in GiB'), ({'memory': 1e-7}, 'more than the 0.00 GiB of --memory'),
    ({'images': 0}, '--images must be at least 1'),
    ({'image': 6}, '--image=6: there are 6 images'), ({'timestep': 1000}, 'has the timesteps 0 to 999'),
    ({'split': 'test'}, 'no split'), ({'data': 'latents', 'data_path': 'nowhere'}, 'nowhere does not exist'),
    ({'out': '{}/student'}, 'is the folder of a model or a run'),
    ({'out': '{}/student/config.json'}, 'is a file'),
    ({'parts': 'routing'}, 'no mixer of model routes tokens'), ({'dtype': 'int8'}, 'unknown dtype')])
def test_what_cannot_be_is_refused_and_nothing_is_written(change, message, folders, tmp_path):
    change = {name: value.format(folders) if isinstance(value, str) else value
              for name, value in change.items()}
    options = {'source': str(folders / 'student'), 'out': str(tmp_path / 'out'), **SHORT, **change}
    with pytest.raises(UserError, match=message):
        analyze(AnalyzeOptions(**options))
    assert not (tmp_path / 'out').exists()


class Mapless(SoftmaxAttention):
    """A mixer that mixes without queries and keys."""

    def __call__(self, x_BND, grid):
        return x_BND.mean(1, keepdims=True) + 0 * x_BND


class Routed(SoftmaxAttention):
    """Softmax attention that shows a choice: 1 where the first number of a token is positive, and one of its
    own name."""

    routes = ('route/query', 'route/own')

    def __call__(self, x_BND, grid):
        show('route/query', (x_BND[..., 0] > 0).astype(jnp.int32))
        show('route/own', jnp.full(x_BND.shape[:2], 2, jnp.int32))
        return super().__call__(x_BND, grid)


def test_of_a_mixer_without_maps_the_rest_is_shown(monkeypatch, tmp_path, caplog):
    monkeypatch.setitem(MIXERS, 'mapless', Mapless)
    save_folder(tmp_path / 'model', {'name': 'mapless', 'heads': 2})
    options = {'source': str(tmp_path / 'model'), 'out': str(tmp_path / 'out'), **SHORT}
    with pytest.raises(UserError, match="'mapless', which has no attention maps. Analyze its loss instead: "
                                        "--parts=loss"):
        analyze(AnalyzeOptions(parts='loss,rank', **options))
    analyze(AnalyzeOptions(**options))
    assert [path.name for path in (tmp_path / 'out').glob('*.png')] == ['loss.png']
    assert "'mapless', which has no attention maps. Its maps are left out here" in caplog.text
    save_folder(tmp_path / 'teacher', {'name': 'softmax', 'heads': 2})
    analyze(AnalyzeOptions(teacher=str(tmp_path / 'teacher'), **options))
    found = json.loads((tmp_path / 'out' / 'analysis.json').read_text())
    assert {'student', 'teacher'} <= {*found['loss']} and 'student' not in found['similarity']
    assert {'teacher'} == {*found['rank']} and 'teacher' in found['tokens']


def test_any_mixer_that_shows_choices_has_its_routing_drawn(monkeypatch, tmp_path):
    monkeypatch.setitem(MIXERS, 'routed', Routed)
    save_folder(tmp_path / 'model', {'name': 'routed', 'heads': 2})
    assert route_names(load(tmp_path / 'model')) == ['route/query', 'route/own']
    analyze(AnalyzeOptions(source=str(tmp_path / 'model'), out=str(tmp_path / 'out'), parts='routing',
                           **SHORT))
    found = json.loads((tmp_path / 'out' / 'analysis.json').read_text())['routing']['model']
    own = found['route/own']
    assert own['used'] == [1] and own['choice'] == [[2]] * len(own['classes']) and own['share'] == [
        [1.0]] * len(own['classes'])
    assert (tmp_path / 'out' / 'routing_model.png').exists()


def test_dydila_shows_which_of_its_projections_it_takes(tmp_path):
    save_folder(tmp_path / 'model', {'name': 'dydila', 'heads': 2})
    assert route_names(load(tmp_path / 'model'))[:2] == ['route/query', 'route/key']


def test_the_most_frequent_choice_is_counted_over_the_tokens_of_a_class():
    index = np.array([[[0, 0, 1], [2, 2, 2], [0, 1, 1]]])          # one layer, three images of three tokens
    assert most_frequent(index, np.array([4, 7, 4])) == {
        'classes': [4, 7], 'choice': [[0], [2]], 'share': [[0.5], [1.0]], 'used': [3]}


def test_analyze_py_prints_what_it_found(folders, tmp_path):
    arguments = [f'--{name}={value}' for name, value in SHORT.items()]
    done = subprocess.run([sys.executable, 'analyze.py', '--from', folders / 'student', '--parts=loss',
                           f'--out={tmp_path / "out"}', *arguments], cwd=ROOT, capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith('loss, mean over timesteps: model mse') and 'loss.png' in done.stdout


def test_a_text_to_image_model_is_refused_by_name(tmp_path):
    arch = {'family': 'pixart', 'depth': 1, 'width': 16, 'patch': 2, 'input_size': [8, 8], 'channels': 3,
            'cross_heads': 2, 'caption_channels': 8, 'caption_tokens': 4,
            'mixer': {'name': 'softmax', 'heads': 2}}
    network = Network(arch)
    config = {'model': network.arch, 'diffusion': {'steps': 1000, 'kind': 'linear'}, 'classes': None,
              'provenance': {},
              'latent': {'space': 'pixels', 'vae': None, 'scale': 1.0, 'downscale': 1},
              'text': {'encoder': None, 'channels': 8, 'tokens': 4}}
    save_model_folder(tmp_path / 'model', config, jax.jit(network.init)(jax.random.key(0)))
    with pytest.raises(UserError, match='is a text-to-image model'):
        analyze(AnalyzeOptions(source=str(tmp_path / 'model'), out=str(tmp_path / 'out')))
