"""Scores in the loop, with the features of the digits judge: small enough to train and score in a test."""
import json
from types import MappingProxyType

import jax
import numpy as np
import pytest
from tiny import tiny_recipe

import lit_jax
from lit_jax.data.sources import open_source
from lit_jax.report.grids import to_uint8
from lit_jax.runtime.errors import UserError
from lit_jax.training import loop
from lit_jax.training import loop_evaluation as evaluating
from lit_jax.training.metrics_log import read_lines

pytestmark = pytest.mark.usefixtures('two_devices')


@pytest.fixture(scope='module')
def reference(tmp_path_factory, judge):
    """(path of a reference, what its features are of)."""
    source = open_source('digits', split='train')
    images = to_uint8(source.take(range(300))['image'])
    path = tmp_path_factory.mktemp('reference') / 'digits.npz'
    np.savez(path, arr_0=np.broadcast_to(images, (*images.shape[:3], 3)))
    return str(path), f'digits:{judge}'


def scored_recipe(reference, changes=MappingProxyType({})):
    config = tiny_recipe(steps=6)
    config.data.name = 'digits'
    config.eval.update({'every': 3, 'num_samples': 48, 'steps': 4, 'cfg_scales': (1.0, 2.0),
                        'metrics': 'fid,precision', 'reference': reference[0], 'features': reference[1]} |
                       changes)
    return config


def scores_of(workdir):
    return [{name: value for name, value in record.items() if not name.startswith('time/')}
            for record in read_lines(workdir / 'metrics.jsonl') if 'eval/num_samples' in record]


HELD = []        # the weights that the samplers held after each evaluation of `run`


@pytest.fixture(scope='module')
def run(reference, tmp_path_factory):
    scores, workdir = evaluating.LoopEvaluation.scores, tmp_path_factory.mktemp('scored')

    def remembered(self, *arguments):
        result = scores(self, *arguments)
        HELD.append([sampler._groups.weights for sampler in self._pipeline._samplers.values()])
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluating.LoopEvaluation, 'scores', remembered)
        assert loop.train(scored_recipe(reference), workdir) == 'done'
    return workdir


@pytest.mark.slow
def test_every_evaluation_is_a_record_with_a_score_for_each_guidance_scale(run):
    records = scores_of(run)
    assert [record['step'] for record in records] == [3, 6]
    assert set(records[0]) == {'step', 'eval/num_samples', 'eval/fid_cfg1', 'eval/fid_cfg2',
                               'eval/precision_cfg1', 'eval/precision_cfg2'}
    assert all(np.isfinite(value) for record in records for value in record.values())
    assert 'eval' not in ''.join(name for record in read_lines(run / 'metrics.jsonl')
                                 if 'loss/total' in record for name in record)


@pytest.mark.slow
def test_the_rows_carry_their_recipe_cards(run):
    rows = json.loads((run / 'eval' / 'scores.json').read_text())
    rows = rows['rows'] if isinstance(rows, dict) else rows
    assert len(rows) == 4
    card = rows[0]['card']
    assert card['samples']['card']['sampler']['cfg_scale'] in (1.0,
                                                               2.0) and card['reference'][
                                                                   'id'] == 'digits.npz'
    assert not any((run / 'eval' / 'features').glob('*/*'))       # scored, so not kept


@pytest.mark.slow
def test_the_best_weights_are_kept_as_a_model_folder(run):
    records = scores_of(run)
    best = min(records, key=lambda record: min(record['eval/fid_cfg1'], record['eval/fid_cfg2']))
    model = lit_jax.load(run / 'best')
    assert model.config['provenance']['step'] == best['step']
    assert model.config['provenance']['score']['value'] == min(best['eval/fid_cfg1'], best['eval/fid_cfg2'])
    if best['step'] == 6:
        for kept, newest in zip(jax.tree.leaves(model.params), jax.tree.leaves(lit_jax.load(run).params),
                                strict=True):
            np.testing.assert_array_equal(kept, newest)


@pytest.mark.slow
def test_no_copy_of_the_weights_stays_behind_an_evaluation(run):
    assert HELD == [[None, None], [None, None]]


@pytest.mark.slow
def test_the_report_shows_the_scores(run):
    page = (run / 'report.html').read_text()
    assert '<h2>Scores</h2>' in page and 'fid_cfg2' in page


@pytest.mark.slow
def test_an_evaluation_that_was_killed_is_made_up_for(reference, run, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def die(self, step, ema, count):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(evaluating.LoopEvaluation, 'scores', die)
        with pytest.raises(Killed):
            loop.train(scored_recipe(reference), tmp_path)
    assert scores_of(tmp_path) == []
    assert loop.train(scored_recipe(reference), tmp_path) == 'done'
    assert scores_of(tmp_path) == scores_of(run)


@pytest.mark.parametrize('changes, said', [
    ({'reference': ''}, 'eval.reference names nothing'), ({'reference': '/absent.npz'}, 'does not exist'),
    ({'metrics': 'fidd', 'best': ''}, "unknown metric 'fidd'"),
    ({'best': 'kid'}, "eval.best 'kid' is not among"),
    ({'cfg_scales': ()}, 'eval.cfg_scales is empty'),
    ({'num_samples': 1}, 'eval.num_samples must be a whole number from 2 on'),
    ({'labels': 'balanced'}, 'not a multiple of the 10 classes')])
def test_what_cannot_be_scored_is_said_before_the_first_step(reference, tmp_path, changes, said):
    with pytest.raises(UserError, match=said):
        loop.train(scored_recipe(reference, changes), tmp_path / 'run')
    assert not (tmp_path / 'run' / 'checkpoints').exists()
