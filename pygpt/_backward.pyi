from typing import Any

import numpy as np
import numpy.typing as npt

from ._kernels import Floats, Step, Weights
from .config import Config

Array = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int32]

class TrainStep(Step):
    def __init__(
        self,
        weights: Weights,
        nth: int,
        spins: int,
        config: Config,
        parameters: Array,
        gradients: Array,
        first: Array,
        second: Array,
        *,
        keep: bool,
    ) -> None: ...
    @property
    def ready(self) -> bool: ...
    @property
    def rows(self) -> int: ...
    @property
    def updates(self) -> int: ...
    def begin_forward(self, inputs: Ids, targets: Ids, active: int) -> None: ...
    def finish_forward(self) -> Floats: ...
    def begin_backward(
        self, accumulate: bool, scale: float, active: int, dlogits: Array | None = None, out: Array | None = None
    ) -> None: ...
    @property
    def squares(self) -> bytearray: ...
    def begin_norm(self, start: int, stop: int, active: int) -> None: ...
    def begin_update(self, numbers: Any, spans: npt.NDArray[np.float64], active: int) -> None: ...
    def begin_stream(self) -> None: ...
