"""Windows over a stream of tokens, token files and the command that makes them, and the embedded sources."""

from __future__ import annotations

import json
import multiprocessing
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from raytrainer.data import Loader, PythonSources, TokenDataset
from raytrainer.data.tokenize import main, tokenize
from raytrainer.data.tokens import IGNORED_LABEL, TokenFile, TokenWindows, TokenWriter
from raytrainer.errors import ConfigError, DataError
from raytrainer.storage import Storage

TEXTS = ["the cat sat on the mat", "größer als die Katze\n", "", "a b c " * 30]


# -- windows ---------------------------------------------------------------------------------------------------------


def targets(windows: TokenWindows) -> list[int]:
    """Return the labels that count, window after window. Check that each window's inputs are the tokens before them."""
    found: list[int] = []
    for i in range(len(windows)):
        sample = windows[i]
        counts = sample["labels"] != IGNORED_LABEL
        assert sample["input_ids"].shape == sample["labels"].shape == (windows.seq_len,)
        assert sample["input_ids"].dtype == sample["labels"].dtype == torch.int64
        begin = i * windows.seq_len
        assert sample["input_ids"][counts].tolist() == windows.tokens[begin : begin + int(counts.sum())].tolist()
        found += sample["labels"][counts].tolist()
    return found


@given(st.integers(2, 40), st.integers(1, 50), st.sampled_from(["u1", "<u2", "<u4"]))
def test_every_token_is_predicted_once(length: int, seq_len: int, dtype: str) -> None:
    tokens = np.arange(1, length + 1).astype(dtype)
    windows = TokenWindows(tokens, seq_len)
    assert targets(windows) == tokens[1:].tolist()
    batch = windows.__getitems__(list(range(len(windows)))[::-1])
    for name, values in batch.items():
        assert torch.equal(values, torch.stack([windows[i][name] for i in reversed(range(len(windows)))]))


def test_windows_go_through_the_loader() -> None:
    windows = TokenWindows(np.arange(100, dtype=np.uint16), 8)
    (batch,) = Loader(windows, global_batch_size=13).batches(0, 1)
    assert batch.micro[0].data["input_ids"].shape == (13, 8)
    assert sorted(batch.micro[0].data["labels"].flatten().tolist()) == [IGNORED_LABEL] * 5 + list(range(1, 100))
    with pytest.raises(IndexError, match="window 13 of 13"):
        windows[13]
    assert torch.equal(windows[-1]["labels"], windows[12]["labels"])


@pytest.mark.parametrize(("tokens", "seq_len", "error"), [(1, 4, DataError), (0, 4, DataError), (9, 0, ConfigError)])
def test_what_makes_no_window(tokens: int, seq_len: int, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"at least two tokens|seq_len=0 .*at least 1"):
        TokenWindows(np.zeros(tokens, np.uint16), seq_len)


# -- files -----------------------------------------------------------------------------------------------------------


def write(path: Path, documents: Sequence[Sequence[int]], vocab_size: int = 100, separator: int | None = None) -> Path:
    with TokenWriter(path, vocab_size=vocab_size, separator=separator, tokenizer="sha256:0") as writer:
        for document in documents:
            writer.add([document], 10)
    return path


def test_a_file_holds_what_was_written(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tokens", [[5, 6, 7], [], [8]], separator=99)
    dataset = TokenDataset(path, 4)
    assert dataset.tokens.tolist() == [5, 6, 7, 99, 99, 8, 99]
    assert dataset.head == TokenFile("uint16", 100, 99, "sha256:0", tokens=7, documents=3, bytes=30)
    assert dataset.head.bytes_per_token == pytest.approx(30 / 7)
    assert targets(dataset) == [6, 7, 99, 99, 8, 99]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(2**16, "uint16"), (2**16 + 1, "uint32")])
