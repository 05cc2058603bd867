"""Raw text -> Megatron-core token files `<prefix>.bin` and `.idx`, with `<prefix>.tokenizer.json` and `.meta.json`.

Each source becomes a finished part in `<prefix>.parts/`, named after the hash of everything that decides its content
(source, tokenizer, options), so a stopped run goes on with the next source and a changed source is done again. The
parts are merged in the order of the sources and published by renaming, the `.idx` last: whoever sees both `.bin` and
`.idx` sees a complete pair. A second process that prepares the same prefix waits and finds the work done.

With `valid_fraction` whole documents go to `<prefix>_valid` instead. Documents are never cut in two for that, and the
tokenizer trained here sees only the training documents.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from fp4dist.errors import DataError
from fp4dist.spec.run import PrepareConfig
from fp4dist.train.corpus import Block, Source, find_file, inspect_source, read_blocks
from fp4dist.train.tokenizer import TextTokenizer, hash_tokenizer, load_tokenizer, parse_tokenizer, train_bpe

log = logging.getLogger("fp4dist")
VERSION = 1  # of what a part contains; a change redoes all parts
SIDES = ("train", "valid")
_TRAINING_CHARS = 200_000_000  # text a new tokenizer is trained on, spread over the sources
_BATCH_CHARS = 1 << 21
_PROGRESS_SECONDS = 5.0


@dataclass(frozen=True)
class PreparedData:
    """What `prepare` made or found. Tokens count one end-of-text a document."""

    prefix: Path
    valid_prefix: Path | None
    tokenizer: Path
    vocab_size: int
    eot_id: int
    documents: int
    tokens: int
    valid_documents: int
    valid_tokens: int
    reused: bool  # the files were there already, made from the same sources with the same options


def prepare(plan: PrepareConfig, prefix: str | Path) -> PreparedData:
    """Make the token files of `prefix` from `plan.sources`; does nothing when they are there and still fit the plan.

    Tokens are uint16 below 65,500 ids, else int32; every document ends with `plan.eot_token`.
    Raises DataError for a bad source (see corpus.read_blocks), tokenizer, or a `valid_fraction` that leaves a side
    empty; nothing is then changed under the final names.
    """
    prefix = Path(prefix)
    sources = [inspect_source(name) for name in plan.sources]
    request = describe_request(plan)
    fingerprint = _digest({"request": request, "sources": [s.sha256 for s in sources]})
    with _work_folder(prefix) as work:
        done = _finished(prefix, plan, fingerprint)
        if done is None:
            log.info("%s: preparing %d sources, %.1f MB", prefix, len(sources), sum(s.size for s in sources) / 1e6)
            tokenizer = _tokenizer(plan, sources, work / f"tokenizer-{fingerprint[:16]}.json")
            parts = _encode_sources(plan, sources, tokenizer, _part_stems(request, sources, tokenizer, work))
            _publish(prefix, _Output(plan, tokenizer, parts, request, fingerprint), work)
            done = _finished(prefix, plan, fingerprint)
            assert done is not None, "what was just published must be complete"
            done = PreparedData(**{**vars(done), "reused": False})
        shutil.rmtree(work)
    log.info("%s: %s", prefix, _summary(done))
    return done


def _summary(data: PreparedData) -> str:
    text = f"{data.documents:,} documents, {data.tokens:,} tokens, vocabulary {data.vocab_size}"
    if data.valid_documents:
        text += f"; held out {data.valid_documents:,} documents, {data.valid_tokens:,} tokens"
    return text + (" (already prepared)" if data.reused else "")


def describe_request(plan: PrepareConfig) -> dict[str, Any]:
    """What besides the sources' content decides the tokens; stored in the meta file."""
    if plan.tokenizer is None:
        tokenizer: dict[str, Any] = {"trained": plan.vocab_size, "characters": _TRAINING_CHARS}
    else:
        tokenizer = {"sha256": hash_tokenizer(find_file(plan.tokenizer))}
    return {
        "version": VERSION,
        "tokenizer": tokenizer,
        "eot_token": plan.eot_token,
        "jsonl_key": plan.jsonl_key,
        "document_separator": plan.document_separator,
        "valid_fraction": plan.valid_fraction,
    }


def read_meta(prefix: str | Path) -> dict[str, Any] | None:
    """The `<prefix>.meta.json` written by `prepare`, or None for token files made by others."""
    path = _beside(Path(prefix), ".meta.json")
    if not path.is_file():
        return None
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise DataError(f"{path}: not JSON ({e}), but prepare writes it; remove it and prepare the data again") from e
    if not isinstance(meta, dict) or not isinstance(meta.get("tokens"), int):
        raise DataError(f"{path}: not what prepare writes; remove it and prepare the data again")
    return meta


