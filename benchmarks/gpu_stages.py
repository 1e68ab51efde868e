"""The stages of benchmarks/gpu.py: each yields (name of a row, function that measures it -> dict)."""
import functools
import itertools
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.timing import take_turns

ROOT = Path(__file__).parents[1]
MIXERS: dict[str, dict] = {
    'softmax': {'heads': 4}, 'kv': {'name': 'softmax', 'heads': 4, 'compress': 2}, 'linear': {'heads': 2},
    'edit': {'heads': 1}, 'moh': {'heads': 4, 'shared': 2, 'routed': 1}, 'gla': {'heads': 4},
    'sana': {'heads': 2}, 'dydila': {'heads': 1}}


def median_ms(call, repeats: int = 5) -> float:
    """Of a call that waits for its result; compiled and warmed up first."""
    call()
    once = take_turns({'it': call}, 1, warm=False)['it'][0]
    timed = max(1, min(20, int(50 / max(once, 1e-3))))
    return statistics.median(take_turns({'it': call}, repeats, timed=timed, warm=False)['it'])


def waiting(program, *arguments):
    import jax
    return lambda: jax.block_until_ready(program(*arguments))


def drawn(seed: int, *shape: int, dtype='bfloat16'):
    import jax
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def relative(got, want) -> float:
    import numpy as np
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def passes(function, *arguments) -> dict:
    """Milliseconds of function(*arguments), and of it with the gradients of all arguments."""
    import jax
    y = jax.eval_shape(function, *arguments)
    cotangent = drawn(9, *y.shape, dtype=y.dtype)

    def both(arguments, cotangent):
        y, pull = jax.vjp(function, *arguments)
        return y, pull(cotangent)

    return {'forward_ms': median_ms(waiting(jax.jit(function), *arguments)),
            'both_ms': median_ms(waiting(jax.jit(both), arguments, cotangent))}


# ------------------------------------------------------------------------------------------------------
# Ceilings of the machine


def ceilings(tiny: bool):
    import jax
    import jax.numpy as jnp
    side, size = (256, 2 ** 20) if tiny else (8192, 2 ** 28)

    def copy():
        x = jnp.ones(size, jnp.float32)
        ms = median_ms(waiting(jax.jit(lambda x: x + 1), x))
        return {'GB/s': 2 * 4 * size / ms / 1e6}

    def product():
        a, b = drawn(0, side, side), drawn(1, side, side)
        return {'TFLOP/s': 2 * side ** 3 / median_ms(waiting(jax.jit(jnp.matmul), a, b)) / 1e9}

    yield 'copy of float32', copy
    yield f'bfloat16 product of {side}', product


# ------------------------------------------------------------------------------------------------------
# (a) It runs at all


def runs(tiny: bool):
    yield 'a tiny recipe trained, resumed and sampled', train_and_sample
    for name in MIXERS:
        yield f'bfloat16 of {name}', functools.partial(parity, name)
    for tokens in (256,) if tiny else (256, 1024, 4096):
        yield f'attention of {tokens} tokens against the plain form', functools.partial(attention, tokens)


def train_and_sample() -> dict:
    with tempfile.TemporaryDirectory() as folder:
        small = ['--config.model.depth=2', '--config.model.width=64', '--config.model.mixer.heads=2',
                 '--config.train.batch_size=16', '--config.train.dtype=bfloat16', '--config.sample.every=0',
                 '--config.eval.every=0', f'--workdir={folder}/run']
        for steps in (4, 8):
            script('train.py', f'--config={ROOT / "configs/digits_dit.py"}', *small,
                   f'--config.train.steps={steps}', '--config.checkpoint.every=4')
        script('sample.py', f'--from={folder}/run', '--classes=1,2', '--steps=2', f'--out={folder}/out.png')
        return {'steps': 8, 'resumed_at': 4, 'image': Path(folder, 'out.png').stat().st_size > 0}


def script(name: str, *flags: str) -> None:
    done = subprocess.run([sys.executable, ROOT / name, *flags], cwd=ROOT, capture_output=True, text=True,
                          check=False)
    if done.returncode:
        raise RuntimeError(f'{name} ended with {done.returncode}: {(done.stderr or done.stdout)[-1500:]}')


