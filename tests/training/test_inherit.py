"""Inheritance: what a student takes over, what stays fresh, and the table that says so."""
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from torch_samples import LINEAR, SOFTMAX, random_params, random_state, tiny_arch

from lit_jax.convert.torch_keys import split_run
from lit_jax.models.network import Network
from lit_jax.runtime.errors import UserError
from lit_jax.runtime.leaves import named_leaves
from lit_jax.training.inherit import format_report, inherit_params, parse_copy

TEACHER = tiny_arch(SOFTMAX)
STUDENT = tiny_arch({**LINEAR, 'heads': 1})           # one wide head where the teacher has two
WIDTH = 16


MOH_RUNS = [{'depth': 1, 'mixer': {'shared': 2, 'routed': 0}},
            {'depth': 2, 'mixer': {'shared': 1, 'routed': 1}}]
MOH = tiny_arch({'name': 'moh', 'heads': 2, 'head_dim': 8, 'shared': 2, 'routed': 0}, depth=3,
                stages=MOH_RUNS)
COMPRESSED = tiny_arch(depth=3, input_size=[8, 8],
                       stages=[{'depth': 2}, {'depth': 1, 'mixer': {'compress': 2}}])
DIG = {key: value for key, value in tiny_arch({'name': 'gla', 'heads': 2}, family='dig', depth=3,
                                              ffn='swiglu').items()
       if key != 'stages'}
# Students of a DiT of three blocks, and which of their leaves are fresh.
SYSTEMS = {
    'moh': (MOH, '/attn/'),
    'compressed': (COMPRESSED, 'blocks1/attn/'),        # its first blocks are the teacher's
    'edit': (tiny_arch({'name': 'edit', 'heads': 1}, depth=3), '/attn/'),
    'sana': (tiny_arch({'name': 'sana', 'heads': 1}, depth=3, ffn='mix'), '/(attn|mlp)/'),
    'dydila': (tiny_arch({'name': 'dydila', 'heads': 1}, depth=3, ffn='mix'), '/(attn|mlp)/'),
    'dig': (DIG, '/(attn|mlp|dwc)/'),
}


def inherit(copy=(), teacher=TEACHER, student=STUDENT):
    """(teacher leaves, student leaves before, leaves after, report)."""
    theirs, ours = random_params(teacher, 1), random_params(student, 2)
    params, report = inherit_params(theirs, teacher, ours, student, copy)
    return named_leaves(theirs), named_leaves(ours), named_leaves(params), report


def test_everything_but_attention():
    theirs, before, after, report = inherit()
    assert after.keys() == before.keys()
    for path, leaf in after.items():
        source = before if '/attn/' in path else theirs
        assert np.array_equal(leaf, source[path]), path
    assert {row['path']: row['status'] for row in report['rows']} == {
        path: 'fresh' if '/attn/' in path else 'inherited' for path in after}
    assert report['notes'] == [] and report['copy'] == ''


def test_counts_add_up():
    """Attention of one block: q and kv 3·16·16, proj 16·16 + 16, dwc 9·16 + 16."""
    report = inherit()[-1]
    totals = report['totals']
    assert totals['fresh'] == 2 * (3 * 256 + 256 + 16 + 9 * 16 + 16)
    assert totals['inherited'] + totals['fresh'] == totals['parameters'] == sum(
        row['count'] for row in report['rows'])
    assert totals['parameters'] == sum(leaf.size for leaf in named_leaves(random_params(STUDENT)).values())


