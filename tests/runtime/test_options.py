"""Command lines from dataclasses: every option comes back, every mistake is named."""
import dataclasses
import re
from pathlib import Path

import pytest
from hypothesis import given as forall
from hypothesis import strategies as st

from lit_jax.runtime.errors import UserError
from lit_jax.runtime.options import Processes, given, option, parse_beside, parse_options


@dataclasses.dataclass(frozen=True, kw_only=True)
class Everything(Processes):
    place: str = option('a folder, 100% of it', flag='PLACE')
    source: str = option('model folder', flag='--from')
    image_size: int | None = option('side in pixels', default=None)
    steps: int = option('model evaluations', default=50, group='drawing')
    scales: tuple[float, ...] = option('guidance scales', default=(1.0, 1.5), nargs='+', group='drawing')
    interval: tuple[float, float] = option('guided part', default=(0.0, 1.0), nargs=2,
                                           metavar=('LOW', 'HIGH'))
    classes: tuple[int, ...] = option('class indices', default=())
    names: tuple[str, ...] = option('metrics', default=('fid', 'is'))
    sides: tuple[int, int] | None = option('rows and columns', default=None)
    prompts: tuple[str, ...] = option('what to draw', default=(), flag='--prompt', repeat=True)
    channels: int | str = option('guided channels', default=3, choices=(3, 'all'))
    seconds: int = option('heartbeat', default=60, parse=lambda text: int(text) + 1)
    low_memory: bool = option('one network at a time', default=False)

    def __post_init__(self):
        if self.image_size == 7:
            raise UserError('an image of 7 pixels')


def parse(*words):
    return parse_options(Everything, words, prog='draw')


# What argparse cannot take for a flag: no text with a dash in front, no number such as -1e-7.
TEXT = st.text(st.characters(codec='utf-8'), min_size=1).filter(lambda text: text[0] != '-')
NUMBER = st.integers(-800, 800).map(lambda number: number / 8)
COUNT = st.integers(-10**9, 10**9)


@forall(st.fixed_dictionaries({'place': TEXT, 'source': TEXT}, optional={
    'image_size': COUNT.filter(lambda size: size != 7), 'steps': COUNT, 'process_id': COUNT,
    'coordinator': TEXT,
    'scales': st.lists(NUMBER, min_size=1).map(tuple), 'interval': st.tuples(NUMBER, NUMBER),
    'classes': st.lists(COUNT, min_size=1).map(tuple), 'sides': st.tuples(COUNT, COUNT),
    'names': st.lists(st.from_regex('[a-z]+', fullmatch=True), min_size=1).map(tuple),
    'prompts': st.lists(TEXT, min_size=1).map(tuple), 'channels': st.sampled_from([3, 'all']),
    'seconds': COUNT, 'low_memory': st.just(True)}), st.booleans(), st.booleans())
def test_every_option_comes_back(values, dashes, equals):
    """With `_` or `-` in names, values after `=` or as words of their own; the rest have their defaults."""
    words = []
    for name, value in values.items():
        field = Everything.__dataclass_fields__[name]
        flag = field.metadata['flag'] or f'--{name}'
        flag = flag.replace('_', '-') if dashes else flag
        if name == 'low_memory':
            words.append(flag)
        elif name in ('scales', 'interval'):
            words += [flag, *map(repr, value)]
        elif name == 'prompts':
            words += [f'--prompt={text}' for text in value]
        elif name != 'place':
            text = ','.join(map(str, value)) if isinstance(value, tuple) else str(value)
            words += [f'{flag}={text}'] if equals or text.startswith('-') else [flag, text]
    options = parse(*words, '--', values['place'])
    expected = {**values, 'seconds': values['seconds'] + 1} if 'seconds' in values else values
    assert options == Everything(**expected)


