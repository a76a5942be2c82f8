"""Write the generation loop by hand: a prompt, then one step of the network for each new token of two sequences.

    python examples/step_by_hand.py

`step(rows)` takes rows (token, cache, want_logits). A row is one token of one sequence; the cache says which sequence."""

import numpy as np

from pygpt import GPT2, Tokenizer

tokenizer = Tokenizer()
with GPT2.load() as model:
    sequences = [tokenizer.encode("Ladies and"), tokenizer.encode("My lord,")]
    caches = [model.new_cache() for _ in sequences]

    # Prefill: all tokens of both prompts in one step. Only the last row of each prompt needs logits.
    rows = [
        (token, cache, i == len(prompt) - 1)
        for prompt, cache in zip(sequences, caches, strict=True)
        for i, token in enumerate(prompt)
    ]
    logits = model.step(rows)  # rows -> (2, V)

    # Decode: each step takes one new token of each sequence.
    for _ in range(8):
        new = logits.argmax(axis=1).tolist()  # (2, V) -> 2 ids: greedy
        for sequence, token in zip(sequences, new, strict=True):
            sequence.append(token)
        logits = model.step([(token, cache, True) for token, cache in zip(new, caches, strict=True)])  # -> (2, V)

    for sequence in sequences:
        print(repr(tokenizer.decode(sequence)))

    # A cache can give rows back. The same token after the same tokens has the same logits, bit for bit.
    caches[0].truncate(len(sequences[0]) - 1)
    again = model.step([(sequences[0][-1], caches[0], True)])  # -> (1, V)
    assert np.array_equal(again[0], logits[0])