def test_ids_are_as_small_as_the_vocabulary_lets_them_be(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    path = write(tmp_path / "a", [[0, vocab_size - 1]], vocab_size)
    dataset = TokenDataset(path, 1)
    assert dataset.head.dtype == dtype
    assert dataset[0]["labels"].tolist() == [vocab_size - 1]


def test_parts_share_no_token(tmp_path: Path) -> None:
    path = write(tmp_path / "a", [list(range(1000))], 1000)
    train, val = TokenDataset(path, 7, end=0.9), TokenDataset(path, 7, begin=0.9)
    assert (train.tokens.tolist(), val.tokens.tolist()) == (list(range(900)), list(range(900, 1000)))
    assert targets(train) == list(range(1, 900))
    for wrong in ((0.5, 0.5), (-0.1, 1.0), (0.0, 1.1)):
        with pytest.raises(ConfigError, match="fractions"):
            TokenDataset(path, 7, begin=wrong[0], end=wrong[1])


def test_a_larger_vocabulary_than_the_models_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a", [[1, 2]], 100)
    assert len(TokenDataset(path, 1, vocab_size=100)) == 1
    with pytest.raises(ConfigError, match=r"vocab_size=99 is less than the 100 tokens"):
        TokenDataset(path, 1, vocab_size=99)


def test_what_is_no_file_of_tokens(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        TokenDataset(tmp_path / "missing", 4)
    path = write(tmp_path / "a", [[1, 2, 3]])
    whole = path.read_bytes()
    for data, message in [
        (b"", "is not a token file"),
        (b"\x93NUMPY" * 900, "is not a token file"),
        (b'{"format": "other"}'.ljust(5000), "is not a token file"),
        (whole[:-1], "has 4,101 bytes, and 3 tokens take 4,102"),
        (whole + b"x", "has 4,103 bytes"),
    ]:
        path.write_bytes(data)
        with pytest.raises(DataError, match=message):
            TokenDataset(path, 4)


def test_a_file_in_s3_is_copied_once(in_s3: str, tmp_path: Path) -> None:
    made = write(tmp_path / "here.tokens", [[1, 2, 3], [4, 5]], separator=0)
    uri, cache = f"{in_s3}/there.tokens", tmp_path / "cache"
    Storage(in_s3).write_bytes("there.tokens", made.read_bytes())
    there = TokenDataset(uri, 2, cache=cache)
    assert targets(there) == targets(TokenDataset(made, 2))
    copied = there.path.stat()
    assert TokenDataset(uri, 2, cache=cache).path.stat().st_ino == copied.st_ino

    Storage(in_s3).write_bytes("there.tokens", write(made, [[7, 8]]).read_bytes())
    assert targets(TokenDataset(uri, 2, cache=cache)) == [8]  # a new file gets a new copy
    with pytest.raises(DataError, match=r"nothing\.tokens: no such file"):
        TokenDataset(f"{in_s3}/nothing.tokens", 2, cache=cache)


def test_a_writer_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a", [[1, 2, 3]])
    with pytest.raises(OverflowError):
        write(path, [[7], [2**16]])
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert TokenDataset(path, 1).tokens.tolist() == [1, 2, 3]


def _write_repeatedly(path: Path, token: int) -> None:
    for _ in range(20):
        write(path, [[token] * (100 + token)] * 20)


def test_two_processes_that_write_the_same_file_do_not_mix(tmp_path: Path) -> None:
    path = write(tmp_path / "a", [[1] * 101] * 20)
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_repeatedly, args=(path, token)) for token in (1, 2)]
    for process in writers:
        process.start()
    while any(process.is_alive() for process in writers):
        dataset = TokenDataset(path, 4)  # complete at every moment
        assert len(dataset.tokens) == 20 * (100 + int(dataset.tokens[0]))
        assert (dataset.tokens == dataset.tokens[0]).all()
    assert [process.exitcode for process in writers] == [0, 0]
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_long_stream_costs_no_more_than_a_short_one(tmp_path: Path) -> None:
    path, tokens = write(tmp_path / "a", [[1, 2]]), 10**9
    head = json.loads(path.read_bytes()[:4096]) | {"tokens": tokens}
    with path.open("r+b") as file:
        file.write(json.dumps(head).encode().ljust(4096))
        file.truncate(4096 + 2 * tokens)  # sparse: 2 GB that use no disk
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    dataset = TokenDataset(path, 1024)
    for step in range(20):
        assert dataset.__getitems__([step * 40_000, len(dataset) - 1])["labels"].shape == (2, 1024)
    assert len(dataset) == 976_563
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # kilobytes


