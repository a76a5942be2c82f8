"""The public names of the package, and the flags that it is built with."""

import re
from pathlib import Path

import pytest

import pygpt

ROOT = Path(__file__).resolve().parents[2]


def test_public_names() -> None:
    assert sorted(pygpt.__all__) == sorted([*pygpt._HOME, "__version__"])
    for name in pygpt.__all__:
        assert getattr(pygpt, name) is not None
    assert set(pygpt.__all__) <= set(dir(pygpt))
    with pytest.raises(AttributeError, match="no attribute 'torch'"):
        _ = pygpt.torch


def test_no_forbidden_flags() -> None:
    flags = (ROOT / "setup.py").read_text().split('"""')[2]
    assert "-ffp-contract=off" in flags
    assert not re.search(r"march=native|ffast-math|Ofast|openmp", flags)
