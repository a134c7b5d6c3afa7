"""The memory-mapped Arrow cache: the same batches bit for bit, created once and completely, and no growth with the
rows."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raytrainer.data import Loader, ParquetDataset, arrow
from raytrainer.data.columns import MappedColumn
from raytrainer.data.source_files import find_files
from raytrainer.errors import ConfigError, DataError
from raytrainer.storage import Storage

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path.cwd())}


def rows(first: int, count: int) -> pa.Table:
    numbers = np.arange(first, first + count)
    pixels = ((numbers[:, None] * 7 + np.arange(12)) % 251).astype(np.uint8)
    return pa.table(
        {
            "image": pa.FixedSizeListArray.from_arrays(pa.array(pixels.ravel()), 12),
            "label": numbers,
            "half": numbers.astype(np.float16),
            "flag": numbers % 3 == 0,
            "raw": pa.array([bytes([n % 256]) * 5 for n in numbers], pa.binary(5)),
        }
    )


def write(folder: Path, *tables: pa.Table, group: int = 17) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, part in enumerate(tables):
        pq.write_table(part, folder / f"part-{number}.parquet", row_group_size=group)
    return folder


def batches(dataset: Any, **options: Any) -> list[dict[str, torch.Tensor]]:
    loader = Loader(dataset, **{"global_batch_size": 16, "shuffle": True, "seed": 3, **options})
    return [batch.micro[0].data for batch in loader.batches(0, 14)]


def assert_same(one: Any, other: Any) -> None:
    for left, right in zip(batches(one), batches(other), strict=True):
        assert left.keys() == right.keys()
        for name, column in left.items():
            assert column.dtype == right[name].dtype
            assert torch.equal(column, right[name]), name


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use record batches of 8 rows, so that few rows make many of them."""
    monkeypatch.setattr(arrow, "BATCH_BYTES", 8 * 40)


def caches(folder: Path) -> list[Path]:
    return [record.parent for record in folder.glob("*/cache.json")]


def test_the_same_batches_as_from_memory(tmp_path: Path, small_batches: None) -> None:
    source = write(tmp_path / "source", rows(0, 60), rows(60, 43))
    shapes = {"image": [3, 2, 2]}
    memory = ParquetDataset(source, reshape=shapes, cache=None)
    mapped = ParquetDataset(source, reshape=shapes, cache=tmp_path / "cache")
    assert isinstance(mapped.tensors["image"], MappedColumn)
    assert_same(mapped, memory)
    assert_same(ParquetDataset(source, reshape=shapes, cache=tmp_path / "cache"), memory)
    for index in (0, 7, 8, 102, -1):
        for name, value in memory[index].items():
            assert torch.equal(value, mapped[index][name])
    # Any Arrow reader can read the files.
    with pa.memory_map(str(caches(tmp_path / "cache")[0] / "numbers.arrow")) as file:
        table = pa.ipc.open_file(file).read_all()
    assert table.column("label").to_pylist() == list(range(103))
    assert table.column("image").type == pa.fixed_shape_tensor(pa.uint8(), [3, 2, 2])


@settings(max_examples=25)
@given(count=st.integers(1, 40), group=st.integers(1, 40), row_bytes=st.integers(1, 40), shape=st.sampled_from([1, 3]))
def test_any_sizes(
    tmp_path_factory: pytest.TempPathFactory, count: int, group: int, row_bytes: int, shape: int
) -> None:
    folder = tmp_path_factory.mktemp("sizes")
    column = pa.FixedSizeListArray.from_arrays(pa.array(np.arange(count * shape, dtype=np.float32)), shape)
    write(folder / "source", pa.table({"x": column, "n": np.arange(count)}), group=group)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrow, "BATCH_BYTES", row_bytes)
        mapped = ParquetDataset(folder / "source", cache=folder / "cache")
    picked = torch.randperm(count)
    assert torch.equal(mapped.tensors["n"].take(picked), picked)
    assert torch.equal(mapped.tensors["x"].load().flatten(), torch.arange(count * shape, dtype=torch.float32))
    shutil.rmtree(folder)


def kinds(rows: list[Any]) -> dict[str, Any]:
    return {"kinds": rows}


def test_rows_of_any_type_are_read_from_the_map(tmp_path: Path, small_batches: None) -> None:
    names = pa.array([f"kind {n % 5}" for n in range(50)]).dictionary_encode()
    nested = [{"bytes": bytes([n]), "path": None if n % 2 else f"{n}.jpg"} for n in range(50)]
    table = pa.table({"n": range(50), "kind": names, "image": nested, "words": [["w"] * (n % 3) for n in range(50)]})
    source = write(tmp_path / "source", table)
    memory = ParquetDataset(source, cache=None)
    mapped = ParquetDataset(source, cache=tmp_path / "cache")
    assert not mapped.columnar
    picked = [49, 0, 8, 7, 31, 8]
    assert mapped.__getitems__(picked) == memory.__getitems__(picked) == [memory[n] for n in picked]
    assert mapped[-1]["image"] == {"bytes": bytes([49]), "path": None}
    one = next(Loader(mapped, global_batch_size=3, collate_fn=kinds, num_workers=1).batches(1))
    assert [row["kind"] for row in one.micro[0].data["kinds"]] == ["kind 3", "kind 4", "kind 0"]


