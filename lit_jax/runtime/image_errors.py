"""What Pillow raises for damaged images; found by fuzzing."""
import struct
import zlib

from PIL import Image

DECODE_ERRORS = (OSError, ValueError, SyntaxError, RuntimeError, LookupError, TypeError, ArithmeticError,
                 EOFError, struct.error, zlib.error, Image.DecompressionBombError)
