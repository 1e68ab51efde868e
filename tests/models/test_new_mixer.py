"""A new mixer is one file: what `toy_mixer` states about itself is all that training, sharding, conversion,
inheritance and counting know of it."""
import functools
import importlib.metadata
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from tiny import tiny_recipe

from lit_jax import recipes
from lit_jax.checkpoint.load import load_weights
from lit_jax.convert.torch_export import export, to_torch_state
from lit_jax.convert.torch_import import convert
from lit_jax.data.pipeline import make_pipeline
from lit_jax.models import mixers
from lit_jax.models.cost import format_parameters, macs_of, state_bytes
from lit_jax.models.layers import Linear
from lit_jax.models.mixers import find_mixer, import_mixer
from lit_jax.models.mixers.mixer import Mixer
from lit_jax.models.network import Network
from lit_jax.plan.dry_run import describe_recipe
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.leaves import named_leaves
from lit_jax.training import loop, setup
from lit_jax.training.inherit import inherit_params
from lit_jax.training.matrices import matrix_axes
from lit_jax.training.mesh import BatchLayout, format_shardings, make_mesh
from lit_jax.training.state import abstract_state

NAME = 'toy_mixer:ToyMixer'
ONE, MIXED, COPIES = ((1, 1, 1, 1), (2, 2, 2, 1), (8, 1, 1, 1))
WIDTH = 32


class MeanMixer(Mixer):
    """The least that a mixer can be: no heads, and nothing said about itself."""

    def __init__(self, width, *, dtype, rngs):
        self.key = Linear(width, width, bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x_BND, grid):
        return self.key(x_BND.mean(1, keepdims=True)) + 0 * x_BND


def recipe(name=NAME, sizes=ONE, **options):
    config = tiny_recipe()
    config.name = 'tiny_new'
    config.model.mixer = ConfigDict({'name': name, **options})
    config.mesh.update(dict(zip(('data', 'fsdp', 'tensor', 'seq'), sizes, strict=True)))
    return config


def losses(config, steps=6):
    """Of the first steps on the mesh of the recipe."""
    config = recipes.finalize(config, int(np.prod(list(config.mesh.to_dict().values()))))
    mesh = make_mesh(config.mesh.to_dict(), jax.devices()[:int(np.prod(list(config.mesh.values())))])
    network, optimizer = setup.build_network(config), setup.build_optimizer(config)
    with jax.set_mesh(mesh):
        state, _ = setup.init_state(config, network, optimizer, mesh)
        step = setup.jit_step(config, network, optimizer, mesh,
                              setup.abstract_sharded_state(network, optimizer, mesh))
        layout = BatchLayout(mesh, config.train.batch_size)
        batches = make_pipeline(setup.build_source(config), global_batch=layout.batch_size, seed=0,
                                rows=layout.rows)
        key, found = setup.run_key(config, mesh), []
        for k in range(steps):
            state, metrics = step(state, {'teacher': None}, layout.place(batches.batch(k)), key)
            found.append(float(metrics['loss/total']))
    return np.array(found)


@functools.cache
def losses_of_one_device():
    return losses(recipe(heads=2))


@pytest.mark.slow
def test_it_is_sharded_as_it_says_and_learns_as_on_one_device():
    sharded = losses(recipe(sizes=MIXED, heads=2))
    np.testing.assert_allclose(sharded, losses_of_one_device(), rtol=1e-5)
    assert sharded[-1] < sharded[0]
    config = recipe(sizes=MIXED, heads=2)
    network = setup.build_network(config)
    table = format_shardings({'params': network.abstract()}, make_mesh(config.mesh.to_dict()), network.arch)
    for path, spec in (('qk/kernel', "P(None, 'fsdp', None, 'tensor', None)"), ('proj/bias', 'P()'),
                       ('qk/bias', "P(None, None, 'tensor', None)"), ('skip', "P(None, 'tensor', None)"),
                       ('proj/kernel', "P(None, 'tensor', None, 'fsdp')")):
        line = next(line for line in table.splitlines() if line.startswith(f'params/blocks/attn/{path} '))
        assert re.sub('PartitionSpec', 'P', line).count(spec) == 1, line


