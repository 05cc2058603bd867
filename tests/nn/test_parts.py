"""Operands in parts inside a linear: the six slots, experts, ranks, counts and the table."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fp4dist.errors import RecipeMismatch
from fp4dist.kernels import registry
from fp4dist.kernels.registry import Kernel, Request, explain, resolve
from fp4dist.nn.apply import apply_recipe
from fp4dist.nn.assign import check_shapes
from fp4dist.nn.comm import NoComm
from fp4dist.nn.controllers import Choice, SlotControl, chosen_columns
from fp4dist.nn.function import fp4_linear
from fp4dist.nn.gather import gather_words
from fp4dist.nn.grouped import Expert, TokenPart, expert_linear, grouped_linear
from fp4dist.nn.parts import MANY_TOKENS, cost, parted_slots
from fp4dist.nn.plan import FP4, SIDE, LinearPlan, Operand
from fp4dist.nn.report import LinearRow, fp4_share, table_text
from fp4dist.nn.sites import LinearSite
from fp4dist.numerics import dequantize, matmul, quantize
from fp4dist.numerics.quantize import original
from fp4dist.numerics.splits import Place, decompose, token_mean
from fp4dist.numerics.tensor import BlockScaledTensor, PartedTensor, pack, unpack
from fp4dist.spec.blocks import Ceil, Hadamard
from fp4dist.spec.formats import MXFP8, NVFP4
from fp4dist.spec.operand import QuantSpec
from fp4dist.spec.recipe import Dgrad, Fprop, LinearRecipe, Recipe, Rule, Wgrad
from fp4dist.spec.run import BackendConfig
from fp4dist.spec.splits import Channels, HotResidual, LowRank, Mean, Occ, Outlier, Split, TopK
from tests.generators import normal, spec
from tests.nn.one_linear import INPUTS, OUTPUTS, TOKENS, Watched, make_plan, run_linear, tensors, watch

NV, SR, SQUARE = QuantSpec(format=NVFP4), spec("nvfp4_sr"), QuantSpec(format=NVFP4, block=(16, 16))
RHT = Hadamard(size=16, signs="fixed")
CHOSEN = [0, 5, 31, 40, 95]


def recipe(
    split: Split | None = None, outlier: Outlier | None = None, rotation: Hadamard | None = None
) -> LinearRecipe:
    """NVFP4 in all slots; the parts wherever they may be; backward from the masters, its tokens rotated."""
    x, dy = replace(NV, split=split, outlier=outlier), replace(SR, split=split, outlier=outlier)
    w = NV if isinstance(split, Mean) else replace(NV, split=split)
    w = w if isinstance(outlier, Channels | HotResidual) else replace(w, outlier=outlier)
    if isinstance(outlier, Channels | HotResidual):
        dy = replace(dy, outlier=None)
    wgrad_x = replace(x, outlier=None) if isinstance(outlier, HotResidual) else x
    return LinearRecipe(
        fprop=Fprop(x=x, w=w),
        dgrad=Dgrad(dy=dy, w=w),
        wgrad=Wgrad(dy=replace(dy, rotation=rotation), x=replace(wgrad_x, rotation=rotation)),
    )


CHANNELS = Channels(precision="mxfp8")
RECIPES = {
    "mean": recipe(split=Mean()),
    "lowrank": recipe(split=LowRank(rank=4)),
    "occ": recipe(outlier=Occ(alpha=0.97)),
    "occ of the tensor": recipe(outlier=Occ(alpha=0.97, per="tensor")),
    "topk": recipe(outlier=TopK(k=2, group=32, precision="e4m3")),
    "channels": recipe(outlier=CHANNELS),
    "hot_residual": recipe(outlier=HotResidual()),
    "mean and occ, rotated": recipe(Mean(), Occ(alpha=0.97), RHT),
    "channels, rotated": recipe(outlier=CHANNELS, rotation=RHT),
}


def choose(plan: LinearPlan, chosen: list[int]) -> None:
    """Give a plan's fprop.x the choice of channels that a controller would make."""
    block = plan.recipe.fprop.x.outlier if plan.recipe.fprop.x is not None else None
    assert isinstance(block, Channels | HotResidual)
    choice = Choice(block, plan.path, INPUTS, torch.device("cpu"))
    choice.chosen = torch.zeros(INPUTS, dtype=torch.bool)
    choice.chosen[chosen] = True
    plan.controls = {"fprop.x": SlotControl(None, choice, None, lambda: 1.0)}