@pytest.mark.parametrize('words, message', [
    (['--form', 'x'], 'unknown flag --form; did you mean --from?'),
    (['--from=x', '--image-sise', '4'], 'unknown flag --image-sise; did you mean --image_size?'),
    (['--checkpoint=x'], 'unknown flag --checkpoint; did you mean --from?'),
    (['--from=x', '--zzz'], 'unknown flag --zzz'), (['--from=x', '--ste=4'], 'unknown flag --ste'),
    ([], 'the following arguments are required: --from'),
    (['--from=x', '--steps=many'], "argument --steps: invalid int value: 'many'"),
    (['--from=x', '--classes=1,b'], "argument --classes: '1,b' is not a list of int with commas between"),
    (['--from=x', '--sides=1,2,3'], "'1,2,3' is not a list of 2 int"),
    (['--from=x', '--channels=4'], "argument --channels: invalid choice: '4'"),
    (['--from=x', '--interval', '0'], 'argument --interval: expected 2 arguments'),
    (['--from=x', '--seconds=soon'], 'argument --seconds: invalid'),
    (['--from=x', '--heartbeat_seconds=2'], 'at least 5 seconds, got 2'),
    (['--from='], 'argument --from: it is empty'),
    (['--from=x', '--image_size=7'], 'an image of 7 pixels'),
    (['--from=x', 'stray'], 'unknown arguments: stray')])
def test_a_mistake_is_named_in_one_line_with_status_2(words, message, capsys):
    with pytest.raises(SystemExit) as end:
        parse('place', *words)
    usage, last = capsys.readouterr().err.splitlines()
    assert usage == 'usage: draw PLACE --from FROM [options]'
    assert end.value.code == 2 and last.startswith('draw: error: ') and message in last


def test_help_has_groups_in_order_and_every_default_once(capsys, monkeypatch):
    monkeypatch.setenv('COLUMNS', '300')
    with pytest.raises(SystemExit) as end:
        parse('--help')
    text = capsys.readouterr().out
    assert end.value.code == 0
    assert text.index('100% of it') < text.index('\ndrawing:') < text.index('\nseveral processes:')
    told = {entry.split()[0]: ' '.join(entry.split()) for entry in re.split(r'\n  (?=--|PLACE)', text)}
    for field in dataclasses.fields(Everything):
        entry = told[field.metadata['flag'] or f'--{field.name}']
        assert field.metadata['help'] in entry
        assert entry.count('(default: ') == (field.default not in (None, (), False, dataclasses.MISSING))
    assert '(default: 1.0 1.5)' in told['--scales'] and '(default: fid,is)' in told['--names']
    assert '--interval LOW HIGH' in told['--interval'] and '--classes N,N,...' in told['--classes']
    assert '--sides N,N ' in told['--sides'] and '{3,all}' in told['--channels']
    assert '--from FROM' in told['--from'] and '--prompt PROMPT ' in told['--prompt']


def test_given_names_what_differs_from_its_default():
    options = parse('place', '--from=x', '--steps=50', '--prompt=a', '--scales', '2')
    assert given(options) == ['--scales', '--prompt']
    assert given(options, 'drawing', 'several processes') == ['--scales']


def test_other_fields_are_no_flags():
    @dataclasses.dataclass(frozen=True)
    class Some:
        steps: int = option('model evaluations', default=50)
        cache: dict = dataclasses.field(default_factory=dict)
    assert parse_options(Some, ['--steps=2']) == Some(2) and given(Some(2, {'a': 1})) == ['--steps']
    with pytest.raises(SystemExit):
        parse_options(Some, ['--cache=1'])


def test_words_of_another_parser_are_left_to_it():
    words = ['--config', 'a.py', '--steps=3', '--config.train.x-y=1 2', '--noconfig.flag', '--config.b', '-5']
    options, rest = parse_beside('config', Everything, ['place', '--from=x', *words], prog='draw')
    assert (options.steps, rest) == (3, [word for word in words if word != '--steps=3'])


def test_a_type_that_no_text_can_become_is_refused_at_once():
    @dataclasses.dataclass(frozen=True)
    class Wrong:
        table: dict = option('a table', default=None)
    with pytest.raises(TypeError, match='needs choices or parse'):
        parse_options(Wrong, [])


@dataclasses.dataclass(frozen=True)
class MaybeFile:
    file: Path | None = option('a page', flag='FILE', default=None)


def test_a_positional_that_is_not_given_keeps_its_default():
    assert parse_options(MaybeFile, []).file is None
    assert parse_options(MaybeFile, ['page.md']).file == Path('page.md')
