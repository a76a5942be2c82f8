"""Small models and their expected results: answers, logits, losses and states of training, computed by one worker."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from pygpt import GPT2, Config, DataLoader, TrainableGPT2, Trainer, TrainingOptions, cpu_info
from pygpt._kernels import select_isa

SHAPE = Config(maxT=128, V=211, L=2, NH=3, C=48)
OTHER = Config(maxT=64, V=97, L=1, NH=2, C=32)
TOKENS = [(17 * i + 3) % SHAPE.V for i in range(SHAPE.maxT)]
STEPS = 4  # of a training run
PROMPTS = [TOKENS[:5], TOKENS[:40], [*TOKENS[:39], 7], [1], TOKENS[50:120]]
OPTIONS: list[dict[str, Any]] = [
    {"max_new_tokens": 8},
    {"max_new_tokens": 8, "sampler": "greedy"},
    {"max_new_tokens": 8, "temperature": 0.8, "top_p": 0.9, "seed": 7},
    {"max_new_tokens": 8, "top_k": 5, "repetition_penalty": 1.3, "seed": 8},
    {"total": 150, "overflow": "slide"},
]


def make_model(path: Path, config: Config = SHAPE, *, version: int = 3, seed: int = 1, sharp: float = 1.0) -> str:
    """Write a small model of random weights. `sharp` multiplies the logits, as training does."""
    with TrainableGPT2.random(config, seed=seed, threads=1) as model:
        model.tensor("wpe")[:] *= 10
        model.tensor("lnfw")[:] *= sharp
        model.save(path, version=version)
    return str(path)


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Compute with the named set, then with the previous set."""
    before = cpu_info()["isa"]
    select_isa(name)
    try:
        assert cpu_info()["isa"] == name
        yield
    finally:
        select_isa(before)


def state_of(trainer: Trainer) -> tuple[int, object, str]:
    """Everything that a training run is: updates made, place in the data, digest of weights and moments."""
    engine = trainer.engine
    digest = hashlib.sha256(b"".join(a.tobytes() for a in (engine.parameters, engine.first_moments, engine.second_moments)))
    return trainer.done, trainer.loader.state()["batch"], digest.hexdigest()


class Known:
    """The models' files in a folder, and their expected results."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.files = {version: make_model(place / f"{version}.bin", version=version, sharp=9) for version in (1, 3, 5)}
        self.other = make_model(place / "other.bin", OTHER, sharp=9)
        self.logits: dict[int, Any] = {}
        self.answers: dict[int, dict[tuple[int, int], list[int]]] = {}
        for version, file in self.files.items():
            with GPT2.load(file, threads=1) as model:
                self.logits[version] = model.logits(TOKENS)
                self.answers[version] = {
                    (p, o): list(model.generate(prompt, **options))
                    for p, prompt in enumerate(PROMPTS)
                    for o, options in enumerate(OPTIONS)
                }
        with GPT2.load(self.other, threads=1) as model:
            self.other_ids = list(model.generate([1, 2, 3], total=40))
        self.data = np.array([(31 * i + i // 7) % SHAPE.V for i in range(2000)], np.uint16)
        self.batches = self.some_batches()
        self.trained, self.losses = self.train(1)
        with TrainableGPT2.load(self.files[3], threads=1) as engine:
            trainer = self.trainer(engine)
            self.states = [state_of(trainer)]
            for _ in range(STEPS):
                trainer.step()
                self.states.append(state_of(trainer))

    def loader(self) -> DataLoader:
        """Batches of the data."""
        return DataLoader(self.data, B=2, T=16, shuffle_seed=3)

    def some_batches(self) -> list[list[Any]]:
        """The first batches of a new loader."""
        loader = self.loader()
        return [[part.copy() for part in loader.next_batch()] for _ in range(4)]

    def losses_of(self, engine: TrainableGPT2) -> bytes:
        """The bytes of an evaluation."""
        return engine.evaluate(*self.batches[3]).tobytes()

    def trainer(self, engine: TrainableGPT2) -> Trainer:
        """A run of STEPS steps."""
        return Trainer(engine, self.loader(), TrainingOptions(lr=1e-2, clip=1.0, steps=STEPS))

    def train(self, threads: int) -> tuple[str, bytes]:
        """Make two updates by hand: the digest of the weights, and the bytes of an evaluation."""
        with TrainableGPT2.load(self.files[3], threads=threads) as model:
            for step in (1, 2):
                model.forward(*self.batches[step])
                model.backward()
                model.gradient_norm()
                model.update(lr=1e-3, step=step, weight_decay=0.1)
            return hashlib.sha256(model.parameters.tobytes()).hexdigest(), self.losses_of(model)
