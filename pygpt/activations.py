"""Activations: what GPT2.activations() returns, and the edits that change them.

A step of the network runs phase by phase. A Watch lets it stop after the phases whose results somebody asked for. While the
workers rest, the Watch changes or copies these results. All other phases run together, as in a step without a Watch.

In every array, the positions are the last axis but one: (n, width), and (NH, n, keys) for probs.
"""

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    Places = Sequence[tuple[int, int]]  # (row of a buffer, position in its sequence)

MOST_BYTES = 2 << 30  # that activations() takes by itself; `out` may hold more

# The phase that computes each activation, and the buffer that then has it. The order is that of the network.
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


class Edit:
    """A change of an activation, made by add(), scale() or zero()."""

    def __init__(self, change: "Callable[[Array, Array], Array]", value: "Callable[[Config, str], npt.ArrayLike]") -> None:
        self.change, self.value = change, value


def add(vector: "npt.ArrayLike") -> Edit:
    """Return an edit that adds a number, or an array with the shape of a replacement, to an activation."""
    return Edit(lambda x, value: x + value, lambda *_: vector)


def scale(factor: "npt.ArrayLike") -> Edit:
    """Return an edit that multiplies an activation by a number, or by an array with the shape of a replacement."""
    return Edit(lambda x, value: x * value, lambda *_: factor)


def zero(*, heads: "Iterable[SupportsIndex] | None" = None, neurons: "Iterable[SupportsIndex] | None" = None) -> Edit:
    """Return an edit that sets an activation to 0: these heads of q, k, v, probs or atty, these channels, or by default all."""

    def keep(config: Config, name: str) -> "Array":
        import numpy as np

        if (heads is not None and name not in HEADS) or (neurons is not None and name == "probs"):
            raise InputError(f"zero() of {name}: only {', '.join(HEADS)} have heads, and only probs have no neurons")
        shape = shape_of(config, name)
        kept = np.full(shape, heads is not None or neurons is not None, np.float32)
        if heads is not None:
            kept.reshape(config.NH, -1)[_indices("head", heads, config.NH)] = 0
        if neurons is not None:
            kept[_indices("neuron", neurons, shape[-1])] = 0
        return kept

    def change(x: "Array", kept: "Array") -> "Array":
        import numpy as np

        x[np.broadcast_to(kept == 0, x.shape)] = 0
        return x

    return Edit(change, keep)


class Change:
    """A checked edit of one place. Edits describes the arguments and the errors."""

    def __init__(self, config: Config, place: "Any", value: "Any", T: int | None) -> None:
        self.what = f"edit of {shown(place)}"
        if not isinstance(place, tuple) or len(place) != 3:
            raise InputError(f"{self.what}: a key must be (name, layer or None, position or None)")
        self.name = check_name(place[0])
        if self.name in WHOLE and place[1] is not None:
            raise InputError(f"{self.what}: {self.name} has no layers, so the layer must be None")
        self.layer = 0 if self.name in WHOLE else check_whole(f"{self.what}: the layer", place[1], 0, config.L - 1)
        most = (T or config.maxT) - 1
        self.position = None if place[2] is None else check_whole(f"{self.what}: the position", place[2], 0, most)
        self.covers: int | None = None  # how many positions a value has that is for several
        self.function = value if callable(value) else None
        if self.function is None:
            edit = value if isinstance(value, Edit) else Edit(lambda x, new: new, lambda *_: value)
            self._change, self._value = edit.change, self._check(config, edit.value(config, self.name), T)

    def _check(self, config: Config, value: "Any", T: int | None) -> "Array":
        """Return a value as an array that broadcasts to the activation."""
        import numpy as np

        try:
            array = np.asarray(value, np.float32)
        except (TypeError, ValueError):
            raise InputError(f"{self.what} is {shown(value)}: give numbers, a function, add(), scale() or zero()") from None
        *heads, width = shape_of(config, self.name)
        given, keys = array.shape, T if heads and T else width
        if heads and given and (given[-1] == keys or (given[-1] < width and T is None)):  # the keys that it lacks get 0
            array = np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, width - given[-1])])
        if self.position is None and array.ndim == len(heads) + 2:
            self.covers = given[-2]
        elif given:
            array = np.expand_dims(array, -2)  # [..., width] -> [..., 1, width]
        fits = self.covers is None or (self.covers == T if T else 1 <= self.covers <= config.maxT)
        if not fits or (given and array.shape != (*heads, array.shape[-2], width)):
            one, several = (str((*heads, *n, keys)).replace("'", "") for n in ((), (T or "n",)))
            rule = f"it must be () or {one}" + (f" or {several}" if self.position is None else "")
            raise InputError(f"{self.what} has the shape {given}: {rule}")
        return array

    def among(self, places: "Places") -> "Places":
        """Return which places of a sequence the edit concerns."""
        if self.position is not None:
            return [place for place in places if place[1] == self.position]
        return places if self.covers is None else [place for place in places if place[1] < self.covers]

    def apply(self, x: "Array", positions: list[int]) -> "Array":
        """Return the edited values of an activation at these positions. x: a copy of the values."""
        import numpy as np

        if self.function is None:
            value = self._value[..., positions, :] if self.covers else self._value
            return np.broadcast_to(self._change(x, value[..., : x.shape[-1]] if value.ndim else value), x.shape)
        given = x if self.position is None else x[..., 0, :]
        result = self.function(given)
        try:
            new = np.broadcast_to(np.asarray(given if result is None else result, np.float32), given.shape)
        except (TypeError, ValueError):
            got = f"an array {result.shape}" if isinstance(result, np.ndarray) else shown(result)
            raise InputError(f"{self.what}: the function returned {got}: it must return numbers {given.shape}") from None
        return new if self.position is None else np.expand_dims(new, -2)


