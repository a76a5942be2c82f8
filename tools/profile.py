#!/usr/bin/env python3
"""Hotspot reports: `python tools/profile.py` is `python -m pygpt profile`, in this checkout's pygpt."""

import sys
from pathlib import Path

# This script has the name of a module of the standard library: its own folder must not be searched.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pygpt.__main__ import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(["profile", *sys.argv[1:]]))
