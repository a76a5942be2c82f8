"""Activations: what GPT2.activations() returns, and the edits that change them.

A step of the network runs phase by phase. A Watch lets it stop after the phases whose results somebody asked for. While the
workers rest, the Watch copies these results or changes them. All other phases run together, as in a step without a Watch.

add(), scale() and zero() make edits. GPT2.activations() describes the names, the shapes and how edits are given.
"""

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from math import prod

from ._kernels import PHASES
from .config import Config
from .errors import InputError, check_whole, near, shown

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, SupportsIndex, TypeAlias

    import numpy as np
    import numpy.typing as npt

    from ._activations import WatchedStep

    Array = npt.NDArray[np.float32]
    Value: TypeAlias = "npt.ArrayLike | Callable[[Array], npt.ArrayLike | None] | Edit"
    Place = tuple[str, SupportsIndex | None, SupportsIndex | None]

MOST_BYTES = 2 << 30  # that activations() takes by itself; `out` may hold more

# Each activation: the phase that computes it, and the step's buffer that then has it. In the order of the network.
NAMES = {
    "encoded": ("encoder", "residual"),
    "ln1": ("ln1", "ln"),
    "q": ("qkv", "qkv"),
    "k": ("qkv", "qkv"),
    "v": ("qkv", "qkv"),
    "probs": ("attention", "probs"),
    "atty": ("attention", "atty"),
    "attproj": ("attproj", "proj"),
    "residual2": ("attproj", "residual"),
    "ln2": ("ln2", "ln"),
    "fch": ("fc", "fch"),
    "fch_gelu": ("fc", "fch_gelu"),
    "fcproj": ("fcproj", "proj"),
    "residual3": ("fcproj", "residual"),
    "lnf": ("lnf", "ln"),
    "logits": ("logits", "logits"),
}
ORDER = {name: i for i, name in enumerate(NAMES)}
WHOLE = ("encoded", "lnf", "logits")  # without layers
HEADS = ("q", "k", "v", "probs", "atty")
LAYER_PHASES = PHASES.index("lnf") - PHASES.index("ln1")


def add(vector: "npt.ArrayLike") -> "Edit":
    """Return an edit that adds a number or an array to an activation. Its shapes are those that replace the activation."""
    return Edit("add", vector)


def scale(factor: "npt.ArrayLike") -> "Edit":
    """Return an edit that multiplies an activation by a number or an array, with the shapes that replace the activation."""
    return Edit("scale", factor)


def zero(*, heads: "Iterable[SupportsIndex] | None" = None, neurons: "Iterable[SupportsIndex] | None" = None) -> "Edit":
    """Return an edit that sets an activation to zero: only these heads of q, k, v, probs or atty, only these neurons
    (channels), or all of it."""
    return Edit("zero", None, heads, neurons)


class Edit:
    """A change of an activation. add(), scale() and zero() make it."""

    def __init__(
        self,
        kind: str,
        value: "npt.ArrayLike | None" = None,
        heads: "Iterable[SupportsIndex] | None" = None,
        neurons: "Iterable[SupportsIndex] | None" = None,
    ) -> None:
        self.kind, self.value, self.heads, self.neurons = kind, value, heads, neurons


