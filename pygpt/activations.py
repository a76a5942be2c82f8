"""Activations: what GPT2.activations() returns, and the edits that change them.

A Watch lets a step stop after the phases whose results somebody asked for. While the workers rest, it changes or copies them.
In every array, the positions are the last axis but one: (n, width), and (NH, n, keys) for probs."""

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple, SupportsIndex, TypeAlias

import numpy as np
import numpy.typing as npt

from ._kernels import PHASES, Step
from .config import Config
from .errors import InputError, check_whole, listed, near, shown

Array = npt.NDArray[np.float32]
Value: TypeAlias = "npt.ArrayLike | Callable[[Array], npt.ArrayLike | None] | Edit"
Places = Sequence[tuple[int, int]]  # (row of a buffer, position in its sequence)

MOST_BYTES = 2 << 30  # that activations() takes by itself; `out` may hold more

# The activations that are there after each phase, in the order of the network.
AFTER = {"encoder": "encoded", "ln1": "ln1", "qkv": "q k v", "attention": "probs atty", "attproj": "attproj residual2"}
AFTER |= {"ln2": "ln2", "fc": "fch fch_gelu", "fcproj": "fcproj residual3", "lnf": "lnf", "logits": "logits"}
NAMES = {name: PHASES.index(phase) for phase, names in AFTER.items() for name in names.split()}
ORDER = {name: i for i, name in enumerate([*NAMES, "before"])}  # of what is done after one phase
WHOLE = ("encoded", "lnf", "logits")  # without layers
HEADS = ("q", "k", "v", "probs", "atty")


class Edit(NamedTuple):
    """A change that add(), scale() or zero() makes: operation(x, value), or the value, replaces all or a part of x."""

    operation: Callable[[Array, Array], Array] | None
    value: npt.ArrayLike
    heads: Any = None
    neurons: Any = None

    def at(self, config: Config, name: str) -> Any:
        """Return the index of what changes in an activation."""
        if self.heads is None and self.neurons is None:
            return ...
        if (self.heads is not None and name not in HEADS) or (self.neurons is not None and name == "probs"):
            raise InputError(f"zero() of {name}: only {', '.join(HEADS)} have heads, and only probs have no neurons")
        heads = [] if self.heads is None else _indices("head", self.heads, config.NH)
        neurons = [] if self.neurons is None else _indices("neuron", self.neurons, width_of(config, name))
        return heads if name == "probs" else (..., neurons + [head * config.HS + i for head in heads for i in range(config.HS)])


def add(vector: npt.ArrayLike) -> Edit:
    """Return an edit that adds a number, or an array with the shape of a replacement, to an activation."""
    return Edit(operator.add, vector)


def scale(factor: npt.ArrayLike) -> Edit:
    """Return an edit that multiplies an activation by a number, or by an array with the shape of a replacement."""
    return Edit(operator.mul, factor)


def zero(*, heads: Iterable[SupportsIndex] | None = None, neurons: Iterable[SupportsIndex] | None = None) -> Edit:
    """Return an edit that sets an activation to 0: these heads of q, k, v, probs or atty, these channels, or by default all."""
    return Edit(None, 0, heads, neurons)


class Change:
    """A checked edit of one place. Edits describes the arguments and the errors."""

    def __init__(self, config: Config, place: Any, value: Any, T: int | None) -> None:
        self.what = f"edit of {shown(place)}"
        if not isinstance(place, tuple) or len(place) != 3:
            raise InputError(f"{self.what}: a key must be (name, layer or None, position or None)")
        self.name, layer, position = check_name(place[0]), *place[1:]
        if self.name in WHOLE and layer is not None:
            raise InputError(f"{self.what}: {self.name} has no layers, so the layer must be None")
        self.layer = 0 if self.name in WHOLE else check_whole(f"{self.what}: the layer", layer, 0, config.L - 1)
        end = (T or config.maxT) - 1
        self.position = None if position is None else check_whole(f"{self.what}: the position", position, 0, end)
        self.function = value if callable(value) else None
        if self.function is not None:
            return
        edit = value if isinstance(value, Edit) else Edit(None, value)
        self._operation, self._at = edit.operation, edit.at(config, self.name)
        try:
            with np.errstate(over="raise"):
                array = np.asarray(edit.value).astype(np.float32, casting="same_kind", copy=False)
        except (TypeError, ValueError, FloatingPointError):
            raise InputError(f"{self.what} is {shown(edit.value)}: give numbers, a function, add() or scale()") from None
        one = (config.NH, T) if self.name == "probs" else (width_of(config, self.name),)
        shapes = [(), one, (*one[:-1], T, one[-1])]  # one number, one position, all positions
        shapes = [shape for shape in shapes[: 3 if self.position is None else 2] if None not in shape]
        if array.shape not in shapes:
            raise InputError(f"{self.what} has the shape {array.shape}: it must be {' or '.join(map(str, shapes))}")
        self._value = np.expand_dims(array, -2) if array.shape == one else array  # broadcasts to the activation

    def apply(self, x: Array, positions: list[int]) -> Array:
        """Return the edited values of an activation at these positions. x: a copy of the values."""
        if self.function is None:
            value = self._value[..., positions, :] if self._value.ndim and self._value.shape[-2] > 1 else self._value
            x[self._at] = value if self._operation is None else self._operation(x[self._at], value)
            return x
        given = x if self.position is None else x[..., 0, :]
        result = self.function(given)
        try:
            with np.errstate(over="raise"):
                new = np.broadcast_to(given if result is None else result, given.shape).astype(np.float32, casting="same_kind")
        except (TypeError, ValueError, FloatingPointError):
            got = f"an array {result.shape}" if isinstance(result, np.ndarray) else shown(result)
            raise InputError(f"{self.what}: the function returned {got}: it must return numbers {given.shape}") from None
        return new if self.position is None else np.expand_dims(new, -2)