@pytest.mark.slow
def test_it_is_trained_exported_and_read_again_bit_for_bit(tmp_path):
    """The whole road: a recipe, a workdir, a PyTorch file under the names that the mixer gives, a model
    folder."""
    config = recipe(heads=2)
    config.mesh.data = -1
    assert loop.train(config, tmp_path / 'run') == 'done'
    theirs, params = load_weights(tmp_path / 'run')
    state = to_torch_state(params, theirs['model'])
    assert {key for key in state if key.startswith('blocks.1.attn.')} == {
        f'blocks.1.attn.{name}' for name in ('in_proj.weight', 'in_proj.bias', 'v_proj.weight', 'v_proj.bias',
                                             'out_proj.weight', 'out_proj.bias', 'skip_weight')}
    assert state['blocks.1.attn.in_proj.weight'].shape == (2 * WIDTH, WIDTH)
    export(tmp_path / 'run', tmp_path / 'model.safetensors')
    convert(tmp_path / 'model.safetensors', tmp_path / 'model')
    ours, again = load_weights(tmp_path / 'model')
    assert ours['model'] == theirs['model'] and ours['model']['mixer']['name'] == NAME
    want = named_leaves(params)
    assert named_leaves(again).keys() == want.keys()
    for path, leaf in named_leaves(again).items():
        np.testing.assert_array_equal(leaf, want[path], err_msg=path)


def test_it_inherits_from_softmax_attention():
    teacher, student = setup.build_network(tiny_recipe()), setup.build_network(recipe(heads=1))
    theirs, ours = (network.init(jax.random.key(seed)) for seed, network in enumerate((teacher, student)))
    params, report = inherit_params(theirs, teacher.arch, ours, student.arch, copy='q,k,v,o')
    flat = params['blocks']['attn']
    qkv = theirs['blocks']['attn']['qkv']['kernel'].reshape(2, WIDTH, 3, WIDTH)
    np.testing.assert_array_equal(flat['qk']['kernel'].reshape(2, WIDTH, 2, WIDTH), qkv[:, :, :2])
    np.testing.assert_array_equal(flat['v']['kernel'].reshape(2, WIDTH, WIDTH), qkv[:, :, 2])
    np.testing.assert_array_equal(flat['proj']['kernel'].reshape(2, WIDTH, WIDTH),
                                  theirs['blocks']['attn']['proj']['kernel'].reshape(2, WIDTH, WIDTH))
    assert [row['path'] for row in report['rows'] if row['status'] == 'fresh'] == ['blocks/attn/skip']


def test_it_is_counted():
    network = setup.build_network(recipe(heads=2))
    counts, tokens = macs_of(network), 16
    assert counts['blocks/attn/qk/kernel'] == 2 * tokens * 2 * WIDTH ** 2
    assert state_bytes(network.arch) == 2 * 2 * 4 * WIDTH
    listed = format_parameters(network)
    assert 'blocks/attn/skip' in listed and 'MiB of state between its tokens' in listed
    assert 'blocks/attn/qk/kernel' in describe_recipe(recipe(sizes=COPIES, heads=2), verbose=True)[0]