def test_auto_is_in_memory_up_to_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    source = write(tmp_path / "source", rows(0, 50))
    assert isinstance(ParquetDataset(source).tensors["image"], torch.Tensor)
    assert not (tmp_path / "home").exists()
    monkeypatch.setattr("raytrainer.data.parquet.IN_MEMORY_BYTES", 1000)
    assert isinstance(ParquetDataset(source).tensors["image"], MappedColumn)
    assert len(caches(tmp_path / "home" / "raytrainer")) == 1


def test_resident_does_not_pull_a_map_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mapped = ParquetDataset(write(tmp_path / "source", rows(0, 50)), cache=tmp_path / "cache")
    expected = [part["label"].tolist() for part in batches(mapped, resident=True)]

    def loaded(self: MappedColumn) -> torch.Tensor:
        raise AssertionError("a map was loaded as a whole")

    monkeypatch.setattr(MappedColumn, "load", loaded)
    for options in ({}, {"resident": False}, {"prefetch": 0}):
        assert [part["label"].tolist() for part in batches(mapped, **options)] == expected
    with pytest.raises(AssertionError, match="as a whole"):
        batches(mapped, resident=True)


def test_pages_from_a_disk_are_asked_for_in_a_thread(
    tmp_path: Path, small_batches: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "source", rows(0, 103))
    memory, mapped = ParquetDataset(source, cache=None), ParquetDataset(source, cache=tmp_path / "cache")
    asked = []
    page_in = MappedColumn.page_in

    def noted(self: MappedColumn, picked: torch.Tensor) -> None:
        asked.append((threading.current_thread() is threading.main_thread(), len(picked)))
        page_in(self, picked)

    monkeypatch.setattr(MappedColumn, "page_in", noted)
    assert_same(mapped, memory)
    assert asked == []
    monkeypatch.setattr("raytrainer.data.prefetch._HICCUP_S", -1e9)  # as if every batch were slow
    assert_same(mapped, memory)
    assert asked[:5] == [(False, 16)] * 5  # five columns of the fourth batch


def test_a_stale_or_damaged_cache_is_not_used(tmp_path: Path) -> None:
    source, cache = write(tmp_path / "source", rows(0, 50)), tmp_path / "cache"

    def labels(**options: Any) -> list[int]:
        column: MappedColumn = ParquetDataset(source, cache=cache, **options).tensors["label"]
        return list(column.load().tolist())

    assert labels() == list(range(50))
    assert labels(columns=["label"]) == list(range(50))
    assert len(caches(cache)) == 2
    file = source / "part-0.parquet"
    before = file.stat()
    pq.write_table(rows(100, 50), file, row_group_size=17)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert labels() == list(range(100, 150))
    newest = max(caches(cache), key=lambda place: place.stat().st_mtime_ns)
    with (newest / "numbers.arrow").open("r+b") as damaged:
        damaged.truncate(100)
    assert labels() == list(range(100, 150))
    (newest / "cache.json").write_text("{")
    assert labels() == list(range(100, 150))
    assert len(caches(cache)) == 3


def test_without_space_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, cache = write(tmp_path / "source", rows(0, 50)), tmp_path / "cache"
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(999))
    with pytest.raises(DataError, match=r"cache: .*1,400 bytes.* 999 are free; cache=DIR"):
        ParquetDataset(source, cache=cache)

    def full(self: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2000))
    monkeypatch.setattr(arrow.NumbersWriter, "_flush", full)
    with pytest.raises(DataError, match="about 1,400 bytes, and 2,000 are free"):
        ParquetDataset(source, cache=cache)
    assert [place for place in cache.iterdir() if place.suffix != ".lock"] == []


def test_where_no_cache_can_be(tmp_path: Path) -> None:
    source = write(tmp_path / "source", rows(0, 5))
    with pytest.raises(ConfigError, match="cache=s3://bucket/x is a URI"):
        ParquetDataset(source, cache="s3://bucket/x")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=f"cache .*{tmp_path}/file"):
        ParquetDataset(source, cache=tmp_path / "file")


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path) -> None:
    source = write(tmp_path / "source", rows(0, 50), pa.table({**{n: rows(0, 1)[n] for n in rows(0, 1).schema.names}}))
    data = bytearray((source / "part-1.parquet").read_bytes())
    data[4:120] = b"\xff" * 116
    (source / "part-1.parquet").write_bytes(bytes(data))
    with pytest.raises(DataError, match=r"part-1\.parquet, row group 0"):
        ParquetDataset(source, cache=tmp_path / "cache")
    assert [place for place in (tmp_path / "cache").iterdir() if place.suffix != ".lock"] == []


