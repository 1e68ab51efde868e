"""Measures memory and time of the text encoder at full size, with random weights.

    python -m benchmarks.text_encoder                        # T5-XXL in int8, one caption of 300 tokens
    python -m benchmarks.text_encoder --weights bfloat16 --batch 4
    python -m benchmarks.text_encoder --layers 4 --error     # error of int8 and bfloat16 against float32
    python -m benchmarks.text_encoder --save /tmp/t5         # writes the random weights to a folder
    python -m benchmarks.text_encoder --folder /tmp/t5       # measures a run that loads them

The weights are drawn layer by layer in their final dtype, so there is no larger copy. Peak memory is that of
the process, and of the device on an accelerator. `--error` gives the relative error of the features from
rounding weights that were never trained.
"""
import json
import resource
import statistics
import sys
import time

from benchmarks.timing import make_parser


def parse_arguments():
    parser = make_parser(__doc__)
    parser.add_argument('--weights', choices=('int8', 'bfloat16', 'float32'), default='int8')
    parser.add_argument('--compute', choices=('float32', 'bfloat16'),
                        help='default: float32 on CPU, else bfloat16')
    parser.add_argument('--layers', type=int, default=24)
    parser.add_argument('--tokens', type=int, default=300)
    parser.add_argument('--batch', type=int, default=1)
    parser.add_argument('--repeats', type=int, default=2)
    parser.add_argument('--save', help='folder to write the random weights to; nothing is measured')
    parser.add_argument('--folder', help='text encoder folder to load instead of random weights')
    parser.add_argument('--error', action='store_true', help='compare all dtypes with float32; needs few '
                                                             'layers')
    return parser.parse_args()


def draw(network, seed: int = 0) -> dict:
    """Random parameters in the network's dtypes, as jax arrays; kernels preserve the size of their inputs."""
    import jax
    import numpy as np

    from lit_jax.checkpoint.text_encoder_folder import KERNELS
    from lit_jax.runtime.leaves import named_leaves, unflatten
    rng, flat = np.random.default_rng(seed), {}
    for name, leaf in sorted(named_leaves(network.abstract()).items(), key=lambda item: -item[1].size):
        kernel = name if name in KERNELS else name.replace('/scale', '/kernel')
        inputs = np.prod(named_leaves(network.abstract())[kernel].shape[1:1 + KERNELS[kernel]]) \
            if kernel in KERNELS else 1
        values = np.empty(leaf.shape, leaf.dtype)
        for part in values if leaf.ndim > 1 else [values]:
            if leaf.dtype == np.int8:
                part[...] = rng.integers(-127, 128, part.shape, np.int8)
            elif name.endswith('scale'):
                part[...] = 0.5 * inputs ** -0.5 / 73.3        # the deviation of such integers is 73.3
            elif 'gain' in name:
                part[...] = 1
            else:
                scale = 0.5 * inputs ** -0.5 if name in KERNELS else 1
                part[...] = scale * rng.standard_normal(part.shape, np.float32)
        flat[name] = jax.device_put(values)
    return unflatten(flat)


