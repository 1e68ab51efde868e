"""Counts the bytes that a mixer of LiT-XL and of DiT-XL sends along `seq` at high resolution; compiles only.

    python -m benchmarks.sequence --topology v5e:2x4        # with the extra tpu, on any Linux machine
    python -m benchmarks.sequence --topology cpu:8

One image, token rows sharded over all devices of the slice, forward pass in bfloat16 (float32 on CPU).
"""

from flax import nnx

from benchmarks.timing import make_parser
from lit_jax.plan.topology import find_topology
from lit_jax.recipes.recipe import SIZES

PIXELS = (1024, 2048, 4096)


def compiled_mixer(name: str, side: int, mesh, dtype):
    """The program of one token mixer on side x side tokens."""
    import jax
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from lit_jax.models.mixers import build_mixer
    size = SIZES['xl']

    def build():
        return build_mixer({'name': name, 'heads': size[f'{name}_heads']}, size['width'], dtype=dtype,
                           rngs=nnx.Rngs(0))

    graphdef, params = nnx.split(nnx.eval_shape(build))
    tokens, whole = NamedSharding(mesh, P(None, 'seq', None)), NamedSharding(mesh, P())
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), params)
    x = jax.ShapeDtypeStruct((1, side * side, size['width']), dtype, sharding=tokens)
    with jax.set_mesh(mesh):
        mixer = jax.jit(lambda params, x: nnx.merge(graphdef, params)(x, (side, side)), out_shardings=tokens)
        return mixer.lower(params, x).compile()


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument('--topology', default='v5e:2x4')
    parser.add_argument('--pixels', default=','.join(map(str, PIXELS)))
    args = parser.parse_args()
    topology = find_topology(args.topology)
    import jax.numpy as jnp

    from lit_jax.plan.collectives import find_collectives
    from lit_jax.training.mesh import make_mesh
    mesh = make_mesh({'data': 1, 'fsdp': 1, 'tensor': 1, 'seq': len(topology.devices)}, topology.devices)
    dtype = jnp.float32 if topology.chip is None else jnp.bfloat16
    print('| pixels | tokens | mixer | collectives of a forward pass | KiB a device |\n|---|---|---|---|---|')
    for pixels in map(int, args.pixels.split(',')):
        side = pixels // 16
        for label, name in (('LiT, linear', 'linear'), ('DiT, softmax', 'softmax')):
            found = find_collectives(compiled_mixer(name, side, mesh, dtype).as_text(), mesh)
            kinds = sorted({c.kind for c in found})
            bytes_of = {kind: sum(c.total_bytes for c in found if c.kind == kind) for kind in kinds}
            what = ', '.join(f'{sum(c.count for c in found if c.kind == kind)} {kind}' for kind in kinds)
            sizes = ' + '.join(f'{bytes_of[kind] / 1024:,.0f}' for kind in kinds)
            print(f'| {pixels} | {side * side:,} | {label} | {what} | {sizes} |', flush=True)


if __name__ == '__main__':
    main()