@pytest.mark.parametrize('copy', ['q', 'k', 'v', 'o', 'kv', 'q,k,v', 'v,o', ('qkv', 'o')])
def test_copied_parts_against_the_torch_layout(copy):
    """Q is rows 0..D of qkv.weight, K and V the rows after, O is proj: checked on PyTorch's own matrices."""
    letters = set(''.join(copy).replace(',', ''))
    theirs, before, after, report = inherit(copy)
    state = random_state(TEACHER, 1)
    for layer in range(2):
        thirds = np.split(state[f'blocks.{layer}.attn.qkv.weight'], 3)
        kv = after['blocks/attn/kv/kernel'][layer]
        ours = {'q': after['blocks/attn/q/kernel'][layer], 'k': kv[:, 0], 'v': kv[:, 1]}
        fresh_kv = before['blocks/attn/kv/kernel'][layer]
        fresh = {'q': before['blocks/attn/q/kernel'][layer], 'k': fresh_kv[:, 0], 'v': fresh_kv[:, 1]}
        for part, third in zip('qkv', thirds, strict=True):
            expected = third.T if part in letters else fresh[part].reshape(WIDTH, WIDTH)
            assert np.array_equal(ours[part].reshape(WIDTH, WIDTH), expected), part
        proj = after['blocks/attn/proj/kernel'][layer].reshape(WIDTH, WIDTH)
        if 'o' in letters:
            assert np.array_equal(proj, state[f'blocks.{layer}.attn.proj.weight'].T)
            assert np.array_equal(after['blocks/attn/proj/bias'], theirs['blocks/attn/proj/bias'])
        else:
            assert np.array_equal(proj, before['blocks/attn/proj/kernel'][layer].reshape(WIDTH, WIDTH))
    inherited = sum(row['count'] for row in report['rows'] if '/attn/' in row['path']
                    and row['status'] == 'inherited')
    assert inherited == 2 * (256 * len(letters) + 16 * ('o' in letters))


def test_half_a_leaf_gets_two_rows():
    rows = {row['path']: row for row in inherit('v')[-1]['rows']}
    assert 'blocks/attn/kv/kernel' not in rows
    assert rows['blocks/attn/kv/kernel (k)']['status'] == 'fresh'
    assert rows['blocks/attn/kv/kernel (v)'] == {
        'path': 'blocks/attn/kv/kernel (v)', 'shape': [2, 16, 1, 16], 'count': 512, 'status': 'inherited',
        'source': 'blocks/attn/qkv/kernel (v)'}


def test_biases_follow_where_the_student_has_them():
    report = inherit('q,v')[-1]
    assert report['notes'] == [f"the teacher's {part} bias is left out: the student has none (mixer.qkv_bias)"
                               for part in 'qv']
    with_bias = tiny_arch({**LINEAR, 'qkv_bias': True})
    theirs, before, after, report = inherit('k', student=with_bias)
    bias = after['blocks/attn/kv/bias'].reshape(2, 2, WIDTH)
    assert np.array_equal(bias[:, 0], theirs['blocks/attn/qkv/bias'].reshape(2, 3, WIDTH)[:, 1])
    assert np.array_equal(bias[:, 1], before['blocks/attn/kv/bias'].reshape(2, 2, WIDTH)[:, 1])
    assert report['notes'] == []
    without = tiny_arch({**SOFTMAX, 'qkv_bias': False})
    report = inherit('q', teacher=without, student=with_bias)[-1]
    assert report['notes'] == ["the student's q bias stays fresh: the teacher has none"]


def test_softmax_student_and_linear_teacher():
    """General by design: any mixer's student inherits from any other's teacher, parts included."""
    theirs, before, after, _ = inherit('q,k,v', teacher=STUDENT, student=TEACHER)
    qkv = after['blocks/attn/qkv/kernel'].reshape(2, WIDTH, 3, WIDTH)
    assert np.array_equal(qkv[:, :, 0], theirs['blocks/attn/q/kernel'].reshape(2, WIDTH, WIDTH))
    assert np.array_equal(qkv[:, :, 1:], theirs['blocks/attn/kv/kernel'].reshape(2, WIDTH, 2, WIDTH))
    assert np.array_equal(after['blocks/attn/proj/kernel'], before['blocks/attn/proj/kernel'])


@pytest.mark.parametrize('name', SYSTEMS)
def test_every_system_starts_with_what_it_shares_with_a_dit(name):
    """By the number of the block, whatever runs the student's blocks lie in; the table has every leaf
    once."""
    student, fresh = SYSTEMS[name]
    theirs, before, after, report = inherit(teacher=tiny_arch(depth=3, input_size=student['input_size']),
                                            student=student)
    assert [row['path'] for row in report['rows']] == list(after) == list(before) and report['notes'] == []
    for row, (path, leaf) in zip(report['rows'], after.items(), strict=True):
        if re.search(fresh, path):
            assert row['status'] == 'fresh' and np.array_equal(leaf, before[path]), path
        else:
            pattern, run = split_run(path)
            blocks = slice(None) if run is None else slice(*{0: (0, len(leaf)), 1: (3 - len(leaf), 3)}[run])
            assert row['status'] == 'inherited' and np.array_equal(leaf, theirs[pattern][blocks]), path