class Edits:
    """Checked edits of a sequence, in order. T: the number of its tokens; None if it may grow. See GPT2.activations().

    Raises InputError for an unknown name, a layer or position that is not there, and a value of another shape."""

    def __init__(self, config: Config, edits: Mapping[Any, Value], T: int | None = None) -> None:
        if not isinstance(edits, Mapping):
            raise InputError(f"edits are {shown(edits)}: they must map (name, layer or None, position or None) to changes")
        self.changes = [Change(config, place, value, T) for place, value in edits.items()]


class Capture:
    """The arrays that GPT2.activations() returns. It describes the arguments and the errors."""

    def __init__(self, config: Config, T: int, names: Any, layers: Any, positions: Any, out: Any) -> None:
        names = [check_name(name) for name in ([names] if isinstance(names, str) else listed("names", names))]
        if not names:
            raise InputError(f"names is empty: give at least one of {', '.join(NAMES)}")
        self._layers = [*range(config.L)] if layers is None else _indices("layer", layers, config.L)
        self._positions = [*range(T)] if positions is None else _indices("position", positions, T)
        count, shapes = len(self._positions), {}
        for name in names:
            one = (config.NH, count, T) if name == "probs" else (count, width_of(config, name))
            shapes[name] = one if name in WHOLE else (len(self._layers), *one)
        out = {} if out is None else dict(out)
        for name, array in out.items():
            found = getattr(array, "shape", None), getattr(array, "dtype", type(array))
            if found != (shapes.get(name), np.float32) or not getattr(array, "flags", {"WRITEABLE": 0})["WRITEABLE"]:
                kind = f"out of {shown(name)} has the shape {found[0]} and the type {found[1]}"
                raise InputError(f"{kind}: out takes writable float32 arrays for these names: {shapes}")
        size = 4 * sum(prod(shape) for name, shape in shapes.items() if name not in out)
        if size > MOST_BYTES:
            way = "ask for fewer names, layers or positions, or give arrays in out, such as numpy.memmap"
            raise InputError(f"the activations take {size} bytes, and the limit is {MOST_BYTES}: {way}")
        self.arrays = {name: out[name] if name in out else np.empty(shape, np.float32) for name, shape in shapes.items()}
        self.sites = {(name, layer) for name in shapes for layer in ([0] if name in WHOLE else self._layers)}
        self.wanted = {*self._positions} if {"lnf", "logits"} & shapes.keys() else set()  # positions

    def put(self, name: str, layer: int, values: Array, places: Places) -> None:
        """Keep values at these places."""
        row_of, array = {position: row for row, position in places}, self.arrays[name]
        kept = [i for i, position in enumerate(self._positions) if position in row_of]
        at, rows = _span(kept), _span([row_of[self._positions[i]] for i in kept])
        for target in [array] if name in WHOLE else [array[i] for i, each in enumerate(self._layers) if each == layer]:
            target[..., at, : values.shape[-1]] = values[..., rows, :]
            target[..., at, values.shape[-1] :] = 0  # keys of later chunks


