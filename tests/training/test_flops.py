"""The cost of a training step."""
from tiny import tiny_recipe

from lit_jax import recipes
from lit_jax.models.cost import network_macs
from lit_jax.training import setup
from lit_jax.training.flops import forward_macs, train_macs


def test_a_step_is_three_forward_passes_and_one_of_the_teacher():
    student, teacher = (setup.build_network(tiny_recipe(mixer)) for mixer in ('linear', 'softmax'))
    assert train_macs(student, None, 8) == 8 * 3 * network_macs(student)
    assert train_macs(student, teacher, 8) == 8 * (3 * network_macs(student) + network_macs(teacher))


def test_the_papers_count_of_dit_xl():
    network = setup.build_network(recipes.size(recipes.default(), 'xl', 'softmax'))
    assert round(forward_macs(network) / 1e9, 1) == 118.6


def test_remat_and_unrolling_do_not_change_the_count():
    counts = {train_macs(setup.build_network(tiny_recipe(remat=remat, scan_layers=scan)), None, 1)
              for remat in ('none', 'full') for scan in (True, False)}
    assert len(counts) == 1
