"""Damages files and folders as a random generator says: any bytes, and what a format's own reader trips over.

`damage(path, rng)` changes one file of a folder (or the one file) and says what it did. Formats are told by
content: JSON, lines of JSON, zip (.npz, torch.save), .npy, pickle, .safetensors, tar, PNG."""
import ast
import io
import json
import os
import pickletools
import shutil
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

_RAW = '@raw@'      # in a JSON tree: texts that json.dumps would not write
RAW = ('[' * 50_000, '{"a":' * 3_000 + '1' + '}' * 3_000, '9' * 5_000, '-' + '9' * 500 + '.5', '1e999',
       'NaN', '-Infinity', '"\\ud800"', '"\x1b[31m\\u0007"', '"\u2028\u0085"', '1' + '0' * 30,
       '{"a":1,"a":2}')
HOSTILE = (None, True, False, 0, -1, 1, 2 ** 31, 2 ** 63, -2 ** 70, 0.0, -0.5, 1e-300, 1e300, '', 'x', '0',
           'x' * 1_000_000, '../../etc/passwd',
           '/dev/null', 'a\0b', '\x1b[2J\n\nerror', '\ud800', 'é', [], {},
           [[]], [0] * 9, [None], {'a': {}}, [{}], {'': 0}, 'NaN', '%s%n{0}')
_DEEP_TUPLE, _WIDE_TUPLE = b')' + b'\x85' * 2_000_000, b')' + b'2\x86' * 60
PICKLED = (b'cos\nsystem\n(S"true"\ntR', b'cfuzz_canary\nrun\n)R', b'c__builtin__\neval\n(S"1"\ntR',
           b'Nr\xff\xff\xff\x7f', b'Nq\xff', b'p99999999999\n', b'}b', b'(lb', b'}}s',
           b'\x8b\xff\xff\xff\x7f',
           b'\x8e' + b'\xff' * 7 + b'\x7f', b'X\xff\xff\xff\x7f', _DEEP_TUPLE, b'}' + _DEEP_TUPLE + b'Ns',
           _WIDE_TUPLE, b'}' + _WIDE_TUPLE + b'Ns', b')R', b')\x81', b'Q', b'(t', b'0', b'h\x00', b'h\x63',
           b'K\xff', b'G\x7f\xf8\0\0\0\0\0\0', b'\x82\x01', b'\x97', b'P\n', b'}S"a"\nNsb', b'2b')


class Done(NamedTuple):
    """file: relative name. what: in words. damaged: bytes were hit, and no well-formed file was written."""
    file: str
    what: str
    damaged: bool


def damage(root: Path, rng) -> Done:
    """Mutates one file below `root` (or `root` itself); links in the place of files are not followed."""
    files = [root] if root.is_file() else sorted(path for path in root.rglob('*') if path.is_file())
    path = files[rng.integers(len(files))]
    name = path.name if path == root else path.relative_to(root).as_posix()
    if rng.random() < (0.06 if path == root else 0.16):
        return Done(name, _misplace(path, files, rng), True)
    data, times = path.read_bytes(), 1 + int(rng.random() < 0.25)
    said, damaged = [], True
    for _ in range(times):
        data, what, hit = change(data, rng)
        said.append(what)
        damaged &= hit
    path.unlink()           # the file may be a hard link to the valid one
    path.write_bytes(data)
    return Done(name, ', '.join(said), damaged)


def change(data: bytes, rng) -> tuple[bytes, str, bool]:
    """(new content, what was done, whether bytes were hit)."""
    editor = _editor(data)
    if editor and rng.random() < 0.7:
        try:
            return *editor(data, rng), False
        except (ValueError, LookupError, struct.error, zipfile.BadZipFile, tarfile.TarError, SyntaxError,
                OverflowError, EOFError, NotImplementedError, RuntimeError, TypeError, OSError,
                AttributeError, zlib.error):
            pass            # the first of two mutations has left nothing to edit
    return *_hit(data, rng), True


