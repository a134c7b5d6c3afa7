"""Parquet: every numeric layout as one array, everything else row by row, and errors that name the file and column."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from raytrainer.data import Loader, ParquetDataset
from raytrainer.data.source_files import find_files
from raytrainer.errors import ConfigError, DataError
from raytrainer.storage import Storage
from tests.outside.servers import S3


def fixed(values: np.ndarray, size: int) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), size)


def table(rows: int = 20, first: int = 0) -> pa.Table:
    numbers = np.arange(first, first + rows)
    return pa.table(
        {
            "image": fixed((numbers[:, None] * 6 + np.arange(6)).astype(np.float32), 6),
            "label": pa.array(numbers, pa.int64()),
            "flag": pa.array(numbers % 3 == 0),
        }
    )


def write(path: Path, *tables: pa.Table, group: int = 7) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for number, part in enumerate(tables):
        pq.write_table(part, path / f"part-{number}.parquet", row_group_size=group)
    return path


def test_files_become_columns_in_order(tmp_path: Path) -> None:
    dataset = ParquetDataset(write(tmp_path, table(20), table(5, first=20)), reshape={"image": [1, 2, 3]})
    assert len(dataset) == 25
    assert {name: (tuple(c.shape), c.dtype) for name, c in dataset.tensors.items()} == {
        "image": ((25, 1, 2, 3), torch.float32),
        "label": ((25,), torch.int64),
        "flag": ((25,), torch.bool),
    }
    assert dataset.tensors["label"].tolist() == list(range(25))
    assert torch.equal(dataset.tensors["image"], torch.arange(150.0).reshape(25, 1, 2, 3))
    assert dataset[24]["flag"].item() is True
    batch = next(Loader(dataset, global_batch_size=4).batches(6))
    assert batch.micro[0].data["label"].tolist() == [24]


@pytest.mark.parametrize("place", ["", "/*.parquet", "/**/part-*.parquet"])
@pytest.mark.parametrize("by", ["variables", "query"])
def test_files_in_s3(s3: S3, in_s3: str, place: str, by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Storage(in_s3).upload_tree(write(tmp_path, table(20), table(5, first=20)), "")
    if by == "query":
        monkeypatch.delenv("AWS_ENDPOINT_URL")
        place += f"?{s3.query()}"
    dataset = ParquetDataset(in_s3 + place, columns=["label"])
    assert dataset.tensors["label"].tolist() == list(range(25))


def test_files_in_s3_that_are_not_there_or_torn_are_named(s3: S3, in_s3: str, tmp_path: Path) -> None:
    place, data = Storage(in_s3), write(tmp_path, table(20), table(5, first=20))
    place.upload_tree(data, "")
    place.write_bytes("part-1.parquet", (data / "part-1.parquet").read_bytes()[:-100])
    with pytest.raises(DataError, match=r"bucket/[0-9a-f]+/part-1\.parquet: .*magic bytes"):
        ParquetDataset(in_s3)
    with pytest.raises(DataError, match=r"^s3://bucket/nothing/\*\.parquet: no Parquet file"):
        ParquetDataset("s3://bucket/nothing/*.parquet")
    for uri in (f"s3://KEY:planted@bucket/nothing?{s3.query()}", f"s3://KEY:planted@bucket/no/*.parquet?{s3.query()}"):
        with pytest.raises(DataError, match=r"^s3://bucket/no") as caught:
            ParquetDataset(uri)
        assert "planted" not in str(caught.value)


def test_loader_gathers_whole_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = ParquetDataset(write(tmp_path, table()))
    monkeypatch.setattr(ParquetDataset, "__getitem__", None)
    labels = [
        x
        for b in Loader(dataset, global_batch_size=8, shuffle=True).batches(0, 3)
        for x in b.micro[0].data["label"].tolist()
    ]
    assert sorted(labels) == list(range(20))


@pytest.mark.parametrize(
    ("column", "reshape", "shape", "dtype"),
    [
        (pa.array([1, 2, 3], pa.uint8()), None, (), torch.uint8),
        (pa.array([1, 2, 3], pa.uint16()), None, (), torch.int32),
        (pa.array([1, 2, 3], pa.uint32()), None, (), torch.int64),
        (pa.array([1, 2, 3], pa.uint64()), None, (), torch.int64),
        (pa.array(np.array([1, 2, 3], np.float16)), None, (), torch.float16),
        (pa.array([b"ab", b"cd", b"ef"], pa.binary(2)), None, (2,), torch.uint8),
        (pa.array([[1, 2]] * 3, pa.list_(pa.int64())), [2], (2,), torch.int64),
        (pa.array([[1.0, 2.0]] * 3, pa.large_list(pa.float64())), [2, 1], (2, 1), torch.float64),
        (pa.FixedSizeListArray.from_arrays(fixed(np.arange(18), 3), 2), None, (2, 3), torch.int64),
        (
            pa.FixedShapeTensorArray.from_numpy_ndarray(np.arange(12.0).reshape(3, 2, 2)),
            None,
            (2, 2),
            torch.float64,
        ),
    ],
    ids=lambda value: str(getattr(value, "type", value)),
)
def test_layouts(tmp_path: Path, column: pa.Array, reshape: Any, shape: Any, dtype: torch.dtype) -> None:
    path = write(tmp_path, pa.table({"x": column}), group=2)
    dataset = ParquetDataset(path, reshape={"x": reshape} if reshape else None)
    assert dataset.tensors["x"].shape == (3, *shape)
    assert dataset.tensors["x"].dtype == dtype
    flat = [value for row in column.to_pylist() for value in (row if isinstance(row, list | bytes) else [row])]
    flat = [value for row in flat for value in (row if isinstance(row, list) else [row])]
    assert dataset.tensors["x"].reshape(-1).tolist() == flat


def test_strings_go_row_by_row(tmp_path: Path) -> None:
    texts = pa.table(
        {"n": pa.array(range(9)), "text": [f"t{i}" for i in range(9)], "raw": [bytes([i]) for i in range(9)]}
    )
    path = write(tmp_path, texts, group=4)
    dataset = ParquetDataset(path)
    assert dataset[-1] == {"n": torch.tensor(8), "text": "t8", "raw": b"\x08"}

    def lengths(rows: list[Any]) -> Any:
        return {"n": torch.stack([row["n"] for row in rows]), "text": [row["text"] for row in rows]}

    for way in ({}, {"num_workers": 1}):
        batch = next(Loader(dataset, global_batch_size=5, collate_fn=lengths, **way).batches(1))  # type: ignore[arg-type]
        assert batch.micro[0].data["n"].tolist() == [5, 6, 7, 8]
        assert batch.micro[0].data["text"] == ["t5", "t6", "t7", "t8"]
    assert ParquetDataset(path, columns=["n"]).columnar


def test_where_files_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a", table(), table())
    write(tmp_path / "a" / "deep", table())
    write(tmp_path / "a" / "_tmp", table())
    (tmp_path / "a" / "_SUCCESS").touch()
    (tmp_path / "a" / "notes.txt").touch()

    def names(path: str) -> list[str]:
        return [file.path.removeprefix(f"{tmp_path}/") for file in find_files(path)[1]]

    both = ["a/part-0.parquet", "a/part-1.parquet"]
    deep = "a/deep/part-0.parquet"
    assert names(f"{tmp_path}/a/part-1.parquet") == ["a/part-1.parquet"]
    assert names(f"{tmp_path}/a") == [deep, *both]
    assert names(f"{tmp_path}/a/") == [deep, *both]
    assert names(f"{tmp_path}/a/*.parquet") == both
    assert names(f"{tmp_path}/a/part-[1-9].parquet") == both[1:]
    assert names(f"{tmp_path}/**/part-0.parquet") == ["a/_tmp/part-0.parquet", deep, both[0]]
    assert names(f"file://{tmp_path}/a/part-*.parquet") == both
    monkeypatch.chdir(tmp_path)
    assert names("a/*.parquet") == both
    monkeypatch.chdir(tmp_path / "a")
    assert names("*.parquet") == both


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("missing", "missing: no such file or directory"),
        ("empty", "empty: no Parquet file is in it"),
        ("empty/*.parquet", "no Parquet file matches"),
        ("missing/*.parquet", "no Parquet file matches"),
        ("nosuch://bucket/x", "nosuch://bucket/x"),
    ],
)
def test_nothing_there(tmp_path: Path, path: str, says: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=says):
        ParquetDataset(path if "://" in path else f"{tmp_path}/{path}")


def test_no_rows(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no row"):
        ParquetDataset(write(tmp_path, table(0), table(0)))


@pytest.mark.parametrize("kept", [0, 3, 40, -1, -200])
def test_a_truncated_file_is_named(tmp_path: Path, kept: int) -> None:
    write(tmp_path, table(), table())
    file = tmp_path / "part-1.parquet"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(DataError, match=r"part-1\.parquet"):
        ParquetDataset(tmp_path)


def test_damaged_pages_are_named(tmp_path: Path) -> None:
    write(tmp_path, table())
    file = tmp_path / "part-0.parquet"
    data = bytearray(file.read_bytes())
    data[4:200] = b"\xff" * 196
    file.write_bytes(bytes(data))
    with pytest.raises(DataError, match=r"part-0\.parquet, row group 0"):
        ParquetDataset(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"columns": ["lable"]}, "no column 'lable'; the nearest: label"),
        ({"columns": ["zzz"]}, "no column 'zzz'; there are image, label, flag"),
        ({"columns": []}, "columns names none"),
        ({"reshape": {"imag": [6]}}, "no column 'imag'; the nearest: image"),
        (
            {"reshape": {"image": [5]}},
            r"reshape.image=\[5\]: the column is fixed_size_list.*, 6 values a row and not 5",
        ),
        ({"reshape": {"label": [2]}}, "1 values a row and not 2"),
    ],
)
def test_columns_that_are_not_there(tmp_path: Path, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        ParquetDataset(write(tmp_path, table()), **arguments)


def test_columns_that_cannot_be_read(tmp_path: Path) -> None:
    def attempt(name: str, column: pa.Array, **arguments: Any) -> str:
        path = write(tmp_path / name, pa.table({"x": column}))
        with pytest.raises((DataError, ConfigError)) as caught:
            ParquetDataset(path, **arguments)
        return str(caught.value)

    assert "column 'x': 1 nulls" in attempt("nulls", pa.array([1, None, 3]))
    lists = pa.array([[1, 2], None], pa.list_(pa.int64(), 2))
    assert "part-0.parquet, row group 0" in attempt("null lists", lists)  # Arrow itself refuses these
    assert "1 nulls" in attempt("null in list", pa.array([[1, 2], [None, 1]], pa.list_(pa.int64(), 2)))
    uneven = attempt("uneven", pa.array([[1, 2], [1], [2, 3]]), reshape={"x": [2]})
    assert "row 1 has 1 values, but reshape expects 2" in uneven
    assert "more than int64" in attempt("large", pa.array([2**63], pa.uint64()))
    assert "only numbers can be shaped" in attempt("text", pa.array(["a"]), reshape={"x": [1]})


def test_files_that_differ(tmp_path: Path) -> None:
    write(tmp_path, table(), table().drop_columns("label"))
    with pytest.raises(DataError, match=r"part-1\.parquet: has no column 'label'"):
        ParquetDataset(tmp_path)
    assert len(ParquetDataset(tmp_path, columns=["flag"])) == 40
    other = table().set_column(1, "label", pa.array(range(20), pa.int32()))
    write(tmp_path, table(), other)
    with pytest.raises(DataError, match=r"part-1\.parquet: column 'label' is int32, and int64 in .*part-0"):
        ParquetDataset(tmp_path)
