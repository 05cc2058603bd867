"""Megatron-core token files, read with suspicion before a run counts on them.

Megatron-core opens a truncated `.bin` without complaint and fails only when a late sample is read; it builds wrong
samples from an `.idx` that belongs to other data, and a token beyond the vocabulary is an out-of-range embedding row.
`check_token_files` finds these at the start and says which file, which value, which rule, and the way out.

    .idx    9 bytes magic, version u64 = 1, dtype code u8, sequences u64, document boundaries u64,
            lengths [sequences] i32, byte offsets [sequences] i64, boundaries [documents + 1] i64
    .bin    the tokens of all sequences

N sequences, D document boundaries. Megatron's GPT datasets sample sequences; prepare writes one a document.
"""

from __future__ import annotations

import hashlib
import logging
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)

from fp4dist.errors import ConfigError, DataError
from fp4dist.spec.run import RunConfig

log = logging.getLogger("fp4dist")
_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}  # 6 and 7 are floats
_FULL_SCAN_TOKENS = 200_000_000  # of all files together; above, evenly spaced chunks are read
_CHUNK_TOKENS = 1 << 22
SURPLUS = 0.005  # Megatron's mid_level_dataset_surplus: a blend's parts are built so much longer than their share


@dataclass(frozen=True)
class Blend:
    """Prefixes of token files, with weights or (None) in proportion to their samples."""

    prefixes: tuple[str, ...]
    weights: tuple[float, ...] | None = None


@dataclass(frozen=True)
class TokenIndex:
    """A checked `.idx`. lengths_N int32 tokens, offsets_N int64 bytes into the `.bin`."""

    prefix: str
    dtype: np.dtype[np.generic]
    lengths_N: np.ndarray
    offsets_N: np.ndarray
    sha256: str  # of the .idx file

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return int(self.lengths_N.sum(dtype=np.int64))

    def share_tokens(self, share: tuple[float, float]) -> int:
        """Tokens of the sequences that Megatron gives to a split with these bounds in [0, 1]."""
        begin, end = (round(bound * float(len(self.lengths_N))) for bound in share)
        return int(self.lengths_N[begin:end].sum(dtype=np.int64))


def parse_blend(key: str, entries: Sequence[str]) -> Blend:
    """Read `[prefix, ...]` or `[weight, prefix, weight, prefix, ...]` as Megatron does, but refuse a mixture."""
    numbers = [_number(entry) for entry in entries]
    if len(entries) % 2 or any(n is None for n in numbers[::2]):
        if len(entries) > 1 and any(n is not None for n in numbers):
            raise ConfigError(f"{key} = {list(entries)}: give either prefixes only, or a weight before each prefix")
        return Blend(tuple(entries))
    weights = [n for n in numbers[::2] if n is not None]
    if not all(w > 0 and math.isfinite(w) for w in weights):
        raise ConfigError(f"{key}: weights {weights} must be positive; leave out what shall not be used")
    return Blend(tuple(entries[1::2]), tuple(weights) if len(weights) > 1 else None)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


