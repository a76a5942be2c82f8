"""Look inside a model: what each layer would predict (the logit lens), and which heads the prediction needs (ablation).

python examples/inside.py "My lord, the king is dead, and"
python examples/inside.py "My lord, the king is dead, and" gpt2"""

import sys

import numpy as np

from pygpt import GPT2, Logit, Tokenizer, ablate_heads, logit_attribution, logit_lens, text_table

text = sys.argv[1] if len(sys.argv) > 1 else "My lord, the king is dead, and"
name = sys.argv[2] if len(sys.argv) > 2 else None  # None: PYGPT_MODEL, ./gpt2_124M.bin or the small model of the package

tokenizer = Tokenizer()
with GPT2.load(name) as model:
    ids = tokenizer.encode(text)
    layers = [f"layer {layer}" for layer in range(model.config.L)]
    heads = [f"head {head}" for head in range(model.config.NH)]

    # The residual of each layer through the last layernorm and the head: what if the network ended here?
    lens = logit_lens(model, ids, positions=[len(ids) - 1])[:, 0]  # (L + 1, V)
    best = np.argsort(-lens, axis=1)[:, :4].tolist()
    words = [[repr(tokenizer.decode([token])) for token in row] for row in best]
    print(text_table(words, ["embedding", *layers], ["1.", "2.", "3.", "4."]))

    # The number to explain: how far is the best token ahead of the second?
    lead = Logit(best[-1][0], against=best[-1][1])
    parts = logit_attribution(model, ids, lead)  # heads (L, NH), mlps (L,), embedding and rest
    print(f"\n{words[-1][0]} leads {words[-1][1]} by {lead(lens[-1:]):.3f}, and the parts add up to", end=" ")
    print(f"{sum(part.sum() for part in parts.values()):.3f}\n\nwhat each head adds to the lead")
    print(text_table(parts["heads"], layers, heads))

    # Without a head, later layers get other inputs, too. So the change is not what the head itself adds.
    print("\nhow the lead changes without each head")
    print(text_table(ablate_heads(model, ids, lead), layers, heads))
