"""Fused norm, RoPE and loss: torch's and Megatron's formulas, the whole model's gradients, and who gets them.

On a CPU the functions run uncompiled; what torch.compile makes of them is compared on a GPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fp4dist.megatron import fusions
from fp4dist.megatron.fusions import Fusions, choose, fused_loss
from fp4dist.megatron.upstream import rope_utils
from fp4dist.spec.load import config_hash
from tests.distributed import megatron_groups, run_ranks
from tests.megatron.tiny import loss_of, tiny_run

ON_CPU = Fusions(norm=True, rope=True, loss=True)  # SwiGLU's is Megatron's and always compiled
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]
HEADS, GROUPS, WIDTH = 4, 2, 16


def made(*shape: int, seed: int = 0) -> Tensor:
    """N(0, 1), fp64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradients(function: Callable[..., Any], inputs: list[Tensor], seed: int = 9) -> list[Tensor]:
    """Outputs and gradients of the inputs, for random gradients of the outputs."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    arriving = [made(*y.shape, seed=seed + i).to(y) for i, y in enumerate(outputs)]
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, leaves, arriving)]


def compare(fused: Callable[..., Any], plain: Callable[..., Any], inputs: list[Tensor], device: str) -> None:
    """In fp32 the fused form has the plain one's values; in bf16 it is no farther from fp64 than the plain one is, by
    more than one rounding.
    """
    exact = gradients(plain, inputs)
    single = gradients(fused, [t.float().to(device) for t in inputs])
    for got, wanted in zip(single, exact, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.cpu().double(), wanted, rtol=2e-6, atol=2e-6 * float(wanted.abs().max()))
    half = [t.bfloat16().to(device) for t in inputs]
    exact = gradients(plain, [t.double().cpu() for t in half])
    for got, wanted in zip(gradients(fused, half), exact, strict=True):
        wanted = wanted.to(torch.float64)
        error = (got.cpu().double() - wanted).abs()
        # arriving gradients are rounded too: a second bf16 rounding, relative to the largest term of the sums
        assert float(error.max()) <= 2**-7 * float(wanted.abs().max())


@pytest.mark.parametrize("device", DEVICES)
def test_norm_is_torchs(device: str) -> None:
    """Its second output is its input, whose gradient is added to that of the norm."""

    def fused(x: Tensor, weight: Tensor) -> Any:
        return fusions._RmsNormFunction.apply(x, weight, 1e-5)

    def plain(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return functional.rms_norm(x, (64,), weight, 1e-5), x

    inputs = [made(5, 3, 64), 1 + 0.1 * made(64, seed=1)]
    compare(fused, plain, inputs, device)
    compare(lambda x, w: fused(x, w)[0], lambda x, w: plain(x, w)[0], inputs, device)


@pytest.mark.parametrize("device", DEVICES)
def test_rope_is_megatrons(device: str) -> None:
    """Split, rotation of queries and keys, and the gradient's way back, with several queries a group."""
    angles = 100 * torch.rand(7, 1, 1, WIDTH, generator=torch.Generator().manual_seed(3))
    flat = angles.flatten(0, -2)

    def fused(qkv: Tensor) -> Any:
        tables = (f(flat).to(qkv) for f in (torch.cos, torch.sin))
        return fusions._RotateFunction.apply(qkv, *tables)

    def plain(qkv: Tensor) -> tuple[Tensor, ...]:
        per_group = HEADS // GROUPS
        query, key, value = qkv.split([per_group * WIDTH, WIDTH, WIDTH], 3)
        rotated = rope_utils._apply_rotary_pos_emb_bshd(query.reshape(7, 3, HEADS, WIDTH), angles)
        return rotated, rope_utils._apply_rotary_pos_emb_bshd(key, angles), value

    qkv = made(7, 3, GROUPS, (HEADS // GROUPS + 2) * WIDTH)
    compare(fused, plain, [qkv], device)


@pytest.mark.parametrize("device", DEVICES)
def test_loss_is_cross_entropy(device: str) -> None:
    labels = torch.randint(0, 96, (3, 7), generator=torch.Generator().manual_seed(4))

    def fused(logits: Tensor) -> Tensor:
        return fused_loss(logits, labels.to(logits.device), None)

    def plain(logits: Tensor) -> Tensor:
        return functional.cross_entropy(logits.permute(1, 2, 0), labels, reduction="none")

    compare(fused, plain, [5 * made(7, 3, 96)], device)


def test_loss_of_infinite_logits_is_not_finite() -> None:
    """So that the step is skipped."""
    logits = made(2, 1, 8).float()
    for bad in (float("inf"), float("nan")):
        logits[1, 0, 3] = bad
        loss = fused_loss(logits, torch.tensor([[1, 3]]), None)
        assert loss[0, 0].isfinite()
        assert not loss[0, 1].isfinite()


@pytest.mark.distributed
@pytest.mark.parametrize("tp", [1, 2])
def test_whole_model_is_the_same_fused(tp: int) -> None:
    """Loss and every gradient, in fp32, also where ranks share the vocabulary and the heads."""
    for worst in run_ranks(compare_models, tp, tp):
        assert worst["some difference"] > 0  # they are not the same program
        assert worst["loss"] < 1e-6
        assert worst["gradient"] < 2e-6
        assert worst["after recompute"] == 0


def compare_models(tp: int) -> dict[str, float]:
    from fp4dist.megatron.provider import build_gpt

    found: list[tuple[Tensor, dict[str, Tensor]]] = []
    with megatron_groups(tp), pytest.MonkeyPatch.context() as patch:
        for fused, recompute in ((fusions.NONE, "none"), (ON_CPU, "none"), (ON_CPU, "full")):
            patch.setattr(fusions, "choose", lambda _, fused=fused: fused)
            config = tiny_run(tp)
            config = dataclasses.replace(config, train=dataclasses.replace(config.train, recompute=recompute))
            gpt = build_gpt(config, torch.float32)
            kinds = {type(module).__name__ for module in gpt.modules()}
            assert any("RMSNorm" in kind and "Fused" in kind for kind in kinds) == (fused is ON_CPU)
            assert ("FusedRopeAttention" in kinds) == (fused is ON_CPU)
            loss = loss_of(gpt)
            loss.backward()
            found.append((loss.detach(), {n: p.grad for n, p in gpt.named_parameters() if p.grad is not None}))
    (plain_loss, plain), (loss, grads), (_, again) = found
    assert plain.keys() == grads.keys()
    differences = [float((grads[n] - plain[n]).abs().max()) for n in plain]
    return {
        "loss": float((loss - plain_loss).abs()),
        "gradient": max(differences),
        "some difference": max(differences),
        "after recompute": max(float((again[n] - grads[n]).abs().max()) for n in grads),
    }


def test_chosen_once_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_run()

    def chosen(**train: Any) -> Fusions:
        return choose(dataclasses.replace(config, train=dataclasses.replace(config.train, **train)))

    assert chosen(fusions="none").describe() == "none (train.fusions is none)"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert chosen().describe() == "none (there is no GPU)"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert chosen(deterministic=True).describe() == "none (train.deterministic)"
    monkeypatch.setattr(fusions, "_compiler_failure", lambda: "no C compiler")
    assert chosen().describe() == "none (torch.compile does not work here: no C compiler)"
    monkeypatch.setattr(fusions, "_compiler_failure", lambda: None)
    assert chosen() == Fusions(norm=True, rope=True, swiglu=True, loss=True)
    config = tiny_run(qk_norm=True)
    assert not chosen().rope
    assert chosen().norm


def test_a_compiler_that_fails_is_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def broken(_: Any) -> Any:
        raise RuntimeError("Failed to find C compiler\nlong story")

    monkeypatch.setattr(fusions, "_compiled", lambda _: broken)
    monkeypatch.setattr(torch, "ones", lambda *_, **__: None)
    fusions._compiler_failure.cache_clear()
    try:
        with caplog.at_level("WARNING", logger="fp4dist"):
            assert fusions._compiler_failure() == "Failed to find C compiler"
        assert "torch.compile does not work here" in caplog.text
    finally:
        fusions._compiler_failure.cache_clear()


def test_runs_of_before_keep_their_hash() -> None:
    """`auto` is what older configurations mean; switching fusions off changes roundings and is another run."""
    config = tiny_run()
    off = dataclasses.replace(config, train=dataclasses.replace(config.train, fusions="none"))
    assert config_hash(off) != config_hash(config)
