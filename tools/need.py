"""What the tools need before their own imports."""

import sys
from importlib import import_module

from pygpt.cli import status_of


def kernels() -> None:
    """End the script in one line where they cannot be imported: not built, or PYGPT_ISA names a set that is not there."""
    if status := status_of(lambda: import_module("pygpt.model")):
        sys.exit(status)
