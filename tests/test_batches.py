"""Walking over a batch: every container keeps its type and loses no tensor, whatever is done with the tensors.

The meta device stands in for a GPU: a tensor on it was moved.
"""

from __future__ import annotations

import collections
import dataclasses
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import attrs
import numpy as np
import pytest
import torch
from torch import Tensor

from raytrainer.batches import as_tensors, cast, map_tensors, move, moves_itself, parts, pin, tensors
from raytrainer.data import Loader
from raytrainer.errors import ConfigError

META = torch.device("meta")


def x() -> Tensor:
    return torch.ones(2, 3, dtype=torch.float64)


class Named(NamedTuple):
    x: Any
    note: str = "a"


class Own(collections.UserDict[str, Any]):
    """A mapping that also has attribute access, like transformers' BatchEncoding."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self.data[name]
        except KeyError:
            raise AttributeError(name) from None


class Frozen(Mapping[str, Any]):
    """A mapping that cannot be changed."""

    def __init__(self, items: Any) -> None:
        self._items = dict(items)

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)


class Both(dict[str, Any]):
    """A dictionary whose keys are also attributes, like ModelOutput and EasyDict."""

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        super().__setattr__(key, value)


def both() -> Both:
    made = Both()
    made["x"] = x()
    return made


@dataclasses.dataclass
class Data:
    x: Any
    note: str = "a"
    derived: Any = dataclasses.field(init=False, default=None)

    def __post_init__(self) -> None:
        self.derived = [self.x, None]


@dataclasses.dataclass(frozen=True, slots=True)
class FrozenSlots:
    x: Any
    size: tuple[int, int] = (2, 3)


@attrs.define(frozen=True)
class Attrs:
    x: Any


class Slots:
    __slots__ = ("__hidden", "unset", "x")

    def __init__(self) -> None:
        self.x = x()
        self.__hidden = x()


class Plain:
    """Neither a container nor a dataclass: an object with tensors in its attributes."""

    def __init__(self) -> None:
        self.x, self.note = x(), "a"


class Graph(Plain):
    """An object that moves itself into a new object."""

    def to(self, device: Any) -> Graph:
        moved = Graph()
        moved.x, moved.note = self.x.to(device), "moved"
        return moved


class InPlace(Plain):
    """An object that moves itself in place and returns nothing."""

    def to(self, device: Any, non_blocking: bool = False) -> None:
        self.x = self.x.to(device)


class Applied(Plain):
    """An object like torch_geometric's Data: it changes in place, by a function that it calls with each attribute."""

    def to(self, device: Any) -> Applied:
        return self.apply(lambda value: value.to(device) if isinstance(value, Tensor) else value)

    def apply(self, function: Callable[[Any], Any]) -> Applied:
        self.x, self.note = function(self.x), function(self.note)
        return self


MADE: dict[str, Callable[[], Any]] = {
    "tensor": x,
    "dict": lambda: {"x": x(), "note": None},
    "nested": lambda: {"a": [({"x": x()}, "text"), 3.5]},
    "list": lambda: [x(), "a"],
    "tuple": lambda: (x(), 1),
    "named tuple": lambda: Named(x()),
    "ordered dict": lambda: collections.OrderedDict(b=x(), a=x()),
    "default dict": lambda: collections.defaultdict(list, {"x": x()}),
    "UserDict": lambda: Own(x=x()),
    "dict with attributes": both,
    "mapping that cannot be changed": lambda: Frozen({"x": x()}),
    "mapping proxy": lambda: types.MappingProxyType({"x": x()}),
    "dataclass": lambda: Data(x()),
    "frozen dataclass with slots": lambda: FrozenSlots(x()),
    "attrs": lambda: Attrs(x()),
    "slots": Slots,
    "object": Plain,
    "object that moves itself": Graph,
    "object that moves in place": InPlace,
    "object with apply": Applied,
    "deque": lambda: collections.deque([x()], maxlen=4),
    "set": lambda: {x()},
    "packed sequence": lambda: torch.nn.utils.rnn.pack_sequence([torch.ones(3).double(), torch.ones(2).double()]),
    "result of an operation": lambda: torch.max(x(), dim=0),
    "sparse": lambda: {"x": x().to_sparse()},
    "nested tensor": lambda: {"x": torch.nested.nested_tensor([x()[0], x()[0, :2]], layout=torch.jagged)},
}


def floating(data: Any) -> list[Tensor]:
    return [tensor for tensor in tensors(data) if tensor.is_floating_point()]


@pytest.mark.parametrize("name", MADE)
def test_every_tensor_is_moved_and_the_container_keeps_its_type(name: str) -> None:
    data = MADE[name]()
    moved = move(data, META)
    assert type(moved) is type(data)
    assert floating(moved)
    assert {tensor.device.type for tensor in floating(moved)} == {"meta"}
    assert {tensor.device.type for tensor in floating(data)} == {"cpu"}, "the batch itself was changed"


@pytest.mark.parametrize("name", MADE)
def test_every_floating_tensor_is_cast_and_no_other(name: str) -> None:
    data = MADE[name]()
    changed = cast(data, torch.float32)
    assert type(changed) is type(data)
    assert {tensor.dtype for tensor in floating(changed)} == {torch.float32}
    assert {tensor.dtype for tensor in floating(data)} == {torch.float64}, "the batch itself was changed"
    whole = [tensor.dtype for tensor in tensors(changed) if not tensor.is_floating_point()]
    assert whole == [tensor.dtype for tensor in tensors(data) if not tensor.is_floating_point()]


