"""Which blocks keep their attention: budgets, and `analyze.py --linearize` as a person meets it."""
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sampling_models import save_model
from text_models import save_text_model, save_words_encoder

from lit_jax import recipes
from lit_jax.analysis.analysis import analyze
from lit_jax.analysis.analyze_options import AnalyzeOptions
from lit_jax.analysis.budget import Budget, Costs, worst_blocks
from lit_jax.diffusion.flow import Flow
from lit_jax.recipes.override import override
from lit_jax.runtime.errors import UserError
from lit_jax.training.from_teacher import complete

pytestmark = pytest.mark.usefixtures('two_devices')

# Eight blocks; of all together 100 GMACs and 800 bytes with new mixers, 180 and 8,000 with the teacher's.
COSTS = Costs(8, (12 * 10 ** 9, 2 * 10 ** 9), (1000, 100), 100 * 10 ** 9, 180 * 10 ** 9)
CHEAP = Costs(8, (2 * 10 ** 9, 12 * 10 ** 9), (1000, None), 100 * 10 ** 9, 20 * 10 ** 9)


@pytest.mark.parametrize('text, kept', [
    ('softmax=0.25', 2), ('softmax=0', 0), ('softmax=0.3', 2), ('softmax=1', 7), ('gmacs=100', 0),
    ('gmacs=125', 2), ('gmacs=1e3', 7), ('state=2600', 2), ('state=2.6kB', 2), ('state=1KiB', 0)])
def test_a_budget_keeps_as_many_blocks_as_it_can(text, kept):
    assert Budget.parse(text).kept(COSTS) == kept


def test_where_the_new_mixer_costs_more_fewer_blocks_of_it_are_cheaper():
    assert Budget.parse('gmacs=50').kept(CHEAP) == 7 and CHEAP.gmacs(7) == 30


@pytest.mark.parametrize('text, costs, said', [
    ('softmax', COSTS, 'give softmax=SHARE, gmacs=NUMBER or state=BYTES'),
    ('share=1', COSTS, 'give softmax='),
    ('softmax=-1', COSTS, 'give softmax='), ('softmax=nan', COSTS, 'give softmax='),
    ('gmacs=5MiB', COSTS, 'give softmax='), ('state=1XB', COSTS, 'give softmax='),
    ('softmax=1.5', COSTS, 'cannot be met: hybrids of this teacher reach softmax=0 to softmax=1'),
    ('gmacs=99', COSTS, 'reach gmacs=100 to gmacs=170'), ('gmacs=29', CHEAP, 'reach gmacs=30 to gmacs=100'),
    ('state=799', COSTS, r'reach state=800 \(800 bytes\) to state=7100 \(7.1 kB\)'),
    ('state=9000', CHEAP, 'does not define the bytes')])
def test_a_budget_that_cannot_be_met_is_one_message(text, costs, said):
    with pytest.raises(UserError, match=said):
        Budget.parse(text).kept(costs)


def test_the_blocks_with_the_largest_errors_keep_theirs():
    assert worst_blocks([0.1, 0.5, 0.2, 0.5], 3) == [1, 2, 3] and worst_blocks([0.1, 0.2], 0) == []


def options(source, out, **more):
    return AnalyzeOptions(source=str(source), out=str(out), linearize=True, align_rate=1e-2,
                          **{'batch_size': 4, 'align_steps': 4, **more})


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp('models') / 'teacher', depth=3)


@pytest.mark.parametrize('change, said', [
    ({'budget': 'gmacs=0'}, 'cannot be met: hybrids of this teacher reach gmacs='),
    ({'budget': 'half'}, "--budget='half': give softmax=SHARE"), ({'align_steps': 0}, '--align_steps'),
    ({'mixer': 'liner'}, "no row 'liner'"), ({'source': 'nowhere'}, 'nowhere does not exist'),
    ({'mixer': 'softmax'}, "all mixers are the teacher's"),
    ({'data': 'paintings'}, 'unknown --data=paintings')])
def test_what_cannot_be_is_refused_and_nothing_is_written(teacher, tmp_path, change, said):
    with pytest.raises(UserError, match=said):
        analyze(options(**{'source': teacher, 'out': tmp_path / 'out', **change}))
    assert not (tmp_path / 'out').exists()


def test_its_options_need_it():
    with pytest.raises(UserError, match='--budget: only with --linearize'):
        AnalyzeOptions(source='model', budget='softmax=0.5')


@pytest.mark.slow
def test_errors_costs_a_choice_and_the_flag_to_paste(teacher, tmp_path):
    text = analyze(options(teacher, tmp_path / 'out', budget='softmax=0.34'))
    found = json.loads((tmp_path / 'out' / 'linearize.json').read_text())
    errors = [one['error'] for one in found['blocks']]
    assert len(errors) == 3 and all(0 < error < 10 for error in errors)
    assert found['kept'] == [int(np.argmax(errors))]
    assert [one['kept'] for one in found['hybrids']] == [0, 1, 2]
    assert found['hybrids'][0]['error'] == pytest.approx(np.mean(errors))
    assert f'  --config.model.stages={found["kept"][0]}\n' in text and 'student.py:linear' in text
    assert np.asarray(Image.open(tmp_path / 'out' / 'linearize.png').convert('L')).std() > 5
    assert 'keep their attention' in (tmp_path / 'out' / 'report.html').read_text()
    config = recipes.student('linear')
    config.teacher.path, config.data.name = str(teacher), 'digits'
    field, _, value = found['flag'].removeprefix('--config.').partition('=')
    override(config, field, value)
    kept = [run for run in complete(config).model.stages if run.get('mixer')]
    assert kept == [{'depth': 1, 'mixer': {'name': 'softmax', 'heads': 2, 'qkv_bias': True}}]


@pytest.mark.slow
def test_a_teacher_that_is_a_flow(tmp_path):
    teacher = save_model(tmp_path / 'teacher', diffusion=Flow(noise_at=1).to_json())
    text = analyze(options(teacher, tmp_path / 'out', budget='softmax=0.5'))
    assert '1 of 2 blocks keep their attention' in text


@pytest.mark.slow
def test_a_teacher_of_captions(tmp_path, monkeypatch):
    model = save_text_model(tmp_path / 'model', space='pixels', mixer='softmax', input_size=(18, 18), patch=3,
                            base_size=6)
    save_words_encoder(tmp_path / 'words')
    monkeypatch.setenv('LIT_JAX_TEXT_ENCODER', str(tmp_path / 'words'))
    text = analyze(options(model, tmp_path / 'out', data='shapes', budget='softmax=0.5'))
    assert '1 of 2 blocks keep their attention' in text
    assert Path(tmp_path / 'out' / 'linearize.png').exists()
