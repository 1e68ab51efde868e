"""The tiny text-to-image system belongs to the tests of sampling."""
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / 'sampling'))
