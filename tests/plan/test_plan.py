"""Plans: on virtual CPU devices, from what compilers say, and with the TPU compiler where it is installed."""
import dataclasses
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from tiny import tiny_recipe

from lit_jax.checkpoint.model_folder import save_model_folder
from lit_jax.checkpoint.workdir import claim_workdir
from lit_jax.plan import plan as planning
from lit_jax.plan.topology import Topology, find_topology, next_larger
from lit_jax.runtime.chips import CHIPS
from lit_jax.runtime.errors import UserError
from lit_jax.training import setup
from lit_jax.training.flops import stage_macs, train_macs

ROOT = Path(__file__).parents[2]
REFUSAL = ('RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries '
           '(20.70G) exceeds available HBM (15.75G).')
V5E = next(chip for chip in CHIPS if chip.name == 'v5e')
GIB = 2**30


@pytest.fixture(autouse=True)
def jax_runs():
    """A plan that comes before jax has started would choose the number of CPU devices for all tests."""
    assert len(jax.devices()) == 8


def recipe(teacher='', **train):
    config = tiny_recipe('linear', **train)
    config.model.depth = 1
    config.teacher.path = teacher
    config.mesh.update({'data': 2, 'fsdp': 4})
    return config


@pytest.fixture(scope='module')
def plan():
    jax.devices()
    return planning.make_plan(recipe('nowhere/teacher'), 'cpu:8')


def on_v5e(plan, limit, shape='4x4', **memory):
    """The plan as if for a slice whose devices have `limit` GiB, and its memory changed (GiB)."""
    memory = {name: round(size * GIB) for name, size in memory.items()}
    devices = plan.topology.devices
    topology = Topology(f'v5e:{shape}', devices, 4, V5E, limit * GIB, limit * GIB)
    return dataclasses.replace(plan, topology=topology, memory=dataclasses.replace(plan.memory, **memory))


# ------------------------------------------------------------------------------------------------------
# What a plan says


def test_a_plan_counts_what_a_device_holds(plan):
    network = setup.build_network(recipe())
    weights = sum(leaf.size for leaf in jax.tree.leaves(network.abstract())) * 4
    parts = plan.memory.parts
    assert plan.fits and plan.devices == 8 and plan.mesh == {'data': 2, 'fsdp': 4, 'tensor': 1, 'seq': 1}
    # sharded over fsdp, apart from biases and the convolution
    assert weights / 4 < parts['weights'] < weights / 3
    assert parts['EMA'] == parts['weights'] and 2 * parts['weights'] <= parts['optimizer'] < 2 * parts[
        'weights'] + 64
    assert parts['batch'] == 16 // 8 * (8 * 8 + 1) * 4
    assert plan.memory.arguments >= sum(parts.values())
    assert plan.memory.peak >= plan.memory.arguments + plan.memory.temporaries


def test_a_plan_counts_the_models_own_cost(plan):
    teacher, _ = planning.find_teacher(recipe('nowhere/teacher'))
    assert plan.macs == train_macs(setup.build_network(recipe()), teacher, 16) and plan.flops == 2 * plan.macs


def test_a_plan_lists_the_collectives_of_its_mesh(plan):
    assert {c.kind for c in plan.collectives} >= {'all-gather', 'all-reduce'}
    assert {axis for c in plan.collectives for axis in c.axes} == {'data', 'fsdp'}
    assert all(c.count >= 1 and not c.at_least for c in plan.collectives)


def test_the_verdict_comes_first(plan):
    text = planning.format_plan(plan)
    assert re.match(r'fits: \d+\.\d MiB of [\d.,]+ GiB per device \(\d+%\)\n', text)
    for heading in ('memory per device', 'compute of a step', 'collectives of a step', 'traced in'):
        assert f'\n{heading}' in text
    assert 'mesh     data 2  fsdp 4  tensor 1  seq 1   (2 of the batch per device)' in text
    assert 'what to change' not in text and max(map(len, text.splitlines())) < 140


