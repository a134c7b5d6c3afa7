"""Load weights from a run, a checkpoint, a safetensors file, a state dict saved by torch, or a Hugging Face folder.
The names of tensors are known before the tensors are read, and only tensors are unpickled."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit, urlunsplit

import torch
from torch import Tensor, nn

from raytrainer import names
from raytrainer.checkpoint import tree
from raytrainer.checkpoint.checkpoint_files import unread
from raytrainer.checkpoint.checkpointer import Checkpointer
from raytrainer.checkpoint.manifest import CheckpointInfo
from raytrainer.config import InitFrom
from raytrainer.errors import CheckpointCorrupt, CheckpointNotFound
from raytrainer.names import Match, Shape, is_extra_state
from raytrainer.storage import Storage, redacted

_PICKLES = (".bin", ".pt", ".pth")
_FILES = (".safetensors", *_PICKLES)
# The files of a Hugging Face folder, best first. An index lists the files of a model that is split into several.
_IN_FOLDER = (
    *("model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
_MAX_HEADER = 100_000_000  # bytes, the limit of the format
EXTRA_STATE = "raytrainer.extra_state"
"""The key in a safetensors file's metadata of extra state that is no tensor: the JSON of checkpoint/tree.py."""


class Weights(Protocol):
    """A model's state dict in a file or checkpoint."""

    @property
    def place(self) -> str:
        """The location, for messages."""

    def shapes(self) -> dict[str, Shape] | None:
        """Return names and shapes without reading the tensors; None if that is expensive."""

    def read(self) -> dict[str, Any]:
        """Return the whole state dict on the CPU. Modules' extra state has the form in which they returned it."""


def find_weights(source: str, storage_path: str, look_up: Callable[[str], str | None] = lambda _: None) -> Weights:
    """Find weights without reading them.

    Args:
        source: A path or URI of one of these:

            - a `.safetensors`, `.pt`, `.pth` or `.bin` file, or an index of several files (`….index.json`)
            - a Hugging Face folder
            - a run directory: its best checkpoint, else its last; the averaged weights (EMA), if it has them
            - one checkpoint of a run

            Or the name of a run or a trial, or an ID for `look_up`.
        storage_path: Where runs are found by name. A URI on the same storage uses its credentials.
        look_up: Returns the directory of a run for an ID that is not the name of a run there, or None.

    Raises:
        CheckpointNotFound: Nothing of these kinds exists there.
        StorageError: The storage cannot be read.
    """
    sweep, _, trial = source.rpartition(".")
    if "://" in source or Path(source).is_absolute() or Path(source).exists():
        places = [source if "://" in source else str(Path(source).absolute())]
    else:
        runs = Storage(storage_path if "://" in storage_path else Path(storage_path).absolute())
        places = [runs.child(source).uri] + ([runs.child(f"{sweep}/trials/{trial}").uri] if sweep else [])
    for place in places:
        if (weights := _at(place, storage_path)) is not None:
            return weights
    directory = None if "/" in source else look_up(source)
    if directory is not None and (weights := _at(directory, storage_path)) is not None:
        return weights
    raise CheckpointNotFound(
        f"init_from={redacted(source)}: no weights file, run, checkpoint or Hugging Face folder has this path or name"
    )


