"""Collectives read from compiled programs whose answer is known, and from samples of what the TPU compiler
writes."""
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lit_jax.plan.collectives import Collective, find_collectives, format_collectives

AXES = ('data', 'fsdp', 'seq')
AUTO = (AxisType.Auto,) * 3


def make_mesh(order=range(8), shape=(2, 2, 2)):
    return Mesh(np.array(jax.devices())[list(order)].reshape(shape), AXES, axis_types=AUTO)


def compiled_collectives(function, mesh, spec, out_spec, shape=(8, 16), dtype=jnp.float32):
    """Of `function` run by hand on every device (jax.shard_map)."""
    mapped = jax.jit(jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=out_spec, check_vma=False))
    x = jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
    return find_collectives(mapped.lower(x).compile().as_text(), mesh)


def facts(collectives):
    return [(c.kind, c.axes, c.bytes, c.count) for c in collectives]


@pytest.mark.parametrize('axes', [('data',), ('fsdp',), ('seq',), ('data', 'seq'), ('fsdp', 'seq'), AXES])
def test_a_sum_is_found_on_the_axes_it_runs_along(axes):
    found = compiled_collectives(lambda x: jax.lax.psum(x, axes), make_mesh(), P('data', 'fsdp'),
                                 P('data', 'fsdp'))
    assert facts(found) == [('all-reduce', axes, 4 * 8 * 4, 1)]
    assert (found[0].shapes, found[0].group_size) == (('f32[4,8]',), 2 ** len(axes))


@pytest.mark.parametrize('order', [(3, 1, 0, 2, 7, 5, 4, 6), (7, 6, 5, 4, 3, 2, 1, 0)])
def test_ids_are_positions_in_the_mesh_whatever_the_order_of_its_devices(order):
    for axis in AXES:
        found = compiled_collectives(lambda x, axis=axis: jax.lax.psum(x, axis), make_mesh(order), P(), P())
        assert [c.axes for c in found] == [(axis,)]


def test_a_gather_counts_its_result_and_the_turns_of_its_loop():
    def gathers(x):
        def body(total, _):
            return total + jax.lax.all_gather(jnp.sin(total), 'fsdp').sum(0), None
        return jax.lax.scan(body, x, None, length=5)[0]
    found = compiled_collectives(gathers, make_mesh(), P('fsdp'), P('fsdp'))
    assert facts(found) == [('all-gather', ('fsdp',), 2 * 4 * 16 * 4, 5)]
    assert found[0].total_bytes == 5 * found[0].bytes and not found[0].at_least


def test_loops_in_loops_multiply():
    def sums(x):
        def inner(x, _):
            return jnp.sin(jax.lax.psum(x, 'seq')), None
        def outer(x, _):
            return jax.lax.scan(inner, x, None, length=3)[0], None
        return jax.lax.scan(outer, x, None, length=4)[0]
    assert facts(compiled_collectives(sums, make_mesh(), P(),
                                      P())) == [('all-reduce', ('seq',), 8 * 16 * 4, 12)]


def test_a_permute_along_one_axis_and_along_two():
    for axes, size in (('seq',), 2), (('data', 'seq'), 4):
        pairs = [(i, i + 1) for i in range(size - 1)]
        found = compiled_collectives(lambda x, a=axes, p=pairs: jax.lax.ppermute(x, a, p), make_mesh(), P(),
                                     P(), dtype=jnp.bfloat16)
        assert [(c.kind, c.axes) for c in found] == [('collective-permute', axes)]


def test_a_permute_that_goes_nowhere_is_left_out():
    assert compiled_collectives(lambda x: jax.lax.ppermute(x, 'seq', [(0, 0), (1, 1)]), make_mesh(), P(),
                                P()) == []


def test_scatters_and_exchanges_count_their_input():
    scatter = compiled_collectives(lambda x: jax.lax.psum_scatter(x, 'data', tiled=True), make_mesh(), P(),
                                   P('data'))
    assert facts(scatter) == [('reduce-scatter', ('data',), 8 * 16 * 4, 1)]
    exchange = compiled_collectives(lambda x: jax.lax.all_to_all(x, 'fsdp', 1, 0, tiled=True), make_mesh(),
                                    P('fsdp'), P(None, 'fsdp'))
    assert [(c.kind, c.axes, c.total_bytes) for c in exchange] == [('all-to-all', ('fsdp',), 4 * 16 * 4)]


