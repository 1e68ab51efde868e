"""Times one DiT block and one LiT block: ours, jitted, against PyTorch eager and torch.compile.

    python -m benchmarks.block --markdown block.md        # about 25 minutes on two CPU cores
    python -m benchmarks.block --widths 384 --tokens 256 --repeats 5

All contenders take turns on the same cores; results are compared first. The table has medians and minima,
and our time divided by that of the faster PyTorch. Forward: the block's output. Forward + backward: also the
gradients of all parameters, x and the condition. On a GPU: bfloat16, and up to 16,384 tokens.
"""
import itertools
import platform
import statistics
from pathlib import Path

from benchmarks.timing import add_clock, check_same, make_parser, set_clock, take_turns

HEADS = {('dit', 384): 6, ('dit', 768): 12, ('dit', 1024): 16, ('dit', 1152): 16,
         ('lit', 384): 2, ('lit', 768): 3, ('lit', 1024): 4, ('lit', 1152): 4}
CONTENDERS = ('ours', 'eager', 'compiled')


def parse_arguments():
    parser = make_parser(__doc__)
    parser.add_argument('--blocks', default='dit,lit')
    parser.add_argument('--widths', default='384,1152')
    parser.add_argument('--tokens', default='', help='square numbers; default: 256,1024,4096, and 16384 on a '
                                                     'GPU')
    parser.add_argument('--passes', default='forward,both', help='forward, both (forward + backward)')
    parser.add_argument('--batch', type=int, default=1)
    parser.add_argument('--repeats', type=int, default=0,
                        help='turns of each contender; default: depends on their time')
    parser.add_argument('--no_compile', action='store_true', help='without torch.compile')
    parser.add_argument('--markdown', default='', help='also write the table to this file')
    add_clock(parser)
    return set_clock(parser)


def random_weights(kind: str, width: int, heads: int):
    """A block's parameters in our layout, numpy, scaled like trained ones: gates are not zero."""
    import numpy as np
    rng, head = np.random.default_rng(0), width // heads
    shapes = {'proj/kernel': (heads, head, width), 'proj/bias': (width,)}
    if kind == 'dit':
        shapes |= {'qkv/kernel': (width, 3, heads, head), 'qkv/bias': (3, heads, head)}
    else:
        shapes |= {'q/kernel': (width, heads, head), 'kv/kernel': (width, 2, heads, head),
                   'dwc/kernel': (5, 5, 1, head), 'dwc/bias': (head,)}
    shapes = {f'attn/{k}': v for k, v in shapes.items()} | {
        'mlp/fc1/kernel': (width, 4 * width), 'mlp/fc1/bias': (4 * width,),
        'mlp/fc2/kernel': (4 * width, width), 'mlp/fc2/bias': (width,),
        'adaLN/kernel': (width, 6, width), 'adaLN/bias': (6, width)}
    scale = {'attn/dwc/kernel': 0.2, 'mlp/fc2/kernel': 0.5 * width ** -0.5}
    return {path: rng.normal(0, scale.get(path, 0.1 if path.endswith('bias') else width ** -0.5), shape)
            .astype(np.float32) for path, shape in shapes.items()}


def our_block(kind: str, width: int, heads: int, weights, x, c, cotangent, grid, dtype):
    """{'forward': call, 'both': call} of the jitted block of lit_jax; each call waits for its result."""
    import jax
    from flax import nnx

    from lit_jax.models.dit import Block
    from lit_jax.models.network import inference_options

    mixer = {'name': {'dit': 'softmax', 'lit': 'linear'}[kind], 'heads': heads}
    graphdef, state = nnx.split(
        nnx.eval_shape(lambda: Block(width, 4.0, mixer, 'mlp', dtype=dtype, rngs=nnx.Rngs(0))))
    params: dict = {}
    for path, value in weights.items():
        *parents, leaf = path.split('/')
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = jax.numpy.asarray(value)
    if jax.tree.structure(params) != jax.tree.structure(nnx.to_pure_dict(state)):
        raise SystemExit('the parameters of this benchmark are not those of lit_jax.models.dit.Block')
    x, c, cotangent = (jax.numpy.asarray(a, dtype) for a in (x, c, cotangent))

    def apply(params, x, c):
        return nnx.merge(graphdef, params)(x, c, grid)

    @jax.jit
    def both(params, x, c, cotangent):
        y, vjp = jax.vjp(apply, params, x, c)
        return y, vjp(cotangent)

    forward = jax.jit(apply, compiler_options=inference_options(mixer['name'], x.shape[1], width))
    return {'forward': lambda: jax.block_until_ready(forward(params, x, c)),
            'both': lambda: jax.block_until_ready(both(params, x, c, cotangent))}