class Watch:
    """What a step reads and changes. edits: of all caches, or of each cache that has some. capture: of a step with one cache,
    which ends after the last phase that is needed. editing: the edits that are being made, or have raised an exception."""

    def __init__(self, edits: "Edits | Mapping[Any, Edits]", capture: Capture | None = None) -> None:
        self._edits, self._capture = edits, capture
        self._captured = set() if capture is None else capture.sites
        self.editing: Edits | None = None

    def begin(self, work: Step, config: Config, rows: Sequence[tuple[Any, Any, bool]]) -> None:
        """Plan the stops of a prepared step, and select the phases of its first round."""
        self._work, self._at = work, 0
        self._wanted = {r: i for i, r in enumerate(r for r, row in enumerate(rows) if row[2])}
        sequences: dict[Any, list[tuple[int, int]]] = {}
        for r, (_, cache, _) in enumerate(rows):
            self._places = sequences.setdefault(cache, [])  # of the only cache, if there is a capture
            self._places.append((r, cache.length + len(self._places)))
        self._sites: dict[tuple[str, int], list[tuple[Edits | None, Change, Places, int]]] = {}
        for cache, places in sequences.items():
            edits = self._edits if isinstance(self._edits, Edits) else self._edits.get(cache)
            for change in edits.changes if edits is not None else ():
                if found := self._rows(change.name, [place for place in places if change.position in (None, place[1])]):
                    site = self._sites.setdefault((change.name, change.layer), [])
                    site.append((edits, change, found, places[-1][1] + 1))
        self._end = work.watch(share_ln=any(name in ("ln1", "ln2", "lnf") for name, _ in self._sites))
        if self._captured:
            self._end = min(self._end, max(_stop(config, *site) for site in self._captured))
        stops = [(_stop(config, *site), ORDER[site[0]], *site) for site in self._captured | self._sites.keys()]
        added = [site for site in self._sites if site[0] in ("attproj", "fcproj")]  # to a residual that their phase overwrites
        stops += [(_stop(config, *site) - 1, ORDER["before"], "before", site[1]) for site in added]
        self._stops = sorted(stop for stop in stops if stop[0] <= self._end)
        self.more()

    def more(self) -> bool:
        """Change and copy what the phases so far have computed. Select the next phases, and return whether there are any."""
        while self._stops and self._stops[0][0] == self._at:
            self._visit(*self._stops.pop(0)[2:])
        first, self._at = self._at, self._stops[0][0] if self._stops else self._end
        self._work.run_to(self._at, next((layer for *_, name, layer in self._stops if name == "probs"), -1))
        return first < self._at

    def _rows(self, name: str, places: Places) -> Places:
        """Return the places in the memory of an activation. lnf and logits have only the wanted rows."""
        wanted = [(self._wanted[row], position) for row, position in places if row in self._wanted]
        return wanted if name in ("lnf", "logits") else places

    def _view(self, name: str, layer: int) -> Array:
        memory, shape, columns = self._work.view(name, layer)
        return np.frombuffer(memory, np.float32).reshape(shape)[..., columns]

    def _visit(self, name: str, layer: int) -> None:
        if name == "before":
            self._before = self._view("residual2", layer).copy()
            return
        values = self._view(name, layer)
        for edits, change, places, keys in self._sites.get((name, layer), ()):
            self.editing = edits
            self._change(change, values, places, slice(keys if name == "probs" else None))
        self.editing = None
        if self._capture is not None and (name, layer) in self._captured:
            kept = values[..., : self._places[-1][1] + 1] if name == "probs" else values
            self._capture.put(name, layer, kept, self._rows(name, self._places))

    def _change(self, change: Change, values: Array, places: Places, keys: slice) -> None:
        """Edit values, and compute again what their phase has already derived from them."""
        rows, positions = ([*each] for each in zip(*places, strict=True))
        name, layer, part = change.name, change.layer, (..., _span(rows), keys)
        after = change.apply(values[part].copy(), positions)
        if name == "probs":
            after = np.where(np.arange(after.shape[-1]) <= np.array(positions)[:, None], after, np.float32(0))
            changed = np.zeros(values.shape[:2], np.uint8)
            changed[:, rows] = (values[part] != after).any(-1)  # the other heads keep their bits
        values[part] = after
        if name == "probs":
            self._work.mix(layer, changed)
        elif name in ("k", "v"):
            self._work.keep_keys_values(layer)
        elif name == "fch":
            self._work.activate(rows)
        elif name in ("attproj", "fcproj"):
            self._view("residual2", layer)[part] = self._before[part] + values[part]


def _span(rows: list[int]) -> list[int] | slice:
    """Return an index of these rows: a slice, which NumPy copies faster, if they are neighbours."""
    return slice(rows[0], rows[-1] + 1) if rows and rows == [*range(rows[0], rows[0] + len(rows))] else rows


def check_name(name: object) -> str:
    """Return the name of an activation. Raises InputError for anything else."""
    if not isinstance(name, str) or name not in NAMES:
        way = "named_activations() takes such names" if "." in str(name) or "hook" in str(name) else near(name, NAMES)
        raise InputError(f"{shown(name)} is not an activation: {way}")
    return name


def width_of(config: Config, name: str) -> int:
    """Return the number of channels of an activation, neurons or ids included."""
    return {"fch": config.F, "fch_gelu": config.F, "logits": config.V}.get(name, config.C)


def _stop(config: Config, name: str, layer: int) -> int:
    """Return after how many phases of a step an activation is there."""
    before = layer if name not in WHOLE else config.L - 1 if NAMES[name] else 0
    return NAMES[name] + before * NAMES["residual3"] + 1  # a layer has the phases 1 to that of residual3


def _indices(what: str, values: Any, count: int) -> list[int]:
    """Return a list of whole numbers below `count`. Raises InputError for anything else."""
    return [check_whole(f"a {what}", value, 0, count - 1) for value in listed(f"{what}s", values)]
