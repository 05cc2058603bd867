"""Text -> token files: the tokens are right, a stopped run goes on, and nothing half-written is ever published."""

from __future__ import annotations

import bz2
import gc
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from tokenizers import Tokenizer

from fp4dist.errors import DataError
from fp4dist.spec.load import config_root
from fp4dist.spec.run import PrepareConfig
from fp4dist.train import prepare as prepare_module
from fp4dist.train.corpus import END_OF_TEXT, inspect_source, read_blocks
from fp4dist.train.prepare import prepare, read_meta, valid_prefix
from fp4dist.train.tokenizer import train_bpe

ROOT = Path(__file__).resolve().parents[2]
AUSTEN = config_root() / "data" / "austen.txt.bz2"
FINAL = (".bin", ".idx", ".tokenizer.json", ".meta.json")


@pytest.fixture(scope="module", autouse=True)
def _quick_collections() -> Iterator[None]:
    """Megatron's builder collects garbage at every merge; with torch and pytest loaded that is most of a small run."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def chapters() -> list[str]:
    """Forty chapters of Austen."""
    documents: list[str] = []
    for block in read_blocks(inspect_source(AUSTEN)):
        assert block.first, "a chapter is shorter than a block"
        assert block.last
        documents.append(block.text)
    return documents[:40]


@pytest.fixture(scope="module")
def bpe(chapters: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    path.write_text(train_bpe(chapters, 800, END_OF_TEXT).text, encoding="utf-8")
    return path


def write_text(path: Path, documents: list[str]) -> str:
    path.write_text("".join(f"{d}\n{END_OF_TEXT}\n" for d in documents), encoding="utf-8")
    return str(path)


def python(*args: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", *args]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def tool(*args: str) -> subprocess.Popen[str]:
    return python(str(ROOT / "tools" / "prepare_data.py"), *args)


def tokens_of(prefix: Path) -> list[list[int]]:
    """Every document, read with Megatron's own IndexedDataset."""
    dataset = IndexedDataset(str(prefix))
    assert dataset.document_indices.tolist() == list(range(len(dataset) + 1)), "one sequence a document"
    return [dataset[i].tolist() for i in range(len(dataset))]


def direct(tokenizer: Path, documents: list[str]) -> list[list[int]]:
    """The same by the tokenizers library alone."""
    tok = Tokenizer.from_file(str(tokenizer))
    return [[*tok.encode(d, add_special_tokens=False).ids, tok.token_to_id(END_OF_TEXT)] for d in documents]


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def test_tokens_equal_direct_tokenization(tmp_path: Path, bpe: Path, chapters: list[str]) -> None:
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"body": c}) + "\n" for c in chapters[10:30]))
    (tmp_path / "c.txt.bz2").write_bytes(bz2.compress("\n\n".join(chapters[30:]).encode()))
    sources = (write_text(tmp_path / "a.txt", chapters[:10]), str(tmp_path / "b.jsonl"), str(tmp_path / "c.txt.bz2"))
    out = tmp_path / "deep" / "out"
    made = prepare(PrepareConfig(sources=sources, tokenizer=str(bpe), jsonl_key="body"), out)
    expected = direct(bpe, [*chapters[:30], "\n\n".join(chapters[30:])])
    assert tokens_of(out) == expected
    assert (made.documents, made.tokens) == (31, sum(map(len, expected)))
    assert (made.vocab_size, made.eot_id, made.valid_prefix, made.reused) == (800, 0, None, False)
    assert {p.name for p in out.parent.iterdir()} == {f"out{suffix}" for suffix in FINAL}
    assert IndexedDataset(str(out)).index.dtype == np.uint16
    assert made.tokenizer.read_bytes() == bpe.read_bytes()
    meta: Any = read_meta(out)
    assert (meta["vocab_size"], meta["eot_id"], meta["documents"], meta["tokens"]) == (800, 0, 31, made.tokens)
    assert [s["name"] for s in meta["sources"]] == ["a.txt", "b.jsonl", "c.txt.bz2"]
    assert meta["sources"][0]["sha256"] == inspect_source(sources[0]).sha256


