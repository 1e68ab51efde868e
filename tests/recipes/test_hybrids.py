"""Hybrids: their short forms, and that everything takes models with mixers of two kinds."""
import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from sampling_models import save_model
from torch_samples import LINEAR, SOFTMAX, random_params, tiny_arch

import lit_jax
from lit_jax import recipes
from lit_jax.convert.torch_export import export, to_torch_state
from lit_jax.convert.torch_import import convert, from_torch_state
from lit_jax.models.cost import network_macs, state_bytes
from lit_jax.models.network import Network
from lit_jax.plan import plan as planning
from lit_jax.plan.collectives import find_collectives
from lit_jax.plan.dry_run import describe_recipe
from lit_jax.recipes.hybrids import expand_stages, is_short, kept_blocks
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.leaves import named_leaves
from lit_jax.training.flops import mixer_macs, stage_macs
from lit_jax.training.mesh import make_mesh

HYBRID = [{'depth': 1}, {'depth': 1, 'mixer': SOFTMAX}, {'depth': 1}]


@pytest.mark.parametrize('stages, kept', [
    ('every:4', [3, 7, 11]), (('first:1', 'last:2'), [0, 10, 11]), ([0, 7, 'every:6'], [0, 5, 7, 11]),
    (5, [5])])
def test_short_forms_name_blocks(stages, kept):
    assert is_short(stages) and kept_blocks(stages, 12) == kept


@given(st.sets(st.integers(0, 11)))
def test_runs_of_a_short_form_keep_its_blocks(kept):
    runs = expand_stages(sorted(kept), 12, SOFTMAX)
    blocks = [run.get('mixer') for run in runs for _ in range(run['depth'])]
    assert [block for block, mixer in enumerate(blocks) if mixer] == sorted(kept) and len(blocks) == 12


@pytest.mark.parametrize('stages, said', [
    ('every:0', 'no short form'), ('each:4', 'no short form'), (('last:13',), 'there is no block -1'),
    ((12,), 'there is no block 12; a model of 12 blocks has 0 to 11'), ('every:13', 'keeps nothing'),
    ((True,), 'no short form')])
def test_short_forms_that_name_nothing(stages, said):
    with pytest.raises(UserError, match=said):
        kept_blocks(stages, 12)


@pytest.mark.parametrize('family', ['dit', 'pixart'])
def test_a_hybrid_costs_what_its_blocks_cost(family):
    more = {} if family == 'dit' else {'family': 'pixart', 'cross_heads': 2, 'caption_channels': 8,
                                       'caption_tokens': 5}

    def network(mixer, stages=()):
        arch = {**tiny_arch(mixer, depth=3, stages=list(stages)), **more}
        return Network({name: value for name, value in arch.items() if not more or name != 'num_classes'})

    linear, softmax, hybrid = network(LINEAR), network(SOFTMAX), network(LINEAR, HYBRID)
    for count in (network_macs, mixer_macs, lambda one: state_bytes(one.arch)):
        assert 3 * count(hybrid) == 2 * count(linear) + count(softmax)
    assert 'linear and softmax attention' in hybrid.describe()


def test_a_hybrid_goes_to_pytorch_and_back(tmp_path):
    arch = tiny_arch(LINEAR, depth=3, stages=HYBRID)
    params = random_params(arch, 0)
    state = to_torch_state(params, arch)
    assert 'blocks.1.attn.qkv.weight' in state and 'blocks.0.attn.dwc.weight' in state
    same, back = from_torch_state(state, arch)
    assert same == arch
    for path, leaf in named_leaves(params).items():
        np.testing.assert_array_equal(named_leaves(back)[path], leaf)


