"""Damaged files of every kind end in right values or in one message (`make fuzz` tries thousands)."""
import json
import os
from pathlib import Path

import pytest
from fuzz import campaign
from fuzz.mutations import Done, change, copy, damage, seeded

CASES, SEED = int(os.environ.get('FUZZ_CASES', 440)), 0


@pytest.mark.slow
@pytest.mark.peers
def test_every_reader_survives(tmp_path):
    said = campaign.run(CASES, SEED, tmp_path, jobs=2)
    assert len(said) > 40
    found = campaign.report(said, tmp_path, SEED)
    assert not found, '\n\n'.join([campaign.table(said), *found])


def test_a_case_is_its_seed(tmp_path):
    """The same damage for the same seed, kind and number; the valid file stays as it was."""
    valid = tmp_path / 'valid.json'
    valid.write_text('{"a": [1, 2, {"b": "text"}], "c": 3.5}')
    written = []
    for name in ('one', 'two'):
        for case in range(40):
            copy(valid, path := tmp_path / name / f'{case}.json')
            done = damage(path, seeded(7, 'kind', case))
            assert isinstance(done, Done) and done.file == path.name
            written.append((done.what, path.read_bytes() if path.is_file() else None))
    assert written[:40] == written[40:] and len(set(written)) > 30
    assert json.loads(valid.read_text())['c'] == 3.5


def test_a_reader_that_does_wrong_is_caught(tmp_path):
    """Code that runs, memory, a message without its file, other values, and a traceback are told apart."""
    from fuzz.kinds import Kind
    from fuzz.worker import Audit, Cases, Logged

    from lit_jax.runtime.errors import UserError

    def make(folder: Path) -> Path:
        (folder / 'numbers.json').write_text('[1, 2, 3]')
        return folder / 'numbers.json'

    def fails(error):
        def read(path, _):
            if path.is_file() and path.read_bytes() == b'[1, 2, 3]':
                return [1, 2, 3]
            return error(path)
        return read

    def raises(error):
        raise error

    audit = Audit(tmp_path)
    for read, guard, fault in (
            (fails(lambda path: [1]), 'whole', 'wrong values'), (fails(lambda path: [1]), 'free', None),
            (fails(lambda path: raises(KeyError(3))), 'free', 'raised KeyError'),
            (fails(lambda path: raises(UserError('damaged'))), 'free', 'no file named'),
            (fails(lambda path: raises(UserError(f'{path}: \x1b[2J'))), 'free', 'not printable'),
            (fails(lambda path: raises(UserError(f'{path}: ValueError: no'))), 'free', 'names ValueError'),
            (fails(lambda path: [1, os.system('true')]), 'free', 'executed os.system'),
            (fails(lambda path: len(bytearray(1100 << 20))), 'free', 'MiB'),
            (fails(lambda path: raises(UserError(f'{path} is damaged'))), 'whole', None)):
        cases = Cases(Kind('numbers', make, read, guard), tmp_path / 'scratch', audit, Logged())
        faults = [fault for case in range(6) for fault in cases.run(seeded(1, 'numbers', case))['faults']]
        assert any(fault in text for text in faults) if fault else not faults, (fault, faults)


def test_formats_are_edited_and_stay_readable():
    """Half of the edits of a JSON text are JSON again: they reach what lies behind the parser."""
    text, whole = b'{"a": [1, 2, {"b": "text"}], "c": 3.5}', 0
    for case in range(200):
        try:
            json.loads(change(text, seeded(0, 'json', case))[0])
            whole += 1
        except (ValueError, RecursionError):
            continue
    assert whole > 60
