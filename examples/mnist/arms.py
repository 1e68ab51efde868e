"""The students of the demo and of the lab: variants of configs/mnist_lit.py, each at a share of the cost.

Cost is multiply-accumulates of all stages, the teacher's forward passes included, over those of the teacher's
training."""
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ml_collections import ConfigDict

from lit_jax.models.network import Network
from lit_jax.recipes.recipe import architecture, load_recipe
from lit_jax.runtime.json_file import parse_json
from lit_jax.training.flops import forward_macs, stage_macs

ALIGNING = 0.45        # of an aligned student's cost, spent on the first stage
LIT_SHARE = 5          # LiT's recipe: a fifth of the teacher's steps
DRAWN, DRAW_STEPS = 2_000, 25      # images of a set that the teacher draws, and the sampler's steps
# Recipes of the teachers: of every folder but these, configs/mnist_dit.py.
TEACHERS = {'teacher_flow': 'mnist_flow'}


@dataclass(frozen=True)
class Arm:
    """One kind of student.

    Attributes:
        title: for tables. group: of the results it belongs to. row: of configs/mnist_lit.py.
        share: of the teacher's cost; 0: LiT's share of its steps. aligning: share for the first stage.
        falling: whether the rate falls to 0 over the last three quarters of the training.
        fields: further changes of the recipe. teacher: model folder in the workdir. drawn: whether the data
        are drawn by the teacher, which its cost includes."""
    title: str
    group: str = 'cost'
    row: str = 'aligned'
    share: float = 0.05
    aligning: float = 0.0
    falling: bool = True
    fields: Mapping[str, object] = field(default_factory=dict)
    teacher: str = 'teacher'
    drawn: bool = False

    @property
    def teacher_recipe(self) -> str:
        return TEACHERS.get(self.teacher, 'mnist_dit')


def _aligned(title: str, share: float = 0.05, row: str = 'aligned', **rest) -> Arm:
    return Arm(title, row=row, share=share, **{'aligning': ALIGNING, **rest})


def _lit(title: str, share: float = 0.05, **rest) -> Arm:
    """LiT's recipe with another number of steps."""
    return Arm(title, row='lit', share=share, **rest)


def _change(group: str, title: str, **fields) -> Arm:
    """LiT's recipe at 5 % with a falling rate, and these changes."""
    return Arm(title, group, row='lit', fields={name.replace('__', '.'): value
                                               for name, value in fields.items()})


# In the order in which the lab runs them.
ARMS: dict[str, Arm] = {
    'align_5': _aligned('aligned and distilled, 5 %'),
    'lit_5': _lit("LiT's recipe, 5 %", falling=False),
    'hybrid_5': _aligned('hybrid, third block softmax, 5 %', row='hybrid'),
    'align_2': _aligned('aligned and distilled, 2 %', 0.02),
    'align_10': _aligned('aligned and distilled, 10 %', 0.1),
    'fall_5': _lit("LiT's recipe, falling rate, 5 %"),
    'scratch_5': Arm('from scratch, 5 %', row='scratch'),
    'unaligned_5': Arm('distilled as the aligned, without alignment, 5 %'),
    'lit_full': _lit("LiT's recipe, a fifth of the steps", 0, falling=False),
    'fall_full': _lit("LiT's recipe, a fifth of the steps, falling rate", 0),
    'fall_2': _lit("LiT's recipe, falling rate, 2 %", 0.02),
    'fall_10': _lit("LiT's recipe, falling rate, 10 %", 0.1),
    'lit_2': _lit("LiT's recipe, 2 %", 0.02, falling=False),
    'lit_10': _lit("LiT's recipe, 10 %", 0.1, falling=False),
    'hybrid_2': _aligned('hybrid, third block softmax, 2 %', 0.02, row='hybrid'),
    'drawn_10': _aligned('aligned and distilled on images that the teacher drew, 10 %', 0.1, drawn=True),
    'flow_10': _aligned('aligned and distilled, 10 %', 0.1, row='flow', group='flow', teacher='teacher_flow'),
    'flow_10_no_rope': _aligned('the same, without positions in its mixers', 0.1, row='flow', group='flow',
                                teacher='teacher_flow', fields={'model.mixer.rope': False}),

    'no_convolution': _change('mixer', 'without the convolution', model__mixer__dwc_kernel=0),
    'focused': _change('mixer', 'focused, with the convolution', model__mixer__focus_power=3),
    'focused_alone': _change('mixer', 'focused, without the convolution', model__mixer__focus_power=3,
                             model__mixer__dwc_kernel=0),
    'heads_1': _change('heads', '1 head', model__mixer__heads=1),
    'heads_4': _change('heads', '4 heads', model__mixer__heads=4),
    'heads_12': _change('heads', '12 heads', model__mixer__heads=12),
    'teacher_20': Arm('teacher after about 20 % of its training', 'teacher', row='lit', teacher='teacher_20'),
    'teacher_50': Arm('teacher after 50 % of its training', 'teacher', row='lit', teacher='teacher_50'),
    'copy_o': _change('copy', 'o copied', inherit__copy='o'),
    'copy_vo': _change('copy', 'v, o copied', inherit__copy='v,o'),
    'copy_qkv': _change('copy', 'q, k, v copied', inherit__copy='q,k,v'),
    'copy_qkvo': _change('copy', 'q, k, v, o copied', inherit__copy='q,k,v,o'),
    'align_copy_vo': _aligned('aligned, v, o copied', group='copy', fields={'inherit.copy': 'v,o'}),
    'align_copy_qkvo': _aligned('aligned, q, k, v, o copied', group='copy',
                                fields={'inherit.copy': 'q,k,v,o'}),
    'no_distillation': _change('loss', 'λ1 0, λ2 0 (inherited only)', teacher__path=''),
    'noise_only': _change('loss', 'λ1 0.5, λ2 0 (noise only)', teacher__lambda_variance=0.0),
    'variance_only': _change('loss', 'λ1 0, λ2 0.05 (variance only)', teacher__lambda_noise=0.0),
    'noise_1': _change('loss', 'λ1 1, λ2 0.05', teacher__lambda_noise=1.0),
    'noise_10': _change('loss', 'λ1 10, λ2 1, as of the aligned', teacher__lambda_noise=10.0,
                        teacher__lambda_variance=1.0),
    'variance_0.5': _change('loss', 'λ1 0.5, λ2 0.5', teacher__lambda_variance=0.5),
}
# The arm that the changes of a group are compared with, and what it is there.
BASES = {'mixer': ('fall_5', 'with the convolution'), 'heads': ('fall_5', '2 heads'),
         'teacher': ('fall_5', 'teacher after its whole training'), 'copy': ('fall_5', 'none copied'),
         'loss': ('fall_5', 'λ1 0.5, λ2 0.05 (both)')}