def test_the_table_says_which_blocks_of_the_teacher():
    rows = {row['path']: row for row in inherit(teacher=tiny_arch(depth=3), student=MOH)[-1]['rows']}
    assert rows['blocks1/mlp/fc1/bias']['source'] == 'blocks/mlp/fc1/bias [1:3]'
    assert rows['x_embedder/bias']['source'] == 'x_embedder/bias'
    # And the reverse: a student of one run from a teacher of two.
    theirs, _, after, report = inherit(teacher=MOH, student=tiny_arch(LINEAR, depth=3))
    rows = {row['path']: row for row in report['rows']}
    assert rows['blocks/adaLN/bias']['source'] == 'blocks0/adaLN/bias [0:1], blocks1/adaLN/bias [0:2]'
    assert np.array_equal(after['blocks/adaLN/bias'],
                          np.concatenate([theirs[f'blocks{i}/adaLN/bias'] for i in range(2)]))
    # Runs that are cut elsewhere.
    theirs, _, after, report = inherit(teacher=MOH, student=tiny_arch(depth=3, stages=COMPRESSED['stages']))
    rows = {row['path']: row for row in report['rows']}
    assert rows['blocks0/adaLN/bias']['source'] == 'blocks0/adaLN/bias [0:1], blocks1/adaLN/bias [0:1]'
    assert np.array_equal(after['blocks1/adaLN/bias'], theirs['blocks1/adaLN/bias'][1:])


@pytest.mark.parametrize('name', ['moh', 'compressed'])
def test_all_of_the_attention_of_an_equal_layout(name):
    """MoH-DiT and compressed keys with copy 'q,k,v,o': only routers and compressors are new."""
    student = SYSTEMS[name][0]
    theirs, _, after, report = inherit('q,k,v,o', tiny_arch(depth=3, input_size=student['input_size']),
                                       student)
    fresh = {row['path'] for row in report['rows'] if row['status'] == 'fresh'}
    assert fresh and all(re.search('router|compressor', path) for path in fresh) and report['notes'] == []
    for leaf in ('qkv/kernel', 'qkv/bias', 'proj/kernel', 'proj/bias'):
        got = np.concatenate([after[f'blocks{run}/attn/{leaf}'] for run in range(2)])
        assert np.array_equal(got, theirs[f'blocks/attn/{leaf}'])


@pytest.mark.parametrize('name', ['edit', 'sana', 'dydila'])
def test_parts_of_the_attention_of_other_mixers(name):
    theirs, _, after, _ = inherit('v,o', tiny_arch(depth=3), SYSTEMS[name][0])
    value = theirs['blocks/attn/qkv/kernel'][:, :, 2].reshape(3, WIDTH, WIDTH)
    ours = after['blocks/attn/v/linear/kernel'] if name == 'edit' else after['blocks/attn/qkv/kernel'][
        :, :, 2]
    assert np.array_equal(ours.reshape(3, WIDTH, WIDTH), value)
    assert np.array_equal(after['blocks/attn/proj/kernel'].ravel(), theirs['blocks/attn/proj/kernel'].ravel())


def test_blocks_with_the_mixer_of_the_teacher_inherit_it():
    kept = tiny_arch(LINEAR, depth=3, stages=[{'depth': 1, 'mixer': {**SOFTMAX, 'compress': 1}},
                                              {'depth': 2}])
    theirs, before, after, report = inherit('v', tiny_arch(depth=3), kept)
    for path, leaf in after.items():
        pattern, run = split_run(path)
        if '/attn/' in path and run == 0:
            assert np.array_equal(leaf, theirs[pattern][:1]), path
    assert np.array_equal(after['blocks1/attn/q/kernel'], before['blocks1/attn/q/kernel'])
    value = theirs['blocks/attn/qkv/kernel'][1:, :, 2].reshape(2, WIDTH, WIDTH)
    assert np.array_equal(after['blocks1/attn/kv/kernel'][:, :, 1].reshape(2, WIDTH, WIDTH), value)
    other_heads = tiny_arch(LINEAR, depth=3, stages=[{'depth': 1, 'mixer': {**SOFTMAX, 'heads': 4}},
                                                     {'depth': 2}])
    _, before, after, _ = inherit(teacher=tiny_arch(depth=3), student=other_heads)
    assert np.array_equal(after['blocks0/attn/qkv/kernel'], before['blocks0/attn/qkv/kernel'])