# -- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a byte-level BPE, like that of GPT-2, on a few words."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    made.train_from_iterator(TEXTS, trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return path


def decoded(path: Path, tokenizer: Path) -> list[str]:
    """Return the documents of a token file."""
    dataset, coder = TokenDataset(path, 8), Tokenizer.from_file(str(tokenizer))
    parts = np.split(dataset.tokens, np.flatnonzero(dataset.tokens == dataset.head.separator) + 1)
    return [coder.decode(part[:-1].tolist()) for part in parts[:-1]]


def _as_lines(path: Path) -> Path:
    path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n\n" for i, text in enumerate(TEXTS)))
    return path


def _as_compressed_lines(path: Path) -> Path:
    plain = _as_lines(path.with_suffix(".tmp")).read_bytes()
    with pa.CompressedOutputStream(str(path), "gzip") as out:
        out.write(plain)
    return path


def _as_parquet(path: Path) -> Path:
    pq.write_table(pa.table({"id": range(len(TEXTS)), "text": TEXTS}), path, row_group_size=3)
    return path


def _as_texts(path: Path) -> Path:
    (path / "b").mkdir(parents=True)
    (path / ".hidden").write_text("not this one")
    for name, text in zip(["a.md", "b/a.txt", "b/b.txt", "c"], TEXTS, strict=True):
        (path / name).write_text(text)
    return path