# Models that are also measured with fewer evaluations: what they and their samplers are.
WITH_FEW = {'teacher': 'DiT, the teacher, ddpm', 'teacher_flow': 'flow teacher, euler',
            'align_10': 'aligned and distilled, 10 %, ddpm', 'flow_10': 'of the flow teacher, 10 %, euler'}
DEMO = ('align_5', 'lit_5', 'hybrid_5', 'scratch_5')


@dataclass(frozen=True)
class Run:
    """One student of an arm of ARMS; a `pool.Job`. Its folder is workdir/ARM_SEED."""
    workdir: Path
    arm: str
    seed: int

    @property
    def path(self) -> Path:
        return self.workdir / f'{self.arm}_{self.seed}'

    def changes(self) -> dict[str, object]:
        """The changes of the recipe's fields."""
        arm = ARMS[self.arm]
        teacher = str(self.workdir / arm.teacher)
        changes = {'name': f'mnist_{self.arm}', 'seed': self.seed, 'checkpoint.every': 1_000}
        if arm.row != 'scratch':
            changes |= {'teacher.path': teacher, 'inherit.path': teacher}
        if arm.drawn:
            changes |= {'data.name': 'latents', 'data.path': str(self.workdir / 'drawn')}
        changes |= arm.fields
        if arm.share:
            recipe = load_recipe(f'mnist_lit:{arm.row}')
            recipe.update_from_flattened_dict(changes)
            align, train = step_costs(recipe, arm.teacher_recipe)
            share = arm.share - (drawing_cost() if arm.drawn else 0)
            changes['align.steps'] = int(share * arm.aligning / align)
            changes['train.steps'] = int(share * (1 - arm.aligning) / train)
        else:
            changes['train.steps'] = load_recipe(arm.teacher_recipe).train.steps // LIT_SHARE
        steps = changes['train.steps']
        return changes | {'train.cooldown_steps': steps * 3 // 4 if arm.falling else 0}

    def recipe(self) -> ConfigDict:
        config = load_recipe(f'mnist_lit:{ARMS[self.arm].row}')
        config.update_from_flattened_dict(self.changes())
        return config

    def command(self) -> str:
        """The same run from the command line."""
        flags = ' '.join(f'--config.{name}={value!r}' if value == '' else f'--config.{name}={value}'
                         for name, value in self.changes().items())
        return (f'python train.py --config=configs/mnist_lit.py:{ARMS[self.arm].row} {flags} '
                f'--workdir={self.path}')


def step_costs(config: ConfigDict, teacher: str = 'mnist_dit') -> tuple[float, float]:
    """Cost of a step of alignment and of training, over the whole training of the recipe `teacher`."""
    batch = config.train.batch_size / load_recipe(teacher).train.batch_size
    align, train = _step_costs(json.dumps(architecture(config)), bool(config.teacher.path), teacher)
    return batch * align, batch * train


def cost(run: Run) -> float:
    """Of all stages of a student, and of drawing its data, as a share of its teacher's training."""
    arm, config = ARMS[run.arm], run.recipe()
    align, train = step_costs(config, arm.teacher_recipe)
    return config.align.steps * align + config.train.steps * train + (drawing_cost() if arm.drawn else 0)


def drawing_cost() -> float:
    """Of a set of DRAWN images: so many forward passes, without guidance."""
    network, whole = teacher_training('mnist_dit')
    return DRAWN * DRAW_STEPS * forward_macs(network) / (whole * load_recipe('mnist_dit').train.batch_size)


@functools.cache
def teacher_training(recipe: str) -> tuple[Network, int]:
    """(network, multiply-accumulates of its whole training for one image of each batch)."""
    config = load_recipe(recipe)
    network = Network(architecture(config))
    return network, config.train.steps * stage_macs('train', network, None, 1)


@functools.cache
def _step_costs(arch: str, distilled: bool, recipe: str) -> tuple[float, float]:
    (teacher, whole), network = teacher_training(recipe), Network(parse_json(arch, 'the student'))
    return (stage_macs('align', network, teacher, 1) / whole,
            stage_macs('train', network, teacher if distilled else None, 1) / whole)
