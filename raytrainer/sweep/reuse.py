"""Restore the process-wide settings that a trial's code may have changed, for the next trial in the same process.
Settings of a thread (autocast, disabled gradients, the default device) end with the trial's thread.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any

from raytrainer.core.environment import put_back

_Setting = tuple[Callable[[], Any], Callable[[Any], Any]]


@contextlib.contextmanager
def as_found() -> Iterator[None]:
    """Restore all process-wide settings when the context ends, and discard compiled code."""
    import torch._dynamo  # each optimizer imports it anyway

    environment, folder, path, output = dict(os.environ), Path.cwd(), list(sys.path), (sys.stdout, sys.stderr)
    ignored = list(warnings.filters)
    settings = [(write, read()) for read, write in _settings()]
    tables = [(table, dict(table)) for table in _tables()]
    configs = [(config, config.get_config_copy()) for config in _compiler_configs()]
    try:
        yield
    finally:
        sys.path[:], (sys.stdout, sys.stderr) = path, output
        if warnings.filters != ignored:
            warnings.resetwarnings()
            warnings.filters[:] = ignored  # type: ignore[index]
        # Otherwise dynamo recompiles code that earlier trials compiled, until it reaches its limit and stops.
        torch._dynamo.reset()
        for write, value in settings:
            write(value)
        for table, before in tables:
            if dict(table) != before:
                table.clear()
                table.update(before)
        for config, before in configs:
            now = config.get_config_copy()
            for name in [name for name, value in before.items() if now[name] is not value and now[name] != value]:
                setattr(config, name, before[name])
        put_back(environment)
        os.chdir(folder)


def _settings() -> list[_Setting]:
    """Return a reader and a writer for each setting that is a single value."""
    import torch

    backends, cuda, utils = torch.backends, torch.backends.cuda, torch.utils.deterministic
    modules = sys.modules["torch.nn.modules.module"]
    return [
        (torch.get_default_dtype, torch.set_default_dtype),
        (torch.get_num_threads, torch.set_num_threads),
        (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
        (
            lambda: (
                torch.are_deterministic_algorithms_enabled(),
                torch.is_deterministic_algorithms_warn_only_enabled(),
            ),
            lambda on: torch.use_deterministic_algorithms(on[0], warn_only=on[1]),
        ),
        _attribute(utils, "fill_uninitialized_memory"),
        (
            lambda: (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
            lambda on: torch.set_anomaly_enabled(*on),
        ),
        *(_attribute(backends.cudnn, name) for name in ("enabled", "benchmark", "deterministic", "allow_tf32")),
        (
            lambda: (backends.mkldnn.enabled, backends.mkldnn.deterministic, backends.mkldnn.allow_tf32),
            lambda flags: backends.mkldnn.set_flags(*flags),
        ),
        _attribute(backends.opt_einsum, "enabled"),
        (backends.mha.get_fastpath_enabled, backends.mha.set_fastpath_enabled),
        (cuda.flash_sdp_enabled, cuda.enable_flash_sdp),
        (cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp),
        (cuda.math_sdp_enabled, cuda.enable_math_sdp),
        (cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp),
        (cuda.fp16_bf16_reduction_math_sdp_allowed, cuda.allow_fp16_bf16_reduction_math_sdp),
        *(
            _attribute(cuda.matmul, f"allow_{name}")
            for name in ("fp16_accumulation", "fp16_reduced_precision_reduction", "bf16_reduced_precision_reduction")
        ),
        _attribute(modules, "_global_is_full_backward_hook"),
        (gc.isenabled, lambda on: gc.enable() if on else gc.disable()),
        (gc.get_threshold, lambda threshold: gc.set_threshold(*threshold)),
        (sys.getrecursionlimit, sys.setrecursionlimit),
        _attribute(logging.root.manager, "disable"),
    ]


def _attribute(owner: Any, name: str) -> _Setting:
    return lambda: getattr(owner, name), lambda value: setattr(owner, name, value)


def _tables() -> list[MutableMapping[Any, Any]]:
    """Return the tables of hooks that apply to every module and every optimizer."""
    variables = {**vars(sys.modules["torch.nn.modules.module"]), **vars(sys.modules["torch.optim.optimizer"])}
    return [table for name, table in variables.items() if name.startswith("_global_") and isinstance(table, dict)]


def _compiler_configs() -> list[Any]:
    names = ("torch._dynamo.config", "torch._functorch.config", "torch._inductor.config")
    return [sys.modules[name] for name in names if name in sys.modules]
