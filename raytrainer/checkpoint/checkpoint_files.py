"""The files of one checkpoint: what each rank writes, what a directory contains, and how a state is read.
`shared.json` and `shared-RANK.safetensors` hold one state for all ranks; `local-RANK.*` holds a rank's own state."""

from __future__ import annotations

import hashlib
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from raytrainer.checkpoint import manifest as manifests
from raytrainer.checkpoint import tensors, tree
from raytrainer.checkpoint.manifest import Manifest
from raytrainer.errors import CheckpointCorrupt, CheckpointError
from raytrainer.storage import Storage

_log = logging.getLogger("raytrainer.checkpoint")

_BLOCK = 8 << 20

Contents = dict[str, tuple[bytes | memoryview, ...]]
"""What to write: a file's name -> its parts, one after the other."""


class Snapshot:
    """A copy of a rank's state in its own memory, so that the caller may change the original."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._buffers = {"shared": tensors.Buffer(), "local": tensors.Buffer()}

    def take(self, shared: Mapping[str, Any], local: Mapping[str, Any]) -> Contents:
        """Copy both states. The result is valid until the next call."""
        contents: Contents = {}
        for kind, state in (("shared", shared), ("local", local)):
            text, named = tree.flatten(state)
            replicated = kind == "local" or self._rank == 0
            if replicated:
                contents["shared.json" if kind == "shared" else f"local-{self._rank:05d}.json"] = (text,)
            chunks, parts = [], {}
            for chunk, part in tensors.owned(named, replicated=replicated):
                chunks.append(chunk)
                parts[chunk.name] = part
            if chunks:
                layout = tensors.lay_out(chunks)
                buffer = self._buffers[kind]
                buffer.fill(layout, parts)
                contents[f"{kind}-{self._rank:05d}.safetensors"] = (layout.header, buffer.data)
        return contents

    def clear(self) -> None:
        """Free the memory."""
        for buffer in self._buffers.values():
            buffer.clear()


def write(storage: Storage, directory: str, contents: Contents) -> dict[str, tuple[int, str]]:
    """Write and sync the files. Return their sizes and SHA-256 hashes, computed while writing."""
    written = {}
    for name, parts in contents.items():
        digest, size = hashlib.sha256(), 0
        with storage.open_write(f"{directory}/{name}") as file:
            for part in parts:
                for begin in range(0, len(part), _BLOCK):
                    block = memoryview(part)[begin : begin + _BLOCK]
                    file.write(block)
                    digest.update(block)
                size += len(part)
        written[name] = (size, digest.hexdigest())
    return written


@dataclass(frozen=True)
class CheckpointEntry:
    """A checkpoint directory with its manifest, or with the manifest's problem. An unfinished save has neither."""

    name: str
    order: tuple[int, int]
    manifest: Manifest | None
    problem: CheckpointCorrupt | None


def scan(storage: Storage) -> list[CheckpointEntry]:
    """Return all directories whose names are checkpoint names, oldest step first."""
    entries = []
    for entry in storage.list():
        order = manifests.directory_order(entry.name)
        if not entry.is_dir or order is None:
            continue
        place = f"{entry.name}/{manifests.NAME}"
        manifest: Manifest | None = None
        problem: CheckpointCorrupt | None = None
        try:
            data = storage.read_if_exists(place)
            if data is not None:
                manifest = manifests.decode(data, storage.where(place))
                if manifest.step != order[0]:
                    problem = CheckpointCorrupt(
                        f"{storage.where(place)} names step {manifest.step} instead of {order[0]}"
                    )
                    manifest = None
        except CheckpointCorrupt as exc:
            problem = exc
        entries.append(CheckpointEntry(entry.name, order, manifest, problem))
    return sorted(entries, key=lambda item: item.order)


def committed(entries: Sequence[CheckpointEntry]) -> list[CheckpointEntry]:
    """Return those with a valid manifest. If a step was saved several times, only its last save is returned."""
    return list({item.order[0]: item for item in entries if item.manifest is not None}.values())


# The folder beside the checkpoints for the best one from before `import_checkpoint`. Runs never resume from it.
ASIDE = "aside"


def put_aside(storage: Storage) -> list[CheckpointEntry]:
    """Return the committed checkpoints in `ASIDE`, with names relative to `storage`."""
    entries = committed(scan(storage.child(ASIDE)))
    return [replace(item, name=f"{ASIDE}/{item.name}") for item in entries]


def best(entries: Sequence[CheckpointEntry], mode: str) -> CheckpointEntry | None:
    """Return the checkpoint with the best finite metric; the first if several are equal."""
    measured = [(item.manifest.metric, item) for item in entries if item.manifest and item.manifest.metric is not None]
    finite = [(metric, item) for metric, item in measured if math.isfinite(metric)]
    if not finite:
        return None
    return (max if mode == "max" else min)(finite, key=lambda pair: pair[0])[1]


