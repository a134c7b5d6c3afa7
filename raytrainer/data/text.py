"""Text that needs no download: the sources of the Python standard library, as bytes."""

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

# Tables instead of text, directories that not every installation has (Debian packages tests separately), and other
# packages.
_LEFT_OUT = {"encodings", "pydoc_data", "test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_HELD_OUT = 10  # one file in this many is for validation
_BETWEEN = b"\0"  # between files; no source contains it


class PythonSources(TokenWindows):
    """The sources of this Python's standard library as bytes: ids below 256, and a 0 after each file.

    Files are ordered by a hash of their names, which also decides the split of each file. A limited part is therefore a
    mixture, and a file that is missing on one machine does not move the others. The text depends on the Python release.

    Args:
        split: `train` (nine files in ten) or `val`.
        seq_len: Bytes in a window; for the samples, see `raytrainer.data.TokenDataset`.
        max_bytes: The maximum number of bytes; the last file is cut. None for all, about 10 MB in both splits.
        folder: The directory of the sources; None for this Python's own.

    Raises:
        ConfigError: The split is unknown, or the limit is below 2.
        DataError: There are no sources, because some installations have them compiled or in an archive.
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
    """Yield the names of the sources below `root`, with `/`, in any order."""
    for folder, below, files in os.walk(root):
        below[:] = [name for name in below if name not in _LEFT_OUT]
        inside = Path(folder).relative_to(root)
        # _sysconfigdata describes how this Python was built.
        yield from ((inside / f).as_posix() for f in files if f.endswith(".py") and not f.startswith("_sysconfigdata"))