def test_optimizers_see_its_matrices_as_it_says():
    arch = setup.build_network(recipe(heads=2)).arch
    assert matrix_axes('blocks/attn/qk/kernel', 5, arch) == ((0,), (1,), (2, 3, 4))
    assert matrix_axes('blocks/attn/proj/kernel', 4, arch) == ((0,), (1, 2), (3,))
    assert not matrix_axes('blocks/attn/skip', 3, arch).is_matrix
    config = recipe(heads=2)
    config.train.optimizer = 'came'
    second = abstract_state(setup.build_network(config), setup.build_optimizer(config))['opt'][0].nu
    assert second['blocks']['attn']['proj']['kernel']['came_row'].shape == (2, 2, WIDTH // 2)


def test_a_mixer_that_says_nothing_trains_where_weights_are_whole():
    name = f'{__name__}:MeanMixer'
    assert np.isfinite(losses(recipe(name, COPIES), steps=2)).all()
    network = setup.build_network(recipe(name))
    assert state_bytes(network.arch) is None and 'of state' not in format_parameters(network)
    with pytest.raises(UserError, match=r'no sharding rule fits blocks/attn/key/kernel .*declares no '
                                        r'key/.*gla declare.*`leaves` of .*MeanMixer.*mesh\.fsdp'):
        losses(recipe(name, MIXED))
    params = network.init(jax.random.key(0))
    with pytest.raises(UserError, match='q, v of the attention cannot be copied: the mixer .*MeanMixer does'):
        inherit_params(params, network.arch, params, network.arch, copy='q,v')


@pytest.mark.parametrize('name, says', [
    ('toy', 'unknown mixer .toy. .*known: softmax, .*package.module:Class'), (':', 'unknown mixer'),
    ('no_such_module:ToyMixer', 'cannot be imported: No module named .no_such_module.*PYTHONPATH'),
    ('toy_mixer:Toy', "'toy_mixer:Toy' is no mixer"),
    ('toy_mixer:Linear', 'must be a class derived from lit_jax.models.mixers.mixer.Mixer')])
def test_what_is_no_mixer_is_told(name, says):
    with pytest.raises(UserError, match=says):
        import_mixer(name)
    with pytest.raises(UserError, match=says):
        recipes.architecture(recipe(name, heads=2))


def test_its_options_are_checked():
    with pytest.raises(UserError, match="no option 'dwc'; its options: heads, skip"):
        recipes.architecture(recipe(heads=2, dwc=1))
    with pytest.raises(UserError, match='needs heads'):
        recipes.architecture(recipe())
    arch = recipes.architecture(recipe(heads=2, skip=0.5))
    params = Network(arch).init(jax.random.key(0))
    assert jnp.all(params['blocks']['attn']['skip'] == 0.5)


def test_a_name_in_a_file_imports_nothing(tmp_path, monkeypatch):
    """A model folder is data: its mixer must be imported already, or be listed by the person."""
    (tmp_path / 'unseen_mixer.py').write_text('from toy_mixer import ToyMixer\n')
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match='`import unseen_mixer` first, or set '
                                        'LIT_JAX_MIXERS=unseen_mixer, with its folder in PYTHONPATH'):
        find_mixer('unseen_mixer:ToyMixer')
    assert 'unseen_mixer' not in sys.modules
    monkeypatch.setenv('LIT_JAX_MIXERS', 'no_such_mixer,broken_mixer,another,unseen_mixer')
    (tmp_path / 'broken_mixer.py').write_text('class ToyMixer(Unknown): pass\n')
    for module, says in (('no_such_mixer', 'No module named'), ('broken_mixer', "'Unknown' is not defined")):
        for find in (find_mixer, import_mixer):
            with pytest.raises(UserError, match=f'{module}:ToyMixer. cannot be imported: .*{says}'):
                find(f'{module}:ToyMixer')
    assert find_mixer('unseen_mixer:ToyMixer').__name__ == 'ToyMixer'


def test_an_installed_package_gives_its_mixer_a_short_name(monkeypatch):
    point = importlib.metadata.EntryPoint('toy', NAME, mixers.ENTRY_POINTS)
    broken = importlib.metadata.EntryPoint('gone', 'no_such_module:Mixer', mixers.ENTRY_POINTS)
    monkeypatch.setattr(mixers, '_installed', lambda: {'toy': point, 'gone': broken})
    assert find_mixer('toy').__name__ == 'ToyMixer'
    assert recipes.architecture(recipe('toy', heads=2))['mixer']['name'] == 'toy'
    with pytest.raises(UserError, match='installed as no_such_module:Mixer, which cannot be imported'):
        find_mixer('gone')
    with pytest.raises(UserError, match='known: softmax, .*toy'):
        find_mixer('other')