def peak_bytes() -> int:
    """Peak memory of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == 'darwin' else 1024 * peak


def save(arguments) -> None:
    """Writes the random weights as a folder, with a tokenizer of single letters."""
    import tokenizers

    from lit_jax.checkpoint.text_encoder_folder import save_text_encoder_folder
    from lit_jax.models.t5 import T5_XXL, T5Network
    from lit_jax.text.tokenizer import Tokenizer
    network = T5Network({**T5_XXL, 'layers': arguments.layers}, weights=arguments.weights)
    pieces = ['<pad>', '</s>', '<unk>', '\u2581', *'abcdefghijklmnopqrstuvwxyz']
    letters = tokenizers.Tokenizer(
        tokenizers.models.Unigram([(piece, -float(i > 2)) for i, piece in enumerate(pieces)], unk_id=2))
    letters.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    config = {'text_encoder': network.arch, 'id': 'random',     # a real sha256 would need a float32 copy
              'provenance': {'sha256': 'random', 'tool': 'benchmarks/text_encoder.py'}}
    save_text_encoder_folder(arguments.save, config, draw(network),
                             Tokenizer('tokenizer.json', letters.to_str().encode()))


def load(arguments, compute: str):
    """(network, parameters), random or from a folder."""
    import jax.numpy as jnp

    from lit_jax.checkpoint.text_encoder_folder import load_text_encoder
    from lit_jax.models.t5 import T5_XXL, T5Network
    if arguments.folder:
        encoder = load_text_encoder(arguments.folder, arguments.weights, compute=compute)
        return encoder.network, encoder.params
    network = T5Network({**T5_XXL, 'layers': arguments.layers}, jnp.dtype(compute).type, arguments.weights)
    return network, draw(network)


def measure(arguments) -> dict:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from lit_jax.runtime.leaves import tree_bytes
    compute = arguments.compute or ('float32' if jax.default_backend() == 'cpu' else 'bfloat16')
    before, began = peak_bytes(), time.perf_counter()
    network, params = load(arguments, compute)
    jax.block_until_ready(params)
    drawn, loaded = time.perf_counter() - began, peak_bytes()
    ids = np.random.default_rng(1).integers(3, 32000, (arguments.batch, arguments.tokens)).astype(np.int32)
    began = time.perf_counter()
    encode = jax.jit(network.apply, compiler_options=network.inference_options())
    encode = encode.lower(params, ids, np.ones_like(ids)).compile()
    compiled, seconds = time.perf_counter() - began, []
    for _ in range(arguments.repeats):
        began = time.perf_counter()
        features = jax.block_until_ready(encode(params, ids, np.ones_like(ids)))
        seconds.append(time.perf_counter() - began)
    memory = jax.local_devices()[0].memory_stats() or {}
    sizes = {'weights_gb': tree_bytes(params), 'before_gb': before, 'peak_loaded_gb': loaded,
             'peak_gb': peak_bytes(), 'device_peak_gb': memory.get('peak_bytes_in_use', 0)}
    return {'device': jax.devices()[0].device_kind, 'weights': network.weights, 'compute': compute,
            'layers': network.arch['layers'], 'tokens': arguments.tokens, 'batch': arguments.batch,
            **{name: size / 1e9 for name, size in sizes.items()}, 'load_s': drawn, 'compile_s': compiled,
            'first_s': seconds[0], 'encode_s': statistics.median(seconds),
            'finite': bool(jnp.isfinite(features).all())}


def errors(arguments) -> dict:
    """Relative error (of norms) of the features in each dtype, compared with float32."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from lit_jax.checkpoint.text_encoder_folder import KERNELS, pack
    from lit_jax.models.t5 import T5_XXL, T5Network
    from lit_jax.runtime.leaves import named_leaves, unflatten
    arch = {**T5_XXL, 'layers': arguments.layers}
    flat = {name: np.asarray(leaf) for name, leaf in named_leaves(draw(T5Network(arch))).items()}
    ids = np.random.default_rng(1).integers(3, 32000, (arguments.batch, arguments.tokens)).astype(np.int32)
    want, found = None, {}
    for weights, compute in (('float32', 'float32'), ('bfloat16', 'bfloat16'), ('int8', 'float32'),
                             ('int8', 'bfloat16')):
        params = unflatten({path: part for name, leaf in flat.items()
                            for path, part in pack(name, leaf if name in KERNELS else [leaf], len(leaf),
                                                   weights).items()})
        network = T5Network(arch, jnp.dtype(compute).type, weights)
        got = np.asarray(jax.jit(network.apply)(params, ids, np.ones_like(ids)), np.float32)
        want = got if want is None else want
        found[f'{weights}, computed in {compute}'] = float(np.linalg.norm(got - want) / np.linalg.norm(want))
    return found


def main():
    arguments = parse_arguments()
    if arguments.save:
        return save(arguments)
    print(json.dumps(errors(arguments) if arguments.error else measure(arguments), indent=1))


if __name__ == '__main__':
    main()
