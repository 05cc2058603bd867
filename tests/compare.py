"""Equality of bits, with a report that says where and what."""

from __future__ import annotations

from dataclasses import replace

import torch

from fp4dist.numerics import BlockScaledTensor
from fp4dist.numerics.codes import unpack


def assert_same_bits(a: BlockScaledTensor, b: BlockScaledTensor) -> None:
    """Codes, scales and global scale equal bit for bit."""
    assert a.shape == b.shape
    for name, x, y in (("scale", a.scales, b.scales), ("code", unpack(a.codes), unpack(b.codes))):
        different = (x != y).nonzero()
        if len(different):
            at = tuple(different[0].tolist())
            raise AssertionError(f"{len(different)} of {x.numel()} {name}s differ, first at {at}: {x[at]} != {y[at]}")
    same_global = torch.equal(a.global_scale.view(torch.int32), b.global_scale.view(torch.int32))
    assert same_global, f"global scales differ: {a.global_scale.item()!r} != {b.global_scale.item()!r}"


def moved(q: BlockScaledTensor, device: str) -> BlockScaledTensor:
    """The same tensor on another device."""
    return replace(q, codes=q.codes.to(device), scales=q.scales.to(device), global_scale=q.global_scale.to(device))
