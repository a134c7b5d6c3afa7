"""Tests of `_target_` nodes: bound to their targets' signatures at any depth before anything is called, then built."""

from __future__ import annotations

import collections
import functools
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import pytest
import torch

from raytrainer.config import bind, build, compose, factory, locate
from raytrainer.config.nodes import check_targets
from raytrainer.errors import ConfigError

HERE = __name__


class Leaf:
    def __init__(
        self,
        size: int,
        rate: float = 0.1,
        kind: Literal["a", "b"] = "a",
        sizes: Sequence[int] = (),
        pair: tuple[float, float] = (0.0, 0.0),
        names: list[str] | None = None,
        table: Mapping[str, int] | None = None,
        hook: Callable[[], None] | None = None,
        weight: torch.Tensor | float = 1.0,
        path: pathlib.Path | None = None,
        noted: Annotated[int, "a note"] = 0,
        anything: Any = None,
    ) -> None:
        self.arguments = {k: v for k, v in locals().items() if k != "self"}


class Open:
    def __init__(self, size: int = 1, **kwargs: Any) -> None:
        self.kwargs = kwargs


class Failing:
    def __init__(self) -> None:
        raise ValueError("no such colour\nand more")


def function(model: Any, batch: Any) -> dict[str, Any]:
    return {"model": model, "batch": batch}


NOT_CALLABLE = 3


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Add this module to `sys.modules` under a name that a `_target_` can use; pytest's import mode does not."""
    import sys

    monkeypatch.setitem(sys.modules, "nodes_under_test", sys.modules[HERE])


def leaf(**arguments: Any) -> dict[str, Any]:
    return {"_target_": "nodes_under_test.Leaf", **arguments}


def refusal(node: Any, key: str = "model", supplied: Sequence[str] = ()) -> str:
    with pytest.raises(ConfigError) as caught:
        bind(key, node, supplied)
    return str(caught.value)


@pytest.mark.parametrize(
    "arguments",
    [
        {"rate": 1, "kind": "b", "sizes": [1, 2], "pair": [0.5, 1], "names": ["x"], "table": {"a": 1}},
        {"names": None, "table": None, "hook": None, "weight": 2.0, "path": "/tmp/x", "noted": 3},
        {"hook": {"_target_": "nodes_under_test.Leaf", "size": 1}, "weight": {"_target_": "torch.ones", "_args_": [3]}},
        {"anything": [{"a": {"b": None}}], "sizes": []},
        {"rate": {"_target_": "builtins.float", "_args_": [3]}},
    ],
)
def test_what_a_signature_allows_passes(arguments: dict[str, Any]) -> None:
    bind("model", leaf(size=1, **arguments))


@pytest.mark.parametrize(
    ("arguments", "assigned", "fix"),
    [
        ({"sice": 1}, "model.sice=1", "valid: size, sizes"),
        ({"size": "abc"}, "model.size=abc", "a whole number"),
        ({"size": 1.5}, "model.size=1.5", "a whole number"),
        ({"size": True}, "model.size=true", "a whole number"),
        ({"size": None}, "model.size", "a whole number"),
        ({"size": 1, "rate": "fast"}, "model.rate=fast", "a number"),
        ({"size": 1, "kind": "c"}, "model.kind=c", "valid: a, b"),
        ({"size": 1, "sizes": 3}, "model.sizes=3", "a list (of a whole number)"),
        ({"size": 1, "sizes": [1, "x"]}, "model.sizes=[1,x]", "a list"),
        ({"size": 1, "pair": [1.0]}, "model.pair=[1.0]", "a list of 2 (a number)"),
        ({"size": 1, "names": [1]}, "model.names=[1]", "a list (of text) or null"),
        ({"size": 1, "table": [1]}, "model.table=[1]", "a mapping or null"),
        ({"size": 1, "hook": "print"}, "model.hook=print", "a _target_ or null"),
        ({"size": 1, "hook": {"padding": 2}}, "model.hook={padding:2}", "a _target_ or null"),
        ({"size": 1, "weight": "x"}, "model.weight=x", "a number"),
        ({"size": 1, "noted": "x"}, "model.noted=x", "a whole number"),
        ({}, "model.size", "required argument"),
        ({"size": 1, "_partial_": 3}, "model._partial_=3", "true or false"),
        ({"size": 1, "_partal_": True}, "model._partal_=true", "not an argument"),
    ],
)
def test_what_a_signature_excludes_is_refused(arguments: dict[str, Any], assigned: str, fix: str) -> None:
    message = refusal(leaf(**arguments))
    assert message.startswith(f"{assigned} ")
    assert fix in message