@pytest.mark.parametrize(
    ("name", "write_as"),
    [("a.jsonl", _as_lines), ("a.jsonl.gz", _as_compressed_lines), ("a.parquet", _as_parquet), ("folder", _as_texts)],
)
def test_a_round_trip(
    name: str, write_as: Any, tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = write_as(tmp_path / name), tmp_path / "out.tokens"
    assert main([str(source), "--tokenizer", str(tokenizer), "--output", str(output)]) == 0
    assert decoded(output, tokenizer) == TEXTS
    head = TokenDataset(output, 8).head
    assert head.bytes == sum(len(text.encode()) for text in TEXTS)
    assert (head.documents, head.separator, head.vocab_size) == (
        4,
        0,
        Tokenizer.from_file(str(tokenizer)).get_vocab_size(),
    )
    told = capsys.readouterr().out
    assert f"model.vocab_size={head.vocab_size} loss.bytes_per_token={head.bytes_per_token:.4f}" in told


def test_batches_do_not_change_the_tokens(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = str(_as_lines(tmp_path / "a.jsonl"))
    tokenize([source, source], tmp_path / "whole", tokenizer)
    monkeypatch.setattr("raytrainer.data.tokenize._BATCH_DOCUMENTS", 3)
    tokenize([source, source], tmp_path / "parts", tokenizer)
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "parts").read_bytes()


def test_sources_in_s3(in_s3: str, tmp_path: Path, tokenizer: Path) -> None:
    from pyarrow import fs

    filesystem, base = fs.FileSystem.from_uri(in_s3)
    with filesystem.open_output_stream(f"{base}/folder/a.jsonl") as out:
        out.write(_as_lines(tmp_path / "a.jsonl").read_bytes())
    tokenize([in_s3], tmp_path / "out", tokenizer)
    assert decoded(tmp_path / "out", tokenizer) == TEXTS


def test_what_cannot_be_tokenized(tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = _as_lines(tmp_path / "a.jsonl")
    (bad := tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": 1}\n')
    (broken := tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (binary := tmp_path / "binary.txt").write_bytes(b"\xff\xfe\xff")
    (empty := tmp_path / "empty").mkdir()
    nothing = tmp_path / "nothing.jsonl"
    nothing.touch()
    tokens = ["--tokenizer", str(tokenizer)]
    for arguments, code, message in [
        ([str(tmp_path / "no"), *tokens], 1, "no such file or directory"),
        ([str(empty), *tokens], 1, "there is no file in it"),
        ([str(nothing), *tokens], 1, "there is no text in it"),
        ([str(lines), *tokens, "--column", "body"], 1, "line 1: has no field 'body'; valid: id, text"),
        (
            [str(_as_parquet(tmp_path / "a.parquet")), *tokens, "--column", "body"],
            1,
            "no column 'body'; valid: id, text",
        ),
        ([str(bad), *tokens], 1, "line 2, field 'text': is int, not text"),
        ([str(broken), *tokens], 1, "broken.jsonl, line 2: Expecting value"),
        ([str(binary), *tokens], 1, "can't decode byte 0xff"),
        ([str(lines), "--format", "parquet", *tokens], 1, "Parquet magic bytes not found"),
        ([str(lines), "--tokenizer", str(lines)], 2, "is not a tokenizer.json"),
        ([str(lines), "--tokenizer", str(empty)], 2, "--tokenizer="),
        (
            [str(lines), *tokens, "--separator", "</s>"],
            2,
            "--separator=</s> is not in the vocabulary; valid: <|endoftext|>, none",
        ),
    ]:
        assert main([*arguments, "--output", str(tmp_path / "out")]) == code, arguments
        assert message in capsys.readouterr().err
    assert main([str(lines), *tokens, "--output", str(tmp_path / "no/out")]) == 2
    assert "--output=" in capsys.readouterr().err
    assert not list(tmp_path.glob("*out*"))


def test_without_tokenizers_it_says_what_to_install(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ConfigError, match=r"pip install 'raytrainer\[huggingface\]'"):
        tokenize(["a"], tmp_path / "out", tokenizer)


# -- the embedded sources --------------------------------------------------------------------------------------------


def test_the_sources_of_python_are_there() -> None:
    train, val = PythonSources("train", 64, max_bytes=50_000), PythonSources("val", 64, max_bytes=50_000)
    assert len(train.tokens) == len(val.tokens) == 50_000
    assert b"import" in bytes(train.tokens)
    assert not (train.tokens > 127).all()
    whole = PythonSources("val", 64)
    assert whole.tokens[:50_000].tobytes() == val.tokens.tobytes()
    assert {bytes(t) for t in np.split(train.tokens, np.flatnonzero(train.tokens == 0))[1:-1]}.isdisjoint(
        bytes(t) for t in np.split(whole.tokens, np.flatnonzero(whole.tokens == 0))
    )


def test_a_files_split_and_place_are_its_names(tmp_path: Path) -> None:
    for number in range(60):
        (tmp_path / f"f{number}.py").write_text(f"<{number}>")
    (tmp_path / "test").mkdir()
    (tmp_path / "test/f.py").write_text("<left out>")
    before = [bytes(PythonSources(split, 8, folder=tmp_path).tokens).split(b"\0") for split in ("train", "val")]
    assert sorted(before[0] + before[1]) == sorted([b"", b"", *(f"<{n}>".encode() for n in range(60))])
    assert len(before[0]) > len(before[1]) > 2
    gone = before[0][3].decode()
    (tmp_path / f"f{gone.strip('<>')}.py").unlink()
    after = [bytes(PythonSources(split, 8, folder=tmp_path).tokens).split(b"\0") for split in ("train", "val")]
    assert after == [[name for name in before[0] if name != gone.encode()], before[1]]


def test_no_sources(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there are no Python sources"):
        PythonSources("train", 8, folder=tmp_path)
    with pytest.raises(ConfigError, match=r"split=test .*valid: train, val"):
        PythonSources("test", 8)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="max_bytes=1 must be at least 2"):
        PythonSources("train", 8, max_bytes=1)