def _misplace(path: Path, files: list[Path], rng) -> str:
    what = ('missing', 'folder', 'dead link', 'circular link',
            'other file', 'link to folder')[rng.integers(6)]
    other = files[rng.integers(len(files))]
    content = other.read_bytes()
    path.unlink()
    if what == 'folder':
        path.mkdir()
        if rng.random() < 0.5:
            (path / 'inside').write_bytes(b'')
    elif what == 'dead link':
        path.symlink_to(path.with_name('nowhere'))
    elif what == 'circular link':
        path.symlink_to(path)
    elif what == 'link to folder':
        path.symlink_to(path.parent)
    elif what == 'other file':
        path.write_bytes(content)
        what = f'content of {other.name}'
    return what


# Any bytes.

def _hit(data: bytes, rng) -> tuple[bytes, str]:
    data, n = bytearray(data), len(data)
    at, size = (int(rng.integers(n)) if n else 0), int(2 ** rng.uniform(0, 12))
    kind = ('bit', 'bits', 'truncated', 'cut', 'doubled', 'spliced', 'zeros', 'junk', 'digit', 'empty',
            'long', 'encoding', 'head')[rng.integers(13)]
    if not n or kind == 'empty':
        return (b'' if n else b'\0'), kind
    if kind == 'bit':
        data[at] ^= 1 << int(rng.integers(8))
    elif kind == 'bits':
        for place in rng.integers(n, size=8):
            data[place] ^= 1 << int(rng.integers(8))
    elif kind == 'truncated':
        del data[at:]
    elif kind == 'cut':
        del data[at:at + size]
    elif kind == 'doubled':
        data[at:at] = data[at:at + size]
    elif kind == 'spliced':
        data[at:at + size] = data[(start := int(rng.integers(n))):start + size]
    elif kind == 'zeros':
        data[at:at + size] = bytes(len(data[at:at + size]))
    elif kind == 'junk':
        data[at:at + size] = rng.bytes(size)
    elif kind == 'digit':
        if places := [i for i, byte in enumerate(data[:1 << 16]) if 48 <= byte < 58]:
            data[places[rng.integers(len(places))]] = 48 + int(rng.integers(10))
    elif kind == 'long':
        data += bytes(100_000)
    elif kind == 'head':
        data[:8] = (b'PK\x03\x04\0\0\0\0', b'\x80\x02}q\0.\0\0', b'\xff' * 8, b'\x93NUMPY\x09\0',
                    b'<html>\n\n',
                    bytes(8))[rng.integers(6)]
    elif kind == 'encoding':
        text = bytes(data).decode('latin-1')
        data = (text.encode('utf-16'), b'\xef\xbb\xbf' + bytes(data), text.encode('utf-8') + b'\xff\xfe',
                bytes(data).replace(b'\n', b'\r'), text.replace('a', '\u2028', 3).encode(),
                text.replace('e', '\x85', 2).encode())[rng.integers(6)]
    return bytes(data), f'{kind} at {at}'


# Formats.

def _editor(data: bytes):
    if data[:4] == b'PK\x03\x04':
        return _edit_zip
    if data[:6] == b'\x93NUMPY':
        return _edit_npy
    if data[:4] == b'\x89PNG':
        return _edit_png
    if data[257:262] == b'ustar':
        return _edit_tar
    if data[8:9] == b'{' and int.from_bytes(data[:8], 'little') <= len(data):
        return _edit_safetensors
    if data[:1] == b'\x80' and data[-1:] == b'.':
        return _edit_pickle
    head = data[:1 << 16].lstrip()[:1]
    return _edit_json if head in (b'{', b'[') else None


def _edit_json(data: bytes, rng) -> tuple[bytes, str]:
    try:
        return edit_text(data.decode(), rng)
    except json.JSONDecodeError:
        lines = data.decode().splitlines(keepends=True)
        number = int(rng.integers(len(lines)))
        kind = int(rng.integers(8))
        if kind == 0:
            lines.insert(int(rng.integers(len(lines))), lines[number])
        elif kind == 1:
            del lines[number]
        elif kind == 2:
            lines.insert(number, ('\n', ' \n', 'null\n', '[]\n', '{}\n', '"x"\n')[rng.integers(6)])
        else:
            new, what = edit_text(lines[number], rng)
            return ''.join(lines[:number]).encode() + new + b'\n' + ''.join(lines[number + 1:]).encode(), what
        return ''.join(lines).encode(), f'line {number}'