class _Checked:
    """An edit of one (name, layer, position), ready for any step.

    An activation of n positions is (n, width); of probs (n, NH, keys). covers: how many positions a value for each has."""

    def __init__(self, config: Config, place: "Any", value: "Any", T: int | None) -> None:
        if not isinstance(place, tuple) or len(place) != 3:
            raise InputError(f"edit of {shown(place)}: it must be a tuple (name, layer, position or None)")
        self.name = _check_name(place[0])
        self.what = f"edit of {shown(place)}"
        self.layer = _check_layer(config, self.name, place[1], self.what)
        limit = config.maxT if T is None else T
        position = place[2]
        self.position = None if position is None else check_whole(f"{self.what}: the position", position, 0, limit - 1)
        self.covers: int | None = None
        self.function = value if callable(value) else None
        edit = value if isinstance(value, Edit) else Edit("replace", value)
        self.kind = edit.kind
        if edit.kind == "zero":
            self.channels = self._zeroed(config, edit)
        elif self.function is None:
            self.value = self._array(config, edit.value, T)

    def _zeroed(self, config: Config, edit: Edit) -> "Any":
        """Return the index of the heads (of probs) or channels that become zero."""
        size = width_of(config, self.name) // config.NH if self.name != "probs" else 1
        heads = _check_indices(f"{self.what}: a head", edit.heads, config.NH)
        if edit.heads is not None and self.name not in HEADS:
            raise InputError(f"{self.what}: {self.name} has no heads; only {', '.join(HEADS)} have heads")
        if edit.neurons is not None and self.name == "probs":
            raise InputError(f"{self.what}: probs have no neurons; give heads")
        neurons = _check_indices(f"{self.what}: a neuron", edit.neurons, width_of(config, self.name))
        if edit.heads is None and edit.neurons is None:
            return slice(None)
        return [head * size + i for head in heads for i in range(size)] + neurons

    def _array(self, config: Config, value: "Any", T: int | None) -> "Array":
        """Return a value as float32: () or the shape of one position; or one for each of `covers` positions, first axis."""
        import numpy as np

        try:
            array = np.asarray(value, np.float32)
        except (TypeError, ValueError):
            raise InputError(
                f"{self.what} is {shown(value)}: it must be numbers, a function, add(), scale() or zero()"
            ) from None
        probs = self.name == "probs"
        one = (config.NH, config.maxT) if probs else (width_of(config, self.name),)
        many = self.position is None and array.ndim == len(one) + 1
        if many:
            array = np.moveaxis(array, 1, 0) if probs else array
            self.covers = len(array)
        least = len(array) if many else (self.position or 0) + 1
        fits = array.ndim in (0, len(one) + many) and (not array.ndim or array.shape[many:] == one)
        if probs and array.ndim in (2, 2 + many):
            fits = array.shape[many] == config.NH and least <= array.shape[-1] <= config.maxT
        if not fits or (many and (len(array) > config.maxT or T not in (None, len(array)))):
            count = "T" if T is None else str(T)
            single = f"({config.NH}, {count})" if probs else f"({one[0]},)"
            several = f"({config.NH}, {count}, {count})" if probs else f"({count}, {one[0]})"
            rule = f"() or {single}" + (f" or {several}" if self.position is None else "")
            raise InputError(f"{self.what} has the shape {np.shape(value)}: it must be {rule}")
        return array

    def among(self, places: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Return which ascending (row, position) of a sequence the edit concerns."""
        if self.position is None:
            return places if self.covers is None else [place for place in places if place[1] < self.covers]
        at = self.position - places[0][1]
        return places[at : at + 1] if at >= 0 else []

    def apply(self, block: "Array", positions: "npt.NDArray[np.intp]") -> "Array":
        """Return the edited block of an activation at these positions. The block is a copy."""
        import numpy as np

        if self.function is not None:
            return self._call(block)
        if self.kind == "zero":
            block[:, self.channels] = 0
            return block
        value = self.value
        if value.ndim == block.ndim:
            value = value[positions]
        if self.name == "probs" and value.ndim:  # a step has as many keys as its sequence has tokens
            missing = max(block.shape[-1] - value.shape[-1], 0)
            value = np.pad(value, [(0, 0)] * (value.ndim - 1) + [(0, missing)])[..., : block.shape[-1]]
        if self.kind == "add":
            return block + value
        if self.kind == "scale":
            return block * value
        return np.broadcast_to(value, block.shape)

    def _call(self, block: "Array") -> "Array":
        """Call the function with what an array for this place would have: (n, width), or (width,) for one position."""
        import numpy as np

        assert self.function is not None
        given = np.moveaxis(block, 1, 0) if self.name == "probs" else block  # [n, NH, keys] -> [NH, n, keys]
        axis = 1 if self.name == "probs" else 0
        given = np.ascontiguousarray(given if self.position is None else given.take(0, axis))
        result = self.function(given)
        try:
            new = np.broadcast_to(np.asarray(given if result is None else result, np.float32), given.shape)
        except (TypeError, ValueError):
            got = f"the shape {np.shape(result)}" if hasattr(result, "shape") else shown(result)
            raise InputError(f"{self.what}: the function returned {got}, it must return {given.shape} or None") from None
        if self.position is not None:
            new = np.expand_dims(new, axis)
        return np.moveaxis(new, 0, 1) if self.name == "probs" else new


class Edits:
    """Checked edits of one sequence. T: the number of its tokens, or None if tokens follow. GPT2.activations() describes them.

    Raises InputError for an unknown name, a layer or position that is not there, and a value of another shape."""

    def __init__(self, config: Config, edits: "Mapping[Place, Value]", T: int | None = None) -> None:
        if not isinstance(edits, Mapping):
            raise InputError(f"edits are {shown(edits)}: they must map (name, layer, position or None) to values")
        self.edits = [_Checked(config, place, value, T) for place, value in edits.items()]
        self.together = any(edit.function is not None and edit.position is None for edit in self.edits)


class Capture:
    """The arrays that GPT2.activations() fills. Raises InputError for everything that it refuses, before it takes memory."""

    def __init__(
        self,
        config: Config,
        T: int,
        names: "Iterable[str] | str",
        layers: "Iterable[SupportsIndex] | None" = None,
        positions: "Iterable[SupportsIndex] | None" = None,
        out: "Mapping[str, Array] | None" = None,
    ) -> None:
        import numpy as np

        names = [names] if isinstance(names, str) else _listed("names", names)
        if not names:
            raise InputError(f"names is empty: give at least one of {', '.join(NAMES)}")
        asked = list(dict.fromkeys(_check_name(name) for name in names))
        self.layers = _check_indices("a layer of layers", layers, config.L) if layers is not None else [*range(config.L)]
        all_or_some = range(T) if positions is None else _check_indices("a position of positions", positions, T)
        self.positions, self.all = np.array(all_or_some, np.intp), positions is None
        shapes = {name: self._shape(config, T, name) for name in asked}
        out = {} if out is None else out
        _check_out(shapes, out)
        size = 4 * sum(prod(shape) for name, shape in shapes.items() if name not in out)
        if size > MOST_BYTES:
            way = "ask for fewer names, layers or positions, or give arrays in out, such as numpy.memmap"
            raise InputError(f"the activations take {size} bytes, and the limit is {MOST_BYTES}: {way}")
        self.arrays = {name: out[name] if name in out else np.zeros(shape, np.float32) for name, shape in shapes.items()}
        self.sites = [(name, layer) for name in asked for layer in ([0] if name in WHOLE else sorted({*self.layers}))]
        self._wanted = {*self.positions.tolist()} if {"lnf", "logits"} & shapes.keys() else set()

    def _shape(self, config: Config, T: int, name: str) -> tuple[int, ...]:
        count = len(self.positions)
        one = (config.NH, count, T) if name == "probs" else (count, width_of(config, name))
        return one if name in WHOLE else (len(self.layers), *one)

    def wants(self, position: int) -> bool:
        """Return whether the step must compute lnf and logits of a position."""
        return position in self._wanted

    def put(self, name: str, layer: int, values: "Array", positions: "npt.NDArray[np.intp]") -> None:
        """Keep an activation of these ascending positions, (n, width), or (n, NH, keys) of probs."""
        import numpy as np

        place = np.flatnonzero(np.isin(self.positions, positions))
        rows = np.searchsorted(positions, self.positions[place])
        if self.all and len(place) == len(positions):  # slices copy once
            place, rows = slice(positions[0], positions[-1] + 1), slice(None)  # type: ignore[assignment]
        whole = self.arrays[name]
        for target in [whole] if name in WHOLE else [whole[i] for i, each in enumerate(self.layers) if each == layer]:
            if name == "probs":
                target[:, place, : values.shape[-1]] = np.moveaxis(values[rows], 1, 0)
                target[:, place, values.shape[-1] :] = 0
            else:
                target[place] = values[rows]


class Watch:
    """What is read and changed in one step.

    edits: of all caches, or of each cache that has some. capture: of a step with one cache; the step then ends after the last
    phase that the capture needs. failed: the edits that raised an exception, or None."""

    def __init__(self, edits: "Edits | Mapping[Any, Edits]", capture: "Capture | None" = None) -> None:
        self._edits, self._capture = edits, capture
        self.failed: Edits | None = None

    def begin(self, work: "WatchedStep", config: Config, rows: "list[tuple[Any, Any, bool]]") -> None:
        """Plan the stops of a prepared step, and select the phases of its first round."""
        self._work, self._config, self._at, self._end = work, config, 0, work.phases
        places: dict[Any, list[tuple[int, int]]] = {}  # of each cache: (row, position)
        for r, (_, cache, _) in enumerate(rows):
            of_cache = places.setdefault(cache, [])
            of_cache.append((r, cache.length + len(of_cache)))
        self._places = [place for of_cache in places.values() for place in of_cache]
        self._wanted = {r: i for i, r in enumerate(r for r, (_, _, want) in enumerate(rows) if want)}
        self._changes: dict[tuple[str, int], list[_Change]] = {}
        for cache, of_cache in places.items():
            edits = self._edits if isinstance(self._edits, Edits) else self._edits.get(cache)
            if edits is None:
                continue
            for edit in edits.edits:
                if found := self._rows(edit.name, edit.among(of_cache)):
                    change = _Change(edits, edit, found, of_cache[-1][1] + 1)
                    self._changes.setdefault((edit.name, edit.layer), []).append(change)
        self._plan()
        self._continue()

    def _rows(self, name: str, places: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Return where an activation's buffer has these (row, position): lnf and logits have only the wanted rows."""
        if name not in ("lnf", "logits"):
            return places
        return [(self._wanted[row], position) for row, position in places if row in self._wanted]

    def _plan(self) -> None:
        """Find the stops: (number of phases, order, name, layer)."""
        sites = {*self._changes}
        if self._capture is not None:
            captured = {(name, layer) for name, layer in self._capture.sites if self._rows(name, self._places)}
            sites |= captured
            self._end = min(self._end, max(_stop(self._config, *site) for site in self._capture.sites))
        stops = [(_stop(self._config, name, layer), ORDER[name], name, layer) for name, layer in sites]
        for name, layer in self._changes:
            if name in ("attproj", "fcproj"):  # their phase overwrites the residual that they are added to
                stops.append((_stop(self._config, name, layer) - 1, -1, "before", layer))
        self._stops = deque(sorted(stop for stop in stops if stop[0] <= self._end))
        names = {name for name, _ in sites}
        self._work.keep("probs" in names, "fch" in names)

    def more(self) -> bool:
        """Read and change what the phases so far have computed. Return whether another round follows, and select its phases."""
        while self._stops and self._stops[0][0] == self._at:
            _, _, name, layer = self._stops.popleft()
            self._visit(name, layer)
        return self._continue()

    def _continue(self) -> bool:
        if self._at == self._end:
            return False
        self._at = self._stops[0][0] if self._stops else self._end
        self._work.run_to(self._at, next((layer for _, _, name, layer in self._stops if name == "probs"), -1))
        return True

    def _visit(self, name: str, layer: int) -> None:
        import numpy as np

        if name == "before":
            self._before = np.array(self._work.view("residual", layer))
            return
        values = self._values(name, layer)
        for change in self._changes.get((name, layer), ()):
            self.failed = change.edits
            self._change(name, layer, values, change)
            self.failed = None
        if self._capture is not None:
            places = self._rows(name, self._places)
            positions = np.array([position for _, position in places], np.intp)
            self._capture.put(name, layer, values[..., : positions[-1] + 1] if name == "probs" else values, positions)

    def _values(self, name: str, layer: int) -> "Array":
        """Return an activation of all rows, (R, width) or (R, NH, keys): a view of the step's buffer, or for attproj and fcproj
        the sum that the phase has added to the residual."""
        import numpy as np

        buffer, width = NAMES[name][1], width_of(self._config, name)
        view: Array = np.asarray(self._work.view(buffer, layer))
        if name == "probs":
            return view.swapaxes(0, 1)  # [NH, R, keys] -> [R, NH, keys]
        if buffer == "proj":
            total: Array = view + np.asarray(self._work.view(f"{name}b", layer))
            return total
        start = "qkv".index(name) * width if buffer == "qkv" else 0
        return view[:, start : start + width]

    def _change(self, name: str, layer: int, values: "Array", change: "_Change") -> None:
        """Edit values, and compute again what the same phase has already derived from them."""
        import numpy as np

        rows, positions = (np.array(each, np.intp) for each in zip(*change.places, strict=True))
        part = (rows, ..., slice(change.keys if name == "probs" else None))
        new = change.edit.apply(values[part], positions)
        if name == "probs":
            new = np.where(np.arange(change.keys) <= positions[:, None, None], new, np.float32(0))
            changed = np.zeros(values.shape[:2], np.uint8)
            changed[rows] = (new != values[part]).any(-1)  # other heads keep their bits
            values[part] = new
            self._work.mix(layer, changed)
            return
        values[part] = new
        if name in ("k", "v"):
            self._work.store_keys_values(layer)
        elif name == "fch":
            for row in rows:
                self._work.activate(row)
        elif name in ("attproj", "fcproj"):
            np.asarray(self._work.view("residual", layer))[rows] = self._before[rows] + values[rows]


class _Change:
    """An edit in one step. places: its (row, position). keys: the number of tokens of the sequence after the step."""

    def __init__(self, edits: Edits, edit: _Checked, places: list[tuple[int, int]], keys: int) -> None:
        self.edits, self.edit, self.places, self.keys = edits, edit, places, keys


# ------------------------------------------------------------------------------------------------ checks


def width_of(config: Config, name: str) -> int:
    """Return the values of an activation at one position; of probs for one head, the most."""
    return {"probs": config.maxT, "fch": config.F, "fch_gelu": config.F, "logits": config.V}.get(name, config.C)


def _stop(config: Config, name: str, layer: int) -> int:
    """Return after how many phases of a step an activation is there."""
    phase = PHASES.index(NAMES[name][0])
    return phase + 1 if phase == 0 else phase + LAYER_PHASES * (layer if name not in WHOLE else config.L - 1) + 1


def _listed(what: str, values: "Any") -> "list[Any]":
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise InputError(f"{what} is {shown(values)}: it must be a list")
    return list(values)


def _check_name(name: object) -> str:
    if not isinstance(name, str) or name not in NAMES:
        raise InputError(f"{shown(name)} is not an activation: {near(name, NAMES)}")
    return name


def _check_layer(config: Config, name: str, layer: object, what: str) -> int:
    if name not in WHOLE:
        return check_whole(f"{what}: the layer", layer, 0, config.L - 1)
    if layer is not None:
        raise InputError(f"{what}: {name} has no layers, so the layer must be None")
    return 0


def _check_indices(what: str, values: "Any", count: int) -> list[int]:
    """Return whole numbers below `count`."""
    return [check_whole(what, value, 0, count - 1) for value in _listed(f"{what}s", values)]


def _check_out(shapes: "Mapping[str, tuple[int, ...]]", out: "Any") -> None:
    """Raise InputError unless `out` maps asked names to writable float32 arrays of their shapes."""
    import numpy as np

    for name, array in out.items():
        if name not in shapes:
            raise InputError(f"out has {shown(name)}, which is not among the names: ask for it, or leave it out")
        found = getattr(array, "shape", None), str(getattr(array, "dtype", None))
        if not isinstance(array, np.ndarray) or found != (shapes[name], "float32") or not array.flags.writeable:
            kind = f"has the shape {found[0]} and the type {found[1]}" if found[0] is not None else f"is {shown(array)}"
            raise InputError(f"out of {name} {kind}: it must be a writable float32 array {shapes[name]}")
