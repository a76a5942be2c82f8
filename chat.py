"""Chat with GPT-2: `python chat.py` runs `pygpt chat` with the package in this folder."""

import sys

from pygpt import _command

if __name__ == "__main__":
    sys.exit(_command("chat"))