def torch_block(kind: str, width: int, heads: int, weights, x, c, cotangent, grid, device, dtype,
                compiled: bool):
    """The same two calls in PyTorch, in the form that is fastest there."""
    import torch
    import torch.nn.functional as F

    head, rank = width // heads, {'kernel': 1, 'bias': 0}

    # Linear kernels [in, ...out] -> [out, in]; the convolution's stays HW1E -> E1HW
    def parameter(path, value):
        value = torch.from_numpy(value)
        if path == 'attn/dwc/kernel':
            value = value.permute(3, 2, 0, 1)
        elif rank[path.rsplit('/', 1)[1]]:
            value = value.reshape(-1 if path == 'attn/proj/kernel' else width if value.shape[0] == width
                                  else 4 * width, width if path in ('attn/proj/kernel', 'mlp/fc2/kernel')
                                  else value[0].numel()).T
        elif path != 'attn/dwc/bias':
            value = value.reshape(-1)
        return value.contiguous().to(device, dtype).requires_grad_()

    p = {path: parameter(path, value) for path, value in weights.items()}
    x, c, cotangent = (torch.from_numpy(a).to(device, dtype) for a in (x, c, cotangent))
    x.requires_grad_()
    c.requires_grad_()

    def linear(name, x):
        return F.linear(x, p[f'{name}/kernel'], p.get(f'{name}/bias'))

    def softmax_attention(x):
        b, n, _ = x.shape
        q, k, v = linear('attn/qkv', x).view(b, n, 3, heads, head).permute(2, 0, 3, 1, 4)
        return linear('attn/proj',
                      F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, width))

    def linear_attention(x):
        b, n, _ = x.shape
        q = (F.relu(linear('attn/q', x)) + 1e-6).view(b, n, heads, head).transpose(1, 2).float()
        k, v = linear('attn/kv', x).chunk(2, dim=-1)
        k = (F.relu(k) + 1e-6).view(b, n, heads, head).transpose(1, 2).float()
        v32 = v.float()
        v_heads = v32.view(b, n, heads, head).transpose(1, 2)
        z = 1 / (q @ k.mean(dim=-2, keepdim=True).transpose(-2, -1) + 1e-6)
        state = (k * n ** -0.5).transpose(-2, -1) @ (v_heads * n ** -0.5)
        o = ((q @ state) * z).transpose(1, 2).reshape(b, n, width)
        # All heads as channels of one channels_last image: no copy of v, and a faster convolution.
        image = v32.reshape(b, *grid, width).permute(0, 3, 1, 2)
        kernel = p['attn/dwc/kernel'].float().repeat(heads, 1, 1, 1)
        local = F.conv2d(image, kernel, p['attn/dwc/bias'].float().repeat(heads), padding=2, groups=width)
        return linear('attn/proj', (o + local.permute(0, 2, 3, 1).reshape(b, n, width)).to(x.dtype))

    mixer = {'dit': softmax_attention, 'lit': linear_attention}[kind]

    def block(x, c):
        modulation = linear('adaLN', F.silu(c)).unsqueeze(1)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
        x = x + gate1 * mixer(F.layer_norm(x, (width,), eps=1e-6) * (1 + scale1) + shift1)
        h = F.layer_norm(x, (width,), eps=1e-6) * (1 + scale2) + shift2
        return x + gate2 * linear('mlp/fc2', F.gelu(linear('mlp/fc1', h), approximate='tanh'))

    if compiled:
        torch._dynamo.reset()
        block = torch.compile(block, dynamic=False)

    def wait(result):
        if device == 'cuda':
            torch.cuda.synchronize()
        return result

    def forward():
        with torch.no_grad():
            return wait(block(x, c))

    def both():
        y = block(x, c)
        return wait((y, torch.autograd.grad(y, [*p.values(), x, c], cotangent)))

    return {'forward': forward, 'both': both}