def test_at_any_depth() -> None:
    deep = leaf(size=1, anything={"list": [{"x": leaf(size=2, anything=[leaf(sise=3)])}]})
    assert refusal(deep).startswith("model.anything.list[0].x.anything[0].sise=3 ")
    assert refusal({"_target_": "builtins.dict", "_args_": [leaf(sise=3)]}).startswith("model._args_[0].sise=3")


def test_arguments_by_position_and_by_us_are_not_missing() -> None:
    bind("model", {"_target_": "nodes_under_test.Leaf", "_args_": [1]})
    bind("optimizer", {"_target_": "torch.optim.SGD", "lr": 0.1}, ["params"])
    message = refusal({"_target_": "torch.optim.SGD", "lr": 0.1, "params": []}, "optimizer", ["params"])
    assert message.startswith("optimizer.params ")
    assert "leave it out" in message


def test_open_ended_targets_take_anything_but_misspelt_words_of_hydra() -> None:
    bind("model", {"_target_": "nodes_under_test.Open", "whatever": 1})
    assert "is not an argument" in refusal({"_target_": "nodes_under_test.Open", "_recursiv_": False})


def test_a_function_as_a_loss() -> None:
    node = {"_target_": "nodes_under_test.function"}
    assert "loss._partial_=true" in refusal(node, "loss")
    bind("loss", {**node, "_partial_": True})
    assert build({**node, "_partial_": True})("m", "b") == {"model": "m", "batch": "b"}


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("torch.optim.AdamWW", "cannot be imported: torch.optim has no AdamWW; valid: torch.optim.AdamW"),
        ("torch.optm.AdamW", "cannot be imported: torch has no optm; valid: torch.optim"),
        ("raytrainer.modls.MLP", "cannot be imported: raytrainer has no modls; valid: raytrainer.models"),
        ("nosuchmodule.X", "cannot be imported: there is no module nosuchmodule"),
        ("nodes_under_test.NOT_CALLABLE", "cannot be called"),
        ("torch optim", "must be a dotted path"),
        ("", "must be a dotted path"),
        (3, "must be a dotted path"),
        ("..torch", "must be a dotted path"),
    ],
)
def test_targets_that_are_not_there(path: Any, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        locate("optimizer", path)
    assert str(caught.value).startswith(f"optimizer._target_={path} {reason}")


def test_a_module_not_yet_imported_is_found_below_one_that_is(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "late_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "inner.py").write_text("def made(): return 7\n")
    (package / "broken.py").write_text("import a_dependency_that_is_missing\n")
    (package / "worse.py").write_text("raise RuntimeError('at import')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import late_package  # type: ignore[import-not-found]  # noqa: F401

    assert locate("model", "late_package.inner.made")() == 7
    with pytest.raises(ConfigError, match="a_dependency_that_is_missing"):
        locate("model", "late_package.broken.made")
    with pytest.raises(ConfigError, match="RuntimeError: at import"):
        locate("model", "late_package.worse.made")


def test_building() -> None:
    made = build(leaf(size=1, sizes=[1, 2], anything={"x": leaf(size=2)}))
    assert isinstance(made, Leaf)
    assert made.arguments["sizes"] == [1, 2]
    assert type(made.arguments["sizes"]) is list  # plain values, not Hydra's containers
    assert isinstance(made.arguments["anything"]["x"], Leaf)
    assert build({"_target_": "collections.Counter"}) == collections.Counter()
    assert isinstance(factory(leaf(size=1)), functools.partial)


def test_a_constructor_that_refuses_is_named_with_its_reason() -> None:
    with pytest.raises(ConfigError, match="ValueError: no such colour") as caught:
        build({"_target_": "nodes_under_test.Failing"})
    assert isinstance(caught.value.__cause__, ValueError)
    assert "and more" not in str(caught.value)


def test_all_of_an_experiment_is_bound() -> None:
    for key, value in {
        "callbacks": {"a": {"_target_": "nodes_under_test.Leaf", "sise": 1}},
        "loss": {"_target_": "raytrainer.losses.CrossEntropy", "inputs": "x"},
        "lr_scheduler": {"_target_": "raytrainer.optim.Cosine", "warm": 1},
    }.items():
        e = compose(["experiment=mlp"]).experiment
        setattr(e, key, value)
        with pytest.raises(ConfigError, match=f"^{key}.* is not an argument of"):
            check_targets(e)
    e = compose(["experiment=mlp"]).experiment
    e.data.collate_fn = {"_target_": "nodes_under_test.function", "_partial_": True, "modl": 1}
    with pytest.raises(ConfigError, match=r"^data\.collate_fn\.modl=1 "):
        check_targets(e)


def test_a_module_that_parses_the_command_line_when_it_is_imported(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "parses_argv.py").write_text(
        "import argparse\nparser = argparse.ArgumentParser()\nparser.add_argument('--width', type=int, default=3)\n"
        "options = parser.parse_args()\ndef net(width=options.width):\n    return width\n"
    )
    (tmp_path / "parses_nested.py").write_text((tmp_path / "parses_argv.py").read_text())
    (tmp_path / "wants_argv.py").write_text("import sys\nsys.exit('a file is needed')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "argv", argv := ["raytrainer", "experiment=mlp", "--dry-run"])
    bind("model", {"_target_": "parses_argv.net"})
    assert build({"_target_": "parses_nested.net"}) == 3  # like a worker, which does not bind first
    with pytest.raises(ConfigError, match=r"^model\._target_=wants_argv\.net .*__main__"):
        bind("model", {"_target_": "wants_argv.net"})
    with pytest.raises(ConfigError, match=r"wants_argv\.net.*ended the process"):
        build({"_target_": "wants_argv.net"})
    assert sys.argv is argv


def takes_more(function: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator that removes its own arguments before it calls the function."""

    @functools.wraps(function)
    def wrapper(*args: Any, retries: int = 0, **kwargs: Any) -> Any:
        kwargs.pop("num_labels", None)
        return function(*args, **kwargs)

    return wrapper


class Wrapped:
    @takes_more
    def __init__(self, hidden_size: int = 3, layers: int = 2) -> None:
        self.hidden_size, self.layers = hidden_size, layers


@takes_more
def wrapped(hidden_size: int = 3) -> int:
    return hidden_size


@pytest.mark.parametrize("target", ["Wrapped", "wrapped"])
def test_an_argument_that_a_decorator_takes(target: str) -> None:
    """`transformers.BertConfig(num_labels=8)` is valid, though the signature below its decorator lacks that name."""
    node = {"_target_": f"{HERE}.{target}", "num_labels": 8, "retries": 2, "hidden_size": 4}
    bind("model", node)
    build(node)
    with pytest.raises(ConfigError, match=r"^model\.hiden_size=4 .*valid: hidden_size"):
        bind("model", {"_target_": f"{HERE}.{target}", "hiden_size": 4})
    with pytest.raises(ConfigError, match=r"^model\._recursiv_=true "):
        bind("model", {"_target_": f"{HERE}.{target}", "_recursiv_": True})


def test_a_config_of_transformers_takes_num_labels() -> None:
    pytest.importorskip("transformers")
    bind("model", {"_target_": "transformers.BertConfig", "num_labels": 8, "hidden_size": 8})
    with pytest.raises(ConfigError, match=r"^model\.hiden_size=8 .*valid: hidden_size"):
        bind("model", {"_target_": "transformers.BertConfig", "hiden_size": 8})
