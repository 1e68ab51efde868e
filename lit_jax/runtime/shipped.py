"""Files that come with the package: in configs/ and assets/ of a checkout, in _configs/ and _assets/ of an
installed package."""
from pathlib import Path

PACKAGE = Path(__file__).parents[1]


def shipped_folder(kind: str) -> Path:
    """The folder of shipped files: kind is 'configs' or 'assets'."""
    inside = PACKAGE / f'_{kind}'
    return inside if inside.is_dir() else PACKAGE.parent / kind


def find_asset(name: str) -> Path:
    """The path of a shipped file or folder: 'digits_dit.safetensors', 'assets/shapes_t5'."""
    return shipped_folder('assets') / name.removeprefix('assets/')