RUNS = [{'depth': 2, 'mixer': SOFTMAX}, {'depth': 1, 'mixer': SOFTMAX}]


def test_a_hybrid_of_softmax_only_is_its_teacher_bit_for_bit():
    softmax = tiny_arch(LINEAR, depth=3, stages=RUNS)
    theirs, _, after, report = inherit(teacher=tiny_arch(depth=3), student=softmax)
    assert report['totals']['fresh'] == 0
    for path, leaf in after.items():
        pattern, run = split_run(path)
        part = theirs[pattern] if run is None else theirs[pattern][:2] if run == 0 else theirs[pattern][2:]
        assert np.array_equal(leaf, part), path


@pytest.mark.slow
def test_a_hybrid_of_softmax_only_draws_as_its_teacher_bit_for_bit():
    whole, hybrid = tiny_arch(depth=3), tiny_arch(LINEAR, depth=3, stages=RUNS)
    theirs = random_params(whole, 1)
    ours, _ = inherit_params(theirs, whole, random_params(hybrid, 2), hybrid)
    x = np.random.default_rng(0).standard_normal((2, 4, 4, 4), np.float32)
    t, cond = np.array([3, 900]), {'label': np.array([0, 1])}
    outputs = [np.asarray(jax.jit(Network(arch).apply)(params, x, t, cond))
               for arch, params in ((whole, theirs), (hybrid, ours))]
    np.testing.assert_array_equal(*outputs)


def test_parts_that_do_not_fit_are_noted():
    """DiG's keys have half the channels, and its output projection no bias."""
    theirs, before, after, report = inherit('k,v,o', tiny_arch(depth=3), DIG)
    assert np.array_equal(after['blocks/attn/key/kernel'], before['blocks/attn/key/kernel'])
    value = theirs['blocks/attn/qkv/kernel'][:, :, 2]
    assert np.array_equal(after['blocks/attn/value/kernel'].ravel(), value.ravel())
    assert "blocks/attn/key/kernel: k stays fresh, its sides are not the teacher's" in report['notes']
    assert "the teacher's o bias is left out: the student has none" in report['notes']


def test_a_wider_run_of_moh_keeps_its_own_attention():
    wide = tiny_arch({**MOH['mixer'], 'qkv_bias': False}, depth=3, stages=[
        MOH_RUNS[0], {'depth': 2, 'mixer': {'heads': 3, 'shared': 1, 'routed': 1}}])
    theirs, before, after, report = inherit('q,o', tiny_arch({**SOFTMAX, 'qkv_bias': False}, depth=3), wide)
    assert np.array_equal(after['blocks0/attn/proj/kernel'], theirs['blocks/attn/proj/kernel'][:1])
    assert np.array_equal(after['blocks1/attn/qkv/kernel'], before['blocks1/attn/qkv/kernel'])
    assert np.array_equal(after['blocks1/attn/proj/bias'], theirs['blocks/attn/proj/bias'][1:])
    assert [note for note in report['notes'] if 'blocks1/attn/proj/kernel: o stays fresh' in note]


def test_a_udig_takes_what_fits_and_says_what_does_not():
    """Its sizes are its own: neither depth nor width of the teacher need be the student's."""
    student = {**DIG, 'family': 'udig', 'depth': 5, 'width': 8, 'patch': 1,
               'mixer': {'name': 'gla', 'heads': 1}}
    _, before, after, report = inherit('q,k,v,o', tiny_arch(depth=3), student)
    assert all(row['status'] == 'fresh' for row in report['rows']) and len(report['rows']) == len(before)
    note = 'fresh, because it is of another shape: y_embedder/table: 4x16 in the teacher, 4x8 in the student'
    assert note in report['notes']
    # One of the teacher's width and patch: embedders and final layer are taken over.
    theirs, _, after, report = inherit((), tiny_arch(depth=3),
                                       {**student, 'width': 16, 'patch': 2, 'input_size': [8, 8]})
    taken = {row['path'] for row in report['rows'] if row['status'] == 'inherited'}
    assert taken == {path for path in theirs if not path.startswith('blocks')}
    assert all(np.array_equal(after[path], theirs[path]) for path in taken)