def retain(storage: Storage, newest: str, *, num_to_keep: int | None, mode: str, corrupt: set[str]) -> None:
    """Delete checkpoints after the commit of `newest`.

    `newest`, the `num_to_keep` last steps, the best one, and any that a newer format version wrote are kept. Older
    saves that are unfinished or corrupt are deleted too.
    """
    entries = scan(storage)
    valid = committed([item for item in entries if item.name not in corrupt])
    kept = {item.name for item in (valid if num_to_keep is None else valid[-num_to_keep:])}
    kept.add(newest)
    if (winner := best(valid, mode)) is not None:
        kept.add(winner.name)
    now = manifests.directory_order(newest)
    assert now is not None
    for item in entries:
        if item.name in kept or isinstance(item.problem, manifests.UnknownVersion):
            continue
        usable = item.manifest is not None and item.name not in corrupt
        if usable or item.order < now:
            delete(storage, item.name)


def delete(storage: Storage, directory: str) -> None:
    """Delete a checkpoint, its manifest first, so that an interrupted deletion leaves no valid checkpoint."""
    if manifests.directory_order(directory) is None:
        raise CheckpointError(f"{directory!r} is not a checkpoint's directory")
    if not storage.is_local or not (storage.local_path / directory).is_symlink():
        storage.delete(f"{directory}/{manifests.NAME}")
    storage.delete(directory)


@dataclass(frozen=True, slots=True)
class _Request:
    name: str
    target: torch.Tensor
    offset: tuple[int, ...]


def unread(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Return a tensor with a shape but no values.

    As a function in a template, it prevents reading the tensors at and below its position.
    """
    return torch.empty(shape, dtype=dtype, device="meta")


def read(storage: Storage, directory: str, manifest: Manifest, kind: str, template: Any) -> dict[str, Any]:
    """Read a state. `kind` is `shared`, or `local-RANK` for a rank's own state.

    Tensors in `template`, which is nested like the state, are filled in place, DTensors with their shards. A function
    in it makes all tensors at and below its position from dtype and shape. Tensors without a template are allocated on
    the CPU.
    """
    try:
        return _read(storage, directory, manifest, kind, template)
    except CheckpointCorrupt as exc:
        raise CheckpointCorrupt(f"{storage.where(directory)}: {exc}") from exc


def _read(storage: Storage, directory: str, manifest: Manifest, kind: str, template: Any) -> dict[str, Any]:
    names = sorted(name for name in manifest.files if re.fullmatch(rf"{kind}(-\d{{5}})?\.safetensors", name))
    begins: dict[str, int] = {}
    index: dict[str, list[tensors.Chunk]] = {}
    for name in names:
        with storage.open_read(f"{directory}/{name}") as file:
            begins[name], chunks = tensors.read_index(file, manifest.files[name][0], name)
        for chunk in chunks:
            index.setdefault(chunk.name, []).append(chunk)

    requests: list[_Request] = []

    def request(name: str, dtype: str, shape: tuple[int, ...], leaf: Any) -> torch.Tensor:
        tensor = _target(name, dtype, shape, leaf, index.get(name, []))
        part, offset = tensors.local_part(tensor)
        if part.numel() and not part.is_meta:
            requests.append(_Request(name, part, offset))
        return tensor

    state = tree.restore(storage.read_bytes(f"{directory}/{kind}.json"), request, template)

    wanted: dict[str, list[tensors.Piece]] = {name: [] for name in names}
    for item in requests:
        covered = 0
        for chunk in index[item.name]:
            if (piece := tensors.overlap(chunk, item.target, item.offset)) is not None:
                wanted[chunk.file].append(piece)
                covered += piece.target.numel()
        if covered != item.target.numel():
            raise CheckpointCorrupt(f"{item.name} is not complete")
    for name, parts in wanted.items():
        if parts:
            with storage.open_read(f"{directory}/{name}") as file:
                tensors.read_pieces(file, begins[name], parts)
    return state


def _target(name: str, dtype: str, shape: tuple[int, ...], leaf: Any, chunks: list[tensors.Chunk]) -> torch.Tensor:
    # Check the content of the files before allocating memory for what the JSON declares.
    if any(tree.dtype_name(chunk.dtype) != dtype or chunk.shape != shape for chunk in chunks):
        raise CheckpointCorrupt(f"{name}: its files do not hold {dtype} {list(shape)}")
    if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(shape):
        raise CheckpointCorrupt(f"{name}: its files do not hold the whole of {list(shape)}")
    if callable(leaf) and dtype in tensors.DTYPES:
        leaf = leaf(tensors.DTYPES[dtype], shape)
    if isinstance(leaf, torch.Tensor):
        if (tree.dtype_name(leaf.dtype), tuple(leaf.shape)) != (dtype, shape):
            raise CheckpointError(
                f"{name} is {dtype} {list(shape)} in the checkpoint and {tree.dtype_name(leaf.dtype)} "
                f"{list(leaf.shape)} here"
            )
        return leaf
    if dtype not in tensors.DTYPES:
        raise CheckpointCorrupt(f"{name}: unknown dtype {dtype!r}")
    return torch.empty(shape, dtype=tensors.DTYPES[dtype])