def parity(name: str) -> dict:
    """Relative errors of output and gradients in bfloat16 against float32."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from lit_jax.models.mixers import build_mixer
    options, found, width = {'name': name, **MIXERS[name]}, [], 64
    x, cotangent = drawn(0, 2, 256, width), drawn(1, 2, 256, width)
    for dtype in (jnp.float32, jnp.bfloat16):
        graphdef, params = nnx.split(build_mixer(options, width, dtype=dtype, rngs=nnx.Rngs(0)))

        def both(params, x, cotangent, graphdef=graphdef):
            y, pull = jax.vjp(lambda p, x: nnx.merge(graphdef, p)(x, (16, 16)), params, x)
            return y, pull(cotangent)[1]

        found.append(jax.jit(both)(params, x.astype(dtype), cotangent.astype(dtype)))
    return {'output': relative(found[1][0], found[0][0]), 'gradient': relative(found[1][1], found[0][1])}


def attention(tokens: int) -> dict:
    """The platform's softmax attention, forward and backward, against the plain form: errors and times."""
    import jax

    from lit_jax.models.mixers import fused
    q, k, v, g = (drawn(i, 2, 4, tokens, 64) for i in range(4))
    plain, own = fused.FORMS['whole'], fused.fused_attention
    o, lse = jax.jit(plain[0])(q, k, v)
    want = o, *jax.jit(plain[1])(q, k, v, o, lse, g)

    def both(q, k, v, g):
        y, pull = jax.vjp(own, q, k, v)
        return y, *pull(g)

    got = jax.jit(both)(q, k, v, g)
    errors = {f'error_of_{name}': relative(a, b)
              for name, a, b in zip(('o', 'dq', 'dk', 'dv'), got, want, strict=True)}
    return errors | passes(own, q, k, v) | {'plain_ms': median_ms(waiting(jax.jit(plain[0]), q, k, v))}


# ------------------------------------------------------------------------------------------------------
# (b) Forms of the convolution and of linear attention


def forms(tiny: bool):
    from lit_jax.models.mixers.depthwise import FORMS
    sizes = ((1, 64, 256),) if tiny else tuple((4, 1152, n) for n in (256, 1024, 4096, 16384))
    for (batch, width, tokens), form in itertools.product(sizes, FORMS):
        yield f'convolution {form}, {tokens} tokens', functools.partial(
            convolution, form, batch, width, tokens)
    for batch, width, tokens in sizes:
        yield f'linear attention, {tokens} tokens', functools.partial(linear_core, batch, width, tokens)


