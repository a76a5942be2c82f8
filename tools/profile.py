#!/usr/bin/env python3
"""Report where the time goes: `python tools/profile.py` runs `pygpt profile` with the package of this checkout."""

import sys
from pathlib import Path

# Replace this folder on the path: this script, and others in it, have the names of standard modules.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pygpt import _command  # noqa: E402

if __name__ == "__main__":
    sys.exit(_command("profile"))
