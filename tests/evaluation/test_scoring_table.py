"""The table says what differs in columns and the rest below; plots hold what is comparable."""
import copy
import json

import numpy as np
import pytest

from lit_jax.evaluation import scores, table
from lit_jax.evaluation.reference import Reference
from lit_jax.evaluation.scores import Scorer, Settings
from lit_jax.evaluation.spaces import FeatureSpace
from lit_jax.metrics.features import Features

ROW = {'id': 'a', 'scores': {'fid': 12.3456, 'precision': 0.7}, 'impossible': {}, 'notes': ['a note'],
       'card': {
'samples': {'name': 'runs/lit', 'count': 50000, 'card': {
'sampler': {'method': 'ddpm', 'steps': 250, 'cfg_scale': 1.5, 'cfg_channels': 3, 'cfg_interval': [0.0, 1.0]},
'model': {'provenance': {'step': 400000, 'weights': 'ema'}}, 'vae': {'id': 'ema vae'},
'pictures': {'labels': 'random', 'seed': 0}}},
'reference': {'id': 'ref.npz', 'sha256': 'ab' * 32, 'statistics': 'stored in it'},
'features': {'flavour': 'FID-Inception', 'sha256': 'cd' * 32, 'precision': 'highest'},
'settings': Settings().facts()}}


def row(scale=1.5, steps=250, step=400000, fid=12.3456, **change):
    made = copy.deepcopy({**ROW, 'id': f'{scale} {steps} {step}', **change})
    card = made['card']['samples']['card']
    card['sampler'].update(cfg_scale=scale, steps=steps)
    card['model']['provenance']['step'] = step
    made['scores']['fid'] = fid
    return made


def test_what_differs_is_a_column_and_the_rest_is_said_once():
    text = table.markdown([row(), row(scale=2.0, fid=9.0, notes=[], impossible={'recall': 'no images'})])
    head, rule, first, second, *rest = text.splitlines()
    assert [cell.strip() for cell in head.strip('|').split('|')] == ['samples', 'N', 'cfg', 'FID', 'P']
    assert '12.346' in first and '0.7000' in first and '9.000' in second and set(rule) <= set('|-: ')
    for line in ('steps: 250', 'step: 400000', 'VAE: ema vae', 'labels: random', 'weights: ema',
                 'reference: ref.npz', 'runs/lit: a note', 'runs/lit: recall is not possible: no images'):
        assert line in rest, line


def test_a_row_takes_the_place_of_the_one_of_its_id(tmp_path):
    for one in (row(), row(scale=2.0), row(fid=1.0)):
        table.keep_row(tmp_path, one)
    assert [one['scores']['fid']
            for one in json.loads((tmp_path / 'scores.json').read_text())] == [1.0, 12.3456]
    assert sorted(path.name for path in tmp_path.iterdir()) == ['scores.json', 'scores.md', 'scores.png']


def test_lines_join_what_differs_in_one_thing_only():
    rows = [row(scale, steps, fid=scale + steps) for steps in (50, 250)
            for scale in (2.0, 1.0)] + [row(1.5, 20)]
    assert table._lines(rows, 'cfg') == {'steps 50': [(1.0, 51.0), (2.0, 52.0)],
                                         'steps 250': [(1.0, 251.0), (2.0, 252.0)]}
    assert table._lines(rows, 'steps') == {'cfg 2': [(50.0, 52.0), (250.0, 252.0)],
                                           'cfg 1': [(50.0, 51.0), (250.0, 251.0)]}
    assert table._lines(rows, 'step') == {} and table.plots([row()]) is None


# ------------------------------------------------------------------------------------------------------
# Order


@pytest.fixture
def scorer(monkeypatch):
    monkeypatch.setattr(scores, 'ADM_SPLIT', 1000)
    space = FeatureSpace({'flavour': 'test'}, None, (20, 0), 1, head=8 * np.eye(20, dtype=np.float32))
    return Scorer(space, Reference('ref.npz', {}, None), None, Settings(('is',)))


def features_of(labels):
    noise = 0.1 * np.random.default_rng(0).normal(size=(len(labels), 20))
    return Features((np.eye(20)[labels] + noise).astype(np.float32), None)


@pytest.mark.parametrize('known', [True, False])
def test_a_set_sorted_by_class_is_told_from_its_labels_or_its_scores(scorer, known):
    labels = np.repeat(np.arange(20), 200)
    mixed = np.random.default_rng(1).permutation(labels)
    found, notes = scorer.score(features_of(labels), ['is'], labels if known else None)
    assert len(notes) == 1 and 'sorted by class' in notes[0] and found['is'] < 6
    found, notes = scorer.score(features_of(mixed), ['is'], mixed if known else None)
    assert notes == [] and found['is'] > 12


def test_equal_images_are_remarked(scorer):
    _, notes = scorer.score(Features(np.ones((50, 20), np.float32), None), ['is'])
    assert any('all 50 rows' in note for note in notes)