@pytest.mark.slow
def test_each_stage_is_planned_and_what_is_frozen_takes_no_memory(plan):
    config = recipe('nowhere/teacher', trainable='final_layer/*')
    config.align.steps = 5
    align, train = planning.make_plans(config, 'cpu:8')
    assert (align.stage, align.steps, train.stage, train.steps) == ('align', (1, 5), 'train', (6, 11))
    teacher, _ = planning.find_teacher(config)
    assert align.macs == stage_macs('align', setup.build_network(recipe()), teacher, 16) < train.macs
    assert {c.kind for c in align.collectives} >= {'all-gather', 'all-reduce'}
    whole = plan.memory.parts
    for one in (align, train):
        parts = one.memory.parts
        assert parts['weights'] == whole['weights'] and parts['teacher'] == whole['teacher']
        assert 0 < parts['EMA'] < 0.5 * whole['EMA'] and parts['optimizer'] < 0.5 * whole['optimizer']
    text = planning.describe_plan(config, 'cpu:8')
    assert re.match(r'align: fits: .*\ntrain: fits: .*\n\n== align: steps 1 to 5\nfits', text)
    assert "the student's mixers forward x 3" in text and '\n== train: steps 6 to 11\n' in text


# ------------------------------------------------------------------------------------------------------
# Programs that are too large


def refuse(message):
    def compile(self):
        raise jax.errors.JaxRuntimeError(message)
    return compile


def test_a_refused_program_is_a_plan_that_does_not_fit(monkeypatch, plan):
    monkeypatch.setattr(jax.stages.Lowered, 'compile', refuse(REFUSAL))
    refused = planning.make_plan(recipe('nowhere/teacher'), 'cpu:8')
    assert not refused.fits and refused.collectives is None and refused.advice
    assert refused.memory.parts == plan.memory.parts
    assert refused.memory.peak == round(20.7 * GIB) == refused.memory.arguments + refused.memory.temporaries
    assert planning.format_plan(refused).startswith('does not fit: 20.7 GiB of ')


def test_a_refusal_without_a_number_is_shown_as_it_is(monkeypatch):
    monkeypatch.setattr(jax.stages.Lowered, 'compile', refuse('RESOURCE_EXHAUSTED: too many buffers'))
    text = planning.describe_plan(recipe(), 'cpu:8')
    assert text.startswith('does not fit; the compiler: RESOURCE_EXHAUSTED: too many buffers\n')


def test_other_failures_of_the_compiler_are_not_hidden(monkeypatch):
    monkeypatch.setattr(jax.stages.Lowered, 'compile', refuse('INTERNAL: bug'))
    with pytest.raises(jax.errors.JaxRuntimeError, match='INTERNAL: bug'):
        planning.make_plan(recipe(), 'cpu:8')


@pytest.mark.parametrize('message, gib', [
    (REFUSAL, 20.7), (REFUSAL.replace('20.70G', '512.00M'), 0.5), ('RESOURCE_EXHAUSTED: something else', 0),
    ('RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used '
     '18.25G of 15.75G hbm. Exceeded hbm capacity by 2.50G.', 18.25)])
def test_bytes_that_the_compiler_asked_for(message, gib):
    assert planning.parse_refusal(message) == round(gib * GIB)


def advised(plan):
    return [flags for flags, _ in planning.advise(plan)]


def test_temporaries_are_cut_first_where_they_are_most(plan):
    large = on_v5e(plan, 16, arguments=2, temporaries=20, peak=22)
    assert advised(large) == ['--config.train.remat=full', '--config.train.accumulate=2',
                              '--config.train.batch_size=8', '--plan=v5e:4x8']
    assert 'temporaries about 10.0 GiB' in planning.advise(large)[1][1]


def test_arguments_are_cut_first_where_they_are_most(plan):
    config = plan.config.copy_and_resolve_references().unlock()
    config.mesh.update({'data': 8, 'fsdp': 1})
    large = dataclasses.replace(on_v5e(plan, 16, arguments=12, temporaries=6, peak=18), config=config)
    assert advised(large)[0] == '--config.mesh.data=1 --config.mesh.fsdp=8'
    assert 'arguments about 1.5 GiB' in planning.advise(large)[0][1]
    too_large = dataclasses.replace(large,
                                    memory=dataclasses.replace(large.memory, arguments=17 * GIB,
                                                               peak=23 * GIB))
    assert advised(too_large) == ['--config.mesh.data=1 --config.mesh.fsdp=8', '--plan=v5e:4x8']


def test_nothing_is_advised_that_is_done_already(plan):
    config = plan.config.copy_and_resolve_references().unlock()
    config.train.update({'remat': 'full', 'accumulate': 2})
    full = dataclasses.replace(on_v5e(plan, 16, '16x16', arguments=2, temporaries=200, peak=202),
                               config=config)
    assert advised(full) == []       # one image a device and micro-batch, and no larger slice