@dataclass(frozen=True)
class TokenSide:
    """The training or the validation part of a run: which share of the sequences of which files."""

    key: str  # for messages: where the configuration names it
    blend: Blend
    indexes: tuple[TokenIndex, ...]
    share: tuple[float, float]

    def tokens(self) -> list[int]:
        """Tokens of each prefix."""
        return [index.share_tokens(self.share) for index in self.indexes]

    def samples(self, seq_length: int) -> list[int]:
        """Samples of each prefix in one epoch; a sample reads one token more than it feeds to the model."""
        return [max(0, (tokens - 1) // seq_length) for tokens in self.tokens()]

    def weights(self, seq_length: int) -> list[float] | None:
        """Share of each prefix (sum 1); None for a single one."""
        if len(self.blend.prefixes) == 1:
            return None
        raw = self.blend.weights or self.samples(seq_length)
        return [float(w) / sum(raw) for w in raw]


def check_token_files(config: RunConfig) -> None:
    """Raise DataError or ConfigError when the data of a run cannot be trained on; every rank may call it, no talk.

    Checks that each prefix has an intact .bin and .idx that fit together, that token ids are below model.vocab_size
    (all of up to 200 M tokens, else evenly spaced chunks, as the log then says), that each training prefix gives at
    least one sample, and that the validation part gives train.eval_samples samples without repeating any.
    """
    train, valid = token_sides(config)
    indexes = {index.prefix: index for side in (train, valid) if side for index in side.indexes}
    _check_vocabulary(list(indexes.values()), config.model.vocab_size)
    check_sample_counts(train, valid, config)


def check_sample_counts(train: TokenSide, valid: TokenSide | None, config: RunConfig) -> None:
    """Raise DataError when a part is too short; Megatron would repeat it silently, or never return when it is empty."""
    _check_train(train, config.model.seq_length)
    if valid is not None:
        _check_valid(valid, config)


def token_sides(config: RunConfig) -> tuple[TokenSide, TokenSide | None]:
    """The checked files of the training and the validation part (None without evaluation samples)."""
    train_blend = parse_blend("data.train", config.data.train)
    train_indexes = tuple(read_index(prefix) for prefix in train_blend.prefixes)
    wanted = config.train.eval_samples > 0
    if config.data.valid:
        blend = parse_blend("data.valid", config.data.valid)
        valid = TokenSide("data.valid", blend, tuple(read_index(p) for p in blend.prefixes), (0.0, 1.0))
        return TokenSide("data.train", train_blend, train_indexes, (0.0, 1.0)), valid if wanted else None
    train_share, valid_share = split_shares(config.data.split)
    train = TokenSide("data.train", train_blend, train_indexes, train_share)
    key = f"data.split = {config.data.split!r} of data.train"
    return train, TokenSide(key, train_blend, train_indexes, valid_share) if wanted else None


def split_shares(split: str) -> tuple[tuple[float, float], tuple[float, float]]:
    """Megatron's bounds in [0, 1] of the training and the validation part, in that order of the sequences."""
    if not any(float(share) for share in split.split(",")):
        raise ConfigError(f"data.split = {split!r}: all shares are 0; give the training part a share")
    train, valid, _ = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))
    return train or (0.0, 0.0), valid or (0.0, 0.0)


def read_index(prefix: str) -> TokenIndex:
    """Read and check `<prefix>.idx` against `<prefix>.bin`; DataError names what is missing, damaged or too short."""
    idx, tokens = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    for path in (idx, tokens):
        if not path.is_file():
            raise DataError(f"{path}: no such file; {_missing_hint(prefix)}")
        if path.stat().st_size == 0:
            raise DataError(f"{path}: empty (0 bytes); prepare or copy the data again")
    index = _parse_index(prefix, np.memmap(idx, dtype=np.uint8, mode="r"))
    _check_bin(index, tokens)
    return index


def _missing_hint(prefix: str) -> str:
    for suffix in (".bin", ".idx"):
        if prefix.endswith(suffix):
            return f"a prefix is written without {suffix}: {prefix.removesuffix(suffix)!r}"
    return "name the prefix of a .bin/.idx pair, make one with tools/prepare_data.py, or set data.prepare"


def _parse_index(prefix: str, raw_B: np.ndarray) -> TokenIndex:
    def damaged(found: str, rule: str) -> DataError:
        return DataError(f"{prefix}.idx: {found}, but {rule}; it is damaged or no Megatron-core index: copy it again")

    if len(raw_B) < _HEADER.size:
        raise damaged(f"{len(raw_B)} bytes", f"the header alone has {_HEADER.size}")
    magic, version, code, sequences, boundaries = _HEADER.unpack(raw_B[: _HEADER.size].tobytes())
    if magic != _MAGIC:
        raise damaged(f"begins with {magic!r}", f"an index begins with {_MAGIC!r}")
    if version != 1:
        raise damaged(f"version {version}", "Megatron-core reads version 1")
    if code not in _DTYPES:
        raise damaged(f"dtype code {code}", f"token ids are integers, codes {sorted(_DTYPES)}")
    size = _HEADER.size + sequences * 12 + boundaries * 8
    if len(raw_B) not in (size, size + sequences):  # multimodal indices add a byte a sequence
        raise damaged(f"{len(raw_B)} bytes", f"{sequences} sequences and {boundaries} document boundaries need {size}")
    lengths_N = raw_B[_HEADER.size :][: sequences * 4].view(np.int32)
    offsets_N = raw_B[_HEADER.size + sequences * 4 :][: sequences * 8].view(np.int64)
    bounds_D = raw_B[_HEADER.size + sequences * 12 :][: boundaries * 8].view(np.int64)
    if not boundaries or bounds_D[0] != 0 or bounds_D[-1] != sequences or np.any(np.diff(bounds_D) < 0):
        raise damaged("document boundaries that do not rise", f"they go from 0 to {sequences}, the number of sequences")
    if sequences and (lengths_N.min() < 0 or offsets_N.min() < 0):
        raise damaged("a negative length or offset", "both count from 0")
    if not sequences or not lengths_N.any():
        raise DataError(f"{prefix}.idx: lists no tokens in {sequences} sequences; prepare the data again from text")
    return TokenIndex(prefix, np.dtype(_DTYPES[code]), lengths_N, offsets_N, hashlib.sha256(raw_B.data).hexdigest())


