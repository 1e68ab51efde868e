"""A machine for pickles that only records: the instructions that torch.save and numpy write, and no others.

Nothing of Python's pickle is used, no name is looked up, imported or called. A name in a file becomes a
`Name`, and a call or object of it a `Call` with its arguments and state; they belong to one file. Keys of
dicts are texts or whole numbers, so nothing is hashed or compared that a file can make deep; sizes are
compared with what the file has left before anything is read."""
import struct
from collections.abc import Collection

from lit_jax.runtime.errors import UserError, shown_name

_FLAT = {'collections.OrderedDict', 'collections.defaultdict', 'collections.Counter'}


class Damage(ValueError):
    """What is wrong with a pickle, without the name of its file."""


class Name:
    """A class or function that a file names."""
    __slots__ = ('name',)

    def __init__(self, name: str):
        self.name = name


class Call:
    """What a file would have made by calling a name; `state` is what it would have set on it then."""
    __slots__ = ('args', 'name', 'state')

    def __init__(self, name: str, args: tuple):
        self.name, self.args, self.state = name, args, None


class Storage:
    """The values of tensors that stand elsewhere in the file: the fields that torch.save gives for them."""
    __slots__ = ('fields',)

    def __init__(self, fields: tuple):
        self.fields = fields


def read_pickle(data, start: int, known: Collection[str]) -> tuple[object, int]:
    """(content, end) of the pickle that starts at a byte of `data`.

    The content is made of None, bool, int, float, str, bytes, tuple, list, dict, `Name`, `Call` and
    `Storage`. Raises Damage, and UserError for a name that is not in `known`."""
    machine = _Machine(data, start, known)
    return machine.run(), machine.at


class _Machine:
    def __init__(self, data, start: int, known: Collection[str]):
        self.data, self.at, self.known = data, start, known
        self.stack: list = []
        self.marks: list[int] = []
        self.memo: dict[int, object] = {}

    def run(self):
        """The content, when the machine stops."""
        while (code := self.take(1)) != b'.':
            step = _STEPS.get(code)
            if step is None:
                raise Damage(f'byte {self.at - 1} is {code!r}, which is no instruction that torch.save or '
                             f'numpy write')
            step(self)
        return self.pop()

    # Bytes of the file.

    def take(self, count: int) -> bytes:
        end = self.at + count
        if end > len(self.data):
            raise Damage(f'it ends {end - len(self.data)} bytes too early')
        part, self.at = self.data[self.at:end], end
        return bytes(part)

    def number(self, form: str) -> int:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self, form: str) -> str:
        part = self.take(self.number(form))
        try:
            return part.decode('utf-8', 'surrogatepass')
        except UnicodeDecodeError:
            raise Damage(f'a text before byte {self.at} is not UTF-8') from None

    def line(self) -> str:
        end = self.data.find(b'\n', self.at, self.at + 256)
        if end < 0:
            raise Damage(f'a name at byte {self.at} has no end')
        part = self.take(end + 1 - self.at)
        return part[:-1].decode('latin1')

    # The stack.

    def push(self, value) -> None:
        self.stack.append(value)

    def pop(self):
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise Damage('an instruction lacks its operands')
        return self.stack.pop()

    def pop_marked(self) -> list:
        if not self.marks:
            raise Damage('an instruction lacks its operands')
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def tuple_of(self, count: int) -> None:
        self.push(tuple([self.pop() for _ in range(count)][::-1]))

    def remember(self, index: int) -> None:
        value = self.pop()
        self.push(value)
        self.memo[index] = value

    def recall(self, index: int) -> None:
        if index not in self.memo:
            raise Damage(f'it refers to entry {index}, which it never stored')
        self.push(self.memo[index])

    # What is built.

    def extend(self, values: list) -> None:
        target = self.pop()
        if type(target) is not list:
            raise Damage('it appends to what is no list')
        target += values
        self.push(target)

    def update(self, entries: list) -> None:
        target = self.pop()
        if type(target) is not dict or len(entries) % 2:
            raise Damage('it sets entries of what is no dict')
        for key, value in zip(entries[::2], entries[1::2], strict=True):
            if type(key) not in (str, int):
                raise Damage(f'a key of a dict is a {_kind(key)}, expected a text or a whole number')
            target[key] = value
        self.push(target)

    def name(self, module, name) -> None:
        if type(module) is not str or type(name) is not str:
            raise Damage('the name of a class is no text')
        if (whole := f'{module}.{name}') not in self.known:
            raise UserError(f'is refused: it asks for {shown_name(whole)}, and a file of weights needs '
                            f'nothing but arrays. Nothing of it was run')
        self.push(Name(whole))

    def named_on_stack(self) -> None:
        name = self.pop()
        self.name(self.pop(), name)

    def call(self) -> None:
        args = self.pop()
        target = self.pop()
        if type(target) is not Name or type(args) is not tuple:
            raise Damage('it calls what is no name')
        if target.name in _FLAT:
            self.flat_dict(args)
        else:
            self.push(Call(target.name, args))

    def flat_dict(self, args: tuple) -> None:
        """Kinds of dict are dicts here: of no arguments, a default, another dict, or pairs in lists."""
        first = args[0] if args else None
        pairs = first if type(first) is list else first.items() if type(first) is dict else ()
        self.push({})
        for pair in pairs:
            if type(pair) not in (list, tuple) or len(pair) != 2:
                raise Damage('a dict is made of what are no pairs')
            self.update([*pair])

    def build(self) -> None:
        state = self.pop()
        target = self.pop()
        if type(target) is Call and target.state is None:
            target.state = state
        elif type(target) is not dict:      # attributes of an OrderedDict are of no use here
            raise Damage('it sets attributes of what has none')
        self.push(target)

    def storage(self) -> None:
        fields = self.pop()
        if type(fields) is not tuple:
            raise Damage('it refers to what is no storage')
        self.push(Storage(fields))

    def protocol(self) -> None:
        version = self.number('<B')
        if not 2 <= version <= 5:
            raise Damage(f'it is written in protocol {version}; 2 to 5 are known')

    def frame(self) -> None:
        if self.number('<Q') > len(self.data) - self.at:
            raise Damage('it ends too early')


