"""Who sends which bytes: against an owner computed element by element."""

from __future__ import annotations

import math
import random

import pytest

from fp4dist.megatron.gather_layout import GLOBAL_SCALE_BYTES, Extent, GatherLayout


def layouts(seed: int) -> GatherLayout:
    """Parameters of odd sizes at Megatron's alignment, so that slices cut rows, blocks and even bytes."""
    rng = random.Random(seed)
    extents, at = [], 0
    for _ in range(rng.randint(1, 6)):
        block = rng.choice([None, (16, 16), (1, 16), (1, 32)])
        rows, columns = 16 * rng.randint(1, 6), 32 * rng.randint(1, 4)
        extents.append(Extent(at, rows, columns, block))
        at = math.ceil(extents[-1].end / 64) * 64
    ranks = rng.choice([2, 3, 5, 8, 48])
    return GatherLayout(tuple(extents), math.ceil(at / math.lcm(ranks, 128)) * math.lcm(ranks, 128), 2, ranks)


@pytest.mark.parametrize("seed", range(24))
def test_every_byte_comes_once_from_the_rank_that_holds_the_first_element_of_its_block_row(seed: int) -> None:
    layout = layouts(seed)
    shard = layout.numel // layout.ranks
    found: dict[tuple[int, str, int], int] = {}
    for piece in layout.pieces:
        for byte in range(piece.at, piece.at + piece.size):
            assert (piece.extent, piece.kind, byte) not in found
            found[piece.extent, piece.kind, byte] = piece.rank
    expected: dict[tuple[int, str, int], int] = {}
    for index, extent in enumerate(layout.extents):
        for element in range(extent.rows * extent.columns):
            if extent.block is None:
                for byte in (2 * element, 2 * element + 1):
                    expected[index, "raw", byte] = (extent.start + element) // shard
                continue
            row, column = divmod(element, extent.columns)
            block_row = row // extent.block[0]
            owner = (extent.start + block_row * extent.block[0] * extent.columns) // shard
            expected[index, "codes", element // 2] = owner
            scale = block_row * (extent.columns // extent.block[1]) + column // extent.block[1]
            expected[index, "scales", scale] = owner
            if element == 0:
                expected |= {(index, "global_scale", byte): owner for byte in range(GLOBAL_SCALE_BYTES)}
    assert found == expected


@pytest.mark.parametrize("seed", range(24))
def test_owners_get_exactly_the_elements_of_their_block_rows_that_lie_in_later_slices(seed: int) -> None:
    layout = layouts(seed)
    shard = layout.numel // layout.ranks
    expected = {}
    for extent in layout.extents:
        for element in range(extent.start, extent.end) if extent.block is not None else ():
            begin = extent.start + (element - extent.start) // extent.block_row * extent.block_row
            if begin // shard != element // shard:
                expected[element] = (element // shard, begin // shard)
    found = {e: (t.sender, t.owner) for t in layout.tails for e in range(t.start, t.end)}
    assert found == expected
    assert sum(t.end - t.start for t in layout.tails) == len(found)
    for owner in range(layout.ranks):  # what it gets follows its slice without a gap
        got = sorted(e for e, (_, to) in found.items() if to == owner)
        assert got == list(range((owner + 1) * shard, (owner + 1) * shard + len(got)))


@pytest.mark.parametrize("seed", range(24))
def test_payloads_are_evened_out_where_that_is_cheaper(seed: int) -> None:
    layout = layouts(seed)
    stream = [(rank, i) for rank, size in enumerate(layout.payloads) for i in range(size)]
    for sender in range(layout.ranks):
        for receiver in range(layout.ranks):
            share = stream[receiver * layout.share : (receiver + 1) * layout.share]
            assert layout.moves[sender][receiver] == sum(rank == sender for rank, _ in share)
    moved = sum(n for r, row in enumerate(layout.moves) for to, n in enumerate(row) if to != r)
    others = layout.ranks - 1
    evened, padded = moved + others * layout.ranks * layout.share, others * layout.ranks * max(layout.payloads)
    assert layout.is_balanced == (evened < padded)
    assert layout.contribution == (layout.share if layout.is_balanced else max(layout.payloads))


def test_both_ways_to_even_out_occur() -> None:
    assert {layouts(seed).is_balanced for seed in range(24)} == {True, False}