@pytest.mark.slow
def test_a_model_folder_of_a_hybrid_draws_as_its_copy_through_pytorch(tmp_path):
    kept = {'depth': 1, 'mixer': {'name': 'softmax', 'heads': 2, 'qkv_bias': True}}
    save_model(tmp_path / 'model', mixer='linear', depth=3, stages=[{'depth': 2}, kept])
    export(tmp_path / 'model', tmp_path / 'model.safetensors')
    convert(tmp_path / 'model.safetensors', tmp_path / 'back')
    one, other = (lit_jax.load(tmp_path / name) for name in ('model', 'back'))
    assert one.arch == other.arch and len(one.arch['stages']) == 2
    images = [model.sample(classes=[1, 2], steps=2, seed=3) for model in (one, other)]
    np.testing.assert_array_equal(*images)
    assert np.asarray(images[0]).std() > 0


@pytest.mark.slow
def test_only_softmax_blocks_gather_along_the_sequence_axis():
    """Each softmax block gathers the keys and values of all tokens, each linear one only sums its state."""
    mesh = make_mesh({'data': 1, 'fsdp': 1, 'tensor': 1, 'seq': 8})

    def gathered(stages):
        network = Network(tiny_arch(LINEAR, depth=3, input_size=[32, 32], stages=stages), scan_layers=False)
        whole, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P(None, 'seq'))
        params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole),
                              network.abstract())
        x, t, cond = network.example_inputs(1)
        x = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows)
        with jax.set_mesh(mesh):
            text = jax.jit(network.apply, out_shardings=rows).lower(params, x, t, cond).compile().as_text()
        found = [one for one in find_collectives(text, mesh) if one.kind == 'all-gather']
        return sum(one.total_bytes for one in found)

    none, one, all = gathered([]), gathered(HYBRID), gathered([{'depth': 3, 'mixer': SOFTMAX}])
    keys_and_values = 2 * 4 * 16 * 16 * 16      # float32, of 16 x 16 tokens of width 16
    assert none == 0 and one >= keys_and_values and all == 3 * one


FAST = ['lit_xl_fast', 'lit_xl_fast:every_4', 'lit_t2i_512_fast', 'lit_t2i_512_fast:last_2']


@pytest.mark.parametrize('name', FAST)
def test_fast_recipes_say_their_stages(name):
    text, ready = describe_recipe(recipes.load_recipe(name))
    assert not ready and 'stage    align: steps 1 to ' in text and ' of a step of training)' in text
    assert ('linear and softmax attention' in text) == (':' in name)


def test_the_fast_recipe_of_imagenet_costs_a_twentieth_of_its_teacher():
    config = recipes.load_recipe('lit_xl_fast')
    student, teacher = (Network(recipes.architecture(recipes.load_recipe(name)))
                        for name in ('lit_xl_fast', 'dit_xl'))
    cost = sum(steps * stage_macs(stage, student, teacher, 256) for stage, steps in
               (('align', config.align.steps), ('train', config.train.steps)))
    whole = 7_000_000 * stage_macs('train', teacher, None, 256)
    assert 0.045 < cost / whole <= 0.05
    assert config.train.cooldown_steps == 0.75 * config.train.steps


@pytest.mark.parametrize('row', ['every_4_', 'linear_every_4', 'softmax', 'every_0'])
def test_rows_that_keep_nothing(row):
    with pytest.raises(UserError, match='is no row; a row says|no short form'):
        recipes.architecture(recipes.load_recipe(f'lit_xl_fast:{row}'))


@pytest.mark.slow
@pytest.mark.parametrize('name', FAST[1::2])
def test_fast_recipes_have_plans(name):
    """Of four narrow blocks, of which the last ones are the teacher's; the real ones take minutes to
    compile."""
    config = recipes.load_recipe(name)
    config.unlock()
    config.model.update({'depth': 4, 'width': 144})
    config.model.mixer.heads = 2
    if 't2i' in name:
        config.model.cross_heads = 2
    config.teacher.path = config.inherit.path = 'nowhere/teacher'
    config.train.batch_size = 8
    config.mesh.update({'data': 4, 'fsdp': 1, 'seq': 2})
    text = planning.describe_plan(config.lock(), 'cpu:8')
    assert text.startswith('align: fits: ') and '\ntrain: fits: ' in text and 'all-gather' in text
