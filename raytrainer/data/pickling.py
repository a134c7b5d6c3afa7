"""`SharedPickle`: an object pickled once for several data processes, with its arrays and tensors in shared memory.

As after a fork, each process has a private copy of the arrays that needs memory only for the pages that it changes.
"""

from __future__ import annotations

import io
import mmap
import os
import pickle
import tempfile
from collections.abc import Callable
from multiprocessing import reduction
from types import FunctionType
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_LEAST_BYTES = 16 * 2**10  # smaller arrays stay in the pickle itself
_ALIGNMENT = 64


class CannotPickle(Exception):
    """The object cannot be sent to another process; the message says why."""


class SharedPickle:
    """An object as an argument of `multiprocessing.Process`, whose target receives a copy of the object itself.

    Args:
        thing: The object. It may refer to the classes and functions of any module except the launching program, which
            data processes do not import.

    Raises:
        CannotPickle: It cannot be pickled.
    """

    def __init__(self, thing: Any) -> None:
        stream, self._spans = io.BytesIO(), list[tuple[int, int]]()
        # A file, because SharedMemory would need another process to delete it after a SIGKILL.
        in_memory = hasattr(os, "memfd_create")
        self._file: IO[bytes] = (
            os.fdopen(os.memfd_create("raytrainer-data"), "wb") if in_memory else tempfile.TemporaryFile()  # noqa: SIM115
        )
        try:
            _Pickler(stream, self._keep).dump(thing)
        except Exception as error:
            raise CannotPickle(f"{type(error).__name__}: {error}") from error
        self._pickle = stream.getvalue()

    def _keep(self, buffer: pickle.PickleBuffer) -> bool:
        """Write a buffer to the file. Return whether it belongs into the pickle instead."""
        data = buffer.raw()
        if data.nbytes < _LEAST_BYTES:
            return True
        begin = -(-(self._spans[-1][1] if self._spans else 0) // _ALIGNMENT) * _ALIGNMENT
        self._spans.append((begin, begin + data.nbytes))
        while data.nbytes:
            written = os.pwrite(self._file.fileno(), data[: 2**30], begin)
            data, begin = data[written:], begin + written
        return False

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _load, (self._pickle, self._spans, reduction.DupFd(self._file.fileno()))

    def close(self) -> None:
        """Close this process's file, when all processes have been started."""
        self._file.close()


def _load(pickled: bytes, spans: list[tuple[int, int]], duplicate: Any) -> Any:
    file = duplicate.detach()
    memory = memoryview(mmap.mmap(file, 0, access=mmap.ACCESS_COPY)) if spans else memoryview(b"")
    os.close(file)
    return pickle.loads(pickled, buffers=[memory[begin:end] for begin, end in spans])  # noqa: S301  written by the parent process


class _Pickler(pickle.Pickler):
    def __init__(self, stream: io.BytesIO, keep: Callable[[pickle.PickleBuffer], Any]) -> None:
        super().__init__(stream, protocol=5, buffer_callback=keep)

    def reducer_override(self, thing: Any) -> Any:
        if isinstance(thing, type | FunctionType) and thing.__module__ == "__main__":
            raise pickle.PicklingError(f"{thing.__qualname__} belongs to the launching program and not to a module")
        if type(thing) is Tensor and _is_plain(thing):
            numbers = thing.detach().contiguous()
            return _tensor, (numbers.reshape(-1).view(torch.uint8).numpy(), thing.dtype, tuple(thing.shape))
        if isinstance(thing, np.memmap) and thing.filename is not None and thing.flags.c_contiguous:
            return _map_again, (thing.filename, thing.dtype, _offset(thing), thing.shape)
        return NotImplemented


def _is_plain(tensor: Tensor) -> bool:
    is_dense = tensor.device.type == "cpu" and tensor.layout is torch.strided and not tensor.is_quantized
    return is_dense and not (tensor.requires_grad or tensor.is_conj() or tensor.is_neg())


def _tensor(numbers: npt.NDArray[np.uint8], dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(numbers).view(dtype).reshape(shape)


def _offset(array: np.memmap[Any, Any]) -> int:
    """Return the position of an array in its file. A slice has the `offset` of the whole map."""
    whole: Any = array
    while isinstance(whole.base, np.ndarray):
        whole = whole.base
    begin = array.__array_interface__["data"][0] - whole.__array_interface__["data"][0]
    return int(array.offset + begin)


def _map_again(file: Any, dtype: np.dtype[Any], offset: int, shape: tuple[int, ...]) -> np.memmap[Any, Any]:
    return np.memmap(file, dtype, "r", offset, shape)
