"""Writing an .npz whose arrays do not fit into memory; its bytes depend on its arrays alone."""
import contextlib
import io
import os
import zipfile
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from lit_jax.runtime.paths import as_path, fsync_path, is_remote

_NO_TIME = (1980, 1, 1, 0, 0, 0)     # the earliest that a zip file can hold


def npy_header(shape: tuple[int, ...], dtype=np.uint8) -> bytes:
    """What stands before the numbers in a .npy file of format 1.0."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {'descr': np.lib.format.dtype_to_descr(np.dtype(dtype)), 'fortran_order': False,
                 'shape': tuple(shape)})
    return header.getvalue()


def write_npz(path, arrays: Mapping[str,
                                    np.ndarray | tuple[tuple[int, ...], np.dtype, Iterable[bytes]]]) -> None:
    """Writes arrays, or what is given as (shape, dtype, its bytes in blocks), not compressed. The file is
    whole or absent."""
    def write(file) -> None:
        with zipfile.ZipFile(file, 'w', zipfile.ZIP_STORED, allowZip64=True) as archive:
            for name, array in arrays.items():
                shape, dtype, blocks = array if isinstance(array,
                                                           tuple) else (array.shape, array.dtype,
                                                                        [array.tobytes()])
                with archive.open(zipfile.ZipInfo(name + '.npy', date_time=_NO_TIME), 'w',
                                  force_zip64=True) as entry:
                    entry.write(npy_header(shape, dtype))
                    for block in blocks:
                        entry.write(block)

    _write_whole(as_path(path), write)


def _write_whole(path, write: Callable) -> None:
    """`write(file)` into a file that then is whole or absent: as `paths.write_bytes_atomic`, without its
    bytes in memory."""
    if is_remote(path):
        try:
            with path.open('wb') as file:
                write(file)
        except BaseException:
            path.unlink(missing_ok=True)     # closing the file made an object of the part that was written
            raise
        return
    temporary = path.with_name(f'.{path.name}.partial')
    try:
        with open(temporary, 'wb') as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
    fsync_path(path.parent)
