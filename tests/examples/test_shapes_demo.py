"""The text-to-image demo as a stranger starts it, and what it must reach."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from printed_commands import printed_next, run_printed

from examples.shapes import __main__ as shapes
from examples.shapes import pages as shapes_pages
from examples.shapes.__main__ import ARMS, ENCODER, TEACHER, student
from lit_jax.data.toys.shapes_words import all_captions
from lit_jax.metrics.geneval.geneval_prompts import TASKS
from lit_jax.models.network import Network
from lit_jax.recipes.recipe import architecture, finalize, load_recipe
from lit_jax.training.flops import stage_macs

# of the teacher's score by the students; measured 0.97, which another machine's rounding moves by 0.02
REACHED, AIM = 0.9, 0.95
ROOT = Path(__file__).parents[2]
RUN = {'overall': 0.8, **{task: 0.8 for task in TASKS}}
RESULT = {'seconds': 10, 'samples': {'method': 'dpm++', 'steps': 20, 'cfg_scale': 3.0, 'pictures': 4,
                                     'singles': 16},
          'rows': [{'name': name, 'steps': 600, 'parameters': 300_000, 'macs': 20_000_000, 'runs': [RUN, RUN],
                    **RUN, 'ratio': 1.0, 'steps_ratio': 0.1} for name in ('teacher', *ARMS)]}


def test_the_table_names_every_model_and_every_task():
    text = shapes_pages.figures_as_text(RESULT)
    for part in (*shapes_pages.TITLES.values(), *(task.replace('_', ' ') for task in TASKS),
                 '0.800 (0.800 / 0.800)', '300,000'):
        assert part in text


def test_arms_leave_out_what_they_say():
    recipes = {arm: finalize(student(Path('demo'), arm, 0).recipe(), 1) for arm in ARMS}
    assert {arm: (bool(r.inherit.path), bool(r.teacher.path)) for arm, r in recipes.items()} == {
        'distilled': (True, True), 'aligned': (True, True), 'scratch': (False, False)}
    assert recipes['distilled'].model.mixer.name == recipes['scratch'].model.mixer.name == 'linear'


def test_students_take_at_most_a_fifth_of_the_teachers_steps():
    assert shapes.teacher_steps() == 4_000 + 14_500 == json.loads(TEACHER.with_suffix('.json').read_text())[
        'steps']
    assert 5 * student(Path('demo'), 'distilled', 0).recipe().train.steps <= shapes.teacher_steps()


def test_the_aligned_student_costs_a_twentieth():
    config, teacher = student(Path('demo'), 'aligned', 0).recipe(), Network(architecture(load_recipe(
        'shapes_pixart:refine')))
    network = Network(architecture(config))
    macs = (config.align.steps * stage_macs('align', network, teacher, 1)
            + config.train.steps * stage_macs('train', network, teacher, 1))
    assert 0.97 * 0.05 <= macs / (shapes.teacher_steps() * stage_macs('train', teacher, None, 1)) <= 0.05


def test_the_prompts_that_are_shown_are_captions():
    assert set(shapes_pages.SHOWN) <= set(all_captions()) and len(set(shapes_pages.SHOWN)) == 12


def test_the_shipped_checkpoints_are_small_and_say_where_they_come_from():
    files = [TEACHER, *ENCODER.iterdir()]
    assert sum(file.stat().st_size for file in files) <= 10_000_000
    card = json.loads(TEACHER.with_suffix('.json').read_text())
    assert {'command', 'seed', 'steps', 'versions', 'figures', 'sha256', 'text_encoder'} <= set(card)
    assert card['sha256'] == shapes.file_sha256(TEACHER)
    assert card['text_encoder'] == {file.name: shapes.file_sha256(file) for file in ENCODER.iterdir()}


@pytest.mark.slow
def test_the_demo_reaches_its_figures(tmp_path):
    done = subprocess.run([sys.executable, '-m', 'examples.shapes', '--seeds', '3', '--workdir',
                           str(tmp_path)], cwd=ROOT,
                          text=True, capture_output=True, timeout=2400,
                          env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''})
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout[-2500:])
    commands = printed_next(done.stdout)
    assert len(commands) == 3
    for line in commands:
        run_printed(line, tmp_path)
    rows = {row['name']: row for row in json.loads((tmp_path / 'figures.json').read_text())['rows']}
    assert len(rows['distilled']['runs']) == 3 and rows['distilled']['steps_ratio'] <= 0.2
    assert rows['teacher']['overall'] >= 0.5
    assert rows['distilled']['ratio'] >= REACHED
    assert rows['distilled']['overall'] > rows['scratch']['overall']
    report = (tmp_path / 'report.html').read_text()
    assert len(re.findall(r'data:image/png;base64,', report)) == 2 and 'y_embedder/fc1/kernel' in report
    assert not re.search(r'src="http', report)
    if rows['distilled']['ratio'] < AIM:
        pytest.xfail(f"the students have {rows['distilled']['ratio']:.2f} of the teacher's score, the aim is "
                     f"{AIM}")