def convolution(form: str, batch: int, width: int, tokens: int) -> dict:
    from lit_jax.models.mixers.depthwise import depthwise_conv
    side = round(tokens ** 0.5)
    x, kernel, bias = drawn(0, batch, side, side, 4, width // 4), drawn(1, 5, 5, 1, width // 4), drawn(
        2, width // 4)
    return passes(lambda x, kernel, bias: depthwise_conv(x, kernel, bias, form), x, kernel, bias)


def linear_core(batch: int, width: int, tokens: int) -> dict:
    from lit_jax.models.mixers.linear import relu_attention
    return passes(lambda q, k, v: relu_attention(q, k, v, 4), *(drawn(i, batch, tokens, width)
                                                                for i in range(3)))


# ------------------------------------------------------------------------------------------------------
# (c) One block against PyTorch


def blocks(tiny: bool):
    cases = [('lit', 384, 256)] if tiny else list(itertools.product(('lit', 'dit'), (384, 1152),
                                                                    (256, 1024, 4096, 16384)))
    for kind, width, tokens in cases:
        yield f'{kind} block, width {width}, {tokens} tokens', functools.partial(
            block, kind, width, tokens, tiny)


def block(kind: str, width: int, tokens: int, tiny: bool) -> dict:
    import argparse
    import time

    import jax
    import torch

    from benchmarks.block import measure
    on_gpu = jax.default_backend() == 'gpu' and torch.cuda.is_available()
    options = argparse.Namespace(batch=1 if tiny else 4, passes='forward,both', repeats=2 if tiny else 5,
                                 no_compile=tiny)
    rows = list(measure(kind, width, tokens, options, time.perf_counter, on_gpu))
    return {f'{name}_{row["pass"]}_ms': ms for row in rows for name, ms in row['medians'].items()} | {
        f'ours_to_best_{row["pass"]}': row['medians']['ours'] / min(
            ms for name, ms in row['medians'].items() if name != 'ours') for row in rows}


# ------------------------------------------------------------------------------------------------------
# (d) The whole step


def steps(tiny: bool):
    cases = (('lit_s', 2),) if tiny else (('lit_s', 128), ('lit_xl', 32))
    for recipe, batch in cases:
        yield f'step of {recipe}, batch {batch}', functools.partial(our_step, recipe, batch, tiny)
        yield f'step of {recipe} in PyTorch, batch {batch}', functools.partial(
            torch_step, recipe, batch, tiny)


def read_step(recipe: str, batch: int, tiny: bool):
    from lit_jax.plan.plan import find_teacher
    from lit_jax.recipes.recipe import finalize, load_recipe
    from lit_jax.training import setup
    from lit_jax.training.from_teacher import complete
    config = load_recipe(recipe)
    config.train.batch_size = batch
    if tiny:
        config.model.depth, config.train.dtype = 1, 'float32'
        config.data.image_size, config.teacher.path, config.inherit.path = 64, 'models/teacher', ''
    for axis in ('data', 'fsdp', 'tensor', 'seq'):
        config.mesh[axis] = 1
    config = finalize(complete(config), 1)
    return config, setup.build_network(config), find_teacher(config)[0]


def our_step(recipe: str, batch: int, tiny: bool) -> dict:
    import jax
    import jax.numpy as jnp

    from lit_jax.plan.plan import abstract_arguments
    from lit_jax.runtime.chips import find_chip
    from lit_jax.training import setup
    from lit_jax.training.flops import stage_macs
    from lit_jax.training.mesh import make_mesh
    from lit_jax.training.stages import plan_stages
    config, network, teacher = read_step(recipe, batch, tiny)
    mesh = make_mesh(config.mesh.to_dict(), jax.devices()[:1])
    stage = plan_stages(config, network, teacher and teacher.arch)[-1]
    with jax.set_mesh(mesh):
        arguments = abstract_arguments(config, stage, network, teacher, mesh)
        compiled = setup.jit_stage(config, network, stage, mesh, teacher).lower(*arguments).compile()
        *trees, key = arguments
        state, frozen, data = (jax.tree.map(
            lambda leaf: jnp.full(leaf.shape, 0.01, leaf.dtype) if jnp.issubdtype(leaf.dtype, jnp.inexact)
            else jnp.zeros(leaf.shape, leaf.dtype), tree) for tree in trees)
        held, key = [state], jax.random.key(0)

        def run():
            held[0], metrics = compiled(held[0], frozen, data, key)      # the state is donated
            return jax.block_until_ready(metrics)

        ms = median_ms(run, 3)
    flops = 2 * stage_macs('train', network, teacher, batch)
    chip, stats = find_chip(jax.devices()[0].device_kind), jax.devices()[0].memory_stats() or {}
    return {'ms': ms, 'images_per_second': 1e3 * batch / ms, 'TFLOP/s': flops / ms / 1e9,
            'mfu': flops / ms * 1e3 / chip.peak_flops if chip else None,
            'temporaries_GiB': compiled.memory_analysis().temp_size_in_bytes / 2**30,
            'peak_GiB': stats.get('peak_bytes_in_use', 0) / 2**30 or None}


def torch_step(recipe: str, batch: int, tiny: bool) -> dict:
    """Teacher, student, both losses, AdamW and EMA; torch.compile unless tiny."""
    import torch
    import torch.nn.functional as F

    from lit_jax.convert.twins import blocks_twin, linear_twin, softmax_twin
    from lit_jax.convert.twins.dit_twin import DiT
    from lit_jax.training.flops import stage_macs
    blocks_twin.MIXERS.update(linear=linear_twin.LinearAttention, softmax=softmax_twin.SoftmaxAttention)
    _, network, teacher_network = read_step(recipe, batch, tiny)
    cuda = torch.cuda.is_available()
    device, dtype = ('cuda', torch.bfloat16) if cuda else ('cpu', torch.float32)
    student, teacher = (DiT(one.arch).to(device) for one in (network, teacher_network))
    teacher.requires_grad_(False).to(dtype)
    average = [p.detach().clone() for p in student.parameters()]
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, weight_decay=0, fused=cuda)
    arch = network.arch
    x, noise = (torch.randn(batch, arch['channels'], *arch['input_size'], device=device) for _ in range(2))
    t, y = torch.randint(0, 1000, (batch,), device=device), torch.randint(0, 1000, (batch,), device=device)

    def loss():
        with torch.autocast(device, dtype, enabled=cuda):
            output = student(x, t, y)
            with torch.no_grad():
                taught = teacher(x.to(dtype), t, y)
        return F.mse_loss(output.float()[:, :arch['channels']], noise) + 0.5 * F.mse_loss(
            output.float(), taught.float())

    compiled = loss if tiny else torch.compile(loss)

    def run():
        optimizer.zero_grad(set_to_none=True)
        compiled().backward()
        optimizer.step()
        torch._foreach_lerp_(average, [p.detach() for p in student.parameters()], 1e-4)
        if cuda:
            torch.cuda.synchronize()

    ms = median_ms(run, 3)
    flops = 2 * stage_macs('train', network, teacher_network, batch)
    return {'ms': ms, 'TFLOP/s': flops / ms / 1e9,
            'peak_GiB': torch.cuda.max_memory_allocated() / 2**30 if cuda else None}


