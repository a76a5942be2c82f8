"""Complete a text with the model that `pygpt` finds, or with the one named.

    python examples/complete.py "Ladies and"
    python examples/complete.py "Ladies and" gpt2

The same seed gives the same text. Leave the seed out to get another text each time."""

import sys

from pygpt import GPT2, Tokenizer

text = sys.argv[1] if len(sys.argv) > 1 else "Ladies and"
name = sys.argv[2] if len(sys.argv) > 2 else None  # None: PYGPT_MODEL, ./gpt2_124M.bin or the small model of the package

tokenizer = Tokenizer()
with GPT2.load(name) as model:
    prompt = tokenizer.encode(text)  # text -> ids
    new = model.generate(prompt, max_new_tokens=20, temperature=0.8, top_p=0.95, seed=7)
    print(text + tokenizer.decode(new))  # ids -> text
