"""The modules of the chaos test, which `make chaos` runs as a program, made importable."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE), str(HERE.parent / "platform" / "training")]