class Edits:
    """Checked edits of a sequence, in order. T: the number of its tokens; None if it may grow. See GPT2.activations().

    Raises InputError for an unknown name, a layer or position that is not there, and a value of another shape."""

    def __init__(self, config: Config, edits: "Mapping[Place, Value]", T: int | None = None) -> None:
        if not isinstance(edits, Mapping):
            raise InputError(f"edits are {shown(edits)}: they must map (name, layer or None, position or None) to changes")
        self.changes = [Change(config, place, value, T) for place, value in edits.items()]
        self.together = any(change.function is not None and change.position is None for change in self.changes)


class Capture:
    """The arrays that GPT2.activations() returns. It describes the arguments and the errors."""

    def __init__(self, config: Config, T: int, names: "Any", layers: "Any", positions: "Any", out: "Any") -> None:
        import numpy as np

        names = [check_name(name) for name in ([names] if isinstance(names, str) else _listed("names", names))]
        if not names:
            raise InputError(f"names is empty: give at least one of {', '.join(NAMES)}")
        self._layers = [*range(config.L)] if layers is None else _indices("layer", layers, config.L)
        self._positions = [*range(T)] if positions is None else _indices("position", positions, T)
        shapes = {}
        for name in names:
            *heads, width = shape_of(config, name)
            one = (*heads, len(self._positions), T if heads else width)
            shapes[name] = one if name in WHOLE else (len(self._layers), *one)
        out = {} if out is None else dict(out)
        for name, array in out.items():
            if name not in shapes:
                raise InputError(f"out has {shown(name)}, which is not among the names: ask for it, or leave it out")
            kind = f"is {shown(array)}"
            if isinstance(array, np.ndarray):
                if (array.shape, array.dtype, array.flags.writeable) == (shapes[name], np.float32, True):
                    continue
                kind = f"has the shape {array.shape} and type {array.dtype}"
            raise InputError(f"out of {name} {kind}: it must be a writable float32 array {shapes[name]}")
        size = 4 * sum(prod(shape) for name, shape in shapes.items() if name not in out)
        if size > MOST_BYTES:
            way = "ask for fewer names, layers or positions, or give arrays in out, such as numpy.memmap"
            raise InputError(f"the activations take {size} bytes, and the limit is {MOST_BYTES}: {way}")
        self.arrays = {name: out[name] if name in out else np.empty(shape, np.float32) for name, shape in shapes.items()}
        self.sites = {(name, layer) for name in shapes for layer in ([0] if name in WHOLE else self._layers)}
        self.wanted = {*self._positions} if {"lnf", "logits"} & shapes.keys() else set()  # positions

    def put(self, name: str, layer: int, values: "Array", places: "Places") -> None:
        """Keep an activation's values at these places."""
        row_of = {position: row for row, position in places}
        at = [i for i, position in enumerate(self._positions) if position in row_of]
        rows, array = [row_of[self._positions[i]] for i in at], self.arrays[name]
        for target in [array] if name in WHOLE else [array[i] for i, each in enumerate(self._layers) if each == layer]:
            target[..., at, : values.shape[-1]] = values[..., rows, :]
            target[..., at, values.shape[-1] :] = 0  # keys of later chunks


