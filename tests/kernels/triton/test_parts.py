"""What is taken out of operands, terms of fp32, slopes: reference = Triton, interpreted on a CPU, compiled on a GPU."""

from __future__ import annotations

import pytest
import torch

from fp4dist.kernels.registry import Request, companion
from fp4dist.spec.build import build
from fp4dist.spec.load import load_recipe
from fp4dist.spec.recipe import QuantSpec
from tests.kernels.triton.interpreter import check


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the compiled kernels are tested instead")
def test_the_interpreted_kernels_have_the_references_bits() -> None:
    check("parts_parity", "no difference in parts")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_compiled_kernels_have_the_references_bits() -> None:
    from tests.kernels.triton import parts_parity

    assert list(parts_parity.differences(torch.device("cuda"))) == []


def test_only_what_the_kernels_know_is_theirs() -> None:
    linear = load_recipe("wang2501").linears["fp4"]

    def takes(op: str, spec: QuantSpec | None) -> bool:
        return companion(Request(op, spec, torch.device("cuda")), "triton") is not None  # type: ignore[arg-type]

    assert takes("decompose", linear.slot("fprop.x"))
    assert takes("slope", linear.slot("fprop.w"))
    assert takes("decompose", load_recipe("stable_spam_fp4").linears["fp4"].slot("fprop.x"))
    for op in ("decompose", "take_channels", "in_precision", "hot_residual"):
        assert takes(op, load_recipe("tetrajet_v2").linears["fp4"].slot("fprop.x"))
        assert not takes(op, load_recipe("quartet2").linears["fp4"].slot("fprop.x"))
    for lacking in (
        {"format": "fp4_row", "outlier": {"kind": "occ", "per": "tensor"}},
        {"format": "fp4_row", "outlier": {"kind": "occ", "precision": "e4m3"}},
        {"format": "fp4_row", "outlier": {"kind": "topk", "k": 9}},
        {"format": "fp4_row", "outlier": {"kind": "topk", "precision": "mxfp8"}},
        {"format": "fp4_row", "outlier": {"kind": "channels", "precision": "e4m3"}},
        {"format": "fp4_row", "outlier": "occ", "split": "mean"},
        {"format": "fp4_row", "estimator": {"kind": "dge", "k": 1}},
        {"format": "fp4_row"},
    ):
        spec = build(QuantSpec, lacking)
        assert not takes("decompose", spec), lacking
        assert not takes("slope", spec), lacking
