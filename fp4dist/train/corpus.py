"""Raw text files as a stream of documents, without ever holding a whole file.

A source is a text file (`.txt`, `.text`, `.md`) or one JSON object a line (`.jsonl`, `.ndjson`), plain or packed with
bzip2, gzip or zstandard. In a text file a line that holds only the separator ends a document; without any separator the
file is one document. The newline before the separator (or before the end of the file) belongs to neither side.

Documents arrive as blocks of whole lines, so a 200 MB document costs no more memory than a 2 MB one. Everything that
can be wrong with a file is a DataError which names the file and the byte or the line.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, cast

from fp4dist.errors import DataError, DependencyError
from fp4dist.spec.load import config_root

END_OF_TEXT = "<|endoftext|>"
TEXT_SUFFIXES = (".txt", ".text", ".md")
JSONL_SUFFIXES = (".jsonl", ".ndjson")
PACKED_SUFFIXES = (".bz2", ".gz", ".zst")
BLOCK_CHARS = 1 << 16  # a block of a long document has at least so many characters
_READ_BYTES = 1 << 20
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Source:
    """A file on disk: `size` bytes (packed, if it is packed) with that SHA-256 in hexadecimal."""

    path: Path
    size: int
    sha256: str


@dataclass(frozen=True)
class Block:
    """Consecutive text of one document; a short document is a single block with `first` and `last`."""

    text: str
    first: bool
    last: bool
    held_out: bool = False  # the whole document belongs to the validation part


def find_file(name: str | Path) -> Path:
    """Resolve a relative path against the current folder, then against the shipped configs (wheel or checkout)."""
    path = Path(name).expanduser()
    if path.exists() or path.is_absolute():
        return path
    shipped = config_root() / (Path(*path.parts[1:]) if path.parts[:1] == ("configs",) else path)
    return shipped if shipped.exists() else path


def inspect_source(name: str | Path) -> Source:
    """Find a source and hash it; DataError when it is missing, a folder, empty or of an unknown kind."""
    path = find_file(name)
    if not path.is_file():
        what = "is not a file" if path.exists() else "does not exist"
        raise DataError(
            f"{name}: {what}; a source is a text or jsonl file, looked up from {Path.cwd()} and {config_root()}"
        )
    _kind(path)
    size = path.stat().st_size
    if size == 0:
        raise DataError(f"{path}: empty (0 bytes), a source needs at least one document; remove it or fetch it again")
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_READ_BYTES):
            digest.update(chunk)
    return Source(path, size, digest.hexdigest())


def read_blocks(
    source: Source,
    *,
    jsonl_key: str = "text",
    document_separator: str | None = END_OF_TEXT,
    valid_fraction: float = 0.0,
    progress: Callable[[int], None] | None = None,
) -> Iterator[Block]:
    """Stream the non-blank documents of `source` as blocks.

    valid_fraction  share of the documents to mark as held out. The hash of a document's text (of the first block, if it
                    is long) decides, so the choice depends neither on order nor on the other documents, copies of a
                    document share their side, and a larger share holds out a superset
    progress        called now and then with the bytes of the file (as stored) read so far
    raises          DataError: not UTF-8 (byte offset in the text), truncated or damaged packing, a jsonl line that is
                    not an object with a text under `jsonl_key` (line number), no document at all
    """
    path, found, held_out = source.path, False, False
    with _open_text_bytes(path) as (stream, position):
        lines = _decoded_lines(path, stream, position, progress)
        is_jsonl = _kind(path) == "jsonl"
        for block in _jsonl_blocks(path, lines, jsonl_key) if is_jsonl else _text_blocks(lines, document_separator):
            found = True
            if block.first:
                held_out = _is_held_out(block.text, valid_fraction)
            yield replace(block, held_out=held_out) if held_out else block
    if not found:
        raise DataError(f"{path}: holds no document, only blank text; remove it from the sources")


def _is_held_out(text: str, fraction: float) -> bool:
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def _kind(path: Path) -> str:
    """`text` or `jsonl`, by the suffix under the packing suffix."""
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in PACKED_SUFFIXES:
        suffixes.pop()
    suffix = suffixes[-1] if suffixes else ""
    if suffix in TEXT_SUFFIXES:
        return "text"
    if suffix in JSONL_SUFFIXES:
        return "jsonl"
    raise DataError(
        f"{path}: unknown kind of source {suffix or path.name!r}; use {', '.join(TEXT_SUFFIXES + JSONL_SUFFIXES)},"
        f" each plain or with {', '.join(PACKED_SUFFIXES)}"
    )


@contextmanager
def _open_text_bytes(path: Path) -> Iterator[tuple[BinaryIO, Callable[[], int]]]:
    """The unpacked bytes of `path`, and a function that tells how far the packed file was read."""
    packing = path.suffix.lower()
    with path.open("rb") as raw:
        if packing == ".bz2":
            unpacked: Any = bz2.BZ2File(raw)
        elif packing == ".gz":
            unpacked = gzip.GzipFile(fileobj=raw)
        elif packing == ".zst":
            unpacked = _ZstdFile(path, raw)
        else:
            unpacked = raw
        with io.BufferedReader(unpacked, _READ_BYTES) as stream:
            yield cast(BinaryIO, stream), raw.tell


class _ZstdFile(io.RawIOBase):
    """Unpack zstandard frames; unlike the package's own reader it notices that the last frame is cut off."""

    def __init__(self, path: Path, raw: BinaryIO) -> None:
        try:
            import zstandard  # optional: only .zst files need it
        except ImportError as e:
            raise DependencyError(
                f"{path}: reading .zst needs the package zstandard; run 'pip install zstandard',"
                " or repack the file as .gz or .bz2"
            ) from e
        self._raw = raw
        self._error: type[Exception] = zstandard.ZstdError
        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._frame: Any = None
        self._pending = b""

    def readable(self) -> bool:
        """This stream can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` with unpacked bytes; 0 at the end; EOFError when the file ends inside a frame."""
        while not self._pending:
            packed = self._raw.read(_READ_BYTES // 8)
            if not packed:
                if self._frame is not None:
                    raise EOFError("the file ends inside a zstandard frame")
                return 0
            self._pending = self._unpack(packed)
        count = min(len(buffer), len(self._pending))
        buffer[:count] = self._pending[:count]
        self._pending = self._pending[count:]
        return count

    def _unpack(self, packed: bytes) -> bytes:
        out = []
        while packed:
            self._frame = self._frame or self._new_frame()
            try:
                out.append(self._frame.decompress(packed))
            except self._error as e:
                raise OSError(str(e)) from e
            packed = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        return b"".join(out)


def _decoded_lines(
    path: Path, stream: BinaryIO, position: Callable[[], int], progress: Callable[[int], None] | None
) -> Iterator[str]:
    """Lines with their ends, decoded; reports progress about once a megabyte."""
    offset, reported = 0, 0
    for line in _lines(path, stream):
        if offset == 0 and line.startswith(_BOM):
            line, offset = line[len(_BOM) :], len(_BOM)
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as e:
            unpacked = " of the unpacked text" if path.suffix.lower() in PACKED_SUFFIXES else ""
            raise DataError(
                f"{path}: byte 0x{line[e.start]:02x} at offset {offset + e.start}{unpacked} is not UTF-8 ({e.reason});"
                " sources must be UTF-8: convert it, for example with 'iconv -f latin1 -t utf-8'"
            ) from e
        offset += len(line)
        if progress and offset - reported >= _READ_BYTES:
            reported = offset
            progress(position())


def _lines(path: Path, stream: BinaryIO) -> Iterator[bytes]:
    """Raw lines; what the unpackers raise becomes a DataError."""
    if path.suffix.lower() not in PACKED_SUFFIXES:
        yield from stream
        return
    file = f"{path}: its {path.stat().st_size} bytes"
    try:
        yield from stream
    except EOFError as e:
        raise DataError(f"{file} are truncated, ending inside the packed text ({e}); fetch the file again") from e
    except (OSError, zlib.error) as e:
        raise DataError(f"{file} cannot be unpacked as {path.suffix} ({e}); fetch the file again") from e


def _text_blocks(lines: Iterator[str], separator: str | None) -> Iterator[Block]:
    """Documents between separator lines, in blocks of at least BLOCK_CHARS but for the last of a document."""
    buffer: list[str] = []
    chars, first = 0, True
    for line in lines:
        if separator is not None and line.rstrip("\r\n") == separator:
            yield from _last_block(buffer, first)
            buffer, chars, first = [], 0, True
            continue
        # A full block leaves only when its document goes on, so that the last block always holds the final newline.
        if chars >= BLOCK_CHARS:
            yield Block("".join(buffer), first, last=False)
            buffer, chars, first = [], 0, False
        buffer.append(line)
        chars += len(line)
    yield from _last_block(buffer, first)


def _last_block(buffer: list[str], first: bool) -> Iterator[Block]:
    text = "".join(buffer)
    if first and not text.strip():
        return
    yield Block(text[:-2] if text.endswith("\r\n") else text.removesuffix("\n"), first, last=True)


def _jsonl_blocks(path: Path, lines: Iterator[str], key: str) -> Iterator[Block]:
    rule = f"a jsonl source has one JSON object a line with its text under {key!r}; set jsonl_key, or repair the file"
    for number, line in enumerate(lines, 1):
        place = f"{path}: line {number}:"
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as e:
            raise DataError(f"{place} not JSON ({e}); {rule}") from e
        if not isinstance(record, dict):
            raise DataError(f"{place} a {type(record).__name__}, not an object; {rule}")
        if key not in record:
            raise DataError(f"{place} no key {key!r}, only {', '.join(map(repr, list(record)[:8]))}; {rule}")
        text = record[key]
        if not isinstance(text, str):
            raise DataError(f"{place} {key!r} is a {type(text).__name__}, not a text; {rule}")
        if text.strip():
            yield Block(text, first=True, last=True)