def test_advice_is_in_the_text_of_a_plan_that_does_not_fit(plan):
    large = on_v5e(plan, 16, arguments=2, temporaries=20, peak=22)
    text = planning.format_plan(dataclasses.replace(large, advice=planning.advise(large)))
    assert text.startswith('does not fit: 22.0 GiB of 16.0 GiB per device (138%)\n')
    assert 'what to change' in text and '  --config.train.remat=full ' in text


# ------------------------------------------------------------------------------------------------------
# The teacher


@pytest.mark.parametrize('path, depth, width, heads', [
    ('models/dit_xl', 28, 1152, 16), ('gs://bucket/models/DiT-S-2/', 12, 384, 6),
    ('models/teacher', 1, 32, 2), ('models/edit_small', 1, 32, 2)])
def test_a_missing_teacher_is_guessed_and_said(path, depth, width, heads, monkeypatch):
    monkeypatch.setattr(planning, '_is_here', lambda path: False)     # a bucket is not asked by a test
    network, text = planning.find_teacher(recipe(path))
    assert (network.arch['depth'], network.arch['width']) == (depth, width)
    assert network.arch['mixer'] == {'name': 'softmax', 'heads': heads, 'qkv_bias': True}
    assert network.arch['input_size'] == (8, 8) and text.startswith(f'{path} not found')


def test_a_teacher_that_is_here_is_taken_as_it_is(tmp_path):
    config = tiny_recipe('softmax')
    config.model.depth = 3
    network = setup.build_network(config)
    description = setup.describe(config, None)
    params = jax.tree.map(lambda leaf: jax.numpy.zeros(leaf.shape, leaf.dtype), network.abstract())
    save_model_folder(tmp_path / 'folder', {**description, 'provenance': {}}, params)
    claim_workdir(tmp_path / 'workdir', config.to_dict(), description)
    for name in 'folder', 'workdir':
        found, text = planning.find_teacher(recipe(str(tmp_path / name)))
        assert found.arch == network.arch and text.startswith(f'{tmp_path / name}: 3 blocks of width 32')


def test_without_a_teacher_there_is_none():
    assert planning.find_teacher(recipe()) == (None, '')


# ------------------------------------------------------------------------------------------------------
# Topologies


@pytest.mark.parametrize('name, said', [
    ('v9:4x4', r"unknown topology 'v9:4x4'; known:\n  v4 (.|\n)*v5e:16x16(.|\n)*cpu:8"),
    ('', 'unknown topology'), ('h100:8', 'GPU can only be compiled on a machine'),
    ('gpu:8', 'GPU can only be compiled on a machine'),
    ('v5e:3x3', r'no v5e slice of that shape; shapes of v5e: 1x1, 2x2, .*16x16'),
    ('v5e:32x32', 'no v5e slice'), ('v5e', "'' is no shape"), ('v5e:16', "'16' is no shape"),
    ('v5p:4x4', 'no shape of a v5p slice; .*2x4x4'),
    ('v6e:4x4x4', 'no shape of a v6e slice'), ('cpu:0', 'an example: cpu:8'), ('cpu', 'an example: cpu:8'),
    ('cpu:9', r'has already started with 8 CPU device\(s\), but the plan needs 9')])
def test_names_that_are_not_known(name, said):
    with pytest.raises(UserError, match=said):
        find_topology(name)


def test_a_missing_tpu_compiler_says_how_to_get_it(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name, *rest: None if name == 'libtpu'
                        else real(name, *rest))
    monkeypatch.delenv('TPU_LIBRARY_PATH', raising=False)
    with pytest.raises(UserError, match=r'pip install "lit_jax\[tpu\]"'):
        find_topology('v5e:4x4')


def test_the_next_larger_slice():
    def slice_of(shape):
        return Topology(f'v5e:{shape}', (), 1, V5E, 1, 1)
    assert [next_larger(slice_of(shape)) for shape in ('1x1', '4x4', '16x16')] == ['v5e:2x2', 'v5e:4x8', None]
    assert next_larger(find_topology('cpu:8')) is None


def test_the_recipe_is_checked_for_the_devices_of_the_topology():
    config = recipe()
    config.mesh.update({'data': 3, 'fsdp': 1})
    with pytest.raises(UserError, match='here are 8'):
        planning.make_plan(config, 'cpu:8')


def test_a_teacher_that_the_mesh_cannot_cut_is_an_error():
    config = recipe('models/dit_s')     # has six heads
    config.model.mixer.heads = 4
    config.mesh.update({'data': 2, 'fsdp': 1, 'tensor': 4})
    with pytest.raises(UserError, match='the teacher models/dit_s does not fit on the mesh(.|\n)*6 softmax '
                                        'heads'):
        planning.make_plan(config, 'cpu:8')