class Watch:
    """What is read and changed in one step. edits: of all caches, or of each cache that has some. editing: the edits that are
    being made, or have raised an exception. capture: of a step with one cache, which ends after the last phase that is needed.
    """

    def __init__(self, edits: "Edits | Mapping[Any, Edits]", capture: "Capture | None" = None) -> None:
        self._edits, self._capture = edits, capture
        self.editing: Edits | None = None

    def begin(self, work: "WatchedStep", config: Config, rows: "Sequence[tuple[Any, Any, bool]]") -> None:
        """Plan the stops of a prepared step, and select the phases of its first round."""
        self._work, self._config, self._at, self._end = work, config, 0, work.phases
        sequences: dict[Any, list[tuple[int, int]]] = {}
        for r, (_, cache, _) in enumerate(rows):
            places = sequences.setdefault(cache, [])
            places.append((r, cache.length + len(places)))
        self._wanted = {r: i for i, r in enumerate(r for r, (_, _, want) in enumerate(rows) if want)}
        self._sites: dict[tuple[str, int], list[tuple[Edits, Change, Places, int]]] = {}
        for cache, places in sequences.items():
            edits = self._edits if isinstance(self._edits, Edits) else self._edits.get(cache)
            for change in edits.changes if edits is not None else ():
                if edits and (found := self._rows(change.name, change.among(places))):
                    site = self._sites.setdefault((change.name, change.layer), [])
                    site.append((edits, change, found, places[-1][1] + 1))
        self._places = places  # of the only sequence, if there is a capture
        captured = set() if self._capture is None else self._capture.sites
        if captured:
            self._end = min(self._end, max(_stop(config, *site) for site in captured))
        stops = [(_stop(config, *site), ORDER[site[0]], *site) for site in captured | self._sites.keys()]
        for name, layer in self._sites:
            if name in ("attproj", "fcproj"):  # their phase overwrites the residual that it adds them to
                stops.append((_stop(config, name, layer) - 1, -1, "before", layer))
        self._stops = deque(sorted(stop for stop in stops if stop[0] <= self._end))
        self._continue()

    def more(self) -> bool:
        """Change and copy what the phases so far have computed; return whether another round follows."""
        while self._stops and self._stops[0][0] == self._at:
            *_, name, layer = self._stops.popleft()
            self._visit(name, layer)
        return self._continue()

    def _continue(self) -> bool:
        """Select the phases up to the next stop. Return whether there are any."""
        first, self._at = self._at, self._stops[0][0] if self._stops else self._end
        self._work.run_to(self._at, next((layer for *_, name, layer in self._stops if name == "probs"), -1))
        return first < self._at

    def _rows(self, name: str, places: "Places") -> "Places":
        """Return the places in the buffer of an activation. lnf and logits have only the wanted rows."""
        if name not in ("lnf", "logits"):
            return places
        return [(self._wanted[row], position) for row, position in places if row in self._wanted]

    def _visit(self, name: str, layer: int) -> None:
        import numpy as np

        if name == "before":
            self._before = np.array(self._work.view("residual", 0))
            return
        buffer, width = NAMES[name][1], shape_of(self._config, name)[-1]
        values: Array = np.asarray(self._work.view(buffer, layer))
        if buffer == "proj":  # the phase adds the bias together with the residual
            values = values + np.asarray(self._work.view(f"{name}b", layer))
        elif name != "probs":
            start = width * "qkv".find(name) if buffer == "qkv" else 0
            values = values[:, start : start + width]
        for edits, change, places, keys in self._sites.get((name, layer), ()):
            self.editing = edits
            self._change(change, values, places, slice(keys if name == "probs" else None))
        self.editing = None
        if self._capture is not None and (name, layer) in self._capture.sites:
            kept = values[..., : self._places[-1][1] + 1] if name == "probs" else values
            self._capture.put(name, layer, kept, self._rows(name, self._places))

    def _change(self, change: Change, values: "Array", places: "Places", keys: slice) -> None:
        """Edit values, and compute again what their phase has already derived from them."""
        import numpy as np

        rows, positions = ([*each] for each in zip(*places, strict=True))
        name, before = change.name, values[..., rows, keys]
        after = change.apply(before.copy(), positions)
        if name == "probs":
            after = np.where(np.arange(before.shape[-1]) <= np.array(positions)[:, None], after, np.float32(0))
        values[..., rows, keys] = after
        if name == "probs":  # only these heads: the others keep their bits
            changed = np.zeros(values.shape[:2], np.uint8)
            changed[:, rows] = (before != after).any(-1)
            self._work.mix(change.layer, changed)
        elif name in ("k", "v"):
            self._work.store_keys_values(change.layer)
        elif name == "fch":
            self._work.activate(rows)
        elif name in ("attproj", "fcproj"):
            np.asarray(self._work.view("residual", 0))[rows] = self._before[rows] + values[rows]


# ------------------------------------------------------------------------------------------------ checks


def check_name(name: object) -> str:
    """Return the name of an activation. Raises InputError for anything else."""
    if not isinstance(name, str) or name not in NAMES:
        raise InputError(f"{shown(name)} is not an activation: {near(name, NAMES)}")
    return name


def shape_of(config: Config, name: str) -> tuple[int, ...]:
    """Return the shape of an activation at one position, of probs with as many keys as possible."""
    widths = {"fch": config.F, "fch_gelu": config.F, "logits": config.V}
    return (config.NH, config.maxT) if name == "probs" else (widths.get(name, config.C),)


def _stop(config: Config, name: str, layer: int) -> int:
    """Return the number of phases of a step after which an activation is there."""
    phase = PHASES.index(NAMES[name][0])
    if name in WHOLE:
        layer = config.L - 1 if phase else 0
    return phase + layer * (PHASES.index("lnf") - 1) + 1


def _listed(what: str, values: "Any") -> "list[Any]":
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise InputError(f"{what} is {shown(values)}: it must be a list")
    return list(values)


def _indices(what: str, values: "Any", count: int) -> list[int]:
    """Return a list of whole numbers below `count`. Raises InputError for anything else."""
    return [check_whole(f"a {what}", value, 0, count - 1) for value in _listed(f"{what}s", values)]