def _kind(value) -> str:
    return {Name: 'name', Call: 'object', type(None): 'none'}.get(type(value), type(value).__name__)


# Instructions of the pickle protocols 2 to 5, by their byte (Python's Lib/pickletools.py describes them).
_STEPS = {
    b'\x80': _Machine.protocol, b'\x95': _Machine.frame,
    b'(': lambda m: m.marks.append(len(m.stack)),
    b'N': lambda m: m.push(None), b'\x88': lambda m: m.push(True), b'\x89': lambda m: m.push(False),
    b'J': lambda m: m.push(m.number('<i')), b'K': lambda m: m.push(m.number('<B')),
    b'M': lambda m: m.push(m.number('<H')), b'G': lambda m: m.push(m.number('>d')),
    b'\x8a': lambda m: m.push(int.from_bytes(m.take(m.number('<B')), 'little', signed=True)),
    b'X': lambda m: m.push(m.text('<I')), b'\x8c': lambda m: m.push(m.text('<B')),
    b'\x8d': lambda m: m.push(m.text('<Q')), b'U': lambda m: m.push(m.text('<B')),
    b'T': lambda m: m.push(m.text('<I')), b'C': lambda m: m.push(m.take(m.number('<B'))),
    b'B': lambda m: m.push(m.take(m.number('<I'))), b'\x8e': lambda m: m.push(m.take(m.number('<Q'))),
    b'\x96': lambda m: m.push(m.take(m.number('<Q'))),
    b')': lambda m: m.push(()), b'\x85': lambda m: m.tuple_of(1), b'\x86': lambda m: m.tuple_of(2),
    b'\x87': lambda m: m.tuple_of(3), b't': lambda m: m.push(tuple(m.pop_marked())),
    b']': lambda m: m.push([]), b'a': lambda m: m.extend([m.pop()]), b'e': lambda m: m.extend(m.pop_marked()),
    b'}': lambda m: m.push({}), b's': lambda m: m.update([m.pop(), m.pop()][::-1]),
    b'u': lambda m: m.update(m.pop_marked()),
    b'q': lambda m: m.remember(m.number('<B')), b'r': lambda m: m.remember(m.number('<I')),
    b'\x94': lambda m: m.remember(len(m.memo)),
    b'h': lambda m: m.recall(m.number('<B')), b'j': lambda m: m.recall(m.number('<I')),
    b'c': lambda m: m.name(m.line(), m.line()), b'\x93': _Machine.named_on_stack,
    b'R': _Machine.call, b'\x81': _Machine.call, b'b': _Machine.build, b'Q': _Machine.storage,
}