def edit_text(text: str, rng) -> tuple[bytes, str]:
    """The JSON in `text` with one edit."""
    tree, what = edit_tree(json.loads(text), rng)
    text = json.dumps(tree)
    for i, raw in enumerate(RAW):
        text = text.replace(f'"{_RAW}{i}"', raw)
    return text.encode('utf-8', 'surrogatepass'), what


def edit_tree(tree, rng):
    """(the tree with one edit somewhere, what was done)."""
    places = list(_places(tree))
    if not places or rng.random() < 0.03:
        return hostile(rng), 'another tree'
    holder, key = places[rng.integers(len(places))]
    old, kind = holder[key], int(rng.integers(10))
    if kind == 0:
        del holder[key]
        what = 'gone'
    elif kind == 1 and isinstance(holder, dict):
        holder[f'{key}x'] = holder.pop(key)
        what = 'renamed'
    elif kind == 2 and isinstance(holder, list):
        holder.insert(key, old)
        what = 'doubled'
    elif kind == 3 and isinstance(old, int | float):
        holder[key] = old + (1, -1, 0.5, 10 ** 6)[rng.integers(4)]
        what = 'other number'
    elif kind == 4:
        holder[key] = [old] if rng.random() < 0.5 else {'a': old}
        what = 'wrapped'
    else:
        holder[key] = hostile(rng)
        what = 'hostile'
    return tree, f'{key}: {what}'[:60]


def hostile(rng):
    if rng.random() < 0.25:
        return f'{_RAW}{rng.integers(len(RAW))}'
    return HOSTILE[rng.integers(len(HOSTILE))]


def _places(tree):
    for key, value in list(tree.items() if isinstance(tree, dict) else
                           enumerate(tree[:40]) if isinstance(tree, list) else ()):
        yield tree, key
        yield from _places(value)


def _edit_npy(data: bytes, rng) -> tuple[bytes, str]:
    length = int.from_bytes(data[8:10], 'little')
    header, body = ast.literal_eval(data[10:10 + length].decode('latin-1')), data[10 + length:]
    kind = int(rng.integers(6))
    if kind == 0:
        header['shape'] = ((), (2 ** 62,), (2 ** 31, 2 ** 31), (-1,), (0,), (True,), (1.5,), None, (1,) * 70,
                           (2 ** 20, 2 ** 20, 4))[rng.integers(10)]
    elif kind == 1:
        header['descr'] = ('|O', '<f4', '>f8', '|S5', '<U9', '<c16', '|V3', [('a', '<f4')], 'x' * 200, 7,
                           '<m8[ns]', '|b1', '<i8')[rng.integers(13)]
    elif kind == 2:
        header['fortran_order'] = (True, None, 7)[rng.integers(3)]
    elif kind == 3:
        header.pop(('shape', 'descr', 'fortran_order')[rng.integers(3)])
    elif kind == 4:
        body = rng.bytes(len(body))
    text = repr(header)
    if kind == 5:
        text = ('(' * 5000, '{' * 300, '1' * 9000, "__import__('os').system('true')", text + '\0',
                '\x1b[2J')[rng.integers(6)]
    text = text.encode('latin-1', 'replace') + b'\n'
    return data[:8] + struct.pack('<H', len(text)) + text + body, f'npy header {kind}'


def _edit_pickle(data: bytes, rng) -> tuple[bytes, str]:
    starts = [place for _, _, place in pickletools.genops(data)]
    at = starts[rng.integers(1, len(starts))]
    kind = int(rng.integers(5))
    if kind < 3:
        number = int(rng.integers(len(PICKLED)))
        pop = b'0' if rng.random() < 0.5 else b''
        return data[:at] + PICKLED[number] + pop + data[at:], f'pickle snippet {number} at {at}'
    first, last = sorted(rng.integers(1, len(starts), 2).tolist())
    last = min(last, first + 9)
    piece = data[starts[first]:starts[last]]
    if kind == 3:
        return data[:starts[first]] + data[starts[last]:], f'opcodes {first}-{last} gone'
    return data[:at] + piece + data[at:], f'opcodes {first}-{last} again at {at}'