def test_the_compilers_own_collectives_are_found():
    """A contraction of a cut axis; the sharding alone says so."""
    mesh = make_mesh()
    place = partial(NamedSharding, mesh)
    a = jax.ShapeDtypeStruct((16, 32), jnp.float32, sharding=place(P('data', ('fsdp', 'seq'))))
    b = jax.ShapeDtypeStruct((32, 8), jnp.float32, sharding=place(P(('fsdp', 'seq'))))
    product = jax.jit(jnp.matmul, out_shardings=place(P('data')))
    found = find_collectives(product.lower(a, b).compile().as_text(), mesh)
    assert facts(found) == [('all-reduce', ('fsdp', 'seq'), 8 * 8 * 4, 1)]
    assert 'dot_general' in found[0].source


def test_an_axis_of_one_device_is_never_named():
    mesh = make_mesh(shape=(1, 8, 1))
    assert [c.axes for c in compiled_collectives(lambda x: jax.lax.psum(x, AXES), mesh, P(),
                                                 P())] == [('fsdp',)]


# ------------------------------------------------------------------------------------------------------
# Samples of the TPU compiler, cut to what matters

ADD = """
%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %s = f32[]{:T(128)} add(%a, %b)
}
"""


def sample(body, others='', shape='f32[8,128]'):
    return (f'HloModule jit_f, num_partitions=8\n{ADD}{others}\nENTRY %main (x: {shape}) -> {shape} {{\n'
            f'  %x = {shape}{{1,0:T(8,128)S(1)}} parameter(0)\n{body}}}\n')


def read(text):
    return facts(find_collectives(text, make_mesh()))


@pytest.mark.parametrize('groups, axes', [
    ('{{0,1},{2,3},{4,5},{6,7}}', ('seq',)), ('{{0,4},{1,5},{2,6},{3,7}}', ('data',)), ('{}', AXES),
    ('{{0,5},{1,4},{2,7},{3,6}}', ('data', 'seq')),
    ('[4,2]<=[8]', ('seq',)), ('[4,2]<=[2,4]T(1,0)', ('data',)), ('[4,2]<=[2,2,2]T(0,2,1)', ('fsdp',)),
    ('[1,8]<=[8]', AXES), ('[8,1]<=[8]', None),
    ("mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", ('data',)),
    ("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", ('fsdp', 'seq')),
    ("mesh['a'=8] {'a':(2)2}", ('fsdp',)), ("mesh['a'=8] {'a':(1)2,'a':(4)2}", ('data', 'seq')),
    ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}", ('seq',)),
    ("mesh['a'=4,'b'=2], device_ids=(0,4,1,5,2,6,3,7) {'b'}", ('data',)), ('@mesh<u=2,v=4> {u}', ('data',)),
])
def test_every_way_to_write_the_groups(groups, axes):
    line = (f'  ROOT %r = f32[8,128]{{1,0:T(8,128)}} all-reduce(%x), channel_id=3, replica_groups={groups}, '
            'use_global_device_ids=true, to_apply=%add\n')
    assert read(sample(line)) == ([('all-reduce', axes, 4096, 1)] if axes else [])


def test_a_start_and_its_done_are_one():
    pairs = 'source_target_pairs={{0,2},{2,0},{1,3},{3,1},{4,6},{6,4},{5,7},{7,5}}'
    text = sample(
        """  %s = (f32[8,128]{1,0}, f32[16,128]{1,0:T(8,128)}) all-gather-start(%x), replica_groups=[4,2]<=[8]
  %d = f32[16,128]{1,0} all-gather-done(%s)
  %p = (f32[8,128]{1,0}, f32[8,128]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x), PAIRS
  %q = f32[8,128]{1,0} collective-permute-done(%p)
  %t = (f32[8,128], /*index=1*/f32[8,128]) all-reduce-start(%x, /*index=1*/%q), replica_groups={}
  ROOT %u = (f32[8,128]{1,0}, f32[8,128]{1,0}) all-reduce-done(%t)
""".replace('PAIRS', pairs))
    assert read(text) == [('all-gather', ('seq',), 8192, 1), ('collective-permute', ('fsdp',), 4096, 1),
                          ('all-reduce', AXES, 8192, 1)]


