"""Train a tiny GPT-2 from random weights on a few lines, save it, and complete a text with it.

    python examples/train_tiny.py              150 steps
    python examples/train_tiny.py 5 tiny.bin   five steps, and the model is saved as tiny.bin

The loss begins at ln(50257) = 10.8, the loss of a random guess. After 150 steps the model knows the text by heart."""

import sys

from pygpt import GPT2, Config, DataLoader, Tokenizer, TrainableGPT2, Trainer, TrainingOptions

TEXT = """\
To be, or not to be, that is the question:
Whether 'tis nobler in the mind to suffer
The slings and arrows of outrageous fortune,
Or to take arms against a sea of troubles
And by opposing end them.
"""

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 150
path = sys.argv[2] if len(sys.argv) > 2 else None

tokenizer = Tokenizer()
tokens = tokenizer.encode(TEXT * 4)
config = Config(L=2, NH=4, C=64, V=tokenizer.V, maxT=64)  # V: GPT-2's 50,257 ids
options = TrainingOptions(steps=steps, lr=3e-3, clip=1.0, schedule="cosine", warmup=min(10, steps))
prompt = tokenizer.encode("To be, or")

with TrainableGPT2.random(config, seed=1) as engine:
    loader = DataLoader(tokens, B=4, T=32, shuffle_seed=1)  # batches of B sequences of T tokens
    trainer = Trainer(engine, loader, options)
    for _ in range(steps):
        record = trainer.step()  # forward, backward, clip, AdamW
        if record.step % 10 == 0 or record.step == steps - 1:
            print(f"step {record.step:3}  loss {record.loss:6.3f}  lr {record.lr:.1e}  {record.ms:5.0f} ms")
    if path is not None:
        engine.save(path)  # then: pygpt chat -m tiny.bin
    with engine.model() as model:
        print(repr(tokenizer.decode(model.generate(prompt, max_new_tokens=12, sampler="greedy"))))

if path is not None:
    with GPT2.load(path) as model:
        print(repr(tokenizer.decode(model.generate(prompt, max_new_tokens=12, sampler="greedy"))))
