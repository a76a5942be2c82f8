"""Complete several texts together: each step of the network serves all of them, so the weights are read once a step.

    python examples/batch.py "Ladies and" "My lord," "Enter"

Each completion has the same tokens that it would have alone. The last lines check that."""

import sys

from pygpt import GPT2, Tokenizer

texts = sys.argv[1:] or ["Ladies and", "My lord,", "Enter"]
seed = 7

tokenizer = Tokenizer()
with GPT2.load() as model:
    prompts = [tokenizer.encode(text) for text in texts]
    completions = model.generate_batch(prompts, max_new_tokens=12, temperature=0.8, seed=seed, top_logprobs=1)
    for text, completion in zip(texts, completions, strict=True):
        logprob = sum(info.logprob for info in completion.infos)  # of the new tokens, in nats
        print(f"{logprob:8.2f} nats, {completion.finish_reason}: {text + tokenizer.decode(completion.tokens)!r}")

    for prompt, completion in zip(prompts, completions, strict=True):
        alone = list(model.generate(prompt, max_new_tokens=12, temperature=0.8, seed=seed))
        assert alone == completion.tokens