def test_an_async_computation_counts_once():
    wrapped = """
%wrapped (p: f32[8,128]) -> f32[4,128] {
  %p = f32[8,128]{1,0} parameter(0)
  ROOT %rs = f32[4,128]{1,0} reduce-scatter(%p), channel_id=5, replica_groups=[4,2]<=[2,4]T(1,0)
}
"""
    text = sample("""  %s = ((f32[8,128]{1,0}), f32[4,128]{1,0}, u32[]{:S(2)}) async-start(%x), calls=%wrapped
  %u = ((f32[8,128]{1,0}), f32[4,128]{1,0}, u32[]{:S(2)}) async-update(%s), calls=%wrapped
  ROOT %d = f32[4,128]{1,0} async-done(%u), calls=%wrapped
""", wrapped)
    assert read(text) == [('reduce-scatter', ('data',), 4096, 1)]


def test_a_gather_spread_over_fusions_counts_where_it_starts():
    gather = ("all-gather(%{p}), channel_id=137, replica_groups=mesh['a'=4,'b'=2] {{'b'}}, dimensions={{1}}, "
              'frontend_attributes={{chain_id="1"}}, '
              'backend_config={{"async_collective_fusion_config":{{"flag_start":"2"}}}}')
    others = ''.join(f"""
%step{n} (p{n}: f32[8,128]) -> f32[8,256] {{
  %p{n} = f32[8,128]{{1,0}} parameter(0)
  %g{n} = f32[8,256]{{1,0}} {gather.format(p=f'p{n}')}
  ROOT %c{n} = f32[8,256]{{1,0}} custom-call(%g{n}), custom_call_target="{target}"
}}
""" for n, target in enumerate(('AsyncCollectiveStart', 'SomethingElse', 'AsyncCollectiveDone')))
    text = sample(''.join(f'  %f{n} = f32[8,256]{{1,0}} fusion(%x), kind=kCustom, calls=%step{n}\n'
                          for n in range(3)), others)
    assert read(text) == [('all-gather', ('seq',), 8192, 1)]


def test_a_sum_fused_with_its_slice_is_a_scatter():
    others = """
%all-reduce-scatter.1 (p: f32[8,128]) -> f32[1,128] {
  %p = f32[8,128]{1,0} parameter(0)
  %r = f32[8,128]{1,0} all-reduce(%p), channel_id=1, replica_groups={}, to_apply=%add
  %i = s32[]{:T(128)} constant(0)
  ROOT %d = f32[1,128]{1,0} dynamic-slice(%r, %i, %i), dynamic_slice_sizes={1,128}
}
"""
    text = sample('  ROOT %f = f32[1,128]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1\n',
                  others)
    assert read(text) == [('reduce-scatter', AXES, 4096, 1)]


