"""Arrays as text tables, and as pictures by matplotlib: one function for each."""

import os
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InputError, PyGPTError
from ..formats.files import Path, atomic_file

WIDTH = 100  # columns of a table
FORMATS = (".svg", ".png")
MOST_LABELS = 40  # of an axis: more would overlap
Labels = Sequence[Any]  # of anything that has a text


def text_table(cells: npt.ArrayLike, rows: Labels, columns: Labels, *, digits: int = 2) -> str:
    """Return numbers or texts (rows, columns) as a table of at most 100 columns. Wide tables continue below.

    Raises InputError if the labels do not fit the shape."""
    array = _checked(cells, rows, columns)
    rows, columns = [*map(str, rows)], [*map(str, columns)]
    texts = [[str(cell) if array.dtype.kind in "OU" else f"{cell:.{digits}f}" for cell in row] for row in array]
    margin = max(map(len, rows), default=0)
    blocks, line = [], WIDTH
    for column, name in enumerate(columns):
        below = [name, *(row[column] for row in texts)]
        width = max(map(len, below)) + 2
        if line + width > WIDTH:
            blocks.append([row.ljust(margin) for row in ["", *rows]])
            line = margin
        line += width
        blocks[-1] = [text + cell.rjust(width) for text, cell in zip(blocks[-1], below, strict=True)]
    return "\n\n".join("\n".join(text.rstrip() for text in block) for block in blocks)


def heat_map(
    values: npt.ArrayLike, path: Path, *, rows: Labels, columns: Labels, title: str = "", cells: Sequence[Labels] | None = None
) -> None:
    """Draw numbers (rows, columns) as colours, and write the picture to a .svg or .png file.

    If a number is negative, red is above zero and blue below. cells: texts to write into the squares. Raises InputError for
    another ending or labels that do not fit, and PyGPTError if matplotlib is missing."""
    array, name = _checked(values, rows, columns).astype(np.float64), os.fspath(path)
    if not name.endswith(FORMATS):
        raise InputError(f"{name}: pictures are written to a file that ends in {' or '.join(FORMATS)}")
    plt = matplotlib()
    size = 2 + min(max(4, (1.0 if cells else 0.45) * len(columns)), 14), 1.2 + min(max(1.5, 0.32 * len(rows)), 10)
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    most, signed = np.abs(array).max(initial=0) or 1, (array < 0).any()
    image = axes.imshow(array, cmap="RdBu_r" if signed else "Blues", vmin=-most if signed else 0, vmax=most, aspect="auto")
    for ticks, labels, turned in ((axes.set_xticks, columns, 0 if cells else 90), (axes.set_yticks, rows, 0)):
        every = -(-len(labels) // MOST_LABELS)
        ticks(range(0, len(labels), every), labels[::every], rotation=turned)
    axes.set_title(title, loc="left")
    for (row, column), value in np.ndenumerate(array):
        if cells:
            colour = "white" if abs(value) > 0.6 * most else "black"
            axes.text(column, row, cells[row][column], ha="center", va="center", fontsize=8, color=colour)
    figure.colorbar(image)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a character that the font does not have becomes a box
        save(figure, name)
    plt.close(figure)


def _checked(values: npt.ArrayLike, rows: Labels, columns: Labels) -> npt.NDArray[Any]:
    array = np.asarray(values)
    if array.shape != (len(rows), len(columns)):
        raise InputError(f"the array has shape {array.shape}: the labels are for {(len(rows), len(columns))}")
    return array


def make_plot_folder(path: str) -> None:
    """Make the folder of --plot before any work. Raises InputError if it cannot be made, or if matplotlib is missing."""
    matplotlib()
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise InputError(f"--plot is {path!r}: {error.strerror}: give a folder, which may be new") from None


def matplotlib() -> Any:
    """Return matplotlib's pyplot, set up to draw to files. Raises PyGPTError if matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise PyGPTError("pictures need matplotlib: python -m pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "pygpt"})
    plt.rcParams["text.parse_math"] = False  # text between $ is not a formula
    return plt


def save(figure: Any, name: str) -> None:
    """Write a picture atomically. The ending of the name is the format."""
    with atomic_file(name) as file:
        figure.savefig(file, format=name.rpartition(".")[2], dpi=120)
