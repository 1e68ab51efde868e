"""The demo as a stranger starts it, and what it must reach."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from printed_commands import printed_next, run_printed

from examples.digits import pages, stages
from examples.digits.stages import student
from examples.students import ARMS

ROOT = Path(__file__).parents[2]
RUN = {'distance': 1.0, 'accuracy': 0.9, 'accuracy_unguided': 0.8}
RESULT = {
    'judge_accuracy': 0.99, 'floor': 0.7, 'seconds': 10,
    'samples': {'unguided': 1000, 'guided': 500, 'method': 'ddpm', 'steps': 50, 'cfg_scale': 2.0},
    'rows': [{'name': name, 'steps': 1000, 'parameters': 329_224, 'macs': 5_000_000, 'runs': [RUN, RUN],
              **RUN, 'distance_ratio': 1.0, 'accuracy_ratio': 1.0,
              'accuracy_unguided_ratio': 1.0} for name in ('teacher', *ARMS)]}


def test_the_table_names_every_model_and_shows_each_seed():
    text = pages.figures_as_text(RESULT)
    for part in (*pages.TITLES.values(), '329,224', '1.00 (1.00 / 1.00)', '0.800',
                 'floor (360 real held-out digits): 0.70'):
        assert part in text


def test_arms_leave_out_what_they_say():
    recipes = {arm: student(Path('demo'), arm, 0).recipe() for arm in ARMS}
    assert {arm: (bool(r.inherit.path), bool(r.teacher.path)) for arm, r in recipes.items()} == {
        'distilled': (True, True), 'inherited': (True, False), 'scratch': (False, False)}
    assert len({r.train.steps for r in recipes.values()}) == 1


def test_students_take_at_most_a_fifth_of_the_teachers_steps():
    teacher = stages.load_recipe('digits_dit')
    assert 5 * student(Path('demo'), 'distilled', 0).recipe().train.steps <= teacher.train.steps


def test_the_shipped_teacher_is_small_and_says_where_it_comes_from():
    assert stages.SHIPPED.stat().st_size <= 4_000_000
    card = json.loads((ROOT / 'assets' / 'digits_dit.json').read_text())
    assert card['command'].startswith('python train.py --config=configs/digits_dit.py')
    assert {'seed', 'steps', 'versions', 'figures', 'sha256'} <= set(card)


@pytest.mark.slow
def test_the_demo_reaches_its_figures(tmp_path):
    done = subprocess.run([sys.executable, '-m', 'examples.digits', '--workdir', str(tmp_path)], cwd=ROOT,
                          text=True, capture_output=True, timeout=1500,
                          env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''})
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout[-2500:])
    commands = printed_next(done.stdout)
    assert len(commands) == 3
    for line in commands:
        run_printed(line, tmp_path)
    rows = {row['name']: row for row in json.loads((tmp_path / 'figures.json').read_text())['rows']}
    assert rows['distilled']['distance_ratio'] <= 1.15
    assert rows['distilled']['accuracy_ratio'] >= 0.95
    assert rows['distilled']['distance'] < rows['scratch']['distance']
    report = (tmp_path / 'report.html').read_text()
    assert len(re.findall(r'data:image/png;base64,', report)) == 7      # five grids, two plots
    assert 'blocks/attn/dwc/kernel' in report and not re.search(r'src="http', report)