def loop(start, step, bound, extra='', config=''):
    others = f"""
%body (t: (u32[], f32[8,128])) -> (u32[], f32[8,128]) {{
  %t = (u32[]{{:T(128)}}, f32[8,128]{{1,0}}) parameter(0)
  %i = u32[]{{:T(128)}} get-tuple-element(%t), index=0
  %v = f32[8,128]{{1,0}} get-tuple-element(%t), index=1
  %one = u32[]{{:T(128)}} constant({step})
  %next = u32[]{{:T(128)}} add(%i, %one)
  %r = f32[8,128]{{1,0}} all-reduce(%v), channel_id=1, replica_groups=[4,2]<=[8], to_apply=%add
  ROOT %o = (u32[]{{:T(128)}}, f32[8,128]{{1,0}}) tuple(%next, %r)
}}

%cond (t: (u32[], f32[8,128])) -> pred[] {{
  %t.1 = (u32[]{{:T(128)}}, f32[8,128]{{1,0}}) parameter(0)
  %bound = u32[]{{:T(128)}} {bound}{extra}
  %j = u32[]{{:T(128)}} get-tuple-element(%t.1), index=0
  ROOT %lt = pred[]{{:T(512)}} compare(%j, %bound), direction=LT
}}
"""
    return sample(f"""  %zero = u32[]{{:T(128)}} constant({start})
  %copied = u32[]{{:T(128)}} copy(%zero)
  %init = (u32[]{{:T(128)}}, f32[8,128]{{1,0}}) tuple(%copied, %x)
  ROOT %w = (u32[]{{:T(128)}}, f32[8,128]{{1,0}}) while(%init), condition=%cond, body=%body{config}
""", others)


@pytest.mark.parametrize('start, step, bound, turns',
                         [(0, 1, 12, 12), (0, 2, 8, 4), (1, 2, 8, 4), (3, 1, 8, 5), (8, 1, 8, 0)])
def test_turns_of_a_loop_are_counted_from_its_condition(start, step, bound, turns):
    assert read(loop(start, step, f'constant({bound})')) == [('all-reduce', ('seq',), 4096, turns)]


def test_the_compilers_note_of_the_turns_comes_first():
    config = ', backend_config={"known_trip_count":{"n":"28"},"known_init_step":{"init":"0","step":"1"}}'
    assert read(loop(0, 1, 'constant(12)', config=config)) == [('all-reduce', ('seq',), 4096, 28)]


def test_a_loop_of_unknown_length_says_so():
    found = find_collectives(loop(0, 1, 'get-tuple-element(%t.1), index=0'), make_mesh())
    assert [(c.count, c.at_least) for c in found] == [(1, True)]
    assert re.search(r'all-reduce +seq +>=1 ', format_collectives(found))


def test_every_branch_of_a_conditional_counts():
    others = """
%yes (p: f32[8,128]) -> f32[8,128] {
  %p = f32[8,128]{1,0} parameter(0)
  ROOT %r = f32[8,128]{1,0} all-reduce(%p), channel_id=1, replica_groups=[4,2]<=[8], to_apply=%add
}

%no (q: f32[8,128]) -> f32[8,128] {
  ROOT %q = f32[8,128]{1,0} parameter(0)
}
"""
    text = sample("""  %k = s32[] constant(0)
  ROOT %c = f32[8,128]{1,0} conditional(%k, %x, %x), branch_computations={%no, %yes}
""", others)
    assert read(text) == [('all-reduce', ('seq',), 4096, 1)]


@pytest.mark.parametrize('dtype, bits',
                         [('bf16', 16), ('pred', 8), ('f8e4m3fn', 8), ('s4', 4), ('c64', 64), ('u32', 32)])
def test_bytes_follow_the_dtype(dtype, bits):
    line = (f'  ROOT %r = {dtype}[8,128]{{1,0}} all-to-all(%x), channel_id=3, replica_groups=[4,2]<=[8], '
            f'dimensions={{0}}\n')
    assert read(sample(line, shape=f'{dtype}[8,128]')) == [('all-to-all', ('seq',), 1024 * bits // 8, 1)]


def test_text_that_is_no_module_is_refused():
    with pytest.raises(ValueError, match='no ENTRY computation'):
        find_collectives('module @jit_f attributes {}', make_mesh())


def test_the_table_groups_by_kind_and_axes_largest_first():
    table = format_collectives([
        Collective('all-reduce', ('data',), 2**20, count=3), Collective('all-reduce', ('data',), 2**20),
        Collective('all-gather', ('data', 'fsdp'), 2**24, count=1000)]).splitlines()
    assert [row.split() for row in table[1:]] == [
        ['all-gather', 'data', 'fsdp', '1,000', '16,000.0'], ['all-reduce', 'data', '4', '4.0'],
        ['total', '1,004', '16,004.0']]
    assert format_collectives([]) == 'none: the devices do not communicate'