def valid_prefix(prefix: str | Path) -> Path:
    """Where the held-out documents of `prefix` go."""
    return _beside(Path(prefix), "_valid")


def _beside(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(prefix.name + suffix)


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


# Finished or not


def _finished(prefix: Path, plan: PrepareConfig, fingerprint: str) -> PreparedData | None:
    """The data under `prefix` when complete and made from exactly this, else None."""
    sides = SIDES if plan.valid_fraction else SIDES[:1]
    metas = [_finished_side(prefix if side == "train" else valid_prefix(prefix), fingerprint) for side in sides]
    tokenizer = _beside(prefix, ".tokenizer.json")
    if any(m is None for m in metas) or not tokenizer.is_file():
        return None
    train, valid = metas[0] or {}, (metas[1] or {}) if len(metas) > 1 else {}
    return PreparedData(
        prefix=prefix,
        valid_prefix=valid_prefix(prefix) if valid else None,
        tokenizer=tokenizer,
        vocab_size=train["vocab_size"],
        eot_id=train["eot_id"],
        documents=train["documents"],
        tokens=train["tokens"],
        valid_documents=valid.get("documents", 0),
        valid_tokens=valid.get("tokens", 0),
        reused=True,
    )


def _finished_side(prefix: Path, fingerprint: str) -> dict[str, Any] | None:
    meta = read_meta(prefix)
    if meta is None or meta.get("fingerprint") != fingerprint:
        return None
    tokens, index = _beside(prefix, ".bin"), _beside(prefix, ".idx")
    if not tokens.is_file() or not index.is_file():
        return None
    return meta if tokens.stat().st_size == meta["tokens"] * np.dtype(meta["dtype"]).itemsize else None


@contextmanager
def _work_folder(prefix: Path) -> Iterator[Path]:
    """`<prefix>.parts`, locked against other processes; a failure leaves only finished parts in it."""
    work = _beside(prefix, ".parts")
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as lock:
        _lock(lock, prefix)
        work.mkdir(exist_ok=True)  # the process we waited for removed it with its lock
        _remove_unfinished(work)
        try:
            yield work
        finally:
            _remove_unfinished(work)
            if work.is_dir() and {p.name for p in work.iterdir()} <= {"lock"}:
                shutil.rmtree(work)


def _lock(lock: IO[str], prefix: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        log.info("%s: another process is preparing it; waiting", prefix)
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError as e:
        if e.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        log.warning("%s: cannot lock (%s); do not prepare this prefix in two processes at a time", prefix, e.strerror)


def _remove_unfinished(work: Path) -> None:
    for path in work.glob("*.tmp"):
        path.unlink()


# Tokenizer


def _tokenizer(plan: PrepareConfig, sources: Sequence[Source], path: Path) -> TextTokenizer:
    """Load the tokenizer, or train one and keep it at `path` for a run that is stopped later."""
    if plan.tokenizer is not None:
        return load_tokenizer(find_file(plan.tokenizer), plan.eot_token)
    if path.is_file():
        return parse_tokenizer(path.read_text(encoding="utf-8"), str(path), plan.eot_token)
    start = time.monotonic()
    progress = _Progress("training the tokenizer", sum(s.size for s in sources))
    tokenizer = train_bpe(_training_texts(plan, sources, progress), plan.vocab_size, plan.eot_token)
    size, seconds = tokenizer.vocab_size, time.monotonic() - start
    log.info("trained a byte-level BPE of %d tokens (%d asked for) in %.1f s", size, plan.vocab_size, seconds)
    _write_text(path, tokenizer.text)
    return tokenizer


def _training_texts(plan: PrepareConfig, sources: Sequence[Source], progress: _Progress) -> Iterator[str]:
    """Training documents from the start of every source, in proportion to their sizes, up to _TRAINING_CHARS."""
    total = sum(s.size for s in sources)
    for source in sources:
        budget = _TRAINING_CHARS * source.size / total
        for block in _blocks(plan, source, progress):
            if block.held_out:
                continue
            yield block.text
            budget -= len(block.text)
            if budget <= 0:
                break
        progress.finish(source)


def _blocks(plan: PrepareConfig, source: Source, progress: _Progress) -> Iterator[Block]:
    return read_blocks(
        source,
        jsonl_key=plan.jsonl_key,
        document_separator=plan.document_separator,
        valid_fraction=plan.valid_fraction,
        progress=progress.at,
    )


# Parts


@dataclass(frozen=True)
class _Part:
    """A finished source: `stem`.<side>.bin/.idx in the work folder; a side without documents has no files."""

    stem: Path
    source: Source
    documents: dict[str, int]
    tokens: dict[str, int]

    def files(self, side: str) -> str:
        """The prefix of the token files of a side."""
        return f"{self.stem}.{side}"


def _part_stems(request: dict[str, Any], sources: Sequence[Source], tokenizer: TextTokenizer, work: Path) -> list[Path]:
    """Where the part of each source goes: the same source with the same tokenizer and options has the same name."""
    same = {**request, "tokenizer": tokenizer.sha256}
    keys = [_digest({"request": same, "source": s.sha256, "suffixes": s.path.suffixes}) for s in sources]
    return [work / f"part-{key[:16]}" for key in keys]


def _encode_sources(
    plan: PrepareConfig, sources: Sequence[Source], tokenizer: TextTokenizer, stems: Sequence[Path]
) -> list[_Part]:
    todo = {stem: source for stem, source in zip(stems, sources, strict=True) if not _manifest(stem).is_file()}
    progress = _Progress("tokenizing", sum(s.size for s in todo.values()))
    for stem, source in todo.items():
        _encode_source(plan, source, tokenizer, stem, progress)
    if len(todo) < len(stems):
        log.info("%d of %d sources were tokenized before", len(stems) - len(todo), len(stems))
    return [_read_part(stem, source) for stem, source in zip(stems, sources, strict=True)]


def _manifest(stem: Path) -> Path:
    return Path(f"{stem}.json")


def _read_part(stem: Path, source: Source) -> _Part:
    counts = json.loads(_manifest(stem).read_text(encoding="utf-8"))
    return _Part(stem, source, counts["documents"], counts["tokens"])


def _encode_source(
    plan: PrepareConfig, source: Source, tokenizer: TextTokenizer, stem: Path, progress: _Progress
) -> None:
    """Write one part; its manifest comes last, so a part with a manifest is complete."""
    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    builders = {side: IndexedDatasetBuilder(f"{stem}.{side}.bin.tmp", dtype) for side in SIDES}
    documents, tokens = dict.fromkeys(SIDES, 0), dict.fromkeys(SIDES, 0)
    progress.start(source)
    try:
        for held_out, ids in _encode_documents(_blocks(plan, source, progress), tokenizer):
            side = SIDES[held_out]
            builders[side].add_document(torch.from_numpy(ids), [len(ids)])
            documents[side] += 1
            tokens[side] += len(ids)
            progress.tokens += len(ids)
    finally:
        for builder in builders.values():
            builder.data_file.close()
    for side in SIDES:
        if documents[side]:
            builders[side].finalize(f"{stem}.{side}.idx.tmp")
            _rename(Path(f"{stem}.{side}.bin.tmp"), Path(f"{stem}.{side}.bin"))
            _rename(Path(f"{stem}.{side}.idx.tmp"), Path(f"{stem}.{side}.idx"))
    _write_text(_manifest(stem), json.dumps({"documents": documents, "tokens": tokens}))
    progress.finish(source)


def _encode_documents(blocks: Iterable[Block], tokenizer: TextTokenizer) -> Iterator[tuple[bool, np.ndarray]]:
    """(held out, ids [n] int32 with the end of text) of each document."""
    eot = np.array([tokenizer.eot_id], dtype=np.int32)
    ids: list[np.ndarray] = []
    for batch in _batches(tokenizer.pieces(blocks)):
        for piece, piece_ids in zip(batch, tokenizer.encode([piece.text for piece in batch]), strict=True):
            ids.append(piece_ids)
            if piece.last:
                yield piece.held_out, np.concatenate([*ids, eot])
                ids = []


def _batches(pieces: Iterable[Block]) -> Iterator[list[Block]]:
    batch: list[Block] = []
    chars = 0
    for piece in pieces:
        batch.append(piece)
        chars += len(piece.text)
        if chars >= _BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


# Publishing


@dataclass(frozen=True)
class _Output:
    """Everything that goes under the final names."""

    plan: PrepareConfig
    tokenizer: TextTokenizer
    parts: Sequence[_Part]
    request: dict[str, Any]
    fingerprint: str

    @property
    def sides(self) -> tuple[str, ...]:
        """The sides to write."""
        return SIDES if self.plan.valid_fraction else SIDES[:1]

    @property
    def dtype(self) -> type[np.number[Any]]:
        """Of the tokens on disk."""
        return DType.optimal_dtype(self.tokenizer.vocab_size)

    def meta(self, side: str, tokenizer_name: str) -> str:
        """The meta file of a side."""
        content = {
            "side": side,
            "vocab_size": self.tokenizer.vocab_size,
            "eot_id": self.tokenizer.eot_id,
            "eot_token": self.tokenizer.eot_token,
            "dtype": np.dtype(self.dtype).name,
            "documents": sum(p.documents[side] for p in self.parts),
            "tokens": sum(p.tokens[side] for p in self.parts),
            "tokenizer": tokenizer_name,
            "tokenizer_sha256": self.tokenizer.sha256,
            "sources": [
                {
                    "name": p.source.path.name,
                    "bytes": p.source.size,
                    "sha256": p.source.sha256,
                    "documents": p.documents[side],
                    "tokens": p.tokens[side],
                }
                for p in self.parts
            ],
            "request": self.request,
            "fingerprint": self.fingerprint,
        }
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _publish(prefix: Path, output: _Output, work: Path) -> None:
    """Merge the parts of each side and rename everything into place, each `.idx` last, the training one last of all."""
    _check_sides(output)
    prefixes = {"train": prefix, "valid": valid_prefix(prefix)}
    tokenizer = _beside(prefix, ".tokenizer.json")
    merged = {side: _merge(output, side, work) for side in output.sides}
    for side in SIDES:
        _withdraw(prefixes[side], keep=side in output.sides)
    _write_text(tokenizer, output.tokenizer.text, work)
    for side in output.sides:
        _write_text(_beside(prefixes[side], ".meta.json"), output.meta(side, tokenizer.name), work)
        _rename(Path(f"{merged[side]}.bin.tmp"), _beside(prefixes[side], ".bin"))
    for side in reversed(output.sides):
        _rename(Path(f"{merged[side]}.idx.tmp"), _beside(prefixes[side], ".idx"))


def _withdraw(prefix: Path, *, keep: bool) -> None:
    """Take the old pair back before the new one is there; a part no longer held out goes for good."""
    if keep:
        _beside(prefix, ".idx").unlink(missing_ok=True)
    elif (read_meta(prefix) or {}).get("side") == "valid":
        for suffix in (".idx", ".bin", ".meta.json"):
            _beside(prefix, suffix).unlink(missing_ok=True)


def _check_sides(output: _Output) -> None:
    documents = {side: sum(p.documents[side] for p in output.parts) for side in SIDES}
    for side in output.sides:
        if not documents[side]:
            raise DataError(
                f"valid_fraction = {output.plan.valid_fraction} leaves no document for {side}: the sources hold"
                f" {sum(documents.values())}, and whole documents are held out; end more documents with the separator"
                " (chapters, articles), change the fraction, or name a validation file of its own in data.valid"
            )


def _merge(output: _Output, side: str, work: Path) -> Path:
    stem = work / f"merged.{side}"
    builder = IndexedDatasetBuilder(f"{stem}.bin.tmp", output.dtype)
    for part in output.parts:
        if part.documents[side]:
            builder.add_index(part.files(side))
    builder.finalize(f"{stem}.idx.tmp")
    return stem


def _write_text(path: Path, text: str, folder: Path | None = None) -> None:
    """Write `path` through a temporary file (in `folder`, on the same file system)."""
    temporary = (folder or path.parent) / f"{path.name}.tmp"
    temporary.write_text(text, encoding="utf-8")
    _rename(temporary, path)


def _rename(temporary: Path, final: Path) -> None:
    """Put a complete file under its final name, its content on disk before its name."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, final)


# Progress


class _Progress:
    """Logs every few seconds how far the sources are read (bytes as stored), and the time left."""

    def __init__(self, what: str, total: int) -> None:
        self.tokens = 0
        self._what = what
        self._total = max(total, 1)
        self._done = 0
        self._name = ""
        self._start = self._logged = time.monotonic()

    def start(self, source: Source) -> None:
        """A source begins."""
        self._name = source.path.name

    def finish(self, source: Source) -> None:
        """A source is complete."""
        self._done += source.size

    def at(self, position: int) -> None:
        """`position` bytes of the current source are read."""
        now = time.monotonic()
        if now - self._logged < _PROGRESS_SECONDS:
            return
        self._logged = now
        share = (self._done + position) / self._total
        left = (now - self._start) * (1 - share) / max(share, 1e-9)
        tokens = f", {self.tokens / 1e6:.1f} M tokens" if self.tokens else ""
        clock = f"{int(left // 60)}:{int(left % 60):02d}"
        log.info("%s %s: %.0f %%%s, about %s left", self._what, self._name, 100 * share, tokens, clock)
