"""The manifest of a checkpoint. It is written last and lists every file with its size and SHA-256 hash.
A directory without a manifest is an unfinished save. A checkpoint that does not match its manifest is corrupt."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

import torch

from raytrainer.checkpoint import tree
from raytrainer.errors import CheckpointCorrupt, StorageError
from raytrainer.storage import Storage

FORMAT_VERSION = 1
NAME = "manifest.json"

_BLOCK = 8 << 20
_DIRECTORY = re.compile(r"step-(\d{9,18})(?:\.(\d{1,9}))?")
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class CheckpointInfo:
    """A committed checkpoint. Checkpoints are ordered by `step`, never by time.

    Attributes:
        step: Optimizer steps done.
        path: The directory, as a path or a URI without credentials.
        metric: The monitored value, which may be NaN; None if there was none.
        world_size: The number of ranks that wrote it.
        created: UTC time in ISO 8601.
    """

    step: int
    path: str
    metric: float | None
    world_size: int
    created: str

    @property
    def name(self) -> str:
        """The name of the directory."""
        place = self.path.partition("?")[0] if "://" in self.path else self.path
        return place.rpartition("/")[2]


@dataclass(frozen=True)
class Manifest:
    """The content of a manifest. `files` maps names to (bytes, SHA-256 in hex); `digest` is its own checksum."""

    step: int
    metric: float | None
    world_size: int
    created: str
    files: dict[str, tuple[int, str]]
    digest: str = ""


def directory_name(step: int, again: int = 0) -> str:
    """Return `step-000000120`, or `step-000000120.1` for the second save of the same step."""
    return f"step-{step:09d}" + (f".{again}" if again else "")


def directory_order(name: str) -> tuple[int, int] | None:
    """Return (step, number of the save) for a directory name; None if it is not a checkpoint name."""
    match = _DIRECTORY.fullmatch(name)
    return (int(match[1]), int(match[2] or 0)) if match else None


def encode(manifest: Manifest) -> bytes:
    """Return the manifest as JSON, with its own checksum."""
    body = {
        "format": "raytrainer-checkpoint",
        "version": FORMAT_VERSION,
        "step": manifest.step,
        "metric": manifest.metric,
        "world_size": manifest.world_size,
        "created": manifest.created,
        "torch": str(torch.__version__),
        "files": {name: {"size": size, "sha256": digest} for name, (size, digest) in sorted(manifest.files.items())},
    }
    plain = json.loads(tree.flatten(body)[0])  # converts a NaN metric to valid JSON
    return json.dumps({**plain, "checksum": _checksum(plain)}, indent=1).encode()


def decode(data: bytes, where: str) -> Manifest:
    """Parse a manifest.

    Raises:
        CheckpointCorrupt: Its checksum or form is wrong, or its version is not supported (`UnknownVersion`).
    """
    try:
        plain = json.loads(data)
        if plain.get("format") != "raytrainer-checkpoint":
            raise ValueError("not a checkpoint's manifest")
        version = plain.get("version")
    except (ValueError, AttributeError, RecursionError) as exc:
        raise CheckpointCorrupt(f"{where}: {exc}") from exc
    if version != FORMAT_VERSION:
        raise UnknownVersion(
            f"{where} has format version {version}; this raytrainer reads version {FORMAT_VERSION}: "
            "use the release that wrote it, or a newer one"
        )
    try:
        checksum = plain.pop("checksum", None)
        if checksum != _checksum(plain):
            raise ValueError("its checksum does not match its content")
        body = tree.restore(json.dumps(plain).encode(), _no_tensors)
        files = {name: (int(file["size"]), str(file["sha256"])) for name, file in body["files"].items()}
        for name in files:
            if _FILE.fullmatch(name) is None:
                raise ValueError(f"{name!r} is not a valid file name")
        metric = None if body["metric"] is None else float(body["metric"])
        return Manifest(int(body["step"]), metric, int(body["world_size"]), str(body["created"]), files, checksum)
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise CheckpointCorrupt(f"{where}: {type(exc).__name__}: {exc}") from exc


def verify(storage: Storage, directory: str, manifest: Manifest, names: list[str]) -> None:
    """Compare the files `names` with the manifest.

    Raises:
        CheckpointCorrupt: A file is missing, or has another size or checksum. The message names the first one.
        StorageError: Remote storage cannot be read.
    """
    listed = {entry.name: entry.size for entry in storage.list(directory)}
    for name in names:
        size, expected = manifest.files[name]
        where = storage.where(f"{directory}/{name}")
        if name not in listed:
            raise CheckpointCorrupt(f"{where} is missing")
        if listed[name] != size:
            raise CheckpointCorrupt(f"{where} has {listed[name]} bytes instead of {size}")
        digest = hashlib.sha256()
        try:
            with storage.open_read(f"{directory}/{name}") as file:
                while block := file.read(_BLOCK):
                    digest.update(block)
        except StorageError as exc:
            # A file that a local disk cannot read is lost. On a network, a later attempt may succeed.
            if storage.is_local:
                raise CheckpointCorrupt(str(exc)) from exc
            raise
        if digest.hexdigest() != expected:
            raise CheckpointCorrupt(f"{where} does not have the checksum that it was written with")


class UnknownVersion(CheckpointCorrupt):
    """An unsupported format version. It is never skipped silently, because that would lose the newest state."""


def _no_tensors(name: str, dtype: str, shape: tuple[int, ...], template: Any) -> torch.Tensor:
    raise ValueError(f"a manifest cannot hold the tensor {name!r}")


def _checksum(plain: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
