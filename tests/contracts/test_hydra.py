"""The private parts of Hydra and OmegaConf behave as `raytrainer/config/hydra_internals.py` relies on."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from raytrainer.config import hydra_internals
from tests.contracts.private_parts import HYDRA, PrivatePart


@pytest.mark.parametrize("part", HYDRA, ids=lambda part: part.name)
def test_part(part: PrivatePart) -> None:
    part.check()


def test_leaves_are_visited_without_resolving() -> None:
    cfg = OmegaConf.create({"a": {"b": "${nowhere}", "c": [1, {"d": "???"}]}, "e": None, "f": {}, "g": "${a}"})
    keys = [hydra_internals.full_key(container, name) for container, name in hydra_internals.leaves(cfg)]
    assert keys == ["a.b", "a.c[0]", "a.c[1].d", "e", "g"]
    written = {keys[n]: hydra_internals.written(*leaf) for n, leaf in enumerate(hydra_internals.leaves(cfg))}
    assert (written["a.b"], written["a.c[0]"], written["g"]) == ("${nowhere}", "1", "${a}")


def test_resolvers_are_by_name() -> None:
    assert {"oc.env", "oc.select"} <= set(hydra_internals.resolvers())
    OmegaConf.register_new_resolver("contract", lambda: 1)
    try:
        assert "contract" in hydra_internals.resolvers()
    finally:
        del hydra_internals.resolvers()["contract"]
    assert not OmegaConf.has_resolver("contract")


def test_singletons_are_by_class() -> None:
    from hydra.core.config_store import ConfigStore

    assert hydra_internals.singletons()[ConfigStore] is ConfigStore.instance()


def test_parser_has_the_options_that_the_command_line_reads() -> None:
    parser = hydra_internals.argument_parser("program", "program 1.0")
    parsed = parser.parse_intermixed_args(["a=1", "-m", "--config-dir", "x", "--cfg", "job"])
    assert (parsed.overrides, parsed.multirun, parsed.config_dir, parsed.cfg) == (["a=1"], True, "x", "job")
    for option in ("help", "hydra_help", "info", "shell_completion", "config_name", "resolve", "package", "run"):
        assert hasattr(parsed, option), f"cli reads --{option}"
    assert "program 1.0" in next(a.version for a in parser._actions if "--version" in a.option_strings)  # type: ignore[attr-defined]


def test_keys_are_escaped() -> None:
    assert hydra_internals.escaped_key("a b:c") == "a\\ b\\:c"


def test_a_job_keeps_its_exception() -> None:
    from hydra.core.utils import JobReturn, JobStatus

    error = ValueError("x")
    job = JobReturn(status=JobStatus.FAILED)
    job.return_value = error
    assert hydra_internals.result_of(job) is error