def run_python(code):
    """In a process of its own, where nothing tells jax what to use."""
    environment = {name: value for name, value in os.environ.items()
                   if name not in ('JAX_PLATFORMS', 'XLA_FLAGS')}
    environment['PYTHONPATH'] = f'{ROOT}{os.pathsep}{ROOT / "tests"}'
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, env=environment, capture_output=True,
                          text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_virtual_devices_are_made_where_jax_has_not_started():
    found = run_python('import json, jax\n'
                       'from lit_jax.plan.topology import find_topology\n'
                       'topology = find_topology("cpu:5")\n'
                       'print(json.dumps([len(topology.devices), jax.default_backend(), topology.memory]))')
    assert found[:2] == [5, 'cpu'] and found[2] > 0


PLAN_OF_A_SLICE = '''
import json, os
from tiny import tiny_recipe
import jax
before = dict(os.environ)
from lit_jax.plan.plan import format_plan, make_plan, plan_json
config = tiny_recipe('linear', scan_layers=True)
config.teacher.path = 'nowhere/teacher'
config.mesh.update({'data': 1, 'fsdp': 4})
plan = make_plan(config, 'v5e:2x2')
config.train.batch_size = 2 ** 22
huge = make_plan(config, 'v5e:2x2')
print(json.dumps({
    'text': format_plan(plan), 'fits': [plan.fits, huge.fits],
    'kinds': sorted({c.kind for c in plan.collectives}),
    'axes': sorted({a for c in plan.collectives for a in c.axes}),
    'at_least': any(c.at_least for c in plan.collectives),
    'huge': huge.memory.peak, 'parts': [[part, teacher] for part, teacher in plan.forecast.parts()],
    'seconds': plan.forecast.seconds, 'unknown': plan.forecast.unknown_loops,
    'source': plan.forecast.operations[0].source, 'json': plan_json(plan)['forecast']['seconds'],
    'backend': jax.default_backend(),
    'same_environment': before == dict(os.environ)}))
'''


@pytest.mark.slow
def test_the_tpu_compiler_plans_a_slice_without_a_tpu():
    pytest.importorskip('libtpu', reason='libtpu comes with the extra tpu')
    found = run_python(PLAN_OF_A_SLICE)
    assert found['fits'] == [True, False] and found['huge'] > 16 * GIB
    assert found['text'].startswith('fits: ') and 'libtpu' in found['text']
    assert found['axes'] == ['fsdp'] and 'all-gather' in found['kinds'] and not found['at_least']
    assert found['backend'] == 'cpu' and found['same_environment']
    assert 'no TPU has confirmed it' in found['text'] and found['json'] == found['seconds'] > 0
    assert found['unknown'] == 0 and found['source'].startswith('lit_jax/')
    for part in ('mixer projections', 'feed-forward', 'adaLN, norms and gates'):
        assert [part, False] in found['parts'] and [part, True] in found['parts']
    for part in ('linear core', 'depth-wise convolution', 'optimizer and EMA'):
        assert [part, False] in found['parts'] and [part, True] not in found['parts']


def test_every_listed_slice_is_known_to_the_tpu_compiler():
    pytest.importorskip('libtpu', reason='libtpu comes with the extra tpu')
    found = run_python('import json\n'
                       'from lit_jax.runtime.chips import CHIPS\n'
                       'from lit_jax.plan.topology import find_topology\n'
                       'names = [f"{c.name}:{s}" for c in CHIPS for s in c.shapes]\n'
                       'slices = [find_topology(name) for name in names]\n'
                       'print(json.dumps([(s.name, len(s.devices), s.devices[0].device_kind in s.chip.kinds) '
                       'for s in slices]))')
    for name, count, kind_known in found:
        chip, _, shape = name.partition(':')
        chips = math.prod(map(int, shape.split('x')))
        assert kind_known and count == chips * (2 if chip == 'tpu7x' else 1), name


@pytest.mark.slow
def test_a_shape_that_the_compiler_refuses_is_shown_with_its_words():
    pytest.importorskip('libtpu', reason='libtpu comes with the extra tpu')
    with pytest.raises(UserError,
                       match=r'the TPU compiler refuses it: INVALID_ARGUMENT(.|\n)*shapes of v5p: 2x2x1'):
        find_topology('v5p:3x3x3')
