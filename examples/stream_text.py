"""Print a completion while it is generated, character by character, and stop at the end of a paragraph.

    python examples/stream_text.py "Ladies and"

A token may end in the middle of a character. StreamDecoder keeps such bytes until the character is complete."""

import sys

from pygpt import GPT2, StreamDecoder, Tokenizer

text = sys.argv[1] if len(sys.argv) > 1 else "Ladies and"

tokenizer = Tokenizer()
decoder = StreamDecoder(tokenizer)
with GPT2.load() as model:
    print(text, end="", flush=True)
    prompt = tokenizer.encode(text)
    for token in model.generate(prompt, max_new_tokens=60, temperature=0.8, top_k=40, seed=7, stop_strings="\n\n"):
        print(decoder.push(token), end="", flush=True)
    print(decoder.finish())  # bytes of a character that was cut
