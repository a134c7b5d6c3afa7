"""Tests of the search space: every form of Hydra's sweep grammar, and what is refused."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hydra import initialize_config_dir
from hypothesis import assume, given
from hypothesis import strategies as st

from raytrainer.config import Parameter, parse_space
from raytrainer.errors import ConfigError
from tests.config.spaces import GROUPS, one, parse, read, refusal, same


@pytest.mark.parametrize(
    ("sweep", "values", "texts"),
    [
        ("1,2", (1, 2), "1 2"),
        ("1_000,1e3,-2,-.5", (1000, 1000.0, -2, -0.5), "1000 1000.0 -2 -0.5"),
        ("choice(1,2)", (1, 2), "1 2"),
        ("choice(sort(2,1))", (1, 2), "1 2"),
        ("null,true,False", (None, True, False), "null true false"),
        ("1,1.0,true,'1'", (1, 1.0, True, "1"), "1 1.0 true '1'"),
        ("inf,-inf,nan", (math.inf, -math.inf, math.nan), "inf -inf nan"),
        ("relu,gelu", ("relu", "gelu"), "relu gelu"),
        ("a/b.c,d-e", ("a/b.c", "d-e"), "a/b.c d-e"),
        ("'1',\"2\"", ("1", "2"), "'1' \"2\""),
        ("'null',nullx", ("null", "nullx"), "'null' nullx"),
        ("'',x", ("", "x"), "'' x"),
        # Hydra's functions drop quotes, and its own multirun then reads '1' as a number.
        ("choice('1',2)", ("1", 2), "'1' 2"),
        ("choice('true',true)", ("true", True), "'true' true"),
        ("choice(a\\,b,c)", ("a,b", "c"), "'a,b' c"),
        ("choice('it\\'s',b)", ("it's", "b"), '"it\'s" b'),
        ("${seed},${x.y}", ("${seed}", "${x.y}"), "'${seed}' '${x.y}'"),
        ("[1,2],[3]", ("[1,2]", "[3]"), "[1,2] [3]"),
        ("choice([],['1',a],{x:1,y:'q,r'})", ("[]", "['1',a]", "{x:1,y:'q,r'}"), "[] ['1',a] {x:1,y:'q,r'}"),
        ("{a:{b:[true,null]}},{}", ("{a:{b:[true,null]}}", "{}"), "{a:{b:[true,null]}} {}"),
        ("float(1,2)", (1.0, 2.0), "1.0 2.0"),
        ("int(choice('1','2'))", (1, 2), "1 2"),
        ("int(1.5,2.5)", (1, 2), "1 2"),
        ("str(1,2)", ("1", "2"), "'1' '2'"),
        ("str([1],[2])", ("['1']", "['2']"), "['1'] ['2']"),
        ("bool(0,1)", (False, True), "false true"),
        ("sort(3,1,2)", (1, 2, 3), "1 2 3"),
        ("sort(choice(a,c,b),reverse=true)", ("c", "b", "a"), "c b a"),
        ("sort(range(0,1,0.3),reverse=true)", (0.8999999999999999, 0.6, 0.3, 0.0), "0.8999999999999999 0.6 0.3 0.0"),
    ],
)
def test_choices(sweep: str, values: tuple[Any, ...], texts: str) -> None:
    parameter = one(f"data.x={sweep}")
    assert (parameter.key, parameter.kind, parameter.group) == ("data.x", "choice", False)
    assert same(parameter.values, values)
    assert parameter.texts == tuple(texts.split(" "))
    assert parameter.grid() is parameter.probes() is parameter.values
    for value, text in zip(parameter.values, parameter.texts, strict=True):
        assert parameter.override(value) == f"data.x={text}"
        assert parameter.contains(value)
        listed = text.startswith(("[", "{"))
        assert listed or same(read(parameter.override(value)), value)


@pytest.mark.parametrize(
    ("sweep", "expected", "grid"),
    [
        ("range(4)", {"low": 0, "high": 3, "step": 1, "integer": True}, (0, 1, 2, 3)),
        ("range(1,10,2)", {"low": 1, "high": 9, "step": 2, "integer": True}, (1, 3, 5, 7, 9)),
        ("range(1,9,2)", {"low": 1, "high": 7, "step": 2, "integer": True}, (1, 3, 5, 7)),
        ("range(start=1,stop=3)", {"low": 1, "high": 2, "step": 1, "integer": True}, (1, 2)),
        ("range(10,0,-3)", {"low": 1, "high": 10, "step": -3, "integer": True}, (10, 7, 4, 1)),
        ("range(0,1,0.25)", {"low": 0.0, "high": 0.75, "step": 0.25}, (0.0, 0.25, 0.5, 0.75)),
        ("range(1,0,-0.5)", {"low": 0.5, "high": 1.0, "step": -0.5}, (1.0, 0.5)),
        ("range(1.0,3)", {"low": 1.0, "high": 2.0, "step": 1.0}, (1.0, 2.0)),
        ("float(range(1,3))", {"low": 1.0, "high": 2.0, "step": 1.0}, (1.0, 2.0)),
        ("int(range(1.0,3.0))", {"low": 1, "high": 2, "step": 1, "integer": True}, (1, 2)),
        ("range(7,8)", {"low": 7, "high": 7, "step": 1, "integer": True}, (7,)),
        # Hydra's own sort gives these other values: -2 and 12.
        ("sort(range(0,10,3),reverse=true)", {"low": 0, "high": 9, "step": -3, "integer": True}, (9, 6, 3, 0)),
        ("sort(range(10,0,-3))", {"low": 1, "high": 10, "step": 3, "integer": True}, (1, 4, 7, 10)),
        ("sort(sweep=range(0,3))", {"low": 0, "high": 2, "step": 1, "integer": True}, (0, 1, 2)),
        ("tag(log,range(1,4))", {"low": 1, "high": 3, "step": 1, "integer": True, "log": True}, (1, 2, 3)),
        ("int(tag(log,range(1.0,3.0)))", {"low": 1, "high": 2, "step": 1, "integer": True, "log": True}, (1, 2)),
        ("tag(log,int(range(1.0,3.0)))", {"low": 1, "high": 2, "step": 1, "integer": True, "log": True}, (1, 2)),
    ],
)
def test_ranges(sweep: str, expected: dict[str, Any], grid: tuple[Any, ...]) -> None:
    parameter = one(f"data.x={sweep}")
    assert same(parameter, replace(Parameter("data.x", "range"), **expected))
    assert same(parameter.grid(), grid)
    assert set(parameter.probes()) == {min(grid), max(grid)}
    assert all(parameter.contains(v) for v in grid)
    assert not parameter.contains(max(grid) + abs(expected["step"]))
    assert not parameter.contains(min(grid) - abs(expected["step"]))
    assert not parameter.contains(grid[0] + abs(expected["step"]) / 2)


@pytest.mark.parametrize(
    ("sweep", "expected"),
    [
        ("interval(1,5)", {"low": 1.0, "high": 5.0}),
        ("tag(interval(-1,0.5))", {"low": -1.0, "high": 0.5}),
        ("tag(log,interval(1e-4,1e-1))", {"low": 1e-4, "high": 0.1, "log": True}),
        ("tag(log,sweep=interval(1,2))", {"low": 1.0, "high": 2.0, "log": True}),
        ("int(interval(1,5))", {"low": 1, "high": 5, "integer": True}),
        ("int(interval(3,3))", {"low": 3, "high": 3, "integer": True}),
        ("float(int(interval(1.5,5)))", {"low": 1.0, "high": 5.0}),
        ("tag(log,int(interval(1,100)))", {"low": 1, "high": 100, "log": True, "integer": True}),
        ("int(tag(log,interval(1,100)))", {"low": 1, "high": 100, "log": True, "integer": True}),
        ("float(tag(log,interval(1,100)))", {"low": 1.0, "high": 100.0, "log": True}),
    ],
)
def test_intervals(sweep: str, expected: dict[str, Any]) -> None:
    parameter = one(f"data.x={sweep}")
    assert same(parameter, replace(Parameter("data.x", "interval"), **expected))
    assert parameter.probes() == tuple(dict.fromkeys((parameter.low, parameter.high)))
    assert all(parameter.contains(v) for v in parameter.probes())
    assert not parameter.contains(math.nextafter(expected["low"], -math.inf))
    assert not parameter.contains(math.nextafter(expected["high"], math.inf))
    assert not parameter.contains(math.nan)
    with pytest.raises(ConfigError, match=r"^data\.x=interval\(.*grid: list values"):
        parameter.grid()


@pytest.mark.parametrize(
    ("override", "key", "group"),
    [
        ("model=mlp,resnet18", "model", True),
        ("+model=mlp,resnet18", "+model", True),
        ("model@net=mlp,resnet18", "model@net", True),
        ("+optimizer@model.inner=sgd,adamw", "+optimizer@model.inner", True),
        ("experiment=choice(mlp,resnet)", "experiment", True),
        ("model='1','2'", "model", True),
        ("model=[a,b],[c]", "model", True),
        # A dict for a group is merged into its section, as in Hydra.
        ("model={width:1},{width:2}", "model", False),
        ("model.width=1,2", "model.width", False),
        ("+model.dropout=0.1,0.2", "+model.dropout", False),
        ("++model.dropout=0.1,0.2", "++model.dropout", False),
        ("seed=1,2,3", "seed", False),
        ("named.x=1,2", "named.x", False),
    ],
)
def test_keys(override: str, key: str, group: bool) -> None:
    parameter = one(override)
    assert (parameter.key, parameter.group) == (key, group)
    assert parameter.override(parameter.values[0]).startswith(f"{key}=")
    as_function = parse_space([override], {}, groups=lambda name: name in GROUPS)[0]
    assert as_function == [parameter]


def test_shuffling_gives_the_same_order_each_time() -> None:
    listed, ranged = one("a=shuffle(choice(1,2,3,4,5,6,7,8))"), one("a=int(shuffle(range(1.0,9.0)))")
    assert listed.kind == ranged.kind == "choice"
    assert sorted(listed.values) == sorted(ranged.values) == list(range(1, 9))
    assert listed.values != tuple(range(1, 9))
    assert one("a=shuffle(choice(1,2,3,4,5,6,7,8))") == listed
    assert one("b=shuffle(choice(1,2,3,4,5,6,7,8))").values != listed.values


@pytest.fixture
def own_configs(tmp_path: Path) -> Path:
    for name in ("wide", "wider", "thin"):
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "model" / f"{name}.yaml").write_text("width: 1\n")
    (tmp_path / "config.yaml").write_text("{}\n")
    return tmp_path


@pytest.fixture
def running(own_configs: Path) -> Iterator[None]:
    with initialize_config_dir(str(own_configs), version_base="1.3"):
        yield


def test_glob_chooses_among_the_choices_of_raytrainer_and_of_a_config_dir(own_configs: Path) -> None:
    assert one("model=glob(resnet*,exclude=*digits)").values == ("resnet18", "resnet50")
    (parameter,) = parse_space(["model@x=glob([wid*,mlp])"], {}, groups=GROUPS, config_dir=own_configs)[0]
    assert parameter == Parameter("model@x", "choice", ("mlp", "wide", "wider"), ("mlp", "wide", "wider"), group=True)


@pytest.mark.usefixtures("running")
def test_glob_asks_the_hydra_that_runs() -> None:
    # The groups are those of the running application. raytrainer's are among them only if its search path has them.
    assert one("model=glob([wid*,mlp])").values == ("wide", "wider")
    message = refusal("model=glob(nope)")
    assert message.startswith("model=glob(nope) ")
    assert "valid: thin, wide, wider" in message


def test_the_space_comes_first_and_fixed_overrides_stay_as_written() -> None:
    overrides = ["experiment=mlp", "seed=1,2", "name='my sweep'", "~data.val", "optimizer.lr=interval(0,1)", "x=[1, 2]"]
    space = {"model.width": "64,128", "model": ["mlp", "resnet18"], "optimizer.eps": "tag(log, interval(1e-9, 1e-7))\n"}
    parameters, fixed = parse_space(overrides, space, groups=GROUPS)
    assert [p.key for p in parameters] == ["model.width", "model", "optimizer.eps", "seed", "optimizer.lr"]
    assert fixed == ["experiment=mlp", "name='my sweep'", "~data.val", "x=[1, 2]"]
    assert parameters[1].group
    assert parameters[2].log


@pytest.mark.parametrize(
    ("overrides", "keys"),
    [
        (["model.width=1,2"], ["+model.dropout", "model.width"]),
        (["model.width=8"], ["+model.dropout"]),
        (["++model.width=8"], ["+model.dropout"]),
        (["~model.width"], ["+model.dropout"]),
        (["model.dropout=0.1"], ["model.width"]),
        (["model=mlp,resnet18"], ["+model.dropout", "model.width", "model"]),
        (["model=mlp"], ["+model.dropout", "model.width"]),
    ],
)
def test_the_command_line_wins_over_the_space(overrides: list[str], keys: list[str]) -> None:
    # A value of the space that the command line replaces is not even parsed.
    space: dict[str, Any] = {"+model.dropout": "interval(0,1)", "model.width": [64, 128]}
    parameters, fixed = parse_space(overrides, space, groups=GROUPS)
    assert [p.key for p in parameters] == keys
    assert fixed == [o for o in overrides if "," not in o]


def test_lists_of_yaml_are_values_as_they_are() -> None:
    values = [
        1,
        1.5,
        True,
        None,
        "relu",
        "1",
        "a b",
        "1,2",
        "interval(0,1)",
        [1, ["2"]],
        {"x": {"y": "z: 1", "k l": []}},
    ]
    (parameter,) = parse(**{"data.x": values})
    assert same(list(parameter.values[:-2]), values[:-2])
    assert [read(parameter.override(v)) for v in parameter.values] == values


def test_a_nested_space_has_dotted_keys() -> None:
    space = {"optimizer": {"lr": "0.1,0.2", "inner": {"eps": [1e-8]}}, "model.width": "1,2"}
    assert [p.key for p in parse(**space)] == ["optimizer.lr", "optimizer.inner.eps", "model.width"]


HOW = "a sweep is a list a,b or choice(a,b), range(1,10), interval(0,1), "


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        # empty or meaningless
        (
            "a=interval(5,1)",
            "a=interval(5,1) is empty: it ends at 1.0, which is not above its start 5.0: interval(1.0,5.0)",
        ),
        (
            "a=interval(1,1)",
            "a=interval(1,1) is empty: it ends at 1.0, which is not above its start 1.0; write one value",
        ),
        ("a=int(interval(5,1))", "a=int(interval(5,1)) is empty: it ends at 1, which is"),
        ("a=interval(0,inf)", "a=interval(0,inf) must begin and end with finite numbers"),
        ("a=interval(nan,1)", "a=interval(nan,1) must begin and end with finite numbers"),
        (
            "a=tag(log,interval(0,1))",
            "a=tag(log,interval(0,1)) begins at 0.0, which has no logarithm: begin above 0, as tag(",
        ),
        ("a=tag(log,int(interval(0.5,9)))", "a=tag(log,int(interval(0.5,9))) begins at 0, which has no logarithm"),
        ("a=tag(log,range(0,9))", "a=tag(log,range(0,9)) begins at 0, which has no logarithm"),
        (
            "a=tag(log,range(1,100,5))",
            "a=tag(log,range(1,100,5)) is both logarithmic and equally spaced: list the values",
        ),
        (
            "a=tag(log,range(2,9,2))",
            "a=tag(log,range(2,9,2)) is both logarithmic and equally spaced: list the values, as",
        ),
        ("a=float(tag(log,range(1,9)))", "a=float(tag(log,range(1,9))) is both logarithmic and equally spaced"),
        ("a=tag(log,choice(1,2))", "a=tag(log,choice(1,2)) is a list, which has no scale: leave out tag(log, …)"),
        ("a=tag(log,shuffle(range(1,3)))", "a=tag(log,shuffle(range(1,3))) is a list, which has no scale"),
        (
            "a=tag(lin,interval(0,1))",
            "a=tag(lin,interval(0,1)) has the tag 'lin', which means nothing here; valid: log",
        ),
        ("a=tag(log,q,choice(1,2))", "a=tag(log,q,choice(1,2)) has the tag 'q', which means nothing here; valid: log"),
        ("a=range(3,3)", "a=range(3,3) is empty: it goes from 3 to 3, which it excludes"),
        ("a=range(5,1)", "a=range(5,1) is empty: it goes from 5 to 1, which it excludes, with a step of 1"),
        ("a=range(1,5,0)", "a=range(1,5,0) has a step of 0: give another"),
        ("a=int(range(0,5,0.5))", "a=int(range(0,5,0.5)) has a step of 0: give another"),
        ("a=range(0,inf)", "a=range(0,inf) must have finite numbers"),
        (
            "a=range(0,1e9,0.1)",
            "a=range(0,1e9,0.1) has more than a million values: use interval(…), which has every number",
        ),
        ("a=choice()", f"a=choice() is an empty list: {HOW}"),
        ("a=1,2,1", "a=1,2,1 has 1 twice; leave one out"),
        ("a=x,'x'", "a=x,'x' has 'x' twice; leave one out"),
        (
            "a=1,[choice(2,3)]",
            "a=1,[choice(2,3)] has a sweep inside of a value: sweep over whole values, as [1,2],[1,3]",
        ),
        ("a=[1,interval(2,3)]", "a=[1,interval(2,3)] has a sweep inside of a value"),
        ("a={x:range(3)}", "a={x:range(3)} has a sweep inside of a value"),
        ("a=1,choice(2,3)", "a=1,choice(2,3) has a sweep inside of a value"),
        # not readable by Hydra
        ("a=1,,2", f"a=1,,2 cannot be read: {HOW}"),
        ("a=interval(1,2", "a=interval(1,2 cannot be read: it has 1 ( and 0 ); a sweep is "),
        (
            "a=intervall(1,2)",
            "a=intervall(1,2) cannot be read: there is no intervall(); valid: interval, bool, choice, ",
        ),
        (
            "a=choice(null,1)",
            "a=choice(null,1) cannot be read: choice() does not accept null, which only a plain list may have",
        ),
        ("a=interval(1;2)", f"a=interval(1;2) cannot be read: {HOW}"),
        ("a=a:=b", "a=a:=b cannot be read: put text in quotes"),
        ("sweep.space.x=1,2", "sweep.space.x=1,2 is where an experiment's file keeps its space; here it is x=1,2"),
        ("sweep.space=1,2", "sweep.space=1,2 is where an experiment's file keeps its space; here it is key=a,b for"),
        ("a=tag(log,1,2)", f"a=tag(log,1,2) cannot be read: tag() does not accept int there; {HOW}"),
        ("a=choice(interval(0,1))", "a=choice(interval(0,1)) cannot be read: choice() does not accept interval there"),
        ("a=int(1,interval(0,1))", "a=int(1,interval(0,1)) cannot be read: int() does not accept that there"),
        ("a=interval(1)", "a=interval(1) cannot be read: missing a required argument: 'end'"),
        ("a=int(x,2)", "a=int(x,2) cannot be read: invalid literal for int() with base 10: 'x'"),
        ("a=str(interval(0,1))", "a=str(interval(0,1)) cannot be read: Intervals cannot be cast to str"),
        ("foo", "'foo' is not key=value; a command comes first"),
        ("=1,2", "'=1,2' is not key=value"),
        # groups
        (
            "model=interval(0,1)",
            "model=interval(0,1) is over a group, whose choices are names: list them, as a,b, or glob(*)",
        ),
        ("model@x=range(3)", "model@x=range(3) is over a group, whose choices are names: list them"),
        (
            "model=mlp,1",
            "model=mlp,1 is over a group, whose choices are names; put a name that looks like something else",
        ),
        ("model=mlp,null", "model=mlp,null is over a group, whose choices are names; put a name"),
        ("model=mlp,{x:1}", "model=mlp,{x:1} is over a group, whose choices are names; put a name"),
        ("++model=a,b", "++model=a,b is a group, which ++ cannot choose from: +model=…"),
        ("seed=glob(*)", "seed=glob(*) is not a group, and glob chooses among a group's configs"),
        ("model=glob(nope*)", "model=glob(nope*) matches no choice of the group; valid: gpt2_124m, llama_1b"),
        ("model=glob([1,2])", "model=glob([1,2]) must have patterns of names, as glob(*)"),
        # keys that cannot differ between trials
        ("~seed=1,2", "~seed=1,2 cannot be swept: ~ deletes the key"),
        ("name=a,b", "name=a,b cannot be swept: a trial is named by its number below the sweep's name"),
        ("+name=a,b", "name=a,b cannot be swept: a trial is named"),
        ("storage_path=a,b", "storage_path=a,b cannot be swept: all trials of a sweep are stored below one path"),
        (
            "tracking.required=true,false",
            "tracking.required=true,false cannot be swept: all trials of a sweep go to one",
        ),
        ("cluster=local,inline", "cluster=local,inline cannot be swept: all trials of a sweep run on one cluster"),
        ("cluster.address=a,b", "cluster.address=a,b cannot be swept: all trials of a sweep run on one cluster"),
        ("model@cluster=a,b", "model@cluster=a,b cannot be swept: all trials of a sweep run on one cluster"),
        ("sweep=asha,random", "sweep=asha,random cannot be swept: a sweep has one way of searching"),
        ("sweep.num_samples=1,2", "sweep.num_samples=1,2 cannot be swept: a sweep has one way of searching"),
        ("debug=default,other", "debug=default,other cannot be swept: debugging is one run, without -m"),
        (
            "scaling.num_workers=range(3)",
            "scaling.num_workers=range(3) cannot be swept: every trial of a sweep has the same",
        ),
        ("hydra/launcher=a,b", "hydra/launcher=a,b cannot be swept: it is Hydra's own, once for all trials"),
        ("hydra.job.num=interval(0,1)", "hydra.job.num=interval(0,1) cannot be swept: it is Hydra's own, once for all"),
    ],
)
def test_refusals_name_key_value_and_fix(override: str, reason: str) -> None:
    assert refusal(override).startswith(reason)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["a=1,2", "a=3,4"], "a=3,4 is given twice, also as a=1,2; leave one out"),
        (["a=1,2", "++a=3"], "a=3 is given twice, also as a=1,2; leave one out"),
        (["a=3", "+a=1,2"], "a=1,2 is given twice, also as a=3; leave one out"),
        (["a=1,2", "~a"], "a is given twice, also as a=1,2; leave one out"),
    ],
)
def test_a_key_given_twice_is_refused(overrides: list[str], reason: str) -> None:
    assert refusal(*overrides) == reason


def test_the_last_of_two_fixed_overrides_wins_as_in_hydra() -> None:
    assert parse_space(["a=1", "a=2", "model@x=a", "model@y=b,c"], {}, groups=GROUPS)[1] == ["a=1", "a=2", "model@x=a"]


@pytest.mark.parametrize(
    ("space", "reason"),
    [
        ({"a": "interval(5,1)"}, "a=interval(5,1) is empty: it ends at 1.0"),
        (
            {"a": "lots of it ,,"},
            f"a=lots of it ,, cannot be read: {HOW}",
        ),
        (
            {"a": "intrval(5,1)"},
            "a=intrval(5,1) cannot be read: there is no intrval() (in sweep.space); valid: interval",
        ),
        ({"a": "64 128"}, f"a=64 128 is one value, not several: {HOW}"),
        ({"a": "[1,2]"}, "a=[1,2] is one value, not several"),
        ({"a": 0.1}, "a=0.1 is one value, not several"),
        ({"a": None}, "a is one value, not several"),
        ({"a": "[1,choice(2)]"}, "a=[1,choice(2)] has a sweep inside of a value"),
        ({"a": " "}, f"a is empty: {HOW}"),
        ({"a": []}, "a=[] is an empty list: give it values (in sweep.space)"),
        ({"a": {"b": {}}}, "a.b is empty (in sweep.space): a sweep is"),
        ({"a": [1, 2, 1]}, "a=[1,2,1] has 1 twice; leave one out"),
        ({"a": [{"1": 2}]}, "a={1:2} cannot be written as an override: {1:2} is another value"),
        ({"a": [{"": 2}]}, "a={:2} cannot be written as an override (in sweep.space)"),
        ({"a": [1, b"x"]}, "a cannot be swept over: b'x' is a bytes"),
        ({1: "1,2"}, "sweep.space has the key 1, which must be a text"),
        ({"a=b": "1,2"}, "a=b cannot be a key (in sweep.space)"),
        ({"a b": "1,2"}, "a b cannot be a key (in sweep.space)"),
        ({"a": {"b": "1,2"}, "a.b": [3]}, "a.b is given twice; leave one out (in sweep.space)"),
        ({"a": "1,2", "+a": [3]}, "+a is given twice; leave one out (in sweep.space)"),
        ({"~a": "1,2"}, "~a=1,2 cannot be swept: ~ deletes the key (in sweep.space)"),
        ({"~a": [1, 2]}, "~a=[1,2] cannot be swept: ~ deletes the key (in sweep.space)"),
        ({"name": ["a", "b"]}, "name=[a,b] cannot be swept: a trial is named"),
        ({"scaling": {"num_workers": "1,2"}}, "scaling.num_workers=1,2 cannot be swept: every trial"),
        ({"model": [1, 2]}, "model=[1,2] is over a group, whose choices are names"),
        ({"model": "interval(0,1)"}, "model=interval(0,1) is over a group"),
    ],
)
def test_refusals_of_a_space_say_where(space: dict[Any, Any], reason: str) -> None:
    message = refusal(space=space)
    assert message.startswith(reason)
    assert "sweep.space" in message


def test_another_application_has_other_shared_sections() -> None:
    (parameter,) = parse_space(["name=a,b"], {}, groups=(), shared={})[0]
    assert parameter.values == ("a", "b")
    with pytest.raises(ConfigError, match="it is Hydra's own"):
        parse_space(["hydra.x=a,b"], {}, groups=(), shared={})


@given(st.integers(-50, 50), st.integers(-50, 50), st.integers(-9, 9), st.booleans())
def test_sorting_a_range_keeps_its_values(start: int, stop: int, step: int, reverse: bool) -> None:
    assume(range(start, stop, step or 1) and step)
    parameter = one(f"a=sort(range({start},{stop},{step}),reverse={str(reverse).lower()})")
    assert list(parameter.grid()) == sorted(range(start, stop, step), reverse=reverse)


@given(
    st.text("a1,()[]{}:='\"\\ \n.-*")
    | st.lists(
        st.sampled_from(
            [
                "1",
                "x",
                "null",
                ",",
                ")",
                "choice(",
                "range(",
                "interval(",
                "tag(log,",
                "int(",
                "float(",
                "sort(",
                "shuffle(",
                "glob(",
                "[",
                "]",
            ]
        )
    ).map("".join)
)
def test_any_text_is_a_sweep_or_a_refusal(text: str) -> None:
    for overrides, space in (([f"model.x={text}"], {}), ([], {"model.x": text}), ([f"model={text}"], {})):
        with contextlib.suppress(ConfigError):
            parameters, fixed = parse_space(overrides, space, groups=GROUPS)
            assert len(parameters) + len(fixed) == 1