def test_large_vocabularies_take_four_bytes(tmp_path: Path, bpe: Path, chapters: list[str]) -> None:
    tok = json.loads(bpe.read_text(encoding="utf-8"))
    tok["model"]["vocab"] |= {f"unused{i}": i for i in range(800, 65_500)}
    big = tmp_path / "big.json"
    big.write_text(json.dumps(tok), encoding="utf-8")
    source = write_text(tmp_path / "a.txt", chapters[:2])
    prepare(PrepareConfig(sources=(source,), tokenizer=str(big)), tmp_path / "out")
    assert IndexedDataset(str(tmp_path / "out")).index.dtype == np.int32
    assert tokens_of(tmp_path / "out") == direct(bpe, chapters[:2])


def test_trained_tokenizer_and_held_out_documents(tmp_path: Path, chapters: list[str]) -> None:
    chapters = chapters[:20]
    source = write_text(tmp_path / "a.txt", chapters)
    plan = PrepareConfig(sources=(source,), vocab_size=600, valid_fraction=0.2)
    made = prepare(plan, tmp_path / "out")
    held_out = [b.text for b in read_blocks(inspect_source(source), valid_fraction=0.2) if b.held_out]
    assert made.valid_documents == len(held_out) > 1
    assert tokens_of(tmp_path / "out") == direct(made.tokenizer, [c for c in chapters if c not in held_out])
    assert tokens_of(tmp_path / "out_valid") == direct(made.tokenizer, held_out)
    trained_on = [c for c in chapters if c not in held_out]
    assert made.tokenizer.read_text(encoding="utf-8") == train_bpe(trained_on, 600, END_OF_TEXT).text
    assert made.valid_prefix == valid_prefix(tmp_path / "out")
    # Without a share to hold out, the old held-out files would repeat training text: they go.
    again = prepare(PrepareConfig(sources=(source,), vocab_size=600), tmp_path / "out")
    assert again.documents == len(chapters)
    assert not list(tmp_path.glob("out_valid*"))


def test_reuse_and_what_ends_it(tmp_path: Path, bpe: Path, chapters: list[str]) -> None:
    source = write_text(tmp_path / "a.txt", chapters[:3])
    plan = PrepareConfig(sources=(source,), tokenizer=str(bpe))
    prepare(plan, tmp_path / "out")
    before = (tmp_path / "out.idx").stat().st_ino
    assert prepare(plan, tmp_path / "out").reused
    assert (tmp_path / "out.idx").stat().st_ino == before
    write_text(tmp_path / "a.txt", chapters[3:5])
    assert not prepare(plan, tmp_path / "out").reused
    assert tokens_of(tmp_path / "out") == direct(bpe, chapters[3:5])
    other = tmp_path / "other.json"
    other.write_text(train_bpe(chapters, 700, END_OF_TEXT).text, encoding="utf-8")
    made = prepare(PrepareConfig(sources=(source,), tokenizer=str(other)), tmp_path / "out")
    assert made.vocab_size == 700
    assert tokens_of(tmp_path / "out") == direct(other, chapters[3:5])
    with (tmp_path / "out.bin").open("r+b") as file:
        file.truncate(10)
    assert not prepare(PrepareConfig(sources=(source,), tokenizer=str(other)), tmp_path / "out").reused