def measure(kind: str, width: int, tokens: int, arguments, clock, on_gpu: bool):
    """Yields one row of the table for each pass."""
    import jax.numpy as jnp
    import numpy as np
    import torch
    side = round(tokens ** 0.5)
    heads, grid = HEADS[kind, width], (side, tokens // side)
    weights = random_weights(kind, width, heads)
    rng = np.random.default_rng(1)
    x, cotangent = (rng.normal(size=(arguments.batch, tokens, width)).astype(np.float32) for _ in range(2))
    c = rng.normal(size=(arguments.batch, width)).astype(np.float32)
    common = (kind, width, heads, weights, x, c, cotangent, grid)
    device, torch_dtype = ('cuda', torch.bfloat16) if on_gpu else ('cpu', torch.float32)
    blocks = {'ours': our_block(*common, jnp.bfloat16 if on_gpu else jnp.float32),
              'eager': torch_block(*common, device, torch_dtype, compiled=False)}
    if not arguments.no_compile:
        blocks['compiled'] = torch_block(*common, device, torch_dtype, compiled=True)
    for name in list(blocks)[1:]:
        check_same(f'{kind} {width} {tokens}, {name}', blocks['ours']['forward'](),
                   blocks[name]['forward']().float().cpu().numpy(), 5e-2 if on_gpu else 1e-4)
    for name in arguments.passes.split(','):
        calls = {contender: block[name] for contender, block in blocks.items()}
        once = sum(milliseconds for milliseconds, in take_turns(calls, 1, clock).values()) / 1e3
        times = take_turns(calls, arguments.repeats or max(3, min(25, int(4 / once))), clock,
                           timed=max(1, min(10, int(0.2 / once))))
        yield {'kind': kind, 'width': width, 'tokens': tokens, 'pass': name,
               'medians': {k: statistics.median(v) for k, v in times.items()},
               'minima': {k: min(v) for k, v in times.items()}}


def format_row(row) -> str:
    cells = [row['kind'].replace('dit', 'DiT').replace('lit', 'LiT'), str(row['width']), str(row['tokens']),
             {'forward': 'forward', 'both': 'forward + backward'}[row['pass']]]
    for name in CONTENDERS:
        cells.append(f'{row["medians"][name]:.2f} / {row["minima"][name]:.2f}' if name in row['medians']
                     else '')
    for times in (row['medians'], row['minima']):
        cells.append(f'{times["ours"] / min(t for name, t in times.items() if name != "ours"):.2f}')
    return '| ' + ' | '.join(cells) + ' |'


HEADER = ('| block | width | tokens | pass | ours ms | PyTorch eager ms | torch.compile ms | '
          'ours / best PyTorch, medians | minima |\n|---|---|---|---|---|---|---|---|---|')


def describe(arguments, on_gpu: bool) -> str:
    from importlib.metadata import version

    import jax
    versions = ', '.join(f'{name} {version(name)}' for name in ('jax', 'jaxlib', 'flax', 'torch', 'numpy'))
    machine = jax.devices()[0].device_kind if on_gpu else f'{_processor()}, {arguments.threads} threads'
    precision = 'bfloat16' if on_gpu else 'float32'
    return (f'{machine}; {precision}; batch {arguments.batch}; Python {platform.python_version()}, '
            f'{versions}. {arguments.clock.capitalize()} time, median / minimum, all contenders in turn in '
            'one process. Heads: DiT 6 (384), 16 (1152); LiT 2 and 4, ReLU, 5 x 5 convolution.')


def _processor() -> str:
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(':', 1)[1].strip() for line in lines if line.startswith('model name')),
                platform.machine())


def main() -> None:
    arguments, clock = parse_arguments()
    import jax
    import torch
    torch.set_num_threads(arguments.threads)
    on_gpu = jax.default_backend() == 'gpu' and torch.cuda.is_available()
    tokens = arguments.tokens or ('256,1024,4096,16384' if on_gpu else '256,1024,4096')
    cases = itertools.product(arguments.blocks.split(','), map(int, arguments.widths.split(',')),
                              map(int, tokens.split(',')))
    lines = [describe(arguments, on_gpu), '', HEADER]
    print('\n'.join(lines), flush=True)
    for kind, width, count in cases:
        for row in measure(kind, width, count, arguments, clock, on_gpu):
            lines.append(format_row(row))
            print(lines[-1], flush=True)
    if arguments.markdown:
        Path(arguments.markdown).write_text('\n'.join(lines) + '\n')


if __name__ == '__main__':
    main()