def test_another_mlp_of_the_same_kind_is_an_error():
    with pytest.raises(UserError, match='blocks/mlp/fc1/kernel: 2x16x32 in the teacher, 2x16x64 in the '
                                        'student'):
        inherit(teacher=tiny_arch(mlp_ratio=2.0))


def test_leaves_that_the_teacher_lacks_stay_fresh():
    ours = random_params(STUDENT, 2)
    ours['blocks']['extra'] = {'gain': np.ones((2, 16), np.float32)}
    params, report = inherit_params(random_params(TEACHER, 1), TEACHER, ours, STUDENT)
    assert np.array_equal(params['blocks']['extra']['gain'], ours['blocks']['extra']['gain'])
    assert [row['status'] for row in report['rows'] if row['path'] == 'blocks/extra/gain'] == ['fresh']


def test_another_size_names_both():
    other = tiny_arch(SOFTMAX, depth=28, width=1152)
    with pytest.raises(UserError,
                       match=r'the teacher has XL weights \(depth 28, width 1152\), the student weights of '
                                        r'depth 2, width 16.*distillation'):
        inherit_params({}, other, {}, STUDENT)


def test_other_shapes_name_the_leaves():
    with pytest.raises(UserError) as error:
        inherit(teacher=tiny_arch(SOFTMAX, num_classes=7, patch=1, input_size=[2, 2]))
    assert 'y_embedder/table: 8x16 in the teacher, 4x16 in the student' in str(error.value)
    assert 'x_embedder/kernel: 1x1x4x16 in the teacher, 2x2x4x16 in the student' in str(error.value)
    assert 'final_layer/linear/bias' in str(error.value)


def test_another_input_size_is_noted():
    report = inherit(student=tiny_arch(LINEAR, input_size=[8, 8]))[-1]
    assert len(report['notes']) == 1 and 'input size 4x4, the student at 8x8' in report['notes'][0]


@pytest.mark.parametrize('copy, parts', [('', ()), ((), ()), ('o,q', ('q', 'o')), (['kv'], ('k', 'v')),
                                         ('q, k, v', ('q', 'k', 'v')), ('all', ('all',)),
                                         (('all',), ('all',))])
def test_parse_copy(copy, parts):
    assert parse_copy(copy) == parts


def test_unknown_part():
    with pytest.raises(UserError, match='unknown parts to copy: x'):
        inherit('q,x')


def test_jax_student_gets_its_own_buffers_and_placement():
    """Donating the student's parameters must not delete the teacher's."""
    device = jax.devices()[-1]
    theirs = jax.tree.map(jnp.asarray, random_params(TEACHER, 1))
    ours = jax.device_put(jax.tree.map(jnp.asarray, random_params(STUDENT, 2)), device)
    params, _ = inherit_params(theirs, TEACHER, ours, STUDENT, 'v,o')
    for path, leaf in named_leaves(params).items():
        assert isinstance(leaf, jax.Array) and leaf.dtype == jnp.float32 and leaf.devices() == {device}, path
    taken = params['y_embedder']['table']
    taken.delete()
    assert not theirs['y_embedder']['table'].is_deleted()


def test_report_is_json_and_prints():
    report = inherit('q,v')[-1]
    assert json.loads(json.dumps(report)) == report
    text = format_report(report)
    lines = text.splitlines()
    assert lines[0].split() == ['leaf', 'shape', 'count', 'status', 'from']
    row = next(line for line in lines if line.startswith('blocks/attn/kv/kernel (v)'))
    assert row.split() == ['blocks/attn/kv/kernel', '(v)', '2x16x1x16', '512', 'inherited',
                           'blocks/attn/qkv/kernel', '(v)']
    totals = report['totals']
    assert f'inherited {totals["inherited"]:,} of {totals["parameters"]:,} parameters' in text
    assert 'note: the teacher\'s q bias is left out' in text


# ------------------------------------------------------------------------------------------------------
# Text models