def test_a_killed_run_goes_on_with_the_next_source(
    tmp_path: Path, bpe: Path, chapters: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    first = write_text(tmp_path / "first.txt", chapters[:3])
    long = write_text(tmp_path / "long.txt", chapters * 6)  # takes a second
    plan = PrepareConfig(sources=(first, long), tokenizer=str(bpe))
    folder = tmp_path / "killed"
    program = "import sys\nfrom fp4dist.spec.run import PrepareConfig\nfrom fp4dist.train.prepare import prepare\n"
    program += f"prepare(PrepareConfig(sources={plan.sources!r}, tokenizer={plan.tokenizer!r}), sys.argv[1])"
    process = python("-c", program, str(folder / "out"))
    try:
        deadline = time.monotonic() + 60
        while not list(folder.glob("out.parts/part-*.json")):
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        process.kill()  # SIGKILL: no handler, no cleanup
        process.communicate()
    assert [p.name for p in folder.iterdir()] == ["out.parts"], "nothing under the final names"
    assert list(folder.glob("out.parts/*.tmp")), "killed while it wrote the second part"
    finished = next(folder.glob("out.parts/part-*.json")).stat().st_ino
    with caplog.at_level(logging.INFO, "fp4dist"):
        seen: list[int] = []
        original = prepare_module._publish

        def publish(*args: Any) -> None:
            seen.extend(p.stat().st_ino for p in folder.glob("out.parts/part-*.json"))
            original(*args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(prepare_module, "_publish", publish)
            prepare(plan, folder / "out")
    assert "1 of 2 sources were tokenized before" in caplog.text
    assert len(seen) == 2
    assert finished in seen, "the finished part was used as it was"
    prepare(plan, tmp_path / "whole" / "out")
    assert files_of(folder) == files_of(tmp_path / "whole")


def test_stopped_anywhere_while_publishing(tmp_path: Path, bpe: Path, chapters: list[str]) -> None:
    """Stop at every rename of a run that replaces older data: .bin and .idx are together only when they fit."""
    texts = [c[:200] for c in chapters]
    old = PrepareConfig(sources=(write_text(tmp_path / "old.txt", texts),), tokenizer=str(bpe), valid_fraction=0.2)
    new = PrepareConfig(sources=(write_text(tmp_path / "new.txt", texts[:20]),), tokenizer=str(bpe), valid_fraction=0.2)
    prepare(new, tmp_path / "whole" / "out")
    whole = {name: tokens_of(tmp_path / "whole" / name) for name in ("out", "out_valid")}
    prepare(old, tmp_path / "base" / "out")
    old_tokens = {name: tokens_of(tmp_path / "base" / name) for name in whole}
    real, stops = os.replace, 0
    for stop in range(100):
        folder = tmp_path / f"stop{stop}"
        prepare(old, folder / "out")
        calls = 0

        def replace(source: Any, target: Any, stop: int = stop) -> None:
            nonlocal calls
            calls += 1
            if calls > stop:
                raise KeyboardInterrupt
            real(source, target)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "replace", replace)
            try:
                prepare(new, folder / "out")
                break
            except KeyboardInterrupt:
                stops += 1
        for name in whole:
            if (folder / f"{name}.idx").is_file() and (folder / f"{name}.bin").is_file():
                assert tokens_of(folder / name) in (old_tokens[name], whole[name])
        assert not list(folder.glob("**/*.tmp"))
        prepare(new, folder / "out")
        assert {name: tokens_of(folder / name) for name in whole} == whole
        assert not list(folder.glob("*.parts"))
    assert stops > 8


def test_a_bad_source_leaves_the_old_data_and_the_finished_parts(
    tmp_path: Path, bpe: Path, chapters: list[str]
) -> None:
    good = write_text(tmp_path / "good.txt", chapters[:3])
    prepare(PrepareConfig(sources=(good,), tokenizer=str(bpe)), tmp_path / "data" / "out")
    before = files_of(tmp_path / "data")
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"fine so far\n" * 50_000 + b"\xff\n")
    for plan in (
        PrepareConfig(sources=(good, str(bad)), tokenizer=str(bpe)),
        PrepareConfig(sources=(good, str(bad)), vocab_size=300),  # fails while the tokenizer is trained
    ):
        with pytest.raises(DataError, match=r"bad\.txt: byte 0xff at offset 600000 is not UTF-8"):
            prepare(plan, tmp_path / "data" / "out")
        assert files_of(tmp_path / "data") == before
        assert not list(tmp_path.glob("data/**/*.tmp"))
    assert len(list(tmp_path.glob("data/out.parts/part-*.json"))) == 1
    with pytest.raises(DataError, match="not UTF-8"):
        prepare(PrepareConfig(sources=(str(bad),), tokenizer=str(bpe)), tmp_path / "fresh" / "out")
    assert list((tmp_path / "fresh").iterdir()) == []


