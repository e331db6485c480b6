"""Data preparation; run by path or imported as a package. Scripts import their siblings plainly, so their folder joins
the path."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent))
