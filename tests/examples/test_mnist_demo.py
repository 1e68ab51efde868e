"""The MNIST demo as a stranger starts it, the lab behind it, and what it must reach."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from printed_commands import printed_next, run_printed

from examples.mnist import lab, lab_pages, pages, stages
from examples.mnist.arms import ARMS, BASES, DEMO, Run, cost
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.paths import file_sha256

ROOT = Path(__file__).parents[2]


def result_of(arm: str, seed: int, distance: float) -> dict:
    return {'arm': arm, 'seed': seed, 'cost': 0.05, 'align_steps': 3, 'steps': 4, 'seconds': 1,
            'command': 'python train.py', 'date': '2026-01-02', 'versions': {'jax': '0.10.2'},
            'distance': distance, 'kid': 0.01, 'accuracy_unguided': 0.9,
            **({'few': {'5': 3.0, '10': 2.0}} if arm in lab.WITH_FEW else {})}


RESULTS = {'command': 'python -m examples.mnist.lab', 'teacher': result_of('teacher', 0, 0.5),
           'teacher_flow': result_of('teacher_flow', 0, 0.25),
           'runs': [result_of(arm, seed, 1 + seed / 10) for arm in ARMS for seed in range(2)]}


@pytest.mark.parametrize('arm', ARMS)
def test_no_student_costs_more_than_its_share(arm):
    one, share = Run(Path('demo'), arm, 0), ARMS[arm].share
    recipe = one.recipe()
    assert bool(recipe.align.steps) == bool(ARMS[arm].aligning)
    if share:
        assert 0.97 * share <= cost(one) <= share
    assert bool(recipe.train.cooldown_steps) == ARMS[arm].falling


def test_a_run_can_be_repeated_from_its_command():
    one = Run(Path('demo'), 'copy_vo', 2)
    assert '--config.inherit.copy=v,o' in one.command() and '--config.seed=2' in one.command()
    assert one.recipe().inherit.copy == 'v,o' and one.recipe().teacher.path == 'demo/teacher'


def test_the_tables_show_every_student_and_each_seed():
    text = pages.figures_as_text(RESULTS | {'floor': 0.07, 'judge_accuracy': 0.99, 'blocks': [
        {'name': name, 'tokens': 64, 'milliseconds': ms, 'megabytes': 1} for name, ms in
        (('teacher', 3.0), ('student', 2.0))]}, RESULTS)
    for part in (*(ARMS[arm].title for arm in DEMO), '1.000 / 1.100', 'floor', '0.070', '1.5', '2.10', '4.20',
                 'recorded: flow teacher'):
        assert part in text


def test_the_page_of_the_lab_keeps_what_was_written_by_hand(tmp_path):
    page = tmp_path / 'mnist.md'
    page.write_text(f'before\n{lab_pages.BEGIN}\nold\n{lab_pages.END}\nafter\n')
    for _ in range(2):
        lab_pages.write_docs(page, RESULTS)
        text = page.read_text()
        assert text.startswith('before') and text.endswith('after\n') and 'old' not in text
        for group in BASES:
            assert lab_pages.CLAIMS[group] in text and 'within the spread' in text
        assert lab_pages.FLOW in text and '| flow teacher, euler | 3.000 | 2.000 | 0.250 |' in text
    assert (tmp_path / 'mnist_cost.png').exists() and (tmp_path / 'mnist_guidelines.png').exists()


def test_finished_runs_are_collected_in_order(tmp_path):
    for arm, seed in (('fall_5', 1), ('align_5', 1), ('align_5', 0), ('teacher', 0)):
        folder = tmp_path / (arm if arm == 'teacher' else f'{arm}_{seed}')
        folder.mkdir()
        (folder / lab.RESULT).write_text(json.dumps(result_of(arm, seed, 1.0)))
    found = lab.collect(tmp_path)
    assert [(run['arm'], run['seed']) for run in found['runs']] == [
        ('align_5', 0), ('align_5', 1), ('fall_5', 1)]
    assert found == json.loads((tmp_path / 'results.json').read_text()) and found['teacher']['seed'] == 0


def test_what_is_recorded_can_be_shown_and_says_how_it_was_made():
    recorded = stages.recorded()
    assert pages.table_rows(recorded, recorded) and lab_pages.cost_series(recorded)
    assert {'command', 'seed', 'versions', 'date', 'cost'} <= set(recorded['runs'][0])


@pytest.mark.parametrize('file', [lab.TEACHER, lab.FLOW_TEACHER], ids=lambda file: file.stem)
def test_the_shipped_teachers_are_small_and_say_where_they_come_from(file):
    assert file.stat().st_size <= 4_000_000
    card = json.loads(file.with_suffix('.json').read_text())
    assert card['command'].startswith(f'python train.py --config=configs/{file.stem}.py')
    assert {'seed', 'steps', 'versions', 'date', 'figures', 'sampling'} <= set(card)
    assert card['sha256'] == file_sha256(file)


@pytest.mark.parametrize('flags, said', [(['--arms=align5'], 'unknown --arms: align5; known: align_5'),
                                         (['--seeds=0'], 'at least 1')])
def test_what_the_lab_cannot_run_is_refused(flags, said, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['lab', *flags])
    with pytest.raises(UserError, match=said):
        lab.main()


@pytest.mark.slow
def test_the_demo_reaches_its_figures(tmp_path):
    done = subprocess.run([sys.executable, '-m', 'examples.mnist', '--workdir', str(tmp_path)], cwd=ROOT,
                          text=True, capture_output=True, timeout=1500,
                          env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''})
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout[-2500:])
    figures = json.loads((tmp_path / 'figures.json').read_text())
    distances = {run['arm']: run['distance'] for run in figures['runs']}
    assert distances['align_5'] < distances['lit_5'] < distances['scratch_5']
    assert distances['align_5'] <= 1.7 * figures['teacher']['distance']      # measured 1.49
    report = (tmp_path / 'report.html').read_text()
    assert len(re.findall(r'data:image/png;base64,', report)) == 6 + 5      # grids, plots
    assert 'blocks/attn/dwc/kernel' in report and not re.search(r'src="http', report)
    commands = printed_next(done.stdout)
    assert len(commands) == 3
    for line in commands:
        run_printed(line, tmp_path)
