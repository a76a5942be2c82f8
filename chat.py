"""Chat with GPT-2: `python chat.py` is `python -m pygpt chat`, in this folder's pygpt."""

import sys

from pygpt.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["chat", *sys.argv[1:]]))