def run(of: LinearRecipe, chosen: list[int] | None = CHOSEN, dtype: torch.dtype = torch.float32) -> tuple[
    Watched, list[Tensor]
]:  # fmt: skip
    """Forward and backward; (what the GEMMs got, [y, dX, dW])."""
    x, w, dy = tensors(dtype)
    x.requires_grad_()
    w.requires_grad_()
    watched = watch(make_plan(of))
    if of.fprop.x is not None and isinstance(of.fprop.x.outlier, Channels | HotResidual) and chosen is not None:
        choose(watched.plan, chosen)
    y = fp4_linear(x, w, watched.plan, NoComm())
    y.backward(dy)
    assert x.grad is not None
    assert w.grad is not None
    return watched, [y.detach(), x.grad, w.grad]


def value(q: Operand) -> Tensor:
    """fp64 values in the operand's basis."""
    return (q if isinstance(q, Tensor) else dequantize(q)).double()


@pytest.mark.parametrize("name", [name for name in RECIPES if "channels" not in name and "hot" not in name])
def test_every_gemm_multiplies_the_values_of_its_operands(name: str) -> None:
    watched, results = run(RECIPES[name])
    assert set(watched.operands) == {"fprop.x", "fprop.w", "dgrad.dy", "dgrad.w", "wgrad.dy", "wgrad.x"}
    for gemm, result in zip(("fprop", "dgrad", "wgrad"), results, strict=True):
        a, b = (q for slot, q in watched.operands.items() if slot.startswith(gemm))
        assert any(isinstance(q, PartedTensor) for q in (a, b))
        torch.testing.assert_close(result.double(), value(a) @ value(b).t(), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("name", [name for name in RECIPES if "channels" in name or "hot" in name])
def test_gemms_of_the_chosen_channels_alone_give_the_same_product(name: str) -> None:
    """What a plan says of where its sides are not zero, against the dense product of all of them."""
    parted = pytest.importorskip("fp4dist.kernels.triton.parted")
    flops: list[int] = []

    def multiply(a: Operand, b: Operand, **named: Any) -> Tensor:
        flops.append(2 * a.shape[0] * b.shape[0] * a.shape[1])
        return matmul(a, b, **named)

    watched, _ = run(RECIPES[name], dtype=torch.bfloat16)
    seen = 0
    for gemm in ("fprop", "wgrad"):
        a, b = (q for slot, q in watched.operands.items() if slot.startswith(gemm))
        if any(isinstance(q, PartedTensor) and q.side is not None for q in (a, b)):
            flops.clear()
            torch.testing.assert_close(parted.matmul(a, b, multiply), matmul(a, b), rtol=1e-5, atol=1e-3)
            assert max(flops[1:]) < flops[0] * (6 if gemm == "fprop" else 1) * 16 / INPUTS + 1
            seen += 1
    assert seen == (1 if "hot" in name else 2)


def test_parts_bring_the_product_nearer_to_high_precision() -> None:
    """With a mean in every column, and with heavy tails, each where its part is meant to help; W as it is."""
    x, w, dy = tensors()
    shifted, tailed = x + 3 * normal(1, INPUTS, seed=9), x * torch.exp(normal(TOKENS, INPUTS, seed=8))
    plain = LinearRecipe(fprop=Fprop(x=NV))
    for data, parts in (
        (shifted, {"split": Mean(quantize=False)}),
        (shifted, {"split": LowRank(rank=4, quantize=False)}),
        (tailed, {"outlier": Occ(alpha=0.97)}),
        (tailed, {"outlier": TopK(k=2, group=32, precision="e4m3")}),
    ):
        exact = data @ w.t()
        parted = LinearRecipe(fprop=Fprop(x=replace(NV, **parts)))  # type: ignore[arg-type]
        errors = [(run_linear(of, data=(data, w, dy)).y - exact).norm() for of in (parted, plain)]
        assert errors[0] < 0.9 * errors[1], parts


def test_the_mean_is_taken_over_tokens_in_every_slot() -> None:
    x, _, dy = tensors()
    watched, _ = run(recipe(split=Mean(quantize=False)))
    wanted = {"fprop.x": x.mean(0)[None], "dgrad.dy": dy.mean(0)[None], "wgrad.x": x.mean(0)[:, None]}
    for slot, mean in wanted.items():
        q = watched.operands[slot]
        assert isinstance(q, PartedTensor)
        torch.testing.assert_close(q.side, mean.expand(q.shape), rtol=1e-5, atol=1e-6)
    assert not isinstance(watched.operands["fprop.w"], PartedTensor)


@pytest.mark.parametrize("name", ["channels", "channels, rotated"])
def test_channels_stand_in_high_precision_in_both_operands_of_fprop_and_wgrad(name: str) -> None:
    of = RECIPES[name]
    watched, (y, _, dw) = run(of)
    x, w, dy = tensors()
    fp8 = QuantSpec(format=MXFP8, scale=Ceil())
    chosen = torch.zeros(INPUTS, dtype=torch.bool)
    chosen[CHOSEN] = True
    low_x, low_w = (dequantize(quantize(torch.where(chosen, 0.0, t), NV)).double() for t in (x, w))
    high_x, high_w = (dequantize(quantize(torch.where(chosen, t, 0.0), fp8)).double() for t in (x, w))
    torch.testing.assert_close(y.double(), low_x @ low_w.t() + high_x @ high_w.t(), rtol=1e-5, atol=1e-3)
    # wgrad: the chosen rows of X^T meet dY^T in the same precision
    high = dequantize(quantize(dy.t(), fp8)).double() @ dequantize(quantize(x.t()[chosen], fp8)).double().t()
    torch.testing.assert_close(dw[:, chosen].double(), high, rtol=1e-5, atol=2e-3)
    dy_q, x_q = watched.operands["wgrad.dy"], watched.operands["wgrad.x"]
    assert isinstance(dy_q, PartedTensor)
    assert dy_q.side is None
    assert isinstance(x_q, PartedTensor)
    low = value(dy_q.main) @ value(x_q.main).t()
    torch.testing.assert_close(dw[:, ~chosen].double(), low[:, ~chosen], rtol=1e-5, atol=2e-3)
    assert not isinstance(watched.operands["dgrad.w"], PartedTensor)


def test_all_channels_give_the_linear_itself() -> None:
    of = recipe(outlier=Channels(precision="bf16"))
    _, (y, _, dw) = run(of, list(range(INPUTS)))
    x, w, dy = tensors()
    torch.testing.assert_close(y, x @ w.t(), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(dw, dy.t() @ x, rtol=1e-6, atol=1e-4)


def test_before_a_choice_channels_and_hot_residual_are_the_plain_recipe() -> None:
    plain = run(recipe())[1]
    for name in ("channels", "hot_residual"):
        watched, results = run(RECIPES[name], None)
        assert all(torch.equal(a, b) for a, b in zip(results, plain, strict=True))
        assert all(isinstance(q, BlockScaledTensor) for q in watched.operands.values())


@pytest.mark.parametrize("rotation", [None, RHT])
def test_hot_residual_adds_the_rounding_error_times_the_weight_itself(rotation: Hadamard | None) -> None:
    quantizer = replace(NV, rotation=rotation)
    fprop = Fprop(x=replace(quantizer, outlier=HotResidual()), w=quantizer)
    _, (y, _, _) = run(LinearRecipe(fprop=fprop, dgrad=RECIPES["occ"].dgrad))
    x, w, _ = tensors()
    x_q, w_q = (original(quantize(t, quantizer), rotation).double() for t in (x, w))
    expected = x_q @ w_q.t() + (x.double() - x_q)[:, CHOSEN] @ w.double()[:, CHOSEN].t()
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-3)


def test_the_columns_of_x_are_shown_to_the_controller_in_training_passes_only() -> None:
    plan = make_plan(RECIPES["channels"])
    choose(plan, CHOSEN)
    x, w, _ = tensors()
    choice = plan.controls["fprop.x"]._choice
    assert choice is not None
    choice.collecting = True
    with torch.no_grad():
        fp4_linear(x, w, plan, NoComm())
    assert not bool(choice.seen.any())
    fp4_linear(x, w.requires_grad_(), plan, NoComm())
    torch.testing.assert_close(choice.seen, x.double().square().sum(0), rtol=1e-5, atol=1e-3)


# -- backward operands from the forward's


def test_requant_reads_the_whole_value() -> None:
    """Nothing of a forward outlier is lost on the way to wgrad.x and dgrad.w, whether or not these have parts too."""
    forward = replace(NV, outlier=TopK(k=2, group=32))
    for backward in (NV, replace(NV, outlier=Occ(alpha=0.97)), replace(NV, split=Mean(quantize=False))):
        w = NV if backward.split else backward
        of = LinearRecipe(
            fprop=Fprop(x=forward, w=forward),
            dgrad=Dgrad(dy=SR, w=replace(w, source="requant")),
            wgrad=Wgrad(dy=SR, x=replace(backward, source="requant")),
        )
        watched, _ = run(of)
        for slot, source, own, dim in (("wgrad.x", "fprop.x", backward, 1), ("dgrad.w", "fprop.w", w, None)):
            values = dequantize(watched.operands[source]).t()  # type: ignore[arg-type]
            parts = decompose(values, own, Place(token_dim=dim))
            main = dequantize(quantize(parts.rest, replace(own, split=None, outlier=None)))
            expected = main if parts.side is None else main + parts.side
            assert torch.equal(dequantize(watched.operands[slot]), expected), slot  # type: ignore[arg-type]


def test_reuse_and_dequant_read_codes_and_what_stands_beside_them() -> None:
    forward = replace(SQUARE, outlier=TopK(k=2, group=32))
    of = LinearRecipe(
        fprop=Fprop(x=forward, w=forward),
        dgrad=Dgrad(dy=SR, w=replace(SQUARE, source="reuse")),
        wgrad=Wgrad(x="dequant"),
    )
    watched, (_, dx, dw) = run(of)
    x, _, dy = tensors()
    w_q, x_q = watched.operands["fprop.w"], watched.operands["fprop.x"]
    torch.testing.assert_close(dx.double(), value(watched.operands["dgrad.dy"]) @ value(w_q), rtol=1e-5, atol=1e-3)
    assert "wgrad.x" not in watched.operands  # a GEMM in high precision
    torch.testing.assert_close(dw.double(), dy.t().double() @ value(x_q), rtol=1e-5, atol=1e-3)
    assert (value(x_q) - x.double()).norm() < (value(x_q.main) - x.double()).norm()  # type: ignore[union-attr]


def test_backward_reads_codes_alone_until_channels_are_chosen() -> None:
    base, again = RECIPES["channels"], replace(NV, source="requant")
    of = replace(base, dgrad=Dgrad(dy=SR, w=again), wgrad=Wgrad(dy=SR, x=replace(again, outlier=CHANNELS)))
    watched, _ = run(of, chosen=None)
    assert watched.calls["dgrad.w:codes"] == watched.calls["wgrad.x:codes"] == 1
    assert not {"dgrad.w", "wgrad.x"} & set(watched.calls)
    assert all(isinstance(operand, BlockScaledTensor) for operand in watched.operands.values())
    watched, _ = run(of)
    assert {slot for slot, operand in watched.operands.items() if isinstance(operand, PartedTensor)} == parted_slots(of)
    assert not {"dgrad.w:codes", "wgrad.x"} & set(watched.calls)
    x_q, again_q = watched.operands["fprop.x"], watched.operands["wgrad.x"]  # the parts of whose value its parts have
    assert isinstance(again_q, PartedTensor)
    chosen = torch.zeros(INPUTS, dtype=torch.bool).index_fill_(0, torch.tensor(CHOSEN), True)
    expected = decompose(value(x_q).float().t(), replace(NV, outlier=CHANNELS), Place(channels=chosen, channel_dim=0))
    assert torch.equal(dequantize(again_q.main), dequantize(quantize(expected.rest, NV)))
    assert expected.side is not None
    assert torch.equal(again_q.side, expected.side)  # type: ignore[arg-type]


def test_of_chosen_channels_backward_is_kept_these_alone() -> None:
    watched, _ = run(RECIPES["channels"], dtype=torch.bfloat16)
    for slot in ("fprop.x", "fprop.w"):
        q = watched.operands[slot]
        assert isinstance(q, PartedTensor)
        tensors, layout = pack(q)
        assert tensors[3].shape == (q.shape[0], 16)  # five, and as many others as make a multiple
        assert tensors[3].dtype == torch.bfloat16
        kept = unpack(tensors, layout)
        assert torch.equal(dequantize(kept), dequantize(q))
        b = quantize(normal(32, INPUTS, seed=8), NV)
        assert torch.equal(matmul(kept, b), matmul(q, b))
        assert torch.equal(pack(kept)[0][3], tensors[3])


def test_merged_channels_are_requantized_for_dgrad() -> None:
    base = RECIPES["channels"]
    of = replace(base, dgrad=Dgrad(dy=SR, w=replace(NV, source="requant")))
    watched, _ = run(of)
    merged = dequantize(watched.operands["fprop.w"]).t()  # type: ignore[arg-type]
    assert torch.equal(dequantize(watched.operands["dgrad.w"]), dequantize(quantize(merged, NV)))  # type: ignore[arg-type]


# -- experts


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_grouped_experts_are_the_loop_bit_for_bit(name: str) -> None:
    counts, part = [33, 0, 64, 7], TokenPart()
    outcomes = []
    for form in ("grouped", "loop"):
        x = (normal(sum(counts), INPUTS, seed=1) + 0.5).requires_grad_()
        experts = []
        for e in range(len(counts)):
            plan = make_plan(RECIPES[name], number=100 + e)
            if isinstance(plan.recipe.fprop.x.outlier, Channels | HotResidual):  # type: ignore[union-attr]
                choose(plan, CHOSEN)
            experts.append(Expert(nn.Parameter(normal(OUTPUTS, INPUTS, seed=10 + e)), plan, NoComm()))
        if form == "grouped":
            y = grouped_linear(x, experts, counts, part)
        else:
            rows = zip(x.split(counts), experts, strict=True)
            y = torch.cat([expert_linear(tokens, expert, part) for tokens, expert in rows])
        y.backward(normal(sum(counts), OUTPUTS, seed=2))
        outcomes.append([y, x.grad, *(e.weight.grad for e in experts)])
        assert dict(experts[0].plan.tally.flops)
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


def test_an_experts_mean_is_that_of_its_own_tokens() -> None:
    """33 tokens, filled up to 48: mean and output are those of the 33, in forward and in backward."""
    plan = make_plan(recipe(split=Mean(quantize=False)))
    watched = watch(plan)
    x, dy = (normal(33, INPUTS, seed=1) + 2).requires_grad_(), normal(33, OUTPUTS, seed=2) + 1
    weight = nn.Parameter(normal(OUTPUTS, INPUTS, seed=3))
    expert_linear(x, Expert(weight, plan, NoComm()), TokenPart()).backward(dy)
    for slot, dim in (("fprop.x", 0), ("wgrad.x", 1), ("dgrad.dy", 0), ("wgrad.dy", 1)):
        q, of = watched.operands[slot], x.detach() if slot.endswith("x") else dy
        assert isinstance(q, PartedTensor)
        assert q.side is not None
        side = q.side if dim == 0 else q.side.t()
        assert torch.equal(side[:33], token_mean(of, 0, None, None).expand(33, -1)), slot
        assert not bool(side[33:].any())
        assert not bool((dequantize(q) if dim == 0 else dequantize(q).t())[33:].any())


# -- counts and the table


def test_costs_have_the_true_size_of_the_parts() -> None:
    m, n, k = 256, 128, 96
    full = 2 * m * n * k
    expected = {
        "mean": 2 * n * (k + m),
        "lowrank": 2 * 4 * n * (k + m) + 2 * 4 * m * (k + n),
        "occ": 2 * full * 2 * 2 / k,  # floor(0.03 * 96) = 2 at either end, in x and in w
        "topk": 2 * full * 2 / 32,
        "channels": full * chosen_columns(CHANNELS, k) / k,
        "hot_residual": full * 16 / 96,
    }
    for name, side in expected.items():
        found = cost(RECIPES[name], "fprop", m, n, k)
        assert found.side == pytest.approx(side, rel=1e-3), name
        assert found.main == (0 if name == "channels" else full), name
    assert cost(recipe(), "fprop", m, n, k) == (full, 0)
    assert cost(RECIPES["channels"], "fprop", m, n, k, channels_chosen=False) == (full, 0)


@pytest.mark.parametrize("name", ["mean", "lowrank", "occ", "topk", "hot_residual"])
def test_what_runs_beside_the_codes_is_counted_as_not_fp4(name: str) -> None:
    watched, _ = run(RECIPES[name])
    tally = watched.plan.tally
    sizes = {"fprop": (TOKENS, OUTPUTS, INPUTS), "dgrad": (TOKENS, INPUTS, OUTPUTS), "wgrad": (OUTPUTS, INPUTS, TOKENS)}
    for gemm, (m, n, k) in sizes.items():
        found = cost(RECIPES[name], gemm, m, n, k)
        assert tally.flops[gemm, FP4] == found.main == 2 * m * n * k
        assert tally.flops[gemm, SIDE] == found.side
    assert tally.flops["fprop", SIDE] > 0


def test_the_table_shows_parts_and_their_share() -> None:
    site = LinearSite(path="layers.0.fc1", role="fc1", layer=0, in_features=1024, out_features=512)
    share = 2 * 10 / 1024  # of each of two operands that contract 1024 inputs
    occ = LinearRecipe(fprop=Fprop(x=replace(NV, outlier=Occ(alpha=0.99)), w=NV))
    row = LinearRow(site, "fp4", occ, "why", {})
    assert row.side() == {"fprop": pytest.approx(share / (1 + share), rel=1e-4)}
    assert row.to_json()["side"] == row.side()
    assert fp4_share([row]) == pytest.approx(1 / (3 + share), rel=1e-6)
    text = table_text([row], Recipe(name="t", linears={"fp4": occ}, rules=(Rule(path="*", linear="fp4"),)), [])
    assert "occ" in text
    assert "1.9% of it beside the codes" in text
    assert "side" not in LinearRow(site, "fp4", recipe(), "why", {}).to_json()
    assert cost(RECIPES["mean"], "fprop", MANY_TOKENS, 512, 1024).side / (2 * MANY_TOKENS * 512 * 1024) < 0.002


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_model_trains_and_its_counts_agree_with_the_table(name: str) -> None:
    model = nn.Sequential(nn.Linear(96, 128), nn.ReLU(), nn.Linear(128, 96))
    whole = Recipe(name="parts", linears={"it": RECIPES[name]}, rules=(Rule(path="*", linear="it"),))
    applied = apply_recipe(model, whole, tokens=64)
    losses = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = normal(64, 96, seed=1)
    for step in range(3):
        applied.set_step(step, 3)
        loss = (model(x.clone().requires_grad_()) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    applied.check_counts()
    assert losses[-1] < losses[0]
    counts = applied.counts()
    unchosen = "channels" in name  # which come after step 500
    assert (counts["flops"].get(SIDE, 0) == 0) == unchosen
    assert (counts["fp4_share"] < 1) != unchosen


# -- refusals


def test_a_kernel_of_codes_alone_does_not_multiply_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    def fn(*_: Any) -> None: ...

    for op in ("quantize", "matmul"):
        monkeypatch.setitem(registry._KERNELS, (op, "triton"), Kernel(op, "triton", fn, lambda _: None))  # type: ignore[arg-type]
    cpu, auto = torch.device("cpu"), BackendConfig()
    parted = replace(NV, outlier=Occ())
    assert resolve(Request("matmul", NV, cpu), auto).backend == "triton"
    requests = [Request("matmul", NV, cpu, sums=True), *(Request(op, parted, cpu) for op in ("quantize", "matmul"))]
    for request in requests:
        assert resolve(request, auto).backend == "reference"
        assert "codes alone" in explain(request, auto)["triton"]
    plan = make_plan(RECIPES["channels"])
    assert {plan.kernels[gemm].backend for gemm in ("fprop", "wgrad")} == {"reference"}
    assert plan.kernels["dgrad"].backend == "triton"


def test_low_rank_under_parallelism_is_refused() -> None:
    site = LinearSite(path="layers.0.fc1", role="fc1", layer=0, in_features=256, out_features=256)
    of = RECIPES["lowrank"]
    check_shapes(site, of, tokens=256, tp=1)
    for layout in ({"tp": 2}, {"tp": 1, "cp": 2}):
        with pytest.raises(RecipeMismatch, match="lowrank needs the whole matrix"):
            check_shapes(site, of, tokens=256, **layout)


def test_parts_of_reused_codes_are_counted_again() -> None:
    forward = replace(SQUARE, outlier=TopK(k=2, group=32))
    reused = replace(SQUARE, source="reuse")
    of = LinearRecipe(fprop=Fprop(x=NV, w=forward), dgrad=Dgrad(dy=SR, w=reused))
    assert cost(of, "dgrad", 64, 32, 128) == (2 * 64 * 32 * 128, 2 * 64 * 32 * 128 * 2 // 32)
    chosen = LinearRecipe(fprop=Fprop(x=replace(NV, outlier=CHANNELS), w=SQUARE), dgrad=Dgrad(dy=SR, w=reused))
    assert cost(chosen, "dgrad", 64, 256, 128) == (64 * 256 * 128, 64 * 256 * 128)  # 128 of 256 channels


def test_parted_slots() -> None:
    assert parted_slots(recipe()) == frozenset()
    assert parted_slots(RECIPES["channels"]) == {"fprop.x", "fprop.w", "wgrad.dy", "wgrad.x"}
    assert parted_slots(RECIPES["hot_residual"]) == {"fprop.x", "fprop.w"}
    reused = LinearRecipe(
        fprop=Fprop(w=replace(SQUARE, outlier=TopK(group=32))), dgrad=Dgrad(dy=SR, w=replace(SQUARE, source="reuse"))
    )
    assert parted_slots(reused) == {"fprop.w", "dgrad.w"}


def test_parts_are_gathered_in_high_precision() -> None:
    class Gathering(NoComm):
        size, split, token_shard = 2, "O", "x"  # type: ignore[assignment]

    class Row(Gathering):
        split, token_shard = "I", "y"  # type: ignore[assignment]

    assert gather_words(recipe(), Gathering(), None) == {"fprop.x": "packed", "wgrad.x": "packed"}  # type: ignore[arg-type]
    assert gather_words(RECIPES["mean"], Gathering(), None) == {"fprop.x": "high", "wgrad.x": "high"}  # type: ignore[arg-type]
    assert gather_words(RECIPES["channels"], Row(), None) == {"dgrad.dy": "high", "wgrad.dy": "high"}  # type: ignore[arg-type]
