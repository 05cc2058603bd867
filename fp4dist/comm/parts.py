"""Vectors in parts, cut into records, and the two operations on them: encode, and sum what several ranks sent.

A part is any contiguous run of memory: a bucket's slice, one of several runs that lie apart (the rack-major order of a
two-level reduction), a tensor of its own. Parts are read and written where they lie; nothing is gathered first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from fp4dist.comm import codec as c
from fp4dist.comm import records as r
from fp4dist.comm.codec import Noise
from fp4dist.errors import WireError
from fp4dist.kernels.triton import wire as kernels
from fp4dist.kernels.wire import wire_kernels
from fp4dist.spec.wire import Wire

Runs = tuple[tuple[int, int], ...]  # [first, last) of records, several times
_NONE_WRONG = 2**31 - 1
_TABLES = 4096  # layouts kept: a few for each piece of each bucket of a run
_VECTOR = 16  # bytes that a thread of a kernel reads at once


@dataclass(frozen=True, slots=True)
class Parts:
    """Flat tensors of one dtype and device, each cut into records of `chunk` elements; the last of each is padded.

    first   number of the first record, for the noise: a message's place among those of its collective
    """

    tensors: tuple[Tensor, ...]
    wire: Wire
    chunk: int
    first: int = 0

    @classmethod
    def of(cls, tensors: Sequence[Tensor], wire: Wire, chunk: int | None = None, first: int = 0) -> Parts:
        """Of tensors in any shape that are contiguous; ValueError for others, and for dtypes but bf16 and fp32."""
        for t in tensors:
            if t.dtype not in (torch.bfloat16, torch.float32) or t.dtype != tensors[0].dtype:
                raise ValueError(f"a message holds bf16 or fp32 tensors, all of one type; got {t.dtype}")
            if not t.is_contiguous():
                raise ValueError(f"a part must be contiguous, got shape {list(t.shape)} with strides {t.stride()}")
        length = chunk or wire.chunk_of(max((t.numel() for t in tensors), default=0))
        return cls(tuple(t.detach().reshape(-1) for t in tensors), wire, length, first)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Elements of each part."""
        return tuple(t.numel() for t in self.tensors)

    @property
    def numel(self) -> int:
        """Elements of all parts."""
        return sum(self.sizes)

    @property
    def records(self) -> int:
        """Records of all parts; of a plain wire the elements, which travel one by one."""
        if self.wire.plain:
            return self.numel
        return sum(-(-n // self.chunk) for n in self.sizes)

    @property
    def unit(self) -> int:
        """Bytes of a record."""
        return self.wire.bytes_of(1) if self.wire.plain else self.wire.record_bytes(self.chunk)

    @property
    def bytes(self) -> int:
        """Bytes of the message."""
        return self.records * self.unit


def encode_parts(
    parts: Parts, noise: Noise, rank: int, runs: Runs | None = None, out: Tensor | None = None, sms: int | None = None
) -> Tensor:
    """Message of `parts` as uint8, in their order; of the records in `runs` alone, in that order, if given.

    rank   the sender, among all ranks of the job;  out   where the bytes go;  sms   multiprocessors to use at most
    """
    chosen = ((0, parts.records),) if runs is None else runs
    number = sum(last - first for first, last in chosen)
    if out is None:
        device = parts.tensors[0].device if parts.tensors else torch.device("cpu")
        out = torch.empty(number * parts.unit, dtype=torch.uint8, device=device)
    if number == 0:
        return out
    if parts.wire.plain:
        _copy_plain(parts, chosen, out)
    elif out.is_cuda:
        base, offsets = _placed(parts.tensors)
        shared, sign_rank = _shared(parts, noise, rank, sms), noise.sign_rank(parts.wire, rank)
        tables = _tables(parts.sizes, offsets, None, parts.chunk, parts.first, chosen, _even(base), out.device)
        for table, aligned in tables:
            wire_kernels(out.device).encode(base, table, out.view(number, parts.unit), shared, sign_rank, aligned)
    else:
        index = _index(chosen)
        counts = torch.from_numpy(_counts(parts.sizes, parts.chunk)[index])
        rows = _rows(parts)[torch.from_numpy(index)]
        numbers = torch.from_numpy(index) + parts.first
        out.view(number, parts.unit).copy_(c.encode_rows(rows, counts, numbers, parts.wire, noise, rank))
    return out


def decode_parts(
    parts: Parts,
    messages: Tensor,
    noise: Noise,
    ranks: Sequence[int],
    own: Parts | None = None,
    factor: float = 1.0,
    runs: Runs | None = None,
    check: bool = False,
    place: str = "",
    sms: int | None = None,
    own_at: int | None = None,
) -> Tensor | None:
    """Write (own + the sum of `messages`) * factor into `parts`, in fp32; of the records in `runs` alone, if given.

    messages   [senders, bytes] uint8 of the senders `ranks`, whose numbers among all ranks of the job decide signs
    own        a contribution that was not coded, with the sizes of `parts`; added last, or, of plain wires, as sender
               number `own_at`
    check      verify headers and tags; raises WireError for `place` at once on a CPU. On a GPU returns what
               `raise_if_wrong` needs after the kernel
    """
    chosen = ((0, parts.records),) if runs is None else runs
    number = sum(last - first for first, last in chosen)
    if number == 0:
        return None
    if parts.wire.plain:
        add = _sum_plain_on_gpu if messages.is_cuda else _sum_plain
        add(parts, messages, own, factor, chosen, own_at)
        return None
    records = messages.reshape(len(messages), number, parts.unit)
    if messages.is_cuda:
        return _decode_on_gpu(parts, records, noise, ranks, own, factor, chosen, check, sms)
    index = _index(chosen)
    counts = torch.from_numpy(_counts(parts.sizes, parts.chunk)[index])
    if check:
        for sender, rank in zip(records, ranks, strict=True):
            r.check(sender, counts, parts.chunk, parts.wire, f"{place} from rank {rank}")
    total = c.decode_rows(records, parts.chunk, parts.wire, noise, list(ranks))
    if own is not None:
        total = total + _rows(own)[torch.from_numpy(index)]
    _scatter(parts, total * factor, index, counts)
    return None


def recode_parts(
    parts: Parts, messages: Tensor, noise: Noise, ranks: Sequence[int], own: Parts, factor: float, runs: Runs,
    after: Noise, rank: int, check: bool, sms: int | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """On a GPU: what `encode_parts` would make of what `decode_parts` would write to `parts` in fp32, in one pass.

    after, rank   noise and sender of the new records, of the same wire and chunk. Returns them and the check's finding
    """
    number = sum(last - first for first, last in runs)
    records = messages.reshape(len(messages), number, parts.unit)
    out = torch.empty(number * parts.unit, dtype=torch.uint8, device=records.device)
    base, offsets = _placed(own.tensors)
    keyed = tuple(noise.sign_rank(parts.wire, sender) for sender in ranks)
    bad = torch.full((), _NONE_WRONG, dtype=torch.int32, device=records.device) if check else None
    for table, aligned in _recode_tables(own.sizes, offsets, parts.chunk, runs, _even(base), records.device):
        wire_kernels(records.device).recode(
            out.view(number, parts.unit), base, records, table, _shared(parts, noise, 0, sms),
            _shared(parts, after, rank, sms), _on_device(keyed, records.device), factor,
            after.sign_rank(parts.wire, rank), aligned, bad,
        )  # fmt: skip
    return out, bad


def raise_if_wrong(bad: Tensor, parts: Parts, messages: Tensor, ranks: Sequence[int], place: str, runs: Runs) -> None:
    """Wait for a GPU's check and raise the WireError that it found."""
    found = int(bad)
    if found == _NONE_WRONG:
        return
    index = _index(runs)
    number = len(index)
    counts = torch.from_numpy(_counts(parts.sizes, parts.chunk)[index])
    sender = messages.reshape(len(messages), number, parts.unit)[found // number].cpu()
    r.check(sender, counts, parts.chunk, parts.wire, f"{place} from rank {ranks[found // number]}")
    raise WireError(f"{place} from rank {ranks[found // number]}, record {found % number}: wrong on the device alone")


def _decode_on_gpu(
    parts: Parts, records: Tensor, noise: Noise, ranks: Sequence[int], own: Parts | None, factor: float, runs: Runs,
    check: bool, sms: int | None,
) -> Tensor | None:  # fmt: skip
    base, offsets = _placed(parts.tensors)
    mine, own_offsets = (None, None) if own is None else _placed(own.tensors)
    even = _even(base) and (mine is None or _even(mine))
    keyed = tuple(noise.sign_rank(parts.wire, rank) for rank in ranks)
    bad = torch.full((), _NONE_WRONG, dtype=torch.int32, device=records.device) if check else None
    for table, aligned in _tables(parts.sizes, offsets, own_offsets, parts.chunk, 0, runs, even, records.device):
        wire_kernels(records.device).accumulate(
            base, mine, records, table, _shared(parts, noise, 0, sms), _on_device(keyed, records.device), factor,
            aligned, bad,
        )  # fmt: skip
    return bad


def _shared(parts: Parts, noise: Noise, rank: int, sms: int | None) -> kernels.Codec:
    return kernels.Codec(
        parts.wire, parts.chunk, r.first_word(parts.wire), noise.key(rank, c.ROUNDING), noise.key(0, c.SIGNS), sms
    )


def rooms(sizes: Sequence[int], device: torch.device) -> list[Tensor]:
    """Empty fp32 vectors of these sizes, in one allocation: where they lie to each other is the same in every step, so
    tables that are kept by it serve again. Each begins where a kernel can read vectors.
    """
    starts = np.cumsum([0, *(-(-n // kernels.UNIT) * kernels.UNIT for n in sizes)]).tolist()
    flat = torch.empty(starts[-1], device=device)
    return [flat[start : start + n] for start, n in zip(starts, sizes, strict=False)]


def _placed(tensors: Sequence[Tensor]) -> tuple[Tensor, tuple[int, ...]]:
    """(the tensor that lies first, offsets of all from it in elements)."""
    filled = [t for t in tensors if t.numel()]
    base = min(filled, key=lambda t: t.data_ptr())
    start, size = base.data_ptr(), base.element_size()
    return base, tuple((t.data_ptr() - start) // size if t.numel() else 0 for t in tensors)


@lru_cache(maxsize=_TABLES)
def _tables(
    sizes: tuple[int, ...], offsets: tuple[int, ...], other: tuple[int, ...] | None, chunk: int, first: int,
    runs: Runs, even: bool, device: torch.device,
) -> tuple[tuple[Tensor, bool], ...]:  # fmt: skip
    """[m, 4] int64 of the records in `runs`: first element, elements, number or first in `other`, place in the message;
    and whether those count units: of the records that begin and end at multiples of a unit, and of the others, apart.
    """
    index = _index(runs)
    start, part = _starts(sizes, chunk)
    where = np.asarray(offsets, dtype=np.int64)[part] + start
    last = np.arange(first, first + len(start)) if other is None else np.asarray(other, dtype=np.int64)[part] + start
    counts = _counts(sizes, chunk)
    table = np.stack((where[index], counts[index], last[index], np.arange(len(index))), axis=1)
    columns = [0, 1] if other is None else [0, 1, 2]
    return _halves(table, columns, even, device)


def _even(base: Tensor) -> bool:
    return base.data_ptr() % _VECTOR == 0


@lru_cache(maxsize=256)
def _on_device(values: tuple[int, ...], device: torch.device) -> Tensor:
    unlike = len(set(values)) > 1
    return torch.tensor(values if unlike else values[:1], dtype=torch.int32).to(device)


def _index(runs: Runs) -> np.ndarray:
    return np.concatenate([np.arange(first, last) for first, last in runs] or [np.arange(0)])


def _starts(sizes: Sequence[int], chunk: int) -> tuple[np.ndarray, np.ndarray]:
    """For each record: its first element in its part, and which part."""
    numbers = [-(-n // chunk) for n in sizes]
    start = np.concatenate([np.arange(n, dtype=np.int64) * chunk for n in numbers])
    return start, np.repeat(np.arange(len(sizes)), numbers)


def _counts(sizes: Sequence[int], chunk: int) -> np.ndarray:
    """Int64 elements of each record that are not padding."""
    start, part = _starts(sizes, chunk)
    return np.minimum(np.asarray(sizes, dtype=np.int64)[part] - start, chunk)


def _rows(parts: Parts) -> Tensor:
    """[records, chunk] fp32, zero beyond each part's end."""
    padded = [torch.nn.functional.pad(t.to(torch.float32), (0, -t.numel() % parts.chunk)) for t in parts.tensors]
    return torch.cat(padded).view(-1, parts.chunk)


def _scatter(parts: Parts, rows: Tensor, index: np.ndarray, counts: Tensor) -> None:
    """Rows [m, chunk] -> the records `index` of `parts`."""
    start, part = _starts(parts.sizes, parts.chunk)
    for row, i, count in zip(rows, index.tolist(), counts.tolist(), strict=True):
        at = int(start[i])
        parts.tensors[int(part[i])][at : at + count].copy_(row[:count])


def _pieces(parts: Parts, runs: Runs) -> list[Tensor]:
    """Views of the elements in `runs`, which of a plain wire count elements."""
    found: list[Tensor] = []
    ends = np.cumsum([0, *parts.sizes]).tolist()
    for first, last in runs:
        for t, begin, end in zip(parts.tensors, ends, ends[1:], strict=False):
            low, high = max(first, begin), min(last, end)
            if low < high:
                found.append(t[low - begin : high - begin])
    return found


def _copy_plain(parts: Parts, runs: Runs, out: Tensor) -> None:
    """The elements themselves, in the wire's type."""
    typed = out.view(torch.bfloat16 if parts.wire.kind == "bf16" else torch.float32)
    at = 0
    for piece in _pieces(parts, runs):
        typed[at : at + piece.numel()].copy_(piece)
        at += piece.numel()


def _sum_plain(
    parts: Parts, messages: Tensor, own: Parts | None, factor: float, runs: Runs, own_at: int | None
) -> None:  # fmt: skip
    """Sums in fp32, in the order of ranks."""
    typed = messages.view(torch.bfloat16 if parts.wire.kind == "bf16" else torch.float32)
    mine = [] if own is None else _pieces(own, runs)
    at = 0
    for i, piece in enumerate(_pieces(parts, runs)):
        terms = [sender[at : at + piece.numel()] for sender in typed]
        if own is not None:
            terms.insert(len(terms) if own_at is None else own_at, mine[i])
        total = terms[0].to(torch.float32)
        for term in terms[1:]:
            total = total + term
        piece.copy_(total if factor == 1.0 else total * factor)
        at += piece.numel()


def _sum_plain_on_gpu(
    parts: Parts, messages: Tensor, own: Parts | None, factor: float, runs: Runs, own_at: int | None
) -> None:  # fmt: skip
    """`_sum_plain` in one pass."""
    typed = messages.view(torch.bfloat16 if parts.wire.kind == "bf16" else torch.float32)
    pieces = _pieces(parts, runs)
    base, offsets = _placed(pieces)
    mine, others = (None, None) if own is None else _placed(_pieces(own, runs))
    rows = typed.shape[1] * typed.element_size() % _VECTOR == 0
    even = rows and all(_even(t) for t in (base, mine, typed) if t is not None)
    sizes = tuple(t.numel() for t in pieces)
    for table, aligned in _plain_tables(sizes, offsets, others, even, messages.device):
        place = len(typed) if own_at is None else own_at
        wire_kernels(messages.device).sum_plain(base, mine, typed, table, place, factor, aligned)


@lru_cache(maxsize=_TABLES)
def _plain_tables(
    sizes: tuple[int, ...], offsets: tuple[int, ...], others: tuple[int, ...] | None, even: bool, device: torch.device
) -> tuple[tuple[Tensor, bool], ...]:
    """As `_tables`: first element, elements, first in own, first in the message, of runs of kernels.PLAIN elements."""
    start, part = _starts(sizes, kernels.PLAIN)
    firsts = np.cumsum([0, *sizes[:-1]], dtype=np.int64)
    columns = [np.asarray(c, dtype=np.int64)[part] + start for c in (offsets, others or offsets, firsts)]
    table = np.stack((columns[0], _counts(sizes, kernels.PLAIN), columns[1], columns[2]), axis=1)
    return _halves(table, [0, 1, 2, 3], even, device)


@lru_cache(maxsize=_TABLES)
def _recode_tables(
    sizes: tuple[int, ...], own: tuple[int, ...], chunk: int, runs: Runs, even: bool, device: torch.device
) -> tuple[tuple[Tensor, bool], ...]:
    """As `_tables`: number of the record, elements, first element in own, place in the message."""
    index = _index(runs)
    start, part = _starts(sizes, chunk)
    where = np.asarray(own, dtype=np.int64)[part] + start
    table = np.stack((index, _counts(sizes, chunk)[index], where[index], np.arange(len(index))), axis=1)
    return _halves(table, [1, 2], even, device)


def _halves(
    table: np.ndarray, columns: list[int], even: bool, device: torch.device
) -> tuple[tuple[Tensor, bool], ...]:  # fmt: skip
    """The rows whose `columns` are multiples of a unit, in units, and the others; those that are not empty."""
    fits = (table[:, columns] % kernels.UNIT == 0).all(axis=1) & even
    in_units = table[fits]
    in_units[:, columns] //= kernels.UNIT
    both = ((in_units, True), (table[~fits], False))
    return tuple((torch.from_numpy(np.ascontiguousarray(t)).to(device), aligned) for t, aligned in both if len(t))
