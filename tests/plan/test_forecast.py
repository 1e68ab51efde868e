"""Forecasts: from a short program in the TPU compiler's notation, and of real ones where libtpu is there."""
import json

import pytest

from lit_jax.commands.train import TrainOptions
from lit_jax.plan.collectives import Collective
from lit_jax.plan.forecast import forecast, forecast_json, format_forecast
from lit_jax.runtime.chips import CHIPS
from lit_jax.runtime.errors import UserError

V5E = next(chip for chip in CHIPS if chip.name == 'v5e')


def estimate(cycles):
    return f'backend_config={{"window_config":{{"kernel_window_bounds":[],"estimated_cycles":"{cycles}"}}}}'


# A loop of 28 layers, a loop of unknown length, a branch, a copy, and operations without an estimate.
PROGRAM = f'''HloModule jit_train_step, is_scheduled=true

FileNames
1 "/home/me/lit_jax/models/layers.py"
2 "/home/me/lit_jax/models/ffn.py"

FunctionNames
1 "Linear.__call__"
2 "Mlp.__call__"

FileLocations
1 {{file_name_id=2 function_name_id=2 line=34 end_line=34 column=4 end_column=30}}
2 {{file_name_id=1 function_name_id=1 line=68 end_line=68 column=4 end_column=30}}

StackFrames
1 {{file_location_id=1 parent_frame_id=1}}
2 {{file_location_id=2 parent_frame_id=2}}

%product (p: bf16[8,8]) -> bf16[8,8] {{
  %p = bf16[8,8]{{1,0}} parameter(0)
  ROOT %dot = bf16[8,8]{{1,0}} dot(%p, %p), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
}}

%layer (t: (s32[], bf16[8,8])) -> (s32[], bf16[8,8]) {{
  %t = (s32[], bf16[8,8]{{1,0}}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = bf16[8,8]{{1,0}} get-tuple-element(%t), index=1
  %ffn.1 = bf16[8,8]{{1,0:T(8,128)}} fusion(%x), kind=kOutput, calls=%product, metadata={{op_name="jit(train_step)/jvp(teacher)/while/body/ffn/dot_general" stack_frame_id=2}}, {estimate(1500000)}
  %core.1 = bf16[8,8]{{1,0:T(8,128)}} fusion(%ffn.1), kind=kOutput, calls=%product, metadata={{op_name="jit(train_step)/jvp(mixer)/while/body/linear_core/dot_general" source_file="/home/me/lit_jax/models/mixers/linear.py" source_line=9}}, {estimate(3000000)}
  %stack.1 = bf16[8,8]{{1,0}} fusion(%core.1), kind=kLoop, calls=%product, metadata={{op_name="jit(train_step)/while/body/dynamic_update_slice"}}, {estimate(750000)}
  ROOT %next = (s32[], bf16[8,8]{{1,0}}) tuple(%i, %stack.1)
}}

%turns (t: (s32[], bf16[8,8])) -> pred[] {{
  %t = (s32[], bf16[8,8]{{1,0}}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %n = s32[] constant(28)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}}

%maybe (t: (s32[], bf16[8,8])) -> pred[] {{
  %t = (s32[], bf16[8,8]{{1,0}}) parameter(0)
  ROOT %known = pred[] custom-call(%t), custom_call_target="Unknown"
}}

%cheap (x: bf16[8,8]) -> bf16[8,8] {{
  %x = bf16[8,8]{{1,0}} parameter(0)
  ROOT %a = bf16[8,8]{{1,0}} fusion(%x), kind=kLoop, calls=%product, {estimate(1)}
}}

%dear (x: bf16[8,8]) -> bf16[8,8] {{
  %x = bf16[8,8]{{1,0}} parameter(0)
  ROOT %b = bf16[8,8]{{1,0}} fusion(%x), kind=kLoop, calls=%product, {estimate(150000)}
}}

ENTRY %main (x: bf16[8,8]) -> bf16[8,8] {{
  %x = bf16[8,8]{{1,0}} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], bf16[8,8]{{1,0}}) tuple(%zero, %x)
  %while.1 = (s32[], bf16[8,8]{{1,0}}) while(%start), condition=%turns, body=%layer
  %while.2 = (s32[], bf16[8,8]{{1,0}}) while(%start), condition=%maybe, body=%layer
  %y = bf16[8,8]{{1,0}} get-tuple-element(%while.1), index=1
  %copy.1 = bf16[8,8]{{0,1}} copy(%y), metadata={{op_name="jit(train_step)/adaln/add"}}, {estimate(300000)}
  %branch.1 = bf16[8,8]{{1,0}} conditional(%zero, %y, %y), branch_computations={{%cheap, %dear}}
  ROOT %update = bf16[8,8]{{1,0}} fusion(%copy.1), kind=kLoop, calls=%product, metadata={{op_name="jit(train_step)/optimizer/add"}}, {estimate(450000)}
}}
'''      # noqa: E501
COLLECTIVES = [Collective('all-gather', ('fsdp',), 100 * 2**20, count=3, group_size=4),
               Collective('all-reduce', ('data',), 100 * 2**20, group_size=2)]


@pytest.fixture(scope='module')
def found():
    return forecast(PROGRAM, V5E, 0.005 * 197e12, COLLECTIVES)


def test_loops_count_their_turns_and_branches_the_dearest(found):
    # A loop of unknown length counts once, and is told.
    assert found.seconds == pytest.approx(((1.5 + 3 + 0.75) * 29 + 0.3 + 0.15 + 0.45) * 1e6 / 1.5e9)
    assert found.unknown_loops == 1 and found.mfu == pytest.approx(0.005 / found.seconds)


def test_parts_come_from_scopes_and_lines_from_frames(found):
    parts = found.parts()
    assert list(parts)[:2] == [('linear core', False), ('feed-forward', True)]
    assert parts['stacking and slicing of layers', False] == pytest.approx(29 * 0.75e6 / 1.5e9)
    assert parts['layout copies', False] == pytest.approx(0.2e-3)
    assert parts['optimizer and EMA', False] == pytest.approx(0.3e-3)
    assert sum(parts.values()) == pytest.approx(found.seconds)
    rest = found.seconds - parts['linear core', False]
    assert found.without('linear core') == pytest.approx(0.005 / rest)
    core, ffn = found.operations[0], next(one for one in found.operations if one.name == 'ffn.1')
    assert (core.source, core.times) == ('lit_jax/models/mixers/linear.py:9', 28)
    assert ffn.source == 'lit_jax/models/layers.py:68 < lit_jax/models/ffn.py:34' and ffn.teacher


def test_collectives_take_the_time_of_their_bytes(found):
    gather, reduce = found.links
    assert gather[:3] == ('all-gather', 'fsdp', 3) and gather[3] == pytest.approx(3 * 75 * 2**20)
    assert reduce[4] == pytest.approx(100 * 2**20 / 200e9)      # each device sends its half twice


def test_the_text_says_that_no_tpu_has_confirmed_it(found):
    text = format_forecast(found, V5E)
    assert 'no TPU has confirmed it' in text and 'the published 200 GB/s' in text and 'MFU without it' in text
    assert '1 loops of unknown length' in text and max(map(len, text.splitlines())) < 140
    plain = json.loads(json.dumps(forecast_json(found)))
    assert plain['confirmed_by_a_tpu'] is False and len(plain['operations']) == 9
    assert plain['parts'][0]['part'] == 'linear core' and plain['links'][0]['kind'] == 'all-gather'


def test_plan_json_belongs_to_a_plan():
    with pytest.raises(UserError, match='only with --plan'):
        TrainOptions(plan_json='plan.json')
