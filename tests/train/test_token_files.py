"""Bad .bin/.idx files are found before the run starts, each with one clear error."""

from __future__ import annotations

import logging
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fp4dist.errors import ConfigError, DataError
from fp4dist.train import token_files
from fp4dist.train.token_files import Blend, check_token_files, parse_blend, read_index, split_shares, token_sides
from tests.train.token_runs import VOCAB_SIZE, random_documents, run_config, write_tokens

HEADER = 34


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    """Fifty documents, about 1,600 tokens."""
    return write_tokens(tmp_path / "data", random_documents(50))


def patch_file(path: str, offset: int, data: bytes) -> None:
    with Path(path).open("r+b") as file:
        file.seek(offset)
        file.write(data)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64, np.uint8])
def test_good_files(tmp_path: Path, dtype: Any) -> None:
    documents = random_documents(50)
    path = write_tokens(tmp_path / "data", documents, dtype)
    run = run_config(tmp_path, {"train": (path,), "split": "80,20,0"})
    check_token_files(run)
    index = read_index(path)
    assert index.dtype == dtype
    assert index.lengths_N.tolist() == [len(d) for d in documents]
    assert index.tokens == sum(map(len, documents))
    train, valid = token_sides(run)
    assert valid is not None
    assert train.tokens() == [sum(len(d) for d in documents[:40])]
    assert valid.tokens() == [sum(len(d) for d in documents[40:])]
    assert train.samples(16) == [(train.tokens()[0] - 1) // 16]


def test_blends() -> None:
    assert parse_blend("data.train", ("a",)) == Blend(("a",))
    assert parse_blend("data.train", ("a", "b")) == Blend(("a", "b"))
    assert parse_blend("data.train", ("0.3", "a", "7e-1", "b")) == Blend(("a", "b"), (0.3, 0.7))
    assert parse_blend("data.train", ("5", "a")) == Blend(("a",))
    for entries in (("0.3", "a", "b"), ("0.3", "a", "b", "c"), ("a", "0.3", "b", "0.7")):
        with pytest.raises(ConfigError, match=r"data\.train = .* weight before each prefix"):
            parse_blend("data.train", entries)
    for weights in (("0", "a", "1", "b"), ("-1", "a", "1", "b"), ("nan", "a", "1", "b")):
        with pytest.raises(ConfigError, match="must be positive"):
            parse_blend("data.valid", weights)


def test_split_is_megatrons() -> None:
    train, valid = split_shares("969,30,1")
    assert train == (0, pytest.approx(0.969))
    assert valid == (pytest.approx(0.969), pytest.approx(0.999))
    assert split_shares("1,0,0") == ((0, 1.0), (0.0, 0.0))
    with pytest.raises(ConfigError, match="all shares are 0"):
        split_shares("0,0,0")


def test_missing_and_empty_files(prefix: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.idx: no such file; .*prepare_data\.py.*data\.prepare"):
        check_token_files(run_config(tmp_path, {"train": (str(tmp_path / "none"),)}))
    with pytest.raises(DataError, match=r"none\.idx: no such file"):
        check_token_files(run_config(tmp_path, {"train": (prefix,), "valid": (str(tmp_path / "none"),)}))
    with pytest.raises(DataError, match=r"written without \.bin: '.*data'"):
        read_index(f"{prefix}.bin")
    (tmp_path / "data.bin").unlink()
    with pytest.raises(DataError, match=r"data\.bin: no such file"):
        read_index(prefix)
    (tmp_path / "data.bin").touch()
    with pytest.raises(DataError, match=r"data\.bin: empty \(0 bytes\)"):
        read_index(prefix)
    (tmp_path / "data.idx").write_bytes(b"")
    with pytest.raises(DataError, match=r"data\.idx: empty \(0 bytes\)"):
        read_index(prefix)


def test_truncated_tokens(prefix: str) -> None:
    size = Path(f"{prefix}.bin").stat().st_size
    with Path(f"{prefix}.bin").open("r+b") as file:
        file.truncate(size - 1)
    with pytest.raises(DataError, match=rf"data\.bin: truncated: {size - 1} bytes, .*describes {size} \(1 of 50 "):
        read_index(prefix)


def test_more_tokens_than_the_index_knows(prefix: str, caplog: pytest.LogCaptureFixture) -> None:
    with Path(f"{prefix}.bin").open("ab") as file:
        file.write(b"123")
    with caplog.at_level(logging.WARNING, "fp4dist"):
        read_index(prefix)
    assert "do the two belong together" in caplog.text


@pytest.mark.parametrize(
    ("offset", "data", "message"),
    [
        (0, b"GIF89a", "begins with b'GIF89aX"),
        (9, struct.pack("<Q", 2), "version 2, but Megatron-core reads version 1"),
        (17, b"\x07", "dtype code 7, but token ids are integers"),
        (17, b"\x63", "dtype code 99"),
        (18, struct.pack("<Q", 49), r"\d+ bytes, but 49 sequences and 51 document boundaries need \d+"),
        (18, struct.pack("<Q", 2**60), "sequences and 51 document boundaries need"),
        (HEADER, struct.pack("<i", -5), "a negative length or offset"),
        (HEADER + 50 * 12 + 8, struct.pack("<q", 40), "document boundaries that do not rise"),
    ],
)
def test_damaged_index(prefix: str, offset: int, data: bytes, message: str) -> None:
    patch_file(f"{prefix}.idx", offset, data)
    with pytest.raises(DataError, match=message) as error:
        read_index(prefix)
    assert "data.idx: " in str(error.value)
    assert "copy it again" in str(error.value)


@pytest.mark.parametrize("size", [5, HEADER - 1, HEADER, 500])
def test_truncated_index(prefix: str, size: int) -> None:
    with Path(f"{prefix}.idx").open("r+b") as file:
        file.truncate(size)
    with pytest.raises(DataError, match=rf"data\.idx: {size} bytes, but"):
        read_index(prefix)


def test_index_of_other_data(prefix: str, tmp_path: Path) -> None:
    other = write_tokens(tmp_path / "other", random_documents(60, seed=1))
    Path(f"{other}.idx").replace(f"{prefix}.idx")
    with pytest.raises(DataError, match=r"data\.bin: truncated: .* of 60 sequences"):
        read_index(prefix)


def test_index_without_tokens(tmp_path: Path) -> None:
    path = write_tokens(tmp_path / "none", [])
    (tmp_path / "none.bin").write_bytes(b"12")
    with pytest.raises(DataError, match=r"none\.idx: lists no tokens in 0 sequences"):
        read_index(path)


def test_tokens_beyond_the_vocabulary(tmp_path: Path) -> None:
    documents = random_documents(50)
    documents[30][3] = VOCAB_SIZE
    at = sum(len(d) for d in documents[:30]) + 3
    for dtype in (np.uint16, np.int32):
        path = write_tokens(tmp_path / "data", documents, dtype)
        message = rf"data\.bin: token id 100 \(token {at}, in sequence 30\) is not in \[0, model\.vocab_size = 100\); "
        with pytest.raises(DataError, match=message):
            check_token_files(run_config(tmp_path, {"train": (path,)}))
    documents[30][3] = -1
    path = write_tokens(tmp_path / "data", documents, np.int32)
    with pytest.raises(DataError, match="token id -1"):
        check_token_files(run_config(tmp_path, {"train": (path,)}))
    good = write_tokens(tmp_path / "good", random_documents(50))
    with pytest.raises(DataError, match=r"data\.bin: token id -1"):
        check_token_files(run_config(tmp_path, {"train": (good,), "valid": (path,)}))


def test_large_files_are_sampled_and_the_log_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_files, "_FULL_SCAN_TOKENS", 400)
    monkeypatch.setattr(token_files, "_CHUNK_TOKENS", 10)
    path = write_tokens(tmp_path / "data", random_documents(50))
    config = run_config(tmp_path, {"train": (path,), "split": "80,20,0"})
    with caplog.at_level(logging.INFO, "fp4dist"):
        check_token_files(config)
    assert "evenly spaced" in caplog.text
    tokens = np.memmap(f"{path}.bin", dtype=np.uint16, mode="r+")
    tokens[-1] = VOCAB_SIZE  # the last chunk is always read
    with pytest.raises(DataError, match="token id 100"):
        check_token_files(config)


def test_the_scan_is_fast(tmp_path: Path) -> None:
    path = write_tokens(tmp_path / "data", [np.full(20_000_000, 7)])
    config = run_config(tmp_path, {"train": (path,), "valid": (path,)})
    start = time.monotonic()
    check_token_files(config)
    assert time.monotonic() - start < 3.0, "20 M tokens take about 10 ms on a free core"


def test_too_little_training_text(tmp_path: Path) -> None:
    path = write_tokens(tmp_path / "data", [np.arange(16)])
    valid = write_tokens(tmp_path / "valid", random_documents(50))
    message = r"data\.train: .*data gives 16 tokens to training, less than .* = 17; "
    with pytest.raises(DataError, match=message):
        check_token_files(run_config(tmp_path, {"train": (path,), "valid": (valid,)}))
    check_token_files(run_config(tmp_path, {"train": (path,), "valid": (valid,)}, seq_length=15))


def test_too_little_validation_text(tmp_path: Path) -> None:
    """Six books and the usual split: Megatron would give an empty part, and loop for ever over it."""
    path = write_tokens(tmp_path / "data", [np.full(1000, 5)] * 6)
    message = r"data\.split = '969,30,1' of data\.train: .* 0 samples .*eval_samples = 4 .*the 6 documents"
    with pytest.raises(DataError, match=message):
        check_token_files(run_config(tmp_path, {"train": (path,)}))
    check_token_files(run_config(tmp_path, {"train": (path,)}, eval_samples=0))
    check_token_files(run_config(tmp_path, {"train": (path,), "split": "5,1,0"}, eval_samples=62))
    with pytest.raises(DataError, match=r"62 samples .* at most 62"):
        check_token_files(run_config(tmp_path, {"train": (path,), "split": "5,1,0"}, eval_samples=63))
    small = write_tokens(tmp_path / "small", [np.full(100, 5)])
    blend = {"train": (path,), "valid": ("0.5", path, "0.5", small)}
    check_token_files(run_config(tmp_path, blend, eval_samples=10))
    message = r"data\.valid: .*small gives .* 6 samples .*eval_samples = 12 takes 7 .* at most 10"
    with pytest.raises(DataError, match=message):
        check_token_files(run_config(tmp_path, blend, eval_samples=12))
