"""Text that every machine has: the Python standard library's own sources, byte by byte."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from raytrainer.data.tokens import TokenWindows
from raytrainer.errors import ConfigError, DataError
from raytrainer.seeds import mix

# Not text (tables), not everywhere (Debian packs tests apart), or not the library's.
_LEFT_OUT = {"encodings", "pydoc_data", "test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_HELD_OUT = 10  # one file in so many is for validation
_BETWEEN = b"\0"  # files; no source holds it


class PythonSources(TokenWindows):
    """The sources of the standard library that this Python runs with, as bytes: ids below 256, a 0 after each file.

    Files come in the order of a hash of their names, which also says whose split each is: a bounded part is of all
    sorts, and a file that one machine lacks moves no other. Another release of Python has somewhat other text.

    Args:
        split: `train` (nine files in ten) or `val`.
        seq_len: Bytes in a window; see `raytrainer.data.TokenDataset` for the samples.
        max_bytes: At most so many, the last file cut; None for all, about 10 MB in both splits.
        folder: Where the sources are; None: where this Python has its own.

    Raises:
        ConfigError: Another split; a bound below 2.
        DataError: There are no sources: some installations have them compiled, or in an archive.
    """

    def __init__(
        self,
        split: Literal["train", "val"],
        seq_len: int,
        *,
        max_bytes: int | None = None,
        folder: str | Path | None = None,
    ) -> None:
        if split not in ("train", "val"):
            raise ConfigError("is unknown", key="split", value=split, choices=("train", "val"))
        if max_bytes is not None and max_bytes < 2:
            raise ConfigError("must be at least 2", key="max_bytes", value=max_bytes)
        root = Path(sysconfig.get_path("stdlib") if folder is None else folder)
        text = bytearray()
        for name in sorted(_sources(root), key=lambda name: (mix("source", name), name)):
            if (mix("split", name) % _HELD_OUT == 0) == (split == "val"):
                try:
                    text += (root / name).read_bytes() + _BETWEEN
                except OSError as error:
                    raise DataError(f"{error.filename}: {error.strerror}") from error
            if max_bytes is not None and len(text) >= max_bytes:
                break
        if len(text) < 2:
            raise DataError(f"{root}: there are no Python sources to read as text for split={split}")
        super().__init__(np.frombuffer(text, np.uint8)[:max_bytes], seq_len)


def _sources(root: Path) -> Iterator[str]:
    """The names of the sources below `root`, with `/`, in any order."""
    for folder, below, files in os.walk(root):
        below[:] = [name for name in below if name not in _LEFT_OUT]
        inside = Path(folder).relative_to(root)
        # _sysconfigdata: how this one Python was built.
        yield from ((inside / f).as_posix() for f in files if f.endswith(".py") and not f.startswith("_sysconfigdata"))