def _edit_safetensors(data: bytes, rng) -> tuple[bytes, str]:
    size = int.from_bytes(data[:8], 'little')
    header, what = data[8:8 + size], ''
    tree = json.loads(header)
    inner = tree.get('__metadata__', {}) if isinstance(tree, dict) else {}
    texts = [key for key, value in inner.items() if str(value)[:1] == '{']
    if texts and rng.random() < 0.6:
        new, what = edit_text(inner[texts[0]], rng)
        inner[texts[0]] = new.decode('utf-8', 'replace')
        header = json.dumps(tree).encode()
    else:
        header, what = edit_text(header.decode(), rng)
    return struct.pack('<Q', len(header)) + header + data[8 + size:], f'header {what}'


def _edit_zip(data: bytes, rng) -> tuple[bytes, str]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    names = list(members)
    pickles = [name for name in names if name.endswith('.pkl')]
    chosen = pickles[0] if pickles and rng.random() < 0.6 else names[rng.integers(len(names))]
    kind, method, twice = int(rng.integers(10)), zipfile.ZIP_STORED, ()
    what = f'member {chosen}'
    if kind < 5:
        members[chosen], inner, _ = change(members[chosen], rng)
        what += f': {inner}'
    elif kind == 5:
        del members[chosen]
    elif kind == 6:
        twice = ((chosen, members[names[0]]),)
    elif kind == 7:
        members = {(name + ('x', '/../a', '\x1b[2J', '/')[rng.integers(4)] if name == chosen else name): value
                   for name, value in members.items()}
    elif kind == 8:
        method = (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)[rng.integers(3)]
    new = io.BytesIO()
    with zipfile.ZipFile(new, 'w', method) as archive:
        for name, value in (*members.items(), *twice):
            archive.writestr(zipfile.ZipInfo(name), value, compress_type=method)
    data = bytearray(new.getvalue())
    if kind == 9:       # a field of a header, in the central directory or in a member's own
        mark = (b'PK\x01\x02', b'PK\x03\x04')[rng.integers(2)]
        at = data.find(mark)
        field = int(rng.integers(4, 42 if mark == b'PK\x01\x02' else 26))
        data[at + field] = (0, 1, 9, 14, 99, 255)[rng.integers(6)]
        what = f'zip field {field}'
    return bytes(data), what


def _edit_tar(data: bytes, rng) -> tuple[bytes, str]:
    kind = int(rng.integers(4))
    if kind == 0:
        return data + data, 'concatenated'
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        members = [(info, tar.extractfile(info).read() if info.isreg() else b'') for info in tar]
    number = int(rng.integers(len(members)))
    info, content = members[number]
    if kind == 1:
        content, what, _ = change(content, rng)
        info.size = len(content)
    elif kind == 2:
        info.name = ('../up.png', 'a b.2.png', '\x1b[2J.png', '.png', 'x' * 300 + '.png', 'dir/',
                     info.name * 2)[rng.integers(7)]
        what = 'name'
    else:
        info.type = (tarfile.SYMTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE,
                     tarfile.GNUTYPE_SPARSE)[rng.integers(4)]
        info.linkname, what = 'nowhere', 'type'
    members[number] = info, content
    new = io.BytesIO()
    with tarfile.open(fileobj=new, mode='w') as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return new.getvalue(), f'member {number}: {what}'


def _edit_png(data: bytes, rng) -> tuple[bytes, str]:
    data = bytearray(data)
    kind = int(rng.integers(3))
    if kind == 0:
        data[16:24] = struct.pack('>II', *[(60_000, 60_000), (2 ** 31 - 1, 1), (0, 0), (9, 30_000)
                                           ][rng.integers(4)])
    elif kind == 1:
        data[24:29] = bytes(rng.integers(0, 20, 5).tolist())
    else:
        text = b'zTXta\0\0' + zlib.compress(bytes(80_000_000))
        chunk = struct.pack('>I', len(text) - 4) + text + struct.pack('>I', zlib.crc32(text))
        data[33:33] = chunk
    data[29:33] = struct.pack('>I', zlib.crc32(bytes(data[12:29])))
    return bytes(data), f'png {kind}'


def copy(source: Path, target: Path) -> None:
    """A folder or file, its files as hard links: `damage` replaces what it changes."""
    if source.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(source, target)
    else:
        shutil.copytree(source, target, copy_function=os.link, symlinks=True)


def seeded(seed: int, kind: str, case: int):
    return np.random.default_rng((seed, zlib.crc32(kind.encode()), case))