@pytest.mark.parametrize("name", MADE)
def test_the_loader_moves_what_collate_fn_returns(name: str) -> None:
    loader = Loader(list(range(8)), global_batch_size=8, collate_fn=lambda _: MADE[name](), device="meta")
    data = next(loader.batches(0, 1)).micro[0].data
    assert type(data) is type(MADE[name]())
    assert {tensor.device.type for tensor in floating(data)} == {"meta"}


def test_what_else_a_container_holds_stays() -> None:
    data = move(Own(x=x(), note="a", size=(2, 3), nothing=None), META)
    assert (data["note"], data["size"], data["nothing"]) == ("a", (2, 3), None)
    assert data.x is data["x"]
    moved = move(collections.defaultdict(list, {"x": x()}), META)
    assert moved["new"] == []
    assert list(move(collections.OrderedDict(b=x(), a=x()), META)) == ["b", "a"]
    assert move(collections.deque([x()], maxlen=4), META).maxlen == 4
    record = move(Data(x()), META)
    assert (record.note, record.derived[1]) == ("a", None)
    changed = move(both(), META)
    assert changed.x is changed["x"]
    assert move(Named(x(), "b"), META).note == "b"


def test_references_to_one_tensor_stay_references_to_one() -> None:
    one = x()
    moved = move({"a": one, "b": [one], "c": Data(one)}, META)
    assert moved["a"] is moved["b"][0] is moved["c"].x is moved["c"].derived[0]
    changed = map_tensors([one, one], torch.clone)
    assert changed[0] is changed[1]


def test_a_batch_may_refer_to_itself() -> None:
    data: dict[str, Any] = {"x": x()}
    data["self"] = data
    moved = move(data, META)
    assert moved["self"] is moved
    node, parent = Plain(), Plain()
    node.parent, parent.child = parent, node  # type: ignore[attr-defined]
    child = cast(node, torch.float32)
    assert child.parent.child is child
    assert child.parent.x.dtype is torch.float32
    assert len(list(tensors(node))) == 2


def test_values_that_a_mapping_makes_anew_are_not_taken_for_one_another() -> None:
    class Lazy(Frozen):
        def __getitem__(self, key: str) -> Any:
            return torch.full((1,), float(self._items[key]))

    data = Lazy({str(i): i for i in range(50)})
    assert [value.item() for value in map_tensors(data, lambda t: t + 1)._items.values()] == list(range(1, 51))


def test_what_is_no_data_is_left_alone() -> None:
    class Rows(torch.utils.data.Dataset[Any]):
        def __init__(self) -> None:
            self.x = x()

    module, rows = torch.nn.Linear(2, 2), Rows()
    data = {"rows": rows, "module": [module], "code": x, "kind": Plain, "when": np.datetime64("2026-01-01")}
    moved = move({**data, "x": x()}, META)
    assert {k: v for k, v in moved.items() if k != "x"} == data
    assert rows.x.device.type == "cpu"
    size = torch.Size([2, 3])
    assert move(size, META) is size


def test_the_to_of_a_date_is_no_move() -> None:
    class Date:
        def to(self, zone: Any) -> Any:
            raise ValueError(f"no time zone {zone}")

    date = Date()
    assert move([date, x()], META)[0] is date


def test_an_object_that_cannot_be_moved_is_named_with_the_way_out() -> None:
    class Stubborn(Plain):
        def __copy__(self) -> Any:
            raise TypeError("there is only one of it")

    class Broken(Plain):
        def to(self, device: Any) -> Any:
            raise RuntimeError("no such device")

    class Locked(tuple[Any, ...]):
        def __new__(cls, first: Any, second: Any) -> Locked:
            return super().__new__(cls, (first, second))

    for made, reason in (
        (Stubborn(), "it cannot be copied (TypeError: there is only one of it)"),
        (Broken(), "its to(meta) raises RuntimeError: no such device"),
        (Locked(x(), 1), "Locked(…) with the changed tensors raises TypeError"),
    ):
        with pytest.raises(ConfigError) as error:
            move({"x": x(), "more": made}, META)
        assert type(made).__qualname__ in str(error.value)
        assert reason in str(error.value)
        assert "data.collate_fn" in str(error.value)
        assert "to(device)" in str(error.value)


def test_arrays_become_tensors_in_every_container() -> None:
    @dataclasses.dataclass
    class Arrays:
        x: Any

    array = np.ones((2, 3), dtype=np.float32)
    for made in ({"x": array}, Own(x=array), collections.OrderedDict(x=array)):
        assert as_tensors(made)["x"].data_ptr() == array.ctypes.data
    for record in (Arrays(array), Named(array), Attrs(array)):
        assert as_tensors(record).x.data_ptr() == array.ctypes.data
    assert as_tensors([np.array(["a"], dtype=object)])[0].dtype == object
    loader = Loader(list(range(4)), global_batch_size=4, collate_fn=lambda rows: Own(x=np.array(rows)), device="meta")
    assert next(loader.batches(0, 1)).micro[0].data["x"].device.type == "meta"


def test_each_part_of_a_batch_is_found_once() -> None:
    one, graph = x(), Graph()
    data = {"a": one, "b": Data(one), "graph": graph, "text": "a"}
    assert [id(t) for t in tensors(data)] == [id(one), id(graph.x)]
    assert [part for part in parts(data) if moves_itself(part)] == [graph]
    assert not moves_itself(one)


def test_what_pins_itself_is_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[Any] = []

    def pin_memory(tensor: Tensor) -> Tensor:
        pinned.append("tensor")
        return tensor

    monkeypatch.setattr(Tensor, "pin_memory", pin_memory)

    class Pinning(Graph):
        def pin_memory(self) -> Pinning:
            pinned.append("graph")
            return self

    data = pin({"x": Own(x=x()), "graph": Pinning(), "sparse": x().to_sparse()})
    assert isinstance(data["graph"], Pinning)
    assert pinned == ["tensor", "graph"]