# ------------------------------------------------------------------------------------------------------
# (e) Resolution and heads


def resolution(tiny: bool):
    from benchmarks.efficiency import mixer_cost, model_cost
    width, pixels = (64, (256,)) if tiny else (1152, (512, 1024, 2048, 4096))
    for size, (name, heads) in itertools.product(pixels, (('linear', 4), ('softmax', 16))):
        yield f'one {name} mixer at {size} px', functools.partial(mixer_cost, name, heads, width, size)
    for size, name in itertools.product(pixels, ('linear', 'softmax')):
        yield f'one model call, {name}, at {size} px', functools.partial(
            model_cost, name, width, size, 1 if tiny else 28)
    for heads in (1, 2) if tiny else (1, 2, 3, 4, 6, 8, 16):
        yield f'linear mixer, {heads} heads', functools.partial(mixer_cost, 'linear', heads, width, pixels[0])


# ------------------------------------------------------------------------------------------------------
# (f) Text to image


def text_to_image(tiny: bool):
    pixels, calls, depth = (256, 1, 1) if tiny else (1024, 20, 28)
    for name in ('linear', 'softmax'):
        yield f'{name}, {pixels} px, {calls} guided calls', functools.partial(
            our_text, name, pixels, calls, depth)
    yield f'PixArt-Σ of diffusers, {pixels} px, {calls} guided calls', functools.partial(
        their_text, pixels, calls, depth)


def our_text(name: str, pixels: int, calls: int, depth: int) -> dict:
    import jax
    import jax.numpy as jnp

    from lit_jax import recipes
    from lit_jax.models.network import Network
    config = recipes.text_to_image(recipes.default(), pixels, name)
    config.model.depth = depth
    network = Network(recipes.architecture(config), dtype=jnp.bfloat16)
    params = jax.jit(network.init)(jax.random.key(0))
    x, t, cond = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), network.example_inputs(2))

    def draw(params, x, t, cond):
        def step(_, x):
            return x - 0.01 * network.apply(params, x, t, cond)[..., :x.shape[-1]].astype(x.dtype)
        return jax.lax.fori_loop(0, calls, step, x)

    return {'seconds': median_ms(waiting(jax.jit(draw), params, x, t, cond), 2) / 1e3}


def their_text(pixels: int, calls: int, depth: int) -> dict:
    import torch
    from diffusers import PixArtTransformer2DModel
    cuda = torch.cuda.is_available()
    device, dtype = ('cuda', torch.bfloat16) if cuda else ('cpu', torch.float32)
    model = PixArtTransformer2DModel(
        num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8, num_layers=depth,
        cross_attention_dim=1152, sample_size=pixels // 8, patch_size=2, caption_channels=4096,
        interpolation_scale=pixels // 512 or 1, use_additional_conditions=False).to(device, dtype).eval()
    x = torch.randn(2, 4, pixels // 8, pixels // 8, device=device, dtype=dtype)
    text, t = torch.randn(2, 300, 4096, device=device, dtype=dtype), torch.full((2,), 500, device=device)

    def draw():
        now = x
        with torch.no_grad():
            for _ in range(calls):
                now = now - 0.01 * model(now, encoder_hidden_states=text, timestep=t,
                                         return_dict=False)[0][:, :4]
        if cuda:
            torch.cuda.synchronize()

    return {'seconds': median_ms(draw, 2) / 1e3}


# name -> (stage, share of the time). In the order of value.
STAGES = {'ceilings': (ceilings, 1), 'runs': (runs, 3), 'forms': (forms, 3), 'blocks': (blocks, 3),
          'steps': (steps, 3), 'resolution': (resolution, 2), 'text_to_image': (text_to_image, 2)}
