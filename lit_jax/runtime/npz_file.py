"""Writes .npz files larger than memory; their bytes depend only on the arrays."""
import io
import zipfile
from collections.abc import Iterable, Mapping

import numpy as np

from lit_jax.runtime.paths import as_path, open_whole

_NO_TIME = (1980, 1, 1, 0, 0, 0)     # the earliest date of the zip format


def npy_header(shape: tuple[int, ...], dtype=np.uint8) -> bytes:
    """The header of a .npy file of format 1.0."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {
        'descr': np.lib.format.dtype_to_descr(np.dtype(dtype)), 'fortran_order': False, 'shape': shape})
    return header.getvalue()


def write_npz(path,
              arrays: Mapping[str, np.ndarray | tuple[tuple[int, ...], np.dtype, Iterable[bytes]]]) -> None:
    """Writes arrays, or (shape, dtype, bytes in blocks), uncompressed; the file is whole or absent."""
    with (open_whole(as_path(path)) as file,
          zipfile.ZipFile(file, 'w', zipfile.ZIP_STORED, allowZip64=True) as archive):
        for name, array in arrays.items():
            if not isinstance(array, tuple):
                array = array.shape, array.dtype, [array.tobytes()]
            shape, dtype, blocks = array
            info = zipfile.ZipInfo(name + '.npy', date_time=_NO_TIME)
            with archive.open(info, 'w', force_zip64=True) as entry:
                entry.write(npy_header(shape, dtype))
                for block in blocks:
                    entry.write(block)
