"""The cost of a training step."""
import pytest
from tiny import tiny_recipe

from lit_jax import recipes
from lit_jax.models.cost import network_macs
from lit_jax.models.macs import count_macs
from lit_jax.models.network import Network
from lit_jax.plan.plan import abstract_arguments, assumed_teacher
from lit_jax.training import setup
from lit_jax.training.flops import forward_macs, stage_macs, train_macs
from lit_jax.training.mesh import make_mesh
from lit_jax.training.stages import plan_stages


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


def test_aligning_lit_xl_costs_at_most_six_tenths_of_distilling_it():
    student, teacher = (setup.build_network(recipes.size(recipes.default(), 'xl', mixer))
                        for mixer in ('linear', 'softmax'))
    align, distil = (stage_macs(stage, student, teacher, 1) for stage in ('align', 'train'))
    assert 0.5 < align / distil < 0.6


@pytest.mark.slow
def test_the_programs_of_lit_xl_compute_what_is_counted():
    """Every product of both traced steps: alignment has no gradient of its inputs, training none of x_t."""
    config = recipes.finalize(recipes.load_recipe('lit_xl'), 8)
    config.unlock()
    config.align.steps, config.train.batch_size = 1, 8
    network, teacher = setup.build_network(config), Network(assumed_teacher(config))
    mesh, counted = make_mesh({'data': 8, 'fsdp': 1, 'tensor': 1, 'seq': 1}), {}
    for stage in plan_stages(config, network, teacher.arch):
        arguments = abstract_arguments(config, stage, network, teacher, mesh)
        step = setup.jit_stage(config, network, stage, mesh, teacher)
        counted[stage.name] = count_macs(step, *arguments)
        assert counted[stage.name] == pytest.approx(stage_macs(stage.name, network, teacher, 8), rel=0.12)
    print(f'lit_xl: a step of alignment is {counted["align"] / counted["train"]:.3f} of one of distillation')
    assert counted['align'] <= 0.6 * counted['train']
