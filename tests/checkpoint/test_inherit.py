"""Inheritance: what a student takes over, what stays fresh, and the table that says so."""
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from torch_samples import LINEAR, SOFTMAX, random_params, random_state, tiny_arch

from lit_jax.checkpoint.inherit import format_report, inherit_params, parse_copy
from lit_jax.checkpoint.leaves import named_leaves
from lit_jax.errors import UserError

TEACHER = tiny_arch(SOFTMAX)
STUDENT = tiny_arch({**LINEAR, 'heads': 1})           # one wide head where the teacher has two
WIDTH = 16


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
    assert totals['inherited'] + totals['fresh'] == totals['parameters'] == sum(row['count'] for row in report['rows'])
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
    inherited = sum(row['count'] for row in report['rows'] if '/attn/' in row['path'] and row['status'] == 'inherited')
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


def test_leaves_that_the_teacher_lacks_stay_fresh():
    ours = random_params(STUDENT, 2)
    ours['blocks']['extra'] = {'gain': np.ones((2, 16), np.float32)}
    params, report = inherit_params(random_params(TEACHER, 1), TEACHER, ours, STUDENT)
    assert np.array_equal(params['blocks']['extra']['gain'], ours['blocks']['extra']['gain'])
    assert [row['status'] for row in report['rows'] if row['path'] == 'blocks/extra/gain'] == ['fresh']


def test_another_size_names_both():
    other = tiny_arch(SOFTMAX, depth=28, width=1152)
    with pytest.raises(UserError, match=r'the teacher has XL weights \(depth 28, width 1152\), the student weights of '
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
                                         ('q, k, v', ('q', 'k', 'v'))])
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
    assert row.split() == ['blocks/attn/kv/kernel', '(v)', '2x16x1x16', '512', 'inherited', 'blocks/attn/qkv/kernel',
                           '(v)']
    totals = report['totals']
    assert f'inherited {totals["inherited"]:,} of {totals["parameters"]:,} parameters' in text
    assert 'note: the teacher\'s q bias is left out' in text