def convert(source: Path, cache: Path, started: Any, note: Path) -> None:
    from raytrainer.data import parquet

    original = parquet._Source.convert

    def noted(self: Any, folder: Path) -> dict[str, Any]:
        with note.open("a") as file:
            file.write("x")
        time.sleep(0.3)
        return original(self, folder)

    parquet._Source.convert = noted  # type: ignore[method-assign]
    started.wait()
    assert ParquetDataset(source, cache=cache).tensors["label"].load().tolist() == list(range(50))


def test_of_several_processes_one_converts(tmp_path: Path) -> None:
    source = write(tmp_path / "source", rows(0, 50))
    context = multiprocessing.get_context("fork")
    started = context.Barrier(3)
    arguments = (source, tmp_path / "cache", started, tmp_path / "note")
    processes = [context.Process(target=convert, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert (tmp_path / "note").read_text() == "x"
    assert len(caches(tmp_path / "cache")) == 1


def test_a_killed_conversion_is_no_cache(tmp_path: Path) -> None:
    source, cache = write(tmp_path / "source", rows(0, 50)), tmp_path / "cache"
    program = f"""
        import time
        from raytrainer.data import arrow, parquet
        arrow.BATCH_BYTES = 320
        original = arrow.NumbersWriter._flush
        def slow(self):
            original(self)
            time.sleep(0.2)
        arrow.NumbersWriter._flush = slow
        parquet.ParquetDataset({str(source)!r}, cache={str(cache)!r})
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], env=ENVIRONMENT)
    try:
        deadline = time.monotonic() + 60
        while not list(cache.glob("*.part/numbers.arrow")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert caches(cache) == []
    assert ParquetDataset(source, cache=cache).tensors["label"].load().tolist() == list(range(50))
    assert list(cache.glob("*.part")) == []


def test_in_s3(in_s3: str, tmp_path: Path) -> None:
    write(tmp_path / "source", rows(0, 30), rows(30, 20))
    for file in (tmp_path / "source").iterdir():
        Storage(in_s3).write_bytes(f"data/{file.name}", file.read_bytes())
    mapped = ParquetDataset(f"{in_s3}/data", cache=tmp_path / "cache")
    assert_same(mapped, ParquetDataset(tmp_path / "source", cache=None))
    assert mapped.where(31) == f"{find_files(f'{in_s3}/data')[1][1].path}, row 1"
    Storage(in_s3).write_bytes("data/part-1.parquet", (tmp_path / "source" / "part-0.parquet").read_bytes())
    assert ParquetDataset(f"{in_s3}/data", cache=tmp_path / "cache").tensors["label"].load()[30:].tolist() == list(
        range(30)
    )


ROWS = 10**8


def test_nothing_grows_with_the_rows(tmp_path: Path) -> None:
    """A separate process opens a dataset, seeks and reads; its memory outside the map's pages and its time are
    bounded."""
    (tmp_path / "source").mkdir()
    group = pa.table({"x": pa.array(np.zeros(10**7, dtype=np.uint8))})
    with pq.ParquetWriter(tmp_path / "source" / "part-0.parquet", group.schema) as writer:
        for _ in range(ROWS // 10**7):
            writer.write_table(group)
    program = f"""
        import json, time, psutil, torch
        from raytrainer.data import Loader, ParquetDataset
        from raytrainer.data import cache, parquet
        def used():
            memory = psutil.Process().memory_info()
            return memory.rss - memory.shared
        torch.arange(8).index_select(0, torch.tensor([1]))
        before = used()
        began = time.perf_counter()
        dataset = ParquetDataset({str(tmp_path / "source")!r}, cache={str(tmp_path / "cache")!r})
        opened = time.perf_counter()
        loader = Loader(dataset, global_batch_size=512, shuffle=True)
        places = 190_000, 3
        for place in places:
            (batch,) = loader.batches(place, place + 1)
            assert batch.micro[0].data["x"].shape == (512,)
        done = time.perf_counter()
        print(json.dumps([len(dataset), used() - before, opened - began, done - opened]))
    """
    results = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program)],
            capture_output=True,
            text=True,
            check=True,
            env=ENVIRONMENT,
        )
        results.append(json.loads(done.stdout))
    for name, (_, memory, opening, reading) in zip(("converted", "opened"), results, strict=True):
        print(f"{name}: {memory / 2**20:.1f} MiB, {1e3 * opening:.1f} ms, two batches in {1e3 * reading:.1f} ms")
    converted, opened = results
    assert opened[0] == ROWS
    # A list with one byte per row would take 100 MB.
    assert converted[1] < 64 * 2**20
    assert opened[1] < 16 * 2**20
    assert opened[2] + opened[3] < converted[2]
