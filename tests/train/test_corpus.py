"""Reading raw text: what is a document, in every packing, and one clear error for each bad file."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fp4dist.errors import DataError, DependencyError
from fp4dist.spec.load import config_root
from fp4dist.train import corpus
from fp4dist.train.corpus import find_file, inspect_source, read_blocks


def zst(data: bytes) -> bytes:
    return pytest.importorskip("zstandard").ZstdCompressor().compress(data)


PACK: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".bz2": bz2.compress, ".gz": gzip.compress, ".zst": zst}


def write(path: Path, data: bytes | str) -> Path:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def documents(path: Path, **options: object) -> list[str]:
    docs: list[str] = []
    for block in read_blocks(inspect_source(path), **options):  # type: ignore[arg-type]
        if block.first:
            docs.append("")
        docs[-1] += block.text
    return docs


@pytest.mark.parametrize("packing", PACK)
def test_text_documents(tmp_path: Path, packing: str) -> None:
    text = "one\n\nstill one — é\n<|endoftext|>\n\n<|endoftext|>\ntwo <|endoftext|> inside\n<|endoftext|>\nlast"
    path = write(tmp_path / f"a.txt{packing}", PACK[packing](text.encode()))
    assert documents(path) == ["one\n\nstill one — é", "two <|endoftext|> inside", "last"]


@pytest.mark.parametrize("packing", PACK)
def test_jsonl_documents(tmp_path: Path, packing: str) -> None:
    lines = [{"body": "one\ntwo"}, {"body": "  "}, {"body": "three", "id": 3}]
    data = "\n\n".join(json.dumps(line) for line in lines)
    path = write(tmp_path / f"a.jsonl{packing}", PACK[packing](data.encode()))
    assert documents(path, jsonl_key="body") == ["one\ntwo", "three"]


def test_without_separator_the_file_is_one_document(tmp_path: Path) -> None:
    text = "one\n<|endoftext|>\ntwo\n"
    assert documents(write(tmp_path / "a.txt", text), document_separator=None) == [text.removesuffix("\n")]
    assert documents(write(tmp_path / "b.txt", text), document_separator="###") == [text.removesuffix("\n")]


def test_windows_line_ends_and_byte_order_mark(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\nmore\r\n<|endoftext|>\r\ntwo\r\n")
    assert documents(path) == ["one\r\nmore", "two"]


def test_long_documents_come_in_blocks_and_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "BLOCK_CHARS", 20)
    text = "".join(f"line number {i}\n" for i in range(50))
    path = write(tmp_path / "a.txt", f"{text}<|endoftext|>\n{text}\n<|endoftext|>\nshort\n")
    blocks = list(read_blocks(inspect_source(path)))
    assert len(blocks) > 20
    assert max(len(b.text) for b in blocks) < 40
    assert sum(b.last for b in blocks) == 3
    assert documents(path) == [text.removesuffix("\n"), text, "short"]


def test_held_out_documents_follow_their_text_alone(tmp_path: Path) -> None:
    texts = [f"document {i}" for i in range(400)]

    def held_out(order: list[str], fraction: float) -> set[str]:
        path = write(tmp_path / "a.txt", "".join(f"{t}\n<|endoftext|>\n" for t in order))
        return {b.text for b in read_blocks(inspect_source(path), valid_fraction=fraction) if b.held_out}

    some = held_out(texts, 0.1)
    assert 20 <= len(some) <= 60
    assert held_out(texts[::-1], 0.1) == some
    assert held_out(texts[:200], 0.1) == some & set(texts[:200])
    assert some < held_out(texts, 0.2)
    assert held_out(texts, 0.0) == set()


def test_progress_counts_the_stored_bytes(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt.bz2", bz2.compress(b"0123456789\n" * 400_000))
    seen: list[int] = []
    list(read_blocks(inspect_source(path), progress=seen.append))
    assert seen == sorted(seen)
    assert len(seen) >= 3
    assert 0 < seen[-1] <= path.stat().st_size


def test_shipped_sources_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = config_root() / "data" / "austen.txt.bz2"
    assert find_file("data/austen.txt.bz2") == shipped
    assert find_file("configs/data/austen.txt.bz2") == shipped
    assert find_file("data/none.txt") == Path("data/none.txt")
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "austen.txt.bz2", b"mine")
    assert find_file("data/austen.txt.bz2") == Path("data/austen.txt.bz2")


def test_the_shipped_text_is_what_its_readme_says() -> None:
    folder = config_root() / "data"
    readme = (folder / "README.md").read_text(encoding="utf-8")
    text = bz2.decompress((folder / "austen.txt.bz2").read_bytes())
    assert hashlib.sha256(text).hexdigest() in readme
    assert f"{len(text):,} bytes" in readme
    chapters = documents(folder / "austen.txt.bz2")
    assert f"{len(chapters)} documents" in readme
    assert max(map(len, chapters)) < 40_000, "chapters, not novels: held-out data is chosen by document"
    assert "gutenberg" not in text.decode().lower()
    held_out = [b for b in read_blocks(inspect_source(folder / "austen.txt.bz2"), valid_fraction=0.05) if b.held_out]
    assert f"holds out {len(held_out)} chapters" in readme


def refused(path: Path, *parts: str, **options: object) -> None:
    with pytest.raises(DataError) as error:
        documents(path, **options)
    for part in (path.name, *parts):
        assert part in str(error.value), str(error.value)


def test_missing_empty_and_unknown_files(tmp_path: Path) -> None:
    refused(tmp_path / "none.txt", "does not exist")
    refused(write(tmp_path / "empty.txt", b""), "empty (0 bytes)")
    refused(write(tmp_path / "a.parquet", b"PAR1"), "unknown kind of source '.parquet'", ".jsonl")
    refused(tmp_path, "is not a file")


@pytest.mark.parametrize("packing", PACK)
def test_blank_files_have_no_document(tmp_path: Path, packing: str) -> None:
    refused(write(tmp_path / f"a.txt{packing}", PACK[packing](b"\n \n<|endoftext|>\n\n")), "holds no document")
    refused(write(tmp_path / f"a.jsonl{packing}", PACK[packing](b'\n{"text": " "}\n')), "holds no document")


def test_not_utf8_names_the_byte(tmp_path: Path) -> None:
    data = "é one\n".encode() + b"caf\xe9 two\n"
    refused(write(tmp_path / "a.txt", data), "byte 0xe9 at offset 10 is not UTF-8", "iconv")
    refused(write(tmp_path / "a.txt.gz", gzip.compress(data)), "byte 0xe9 at offset 10 of the unpacked text")
    refused(write(tmp_path / "b.txt", b"\xef\xbb\xbf" + data), "offset 13")
    refused(write(tmp_path / "c.txt", "ends inside é".encode()[:-1]), "offset 12", "unexpected end of data")


@pytest.mark.parametrize("packing", [".bz2", ".gz", ".zst"])
def test_truncated_and_damaged_packing(tmp_path: Path, packing: str) -> None:
    text = "".join(f"line {i * 7919 % 1013}\n" for i in range(20_000)).encode()
    packed = PACK[packing](text)
    refused(write(tmp_path / f"a.txt{packing}", packed[: len(packed) // 2]), "truncated", "fetch the file again")
    refused(write(tmp_path / f"b.txt{packing}", packed[:-3]), "truncated")
    refused(write(tmp_path / f"c.txt{packing}", text), f"cannot be unpacked as {packing}")
    many = write(tmp_path / f"d.txt{packing}", packed + packed)
    assert documents(many) == [(text + text).decode().removesuffix("\n")]


def test_bad_jsonl_names_the_line(tmp_path: Path) -> None:
    good = '{"text": "fine"}\n'
    refused(write(tmp_path / "a.jsonl", good + "\n{oops\n"), "line 3: not JSON", "'text'")
    refused(write(tmp_path / "b.jsonl", good + '{"body": "x"}\n'), "line 2: no key 'text', only 'body'", "jsonl_key")
    refused(write(tmp_path / "c.jsonl", good + "[1]\n"), "line 2: a list, not an object")
    refused(write(tmp_path / "d.jsonl", good + '{"text": 5}\n'), "line 2: 'text' is a int, not a text")


def test_missing_zstandard_names_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.txt.zst", b"(\xb5/\xfd")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(DependencyError, match=r"a\.txt\.zst: .*pip install zstandard"):
        documents(path)
