"""Students of the MNIST teacher: linear attention for a twentieth of what the teacher's training cost.

The teacher ships; `make demo` converts it, or the command below does. Rows:

    aligned    mixers learn the teacher's attention, then the whole is distilled: 5 % of the teacher's FLOPs
    hybrid     the same, and the third of four blocks, the hardest to learn, keeps the teacher's attention
    flow       as aligned, from the flow teacher of configs/mnist_flow.py and for a tenth of its cost
    lit        LiT's own recipe: inherited and distilled at a constant rate for 20 % of the teacher's steps
    scratch    the same network without a teacher, for the FLOPs of `aligned`

    python convert_torch_ckpt.py assets/mnist_dit.safetensors --out models/mnist_dit
    python train.py --config=configs/mnist_lit.py --workdir=runs/mnist_lit
    python train.py --config=configs/mnist_lit.py:hybrid --workdir=runs/mnist_hybrid
"""
from lit_jax import recipes
from lit_jax.runtime.errors import check_known

# align.steps and train.steps; the test counts the FLOPs. A step costs 0.73 and 1.35 of a teacher's, without
# a teacher 1.02.
STEPS = {'aligned': (1_100, 730), 'hybrid': (1_100, 730), 'flow': (2_200, 1_460), 'lit': (0, 1_800),
         'scratch': (0, 440)}


def get_config(row: str = 'aligned'):
    check_known('row of configs/mnist_lit.py', row, STEPS)
    config = recipes.default()
    config.name = 'mnist_lit' if row == 'aligned' else f'mnist_lit_{row}'
    recipes.mnist(config)
    config.model.mixer = recipes.linear_mixer(heads=2)
    if row == 'flow':
        recipes.mnist_flow(config)
        config.model.mixer = recipes.mixer('linear', heads=2, qkv_bias=False, rope=True)
    config.align.steps, config.train.steps = STEPS[row]
    config.align.learning_rate = 1e-2
    if config.align.steps:
        # What the teacher predicts and its blocks return has no noise, so small batches and many steps pay.
        config.train.batch_size = 16
        config.teacher.update({'lambda_noise': 10.0, 'lambda_variance': 1.0, 'lambda_blocks': 3.0})
    if row == 'hybrid':
        config.model.stages = (2,)
    if row != 'lit':
        config.train.cooldown_steps = config.train.steps * 3 // 4      # the rate falls to 0
    if row != 'scratch':
        teacher = recipes.models_folder('mnist_flow' if row == 'flow' else 'mnist_dit')
        config.inherit.path = config.teacher.path = teacher
    config.checkpoint.every = 1_000
    return config