def test_bad_plans(tmp_path: Path, bpe: Path, chapters: list[str]) -> None:
    source = write_text(tmp_path / "a.txt", chapters[:1])
    with pytest.raises(DataError, match=r"none\.txt: does not exist"):
        prepare(PrepareConfig(sources=(source, str(tmp_path / "none.txt"))), tmp_path / "out")
    with pytest.raises(DataError, match=r"none\.json: no such file"):
        prepare(PrepareConfig(sources=(source,), tokenizer=str(tmp_path / "none.json")), tmp_path / "out")
    with pytest.raises(DataError, match=r"valid_fraction = 0\.1 leaves no document for valid: .* hold 1,.* separator"):
        prepare(PrepareConfig(sources=(source,), tokenizer=str(bpe), valid_fraction=0.1), tmp_path / "out")
    (tmp_path / "out.meta.json").write_text("{oops")
    with pytest.raises(DataError, match=r"out\.meta\.json: not JSON .* remove it"):
        prepare(PrepareConfig(sources=(source,), tokenizer=str(bpe)), tmp_path / "out")
    for bad, message in (
        ({"sources": ()}, "sources is empty"),
        ({"vocab_size": 256}, "at least 257"),
        ({"valid_fraction": 0.6}, "valid_fraction = 0.6"),
    ):
        with pytest.raises(ValueError, match=message):
            PrepareConfig(**{"sources": ("a.txt",), **bad})  # type: ignore[arg-type]


def test_two_processes_do_the_work_once(
    tmp_path: Path, bpe: Path, chapters: list[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Locks belong to open files, so two threads contend as two processes do."""
    plan = PrepareConfig(sources=(write_text(tmp_path / "a.txt", chapters),), tokenizer=str(bpe))
    inside, go_on = threading.Event(), threading.Event()
    original = prepare_module._encode_sources

    def slow(*args: Any) -> Any:
        inside.set()
        assert go_on.wait(30)
        return original(*args)

    monkeypatch.setattr(prepare_module, "_encode_sources", slow)
    results: list[prepare_module.PreparedData] = []
    with caplog.at_level(logging.INFO, "fp4dist"):
        threads = [threading.Thread(target=lambda: results.append(prepare(plan, tmp_path / "out"))) for _ in range(2)]
        threads[0].start()
        assert inside.wait(30)
        threads[1].start()
        deadline = time.monotonic() + 30
        while "another process is preparing it; waiting" not in caplog.text:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        go_on.set()
        for thread in threads:
            thread.join()
    assert sorted(r.reused for r in results) == [False, True]


def test_progress_has_a_share_and_a_time(
    tmp_path: Path, bpe: Path, chapters: list[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_module, "_PROGRESS_SECONDS", 0.0)
    source = write_text(tmp_path / "a.txt", chapters * 5)
    with caplog.at_level(logging.INFO, "fp4dist"):
        prepare(PrepareConfig(sources=(source,), tokenizer=str(bpe)), tmp_path / "out")
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("tokenizing a.txt")]
    assert len(lines) >= 2
    assert all("% " in line or "%," in line for line in lines)
    assert all("left" in line for line in lines)


def test_the_command_line_tool(tmp_path: Path, chapters: list[str]) -> None:
    source = write_text(tmp_path / "a.txt", chapters[:2])
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    good = tool(source, "--prefix", str(tmp_path / "out"), "--vocab-size", "400")
    bad = tool(str(tmp_path / "bad.txt"), "--prefix", str(tmp_path / "x"), "--separator", "")
    _, stderr = good.communicate(timeout=120)
    assert good.returncode == 0, stderr
    assert "2 documents" in stderr
    assert tokens_of(tmp_path / "out") == direct(tmp_path / "out.tokenizer.json", chapters[:2])
    _, stderr = bad.communicate(timeout=120)
    assert bad.returncode == 1
    assert "DataError: " in stderr
    assert "bad.txt: byte 0xff at offset 0" in stderr
    assert "Traceback" not in stderr
