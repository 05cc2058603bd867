"""A `tokenizers` vocabulary for preparing text: trained here or loaded, always without touching the text.

`TextTokenizer` encodes text as it is: no special tokens are added, a special token spelled out inside a document is
ordinary text, and the end-of-text id marks the end of each document alone.

Long documents are cut into pieces so that they fit into memory and fill all threads. A cut must not change a token, so
a place is tried (between a letter and the space before a word, or after a line end), and taken when the tokenizer gives
the same ids for the text around it with and without the cut. Where no place passes, the text stays whole.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from fp4dist.errors import DataError
from fp4dist.train.corpus import Block

PIECE_CHARS = 1 << 15
_CUT = re.compile(r"(?<=\w)(?= \w)|(?<=\S\n)(?=\w)")
_CONTEXT_CHARS = 128  # checked on each side of a cut
_CUT_ATTEMPTS = 32  # places tried in one stretch of text


@dataclass(frozen=True)
class TextTokenizer:
    """A vocabulary with the id that ends a document; `vocab_size` is one more than the largest id."""

    tokenizer: Tokenizer
    text: str  # the JSON
    vocab_size: int
    eot_id: int
    eot_token: str

    @property
    def sha256(self) -> str:
        """Of the JSON, in hexadecimal."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Ids of each text, [n] int32, on all threads."""
        encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(e.ids, dtype=np.int32) for e in encodings]

    def pieces(self, blocks: Iterable[Block]) -> Iterator[Block]:
        """Cut blocks into pieces of about PIECE_CHARS that encode as the uncut documents do."""
        rest, searched, first = "", 0, True
        for block in blocks:
            if block.first:
                rest, searched, first = "", 0, True
            rest, start = rest + block.text, 0
            while len(rest) - start > PIECE_CHARS:
                stop = len(rest) - (0 if block.last else _CONTEXT_CHARS)
                cut, searched = self._find_cut(rest, max(searched, start + PIECE_CHARS), stop)
                if cut is None:
                    break
                yield replace(block, text=rest[start:cut], first=first, last=False)
                start, first = cut, False
            rest, searched = rest[start:], max(0, searched - start)
            if block.last:
                yield replace(block, text=rest, first=first)

    def _find_cut(self, text: str, start: int, stop: int) -> tuple[int | None, int]:
        """The first harmless cut in text[start:stop], and up to where the text was searched."""
        for attempt, match in enumerate(_CUT.finditer(text, start, stop)):
            if attempt == _CUT_ATTEMPTS:
                return None, match.start()
            if self._harmless(text, match.start()):
                return match.start(), match.start()
        return None, max(start, stop)

    def _harmless(self, text: str, cut: int) -> bool:
        left, right = text[max(0, cut - _CONTEXT_CHARS) : cut], text[cut : cut + _CONTEXT_CHARS]
        whole, a, b = self.tokenizer.encode_batch_fast([left + right, left, right], add_special_tokens=False)
        return whole.ids == a.ids + b.ids


def train_bpe(texts: Iterable[str], vocab_size: int, eot_token: str) -> TextTokenizer:
    """Train a byte-level BPE of `vocab_size` >= 257 whose id 0 is `eot_token`; on little text it comes out smaller."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[eot_token],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return parse_tokenizer(tokenizer.to_str(), f"the BPE trained with vocab_size = {vocab_size}", eot_token)


def hash_tokenizer(path: Path) -> str:
    """SHA-256 of the JSON, as `TextTokenizer.sha256`, without building the tokenizer."""
    _check_exists(path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load_tokenizer(path: Path, eot_token: str) -> TextTokenizer:
    """Read a `tokenizers` JSON; DataError when it is missing, something else, or lacks `eot_token`."""
    _check_exists(path)
    try:
        return parse_tokenizer(path.read_text(encoding="utf-8"), str(path), eot_token)
    except UnicodeDecodeError as e:
        raise DataError(f"{path}: not a tokenizers JSON: {e}; name a file such as tokenizer.json") from e


def parse_tokenizer(text: str, place: str, eot_token: str) -> TextTokenizer:
    """Build a TextTokenizer from the JSON `text`; `place` names it in errors."""
    ids = _vocabulary(text, place)
    if eot_token not in ids:
        raise DataError(
            f"{place}: has no token {eot_token!r} to end documents with;"
            f" set eot_token to one of its special tokens: {', '.join(_special_tokens(text)) or '(it has none)'}"
        )
    tokenizer = Tokenizer.from_str(text)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # `<|endoftext|>` inside a document is text, not its end
    return TextTokenizer(tokenizer, text, max(ids.values()) + 1, ids[eot_token], eot_token)


def _check_exists(path: Path) -> None:
    if not path.is_file():
        raise DataError(f"{path}: no such file; name a JSON of the tokenizers library, or no tokenizer to train one")


def _vocabulary(text: str, place: str) -> dict[str, int]:
    """Token -> id of a tokenizers JSON, added tokens included."""
    try:
        data: Any = json.loads(text)
    except json.JSONDecodeError as e:
        raise DataError(f"{place}: not JSON ({e}); expected a file written by the tokenizers library") from e
    if not isinstance(data, dict) or not isinstance(data.get("model"), dict) or "added_tokens" not in data:
        raise DataError(f"{place}: no 'model' or 'added_tokens'; expected a file written by the tokenizers library")
    return Tokenizer.from_str(text).get_vocab(with_added_tokens=True)


def _special_tokens(text: str) -> list[str]:
    return [repr(t["content"]) for t in json.loads(text)["added_tokens"] if t.get("special")][:16]