def pixart(mixer=SOFTMAX, **changes):
    """Captions of 5 tokens with 12 channels."""
    arch = {'cross_heads': 2, 'caption_channels': 12, 'caption_tokens': 5, 'base_size': 2,
            'pe_interpolation': 1.0, **changes}
    return {name: value for name, value in tiny_arch(mixer, family='pixart', **arch).items()
            if name != 'num_classes'}


def test_a_text_model_takes_all_but_the_self_attention():
    """LiT-0.6B of a PixArt-Σ: cross-attention, tables and the null caption are inherited."""
    theirs, before, after, report = inherit(teacher=pixart(), student=pixart({**LINEAR, 'heads': 1}))
    fresh = {row['path'] for row in report['rows'] if row['status'] == 'fresh'}
    assert fresh == {path for path in before if path.startswith('blocks/attn/')}
    assert {'blocks/cross_attn/kv/kernel', 'blocks/scale_shift_table',
            'y_embedder/fc1/kernel'} < after.keys() - fresh
    assert all(np.array_equal(leaf, (before if path in fresh else theirs)[path])
               for path, leaf in after.items())
    # Attention of two blocks: q and kv 3·16·16, proj 16·16 + 16, dwc 9·16 + 16.
    assert report['totals']['fresh'] == 2 * (3 * 256 + 256 + 16 + 9 * 16 + 16)
    assert report['notes'] == []


def test_a_larger_image_goes_on_with_the_same_weights():
    """512 -> 1024: nothing stored depends on the size, and the positions stay those of the teacher."""
    lit = {**LINEAR, 'heads': 1}
    larger = pixart(lit, input_size=[8, 8], base_size=4, pe_interpolation=2.0)
    theirs, _, after, report = inherit('all', teacher=pixart(lit), student=larger)
    assert all(np.array_equal(after[path], leaf)
               for path, leaf in theirs.items()) and after.keys() == theirs.keys()
    assert report['totals']['inherited'] == report['totals']['parameters'] and report['copy'] == 'all'
    assert report['notes'] == ['the teacher was trained at input size 4x4, the student at 8x8; positions are '
                               'computed, nothing is interpolated']
    report = inherit(teacher=pixart(lit), student={**larger, 'pe_interpolation': 1.0})[-1]
    assert report['notes'][1] == ('positions run from 0 to 2 in the teacher, to 4 in the student: '
                                  'model.pe_interpolation 2 would give the teacher\'s')


@pytest.mark.parametrize('teacher, leaf', [
    (pixart(), 'blocks/attn/kv/kernel'), (pixart(LINEAR), 'blocks/attn/proj/kernel'),
    (pixart({**LINEAR, 'heads': 1, 'dwc_kernel': 0}), 'blocks/attn/dwc/kernel')])
def test_all_of_another_attention_is_an_error(teacher, leaf):
    with pytest.raises(UserError,
                       match=rf'all needs a teacher with everything of the student, this one lacks .*{leaf}'):
        inherit(['all'], teacher=teacher, student=pixart({**LINEAR, 'heads': 1}))


@pytest.mark.parametrize('changes, leaf', [
    ({'caption_channels': 8}, 'y_embedder/fc1/kernel: 12x16 in the teacher, 8x16 in the student'),
    ({'cross_heads': 4}, 'blocks/cross_attn/q/kernel: 2x16x2x8 in the teacher, 2x16x4x4 in the student')])
def test_captions_of_another_encoder_are_an_error(changes, leaf):
    with pytest.raises(UserError, match='the same text encoder') as error:
        inherit(teacher=pixart(), student=pixart(LINEAR, **changes))
    assert leaf in str(error.value)


def test_a_text_model_takes_what_it_shares_with_a_dit():
    """As PixArt-α began: patches, timestep, attention and mlp of a class model; captions are new."""
    theirs, _, after, report = inherit('q,k,v,o', teacher=tiny_arch(), student=pixart())
    fresh = {row['path'].split(' ')[0] for row in report['rows'] if row['status'] == 'fresh'}
    assert {path.split('/')[0] if not path.startswith(('blocks', 'final')) else path.rsplit('/', 1)[0]
            for path in fresh} == {
't_block', 'y_embedder', 'blocks', 'blocks/cross_attn/q', 'blocks/cross_attn/kv', 'blocks/cross_attn/proj',
'final_layer'}
    assert all(np.array_equal(leaf, theirs[path]) for path, leaf in after.items() if path not in fresh)