def fit(model: nn.Module, shapes: dict[str, Shape], options: InitFrom) -> Match:
    """Match the tensors of a source to those of the model, by `options` (`names.match`).

    A model with PEFT adapters takes the weights of the model below the adapters. The tensors of the adapters are
    ignored.
    """
    own, shapes = shapes_of(model.state_dict()), {n: shape for n, shape in shapes.items() if not is_extra_state(n)}
    alias = _without_adapters(model, own, shapes)
    groups: dict[int, set[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(p), set()).add(alias.get(name, name))
    matched = names.match(
        {alias[name]: shape for name, shape in own.items() if name in alias},
        shapes,
        strict=options.strict,
        mapping=options.mapping,
        exclude=options.exclude,
        tied=[group for group in groups.values() if len(group) > 1],
    )
    if matched.problem and options.strict and not options.exclude:
        theirs = {names.renamed(name, options.mapping or {}): name for name in shapes}
        if _accepts(model, {name: shapes[source] for name, source in theirs.items()}):
            return Match(theirs, [], [])
    taken = {name: matched.taken[alias[name]] for name in own if alias.get(name) in matched.taken}
    return replace(matched, taken=taken)


def shapes_of(state: Mapping[str, Any]) -> dict[str, Shape]:
    """Return the names and shapes of a state dict's tensors, without the extra state of modules."""
    return {n: tuple(t.shape) for n, t in state.items() if isinstance(t, Tensor) and not is_extra_state(n)}


def _accepts(model: nn.Module, shapes: Mapping[str, Shape]) -> bool:
    """Return whether the model's own `load_state_dict` accepts all of these names, although they differ from its own.

    It may do so by hooks or versions: parametrised weight norm, for example, accepts the names of the older weight
    norm. The test uses meta tensors, which need no memory.
    """
    tensors = [*model.parameters(), *model.buffers()]
    memo: dict[int, Any] = {}
    for tensor in tensors:
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    try:
        extra = {name: value for name, value in model.state_dict().items() if is_extra_state(name)}
        state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        copy.deepcopy(model, memo).load_state_dict({**state, **extra}, strict=True)
    except Exception:  # noqa: BLE001  the model does not accept them, or cannot be copied
        return False
    return True


def take(model: nn.Module, weights: Weights, options: InitFrom) -> tuple[dict[str, Any], str]:
    """Read `weights` and return what `fit` selects, with the model's names and shapes, and a description in words.

    The extra state of modules (`get_extra_state`) is included if the source has it under the module's name.

    Raises:
        CheckpointCorrupt: The weights cannot be read, or do not match.
    """
    source = weights.read()
    match = fit(model, shapes_of(source), options)
    if match.problem:
        raise CheckpointCorrupt(f"{weights.place} {match.problem}")
    for first, *others in match.same:
        if unlike := [name for name in others if not torch.equal(source[first], source[name])]:
            raise CheckpointCorrupt(
                f"{weights.place} has different values for {first} and {unlike[0]}, which are one tensor in the model"
            )
    taken: dict[str, Any] = {name: source[theirs] for name, theirs in match.taken.items()}
    extra = {names.renamed(name, options.mapping or {}): v for name, v in source.items() if is_extra_state(name)}
    taken |= {
        name: value
        for name, value in extra.items()
        if name in model.state_dict() and not any(fnmatchcase(name, pattern) for pattern in options.exclude)
    }
    return taken, f"weights of {weights.place}: {match.describe_sweep()}"


def _without_adapters(model: nn.Module, own: dict[str, Shape], shapes: dict[str, Shape]) -> dict[str, str]:
    """Return each tensor's name in the model below PEFT's adapters. The adapters' own tensors are left out."""
    prefix = getattr(getattr(model, "base_model", None), "prefix", None)
    outer = "base_model.model."
    adapted = hasattr(model, "peft_config") and isinstance(prefix, str)
    if not adapted or any(name.startswith(outer) for name in shapes):  # not adapted, or the source is adapted too
        return {name: name for name in own}
    plain_names = {}
    for name in own:
        if f".{prefix}" not in name:
            # PEFT keeps two copies of a module that is trained besides the adapters: the original and the trained one.
            plain = name.removeprefix(outer).replace(".base_layer.", ".").replace(".original_module.", ".")
            begin, saved, end = plain.partition(".modules_to_save.")
            plain_names[name] = f"{begin}.{end.partition('.')[2]}" if saved else plain
    return plain_names


def _at(place: str, storage_path: str) -> Weights | None:
    """Return the weights at a path or URI; None if there are none."""
    place = place.rstrip("/")
    parent, name = _parent(place)
    if place.endswith((*_FILES, ".index.json")) or ("://" not in place and Path(place).is_file()):
        beside = Storage.shown_as(parent, storage_path)
        if beside.exists(name):
            return _File(beside, name)
    there = Storage.shown_as(place, storage_path)
    for file in _IN_FOLDER:
        if there.exists(file):
            return _File(there, file)
    if there.exists("manifest.json"):
        checkpoints, wanted = Checkpointer(Storage.shown_as(parent, storage_path)), name
    else:
        checkpoints, wanted = Checkpointer(there.child("checkpoints")), None
    listed = checkpoints.list()
    info = next((i for i in listed if i.name == wanted), None) if wanted else (listed[-1] if listed else None)
    return None if info is None else _Checkpoint(checkpoints, info, wanted is None, storage_path)


def _parent(place: str) -> tuple[str, str]:
    """Split a path or URI into its parent and its name there."""
    if "://" not in place:
        parent, _, name = place.rpartition("/")
        return parent or "/", name
    url = urlsplit(place)
    parent, _, name = url.path.rstrip("/").rpartition("/")
    return urlunsplit(url._replace(path=parent)), name


@dataclass(frozen=True)
class _Checkpoint:
    checkpoints: Checkpointer
    last: CheckpointInfo
    best: bool  # whether to use the run's best checkpoint, which its last checkpoint names
    storage_path: str

    @property
    def place(self) -> str:
        return str(self._chosen().path)

    def shapes(self) -> dict[str, Shape]:
        return shapes_of(self._weights(self._outline(self._chosen())))

    def read(self) -> dict[str, Any]:
        shared, _ = self.checkpoints.load(self._chosen(), {"optimizer": unread})
        return self._weights(shared)

    def _chosen(self) -> CheckpointInfo:
        # The best checkpoint depends on checkpoint.mode, which only the trainer knew, so the last checkpoint records
        # its step.
        step = self._outline(self.last).get("best", {}).get("step") if self.best else None
        return next((i for i in self.checkpoints.list() if i.step == step), self.last)

    def _outline(self, info: CheckpointInfo) -> dict[str, Any]:
        """Return the state with tensors that have shapes but no values."""
        text = Storage.shown_as(info.path, self.storage_path).read_bytes("shared.json")
        return tree.restore(text, lambda name, dtype, shape, leaf: unread(torch.float32, shape))

    @staticmethod
    def _weights(state: dict[str, Any]) -> dict[str, Any]:
        return dict(state.get("ema") or state["model"])


@dataclass(frozen=True)
class _File:
    folder: Storage
    name: str

    @property
    def place(self) -> str:
        return self.folder.where(self.name)

    def shapes(self) -> dict[str, Shape] | None:
        shapes: dict[str, Shape] = {}
        for file, wanted in self._files():
            if file.endswith(_PICKLES) and not self.folder.is_local:
                return None
            safe = file.endswith(".safetensors")
            of_file = self._header(file) if safe else shapes_of(self._unpickled(file, "meta"))
            shapes.update(self._chosen(file, of_file, wanted))
        return shapes

    def read(self) -> dict[str, Any]:
        tensors: dict[str, Any] = {}
        for file, wanted in self._files():
            of_file = self._tensors(file) if file.endswith(".safetensors") else self._unpickled(file, "cpu")
            tensors.update(self._chosen(file, of_file, wanted))
            if file.endswith(".safetensors"):
                tensors.update(self._extra(file))
        return tensors

    def _extra(self, file: str) -> dict[str, Any]:
        """Return extra state that is not a tensor, which `export` writes into the file's metadata."""
        text = self._entries(file).get("__metadata__", {}).get(EXTRA_STATE)
        return {} if text is None else tree.restore(text.encode(), lambda name, *_: self._no_tensor(name))

    def _no_tensor(self, name: str) -> Tensor:
        raise CheckpointCorrupt(f"{self.place} has a tensor {name} in its metadata")

    def _files(self) -> Iterator[tuple[str, list[str] | None]]:
        """Yield each file with the names that it holds; None for all names in it."""
        if not self.name.endswith(".index.json"):
            yield self.name, None
            return
        try:
            index: dict[str, str] = json.loads(self.folder.read_bytes(self.name))["weight_map"]
            by_file: dict[str, list[str]] = {}
            for name, file in index.items():
                by_file.setdefault(file, []).append(name)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointCorrupt(f"{self.place} is not an index of model files: {error}") from error
        for file, wanted in by_file.items():
            if not self.folder.exists(file):
                raise CheckpointCorrupt(f"{self.place} lists {file}, which does not exist")
            yield file, wanted

    def _chosen(self, file: str, tensors: dict[str, Any], wanted: list[str] | None) -> dict[str, Any]:
        if wanted is None:
            return tensors
        if lacking := sorted(set(wanted) - tensors.keys()):
            raise CheckpointCorrupt(f"{self.folder.where(file)} lacks {names.few(lacking)}, which {self.name} lists")
        return {name: tensors[name] for name in wanted}

    def _header(self, file: str) -> dict[str, Shape]:
        try:
            entries = self._entries(file)
            return {name: tuple(entry["shape"]) for name, entry in entries.items() if name != "__metadata__"}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointCorrupt(f"{self.folder.where(file)} cannot be read as weights: {error}") from error

    def _entries(self, file: str) -> dict[str, Any]:
        try:
            with self.folder.open_read(file) as opened:
                length = int.from_bytes(opened.read(8), "little")
                if not 0 < length <= _MAX_HEADER:
                    raise ValueError(f"a header of {length} bytes")
                entries: dict[str, Any] = dict(json.loads(opened.read(length)))
                return entries
        except (ValueError, TypeError) as error:
            raise CheckpointCorrupt(f"{self.folder.where(file)} cannot be read as weights: {error}") from error

    def _tensors(self, file: str) -> dict[str, Tensor]:
        from safetensors.torch import load, load_file

        try:
            if self.folder.is_local:
                return load_file(self.folder.local_path / file)
            return load(self.folder.read_bytes(file))
        except Exception as error:  # the library raises several types, with the same meaning
            raise CheckpointCorrupt(f"{self.folder.where(file)} cannot be read as weights: {error}") from error

    def _unpickled(self, file: str, device: str) -> dict[str, Any]:
        where = self.folder.where(file)
        opened: Any = (
            self.folder.local_path / file if self.folder.is_local else io.BytesIO(self.folder.read_bytes(file))
        )
        try:
            loaded: Any = torch.load(opened, map_location=device, weights_only=True)
        except Exception as error:  # a file of another kind may raise any error
            raise CheckpointCorrupt(f"{where} cannot be read as weights: {error}") from error
        for name in ("state_dict", "model"):
            if isinstance(loaded, dict) and isinstance(loaded.get(name), dict):
                loaded = loaded[name]
        if not isinstance(loaded, dict) or not all(
            isinstance(v, Tensor) or is_extra_state(k) for k, v in loaded.items()
        ):
            raise CheckpointCorrupt(f"{where} is not a state dict of tensors")
        return loaded
