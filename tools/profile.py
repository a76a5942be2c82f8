#!/usr/bin/env python3
"""Show where GPT-2 spends its time: `python tools/profile.py` runs `pygpt profile` with the package of this checkout."""

import sys
from pathlib import Path

# Replace tools/ by the checkout on the path: scripts in tools/, such as this one, have the names of standard modules.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pygpt import _command  # noqa: E402

if __name__ == "__main__":
    sys.exit(_command("profile"))
