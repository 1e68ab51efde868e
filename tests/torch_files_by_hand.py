"""Files as torch.save writes them, put together by hand: without PyTorch, or with what it never writes."""
import struct
import zipfile

import numpy as np

STORAGES = {'float32': 'FloatStorage', 'float16': 'HalfStorage', 'int64': 'LongStorage'}


def text(value: str) -> bytes:
    return b'X' + struct.pack('<I', len(value.encode())) + value.encode()


def name(module: str, attribute: str) -> bytes:
    return f'c{module}\n{attribute}\n'.encode()


def number(value: int) -> bytes:
    return b'J' + struct.pack('<i', value)


def tuple_of(*values: bytes) -> bytes:
    return b'(' + b''.join(values) + b't'


def dict_of(entries: dict) -> bytes:
    """entries: name -> pickled value."""
    return b'}(' + b''.join(text(key) + value for key, value in entries.items()) + b'u'


def tensor(key: str, shape, stride=None, dtype='float32', count=None, offset=0) -> bytes:
    """A call of _rebuild_tensor_v2 on the storage `key`."""
    stride = [int(np.prod(shape[i + 1:])) for i in range(len(shape))] if stride is None else stride
    storage = tuple_of(text('storage'), name('torch', STORAGES[dtype]), text(key), text('cpu'),
                       number(int(np.prod(shape)) if count is None else count)) + b'Q'
    return name('torch._utils', '_rebuild_tensor_v2') + tuple_of(
        storage, number(offset), tuple_of(*map(number, shape)), tuple_of(*map(number, stride)), b'\x89',
        name('collections', 'OrderedDict') + b')R') + b'R'


def namespace(**values) -> bytes:
    """An argparse.Namespace of texts and whole numbers."""
    state = dict_of({key: number(value) if isinstance(value, int) else text(value)
                     for key, value in values.items()})
    return name('argparse', 'Namespace') + b')\x81' + state + b'b'


def write_zip(path, content: bytes, storages: dict[str, bytes], **options) -> None:
    """content: the pickle between its protocol and its end."""
    with zipfile.ZipFile(path, 'w', **options) as file:
        file.writestr('archive/data.pkl', b'\x80\x02' + content + b'.')
        file.writestr('archive/version', b'3\n')
        for key, data in storages.items():
            file.writestr(f'archive/data/{key}', data)


def save(path, arrays: dict, wrap=lambda state: state, **options) -> None:
    """A state dict of numpy arrays. wrap: pickled state dict -> pickled content."""
    entries, storages = {}, {}
    for number_of, (key, array) in enumerate(arrays.items()):
        array = np.asarray(array)
        storages[str(number_of)] = np.ascontiguousarray(array).tobytes()
        entries[key] = tensor(str(number_of), array.shape, dtype=array.dtype.name)
    write_zip(path, wrap(dict_of(entries)), storages, **options)