def _check_bin(index: TokenIndex, tokens: Path) -> None:
    ends_N = index.offsets_N + index.lengths_N.astype(np.int64) * index.dtype.itemsize
    needed, found = int(ends_N.max()), tokens.stat().st_size
    if found < needed:
        lost = int(np.count_nonzero(ends_N > found))
        raise DataError(
            f"{tokens}: truncated: {found} bytes, but {index.prefix}.idx describes {needed} ({lost} of {len(ends_N)}"
            " sequences are cut off or missing); copy it again, or prepare the data again"
        )
    if found > needed:
        log.warning("%s: %d bytes, but its index describes only %d; do the two belong together?", tokens, found, needed)


def _check_vocabulary(indexes: Sequence[TokenIndex], vocab_size: int) -> None:
    total = sum(index.tokens for index in indexes)
    if total > _FULL_SCAN_TOKENS:
        share = _FULL_SCAN_TOKENS / total
        log.info("vocabulary check: %.3g of %.3g tokens (evenly spaced chunks)", _FULL_SCAN_TOKENS, total)
    else:
        share = 1.0
    for index in indexes:
        _scan(index, math.ceil(index.tokens * share / _CHUNK_TOKENS), vocab_size)


def _scan(index: TokenIndex, num_chunks: int, vocab_size: int) -> None:
    """Look for ids outside [0, vocab_size) in so many of the file's chunks, evenly spaced."""
    path = Path(f"{index.prefix}.bin")
    tokens_T: Any = np.memmap(path, dtype=index.dtype, mode="r", shape=path.stat().st_size // index.dtype.itemsize)
    all_chunks = math.ceil(len(tokens_T) / _CHUNK_TOKENS)
    for chunk in np.linspace(0, all_chunks - 1, min(num_chunks, all_chunks)).round().astype(np.int64):
        start = int(chunk) * _CHUNK_TOKENS
        part_T = tokens_T[start : start + _CHUNK_TOKENS]
        if part_T.min() >= 0 and part_T.max() < vocab_size:
            continue
        at = start + int(np.argmax((part_T < 0) | (part_T >= vocab_size)))
        document = int(np.searchsorted(index.offsets_N, at * index.dtype.itemsize, side="right")) - 1
        raise DataError(
            f"{path}: token id {int(tokens_T[at])} (token {at}, in sequence {document}) is not in"
            f" [0, model.vocab_size = {vocab_size}); set model.vocab_size to that of the tokenizer which made the file"
            f" (at least {int(part_T.max()) + 1}), or prepare the data with the model's tokenizer"
        )


def _check_train(side: TokenSide, seq_length: int) -> None:
    for index, tokens, samples in zip(side.indexes, side.tokens(), side.samples(seq_length), strict=True):
        if samples < 1:
            raise DataError(
                f"{side.key}: {index.prefix} gives {tokens} tokens to training, less than one sample of"
                f" model.seq_length + 1 = {seq_length + 1}; use more text or a smaller model.seq_length"
            )


def _check_valid(side: TokenSide, config: RunConfig) -> None:
    wanted, seq_length = config.train.eval_samples, config.model.seq_length
    samples = side.samples(seq_length)
    weights = (side.weights(seq_length) if any(samples) else None) or [1.0] * len(samples)
    surplus = SURPLUS if len(samples) > 1 else 0.0
    for index, tokens, have, weight in zip(side.indexes, side.tokens(), samples, weights, strict=True):
        need = math.ceil(math.ceil(wanted * weight) * (1 + surplus))
        if have >= need:
            continue
        most = math.floor(math.floor(have / (1 + surplus)) / weight)
        ways = [f"set train.eval_samples to at most {most}"] if most else []
        if side.key != "data.valid":
            ways.append(f"give data.split a larger middle share (it cuts between the {len(index.lengths_N)} documents)")
        ways.append("name more validation text in data.valid")
        raise DataError(
            f"{side.key}: {index.prefix} gives {tokens} tokens = {have} samples of model.seq_length = {seq_length} to"
            f" validation, but train.eval_samples = {wanted} takes {need} from it; {', or '.join(ways)}"
        )
