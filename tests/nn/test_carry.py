"""A backend that writes carriers gives the reference's bits, and is asked for codes only where somebody reads them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from fp4dist.kernels.registry import Request, companion
from fp4dist.nn.apply import apply_recipe
from fp4dist.nn.clock import Clock
from fp4dist.nn.comm import NoComm
from fp4dist.nn.function import fp4_linear
from fp4dist.nn.grouped import Expert, TokenPart, grouped_linear
from fp4dist.nn.plan import HIGH, LinearPlan
from fp4dist.nn.triage import triage
from fp4dist.numerics.tensor import BlockScaledTensor, Carrier
from fp4dist.spec.recipe import LinearRecipe, Recipe, Rule
from tests.distributed import megatron_groups, run_ranks
from tests.generators import normal
from tests.megatron.test_layers import apply, make_layer, run_layer
from tests.nn.carriers import FP8, OTHER_FP8, carrier_backend
from tests.nn.one_linear import INPUTS, OUTPUTS, TOKENS, Watched, make_plan, run_linear, tensors, watch
from tests.nn.test_function import SHIPPED
from tests.tiny_llama import TinyLlama

KINDS = (torch.bfloat16, FP8)
CARRIED = ["quartet2:fp4", "nvidia_nvfp4:fp4", "nvidia_nvfp4:fp4_fprop_bf16", "quartet:fp4", "tetrajet:fp4"]
E8M0 = ("quartet:fp4", "tetrajet:fp4")


def step(plan: LinearPlan, micro_batches: int = 1, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """(y, dX of each micro-batch, then the weight's grad and main_grad) of one linear under Megatron's protocol."""
    x, w, dy = tensors(dtype)
    w = w.requires_grad_()
    w.main_grad, w.grad_added_to_main_grad = torch.ones(w.shape), False  # type: ignore[attr-defined]
    found = []
    for i in range(micro_batches):
        plan.clock.micro_batch = i
        x_i = (x * (i + 1)).requires_grad_()
        y = fp4_linear(x_i, w, plan, NoComm())
        y.backward(dy)
        assert x_i.grad is not None
        found += [y.detach(), x_i.grad]
    assert w.grad is not None
    assert w.grad_added_to_main_grad == (plan.kind("wgrad") != HIGH or dtype == torch.float32)  # type: ignore[attr-defined]
    return [*found, w.grad, w.main_grad]  # type: ignore[attr-defined]


def equal(a: list[Tensor], b: list[Tensor]) -> None:
    for one, other in zip(a, b, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_carriers_change_no_bit(name: str, kind: torch.dtype) -> None:
    """Every shipped recipe, in both dtypes of a model, with and without quantized weights kept."""
    for dtype in (torch.float32, torch.bfloat16):
        expected = step(make_plan(SHIPPED[name]), 2, dtype)
        for cache in (False, True):
            with carrier_backend(kind) as asked:
                clock = Clock(seed=7, step=3, micro_batch=5, cache_weights=cache)
                plan = make_plan(SHIPPED[name], clock)
                equal(step(plan, 2, dtype), expected)
                assert asked.calls.get("matmul", 0) == 0 or name not in CARRIED or plan.carrying.types


@pytest.mark.parametrize("name", CARRIED)
def test_the_gemms_get_carriers_of_their_type(name: str) -> None:
    for kind in KINDS:
        with carrier_backend(kind):
            watched = watch(make_plan(SHIPPED[name]))
            step(watched.plan)
        narrow = kind == FP8 and name in E8M0
        quantized = [operand for operand in watched.operands.values() if not isinstance(operand, Tensor)]
        assert len(quantized) == (4 if name.endswith("fprop_bf16") else 6)
        for slot, operand in watched.operands.items():
            if not isinstance(operand, Tensor):
                assert isinstance(operand, Carrier)
                second = slot in ("fprop.w", "dgrad.w", "wgrad.x")
                wide = torch.bfloat16 if not narrow else OTHER_FP8 if second else FP8
                assert operand.values.dtype == wide
        assert watched.plan.carrying.narrow == (("fprop", "dgrad", "wgrad") if narrow else ())


WANTS = {  # codes beside the carrier: kept for backward, or looked at by an estimator
    "quartet2:fp4": {"fprop.x", "fprop.w"},
    "quartet:fp4": {"fprop.x", "fprop.w"},
    "nvidia_nvfp4:fp4": {"fprop.w"},
    "nvidia_nvfp4:fp4_fprop_bf16": set[str](),
    "tetrajet:fp4": {"fprop.x", "fprop.w"},
}


@pytest.mark.parametrize("name", CARRIED)
def test_codes_are_written_where_somebody_reads_them(name: str) -> None:
    with carrier_backend() as asked:
        plan = make_plan(SHIPPED[name])
        step(plan)
        assert {slot for slot, want in plan.carrying.wants.items() if want.codes} == WANTS[name]
        assert sum(want.codes for want in asked.wants) == len(WANTS[name]) + (plan.pair_x is not None)
        asked.wants.clear()
        with torch.no_grad():
            fp4_linear(tensors()[0], tensors()[1], plan, NoComm())
        assert not any(want.codes for want in asked.wants), "without a backward pass nobody reads them"


def test_an_estimator_reads_codes() -> None:
    with carrier_backend():
        plan = make_plan(SHIPPED["quest_mxfp4:fp4"])
    assert plan.carrying.types
    assert plan.carrying.wants["fprop.w"].codes


def test_what_no_carrier_holds_stays_codes() -> None:
    """Operands in parts, several samples, fp32 scales."""
    with carrier_backend():
        luq, parts = make_plan(SHIPPED["luq:fp4"]), make_plan(SHIPPED["averis:fp4"])
        assert not luq.carrying.types
        assert "fprop" not in parts.carrying.types, "its x is a sum"
        watched = watch(parts)
        step(watched.plan)
    assert not isinstance(watched.operands["fprop.w"], Carrier)


@pytest.mark.parametrize("name", CARRIED)
def test_dy_is_read_once(name: str) -> None:
    with carrier_backend() as asked:
        step(make_plan(SHIPPED[name]))
        pairs = 1 + (name == "nvidia_nvfp4:fp4")  # whose wgrad.x starts from x, too
        assert asked.calls["quantize_pair"] == pairs
        quantizers = asked.calls.get("quantize", 0) + asked.calls.get("requantize", 0)
        assert quantizers == len(asked.wants) - 2 * pairs
    with carrier_backend(pairs=False) as apart:
        plan = make_plan(SHIPPED[name])
        assert plan.pair is None
        step(plan)
        assert "quantize_pair" not in apart.calls


def test_one_gradient_alone_is_quantized_alone() -> None:
    with carrier_backend() as asked:
        x, w, dy = tensors()
        fp4_linear(x, w.requires_grad_(), make_plan(SHIPPED["quartet2:fp4"]), NoComm()).backward(dy)
        assert "quantize_pair" not in asked.calls


def test_codes_are_kept_in_place_of_an_input_that_wgrad_quantizes() -> None:
    """Made in forward, from the same reading; nothing of it where the weight is frozen, or x is in parts on ranks."""

    def kept(frozen: bool = False) -> int:
        x, w, _ = tensors(torch.bfloat16)
        sizes: list[int] = []
        with saved_tensors_hooks(lambda t: sizes.append(t.numel() * t.element_size()) or t, lambda t: t):
            plan = make_plan(SHIPPED["nvidia_nvfp4:fp4"])
            fp4_linear(x.requires_grad_(), w.requires_grad_(not frozen), plan, NoComm())
        return sum(sizes)

    elements, weight = TOKENS * INPUTS, OUTPUTS * INPUTS // 2 + OUTPUTS * INPUTS // 256 + 4
    assert kept() == 2 * elements + weight
    with carrier_backend() as asked:
        assert kept() == elements * 9 // 16 + 4 + weight
        asked.calls.clear()
        assert kept(frozen=True) == weight
        assert "quantize_pair" not in asked.calls


def test_triage_looks_at_both_operands_of_dy() -> None:
    torch.manual_seed(0)
    with carrier_backend() as asked:
        model = TinyLlama(1)
        apply_recipe(model, "quartet2")
        with triage(model) as found:
            model(torch.randint(0, 64, (2, 64))).backward()
        assert "quantize_pair" not in asked.calls
        assert found.forward is None
        assert found.backward is None
        assert all(plan.pair is not None for m in model.modules() if (plan := getattr(m, "plan", None)) is not None)


def test_experts_get_the_same_bits() -> None:
    recipes, counts = [SHIPPED["quartet2:fp4"], SHIPPED["nvidia_nvfp4:fp4"]], [130, 40]

    def run() -> list[Tensor]:
        clock = Clock(seed=7, step=3, micro_batch=5, cache_weights=True)
        x = normal(170, 128, seed=1).bfloat16().requires_grad_()
        experts, mains = [], []
        for e, recipe in enumerate(recipes):
            w = normal(256, 128, seed=10 + e).bfloat16().requires_grad_()
            w.main_grad, w.grad_added_to_main_grad = torch.zeros(256, 128), False  # type: ignore[attr-defined]
            mains.append(w.main_grad)  # type: ignore[attr-defined]
            experts.append(Expert(w, make_plan(recipe, clock, number=e), NoComm()))
        y = grouped_linear(x, experts, counts, TokenPart())
        y.backward(normal(170, 256, seed=2).bfloat16())
        assert x.grad is not None
        return [y.detach(), x.grad, *mains]

    expected = run()
    with carrier_backend() as asked:
        equal(run(), expected)
        assert asked.calls["quantize_pair"] == 2


# ---------- the weight's operands over a step


def weight_calls(watched: Watched) -> list[int]:
    return [watched.calls.get(slot, 0) for slot in ("fprop.w", "dgrad.w")]


@pytest.mark.parametrize(
    ("name", "kept"), [("nvidia_nvfp4:fp4", [1, 0]), ("quartet2:fp4", [1, 3]), ("quartet:fp4", [1, 3])]
)
def test_a_weight_is_quantized_once_a_step(name: str, kept: list[int]) -> None:
    """What is drawn anew for each micro-batch is not kept."""
    with carrier_backend(FP8) as asked:
        watched = watch(make_plan(SHIPPED[name], Clock(seed=7, cache_weights=True)))
        x, w, dy = tensors()
        w = w.requires_grad_()
        for i in range(3):
            watched.plan.clock.micro_batch = i
            fp4_linear(x.requires_grad_(), w, watched.plan, NoComm()).backward(dy)
        assert weight_calls(watched) == kept
        if name.startswith("nvidia"):
            others = 3 * 4  # x, x^T, dY, dY^T in each micro-batch
            assert len(asked.types) == others + 1, "the transposed weight is the same carrier, turned"


def test_a_deterministic_backward_weight_is_kept_too() -> None:
    with carrier_backend():
        watched = watch(make_plan(SHIPPED["nvidia_nvfp4:fp4_fprop_bf16"], Clock(cache_weights=True)))
        x, w, dy = tensors()
        w = w.requires_grad_()
        for _ in range(2):
            fp4_linear(x.requires_grad_(), w, watched.plan, NoComm()).backward(dy)
        assert weight_calls(watched) == [0, 1]
        watched.plan.clock.step += 1
        fp4_linear(x, w, watched.plan, NoComm()).backward(dy)
        assert weight_calls(watched) == [0, 2]


def changes() -> dict[str, Callable[[nn.Module, torch.optim.Optimizer], None]]:
    def through_data(model: nn.Module, _: torch.optim.Optimizer) -> None:
        for p in model.parameters():
            p.data.mul_(2)

    def load(model: nn.Module, _: torch.optim.Optimizer) -> None:
        model.load_state_dict({name: 2 * value for name, value in model.state_dict().items()})

    def update(_: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.step()

    return {"update": update, "data": through_data, "load": load}


@pytest.mark.parametrize("carriers", [False, True])
@pytest.mark.parametrize("change", sorted(changes()))
def test_a_changed_weight_is_never_served_stale(change: str, carriers: bool) -> None:
    """Between steps whatever changes it; within one, what torch can see (updates and load_state_dict)."""
    x, w, dy = tensors()
    moves_clock = [True] if change == "data" else [False, True]

    def outcome(cache: bool, moves: bool) -> list[Tensor]:
        model = nn.Linear(w.shape[1], w.shape[0], bias=False)
        model.weight.data.copy_(w)
        clock = Clock(seed=7, cache_weights=cache)
        plan, optimizer = make_plan(SHIPPED["nvidia_nvfp4:fp4"], clock), torch.optim.SGD(model.parameters(), lr=0.1)
        fp4_linear(x.clone().requires_grad_(), model.weight, plan, NoComm()).backward(dy)
        changes()[change](model, optimizer)
        clock.step += moves
        again = x.clone().requires_grad_()
        y = fp4_linear(again, model.weight, plan, NoComm())
        y.backward(dy)
        assert again.grad is not None
        return [y.detach(), again.grad]

    for moves in moves_clock:
        expected = outcome(False, moves)
        if not carriers:
            equal(outcome(True, moves), expected)
            continue
        with carrier_backend():
            equal(outcome(True, moves), expected)


@pytest.mark.parametrize("cache", [False, True])
def test_bytes_that_stay_after_a_step(cache: bool) -> None:
    """None without a cache; with one the codes and the carrier of each weight, until the step is settled."""
    with carrier_backend():
        model = nn.Sequential(nn.Linear(128, 256, bias=False), nn.Linear(256, 128, bias=False))
        applied = apply_recipe(model, one_rule(SHIPPED["nvidia_nvfp4:fp4"]))
        applied.clock.cache_weights = cache
        applied.set_step(0, 10)
        model(torch.randn(64, 128)).sum().backward()
        plans = [target.module.plan for target in applied.targets]
        elements = 128 * 256
        expected = elements // 2 + elements // 256 + 2 * elements if cache else 0
        assert [plan.cached_bytes for plan in plans if plan is not None] == [expected, expected]
        applied.settle()
        assert [plan.cached_bytes for plan in plans if plan is not None] == [0, 0]


def one_rule(linear: LinearRecipe) -> Recipe:
    return Recipe(name="one", linears={"it": linear}, rules=(Rule(path="*", linear="it"),))


def test_a_phase_drops_what_was_kept() -> None:
    with carrier_backend():
        model = TinyLlama(2)
        applied = apply_recipe(model, "nvidia_nvfp4")
        applied.clock.cache_weights = True
        applied.set_step(0, 10)
        model(torch.randint(0, 64, (2, 64))).backward()
        applied._switch()
        assert all(t.module.plan.cached_bytes == 0 for t in applied.targets if t.module.plan is not None)


def test_delivered_codes_get_their_carrier_once() -> None:
    with carrier_backend() as asked:
        plan = make_plan(SHIPPED["nvidia_nvfp4:fp4"])
        x, w, _ = tensors()
        whole = fp4_linear(x, w, plan, NoComm())
        codes = plan.kernels["fprop.w"](w, plan.spec("fprop.w"), None, None)
        assert isinstance(codes, BlockScaledTensor)
        plan.delivered = codes
        asked.types.clear()
        stale = torch.full_like(w, float("nan"))
        for _ in range(2):
            assert torch.equal(fp4_linear(x, stale, plan, NoComm()), whole)
        assert len(asked.types) == 3, "x twice, the weight once"


def test_a_plan_aside_multiplies_codes() -> None:
    """The control of weights looks at codes that training never wrote."""
    with carrier_backend():
        plan = make_plan(SHIPPED["quest_mxfp4:fp4"], Clock(cache_weights=True))
        x, w, _ = tensors()
        fp4_linear(x.requires_grad_(), w.requires_grad_(), plan, NoComm())
        found = plan.aside(False).quantize_weight(w, NoComm(), training=True)
        assert isinstance(found, BlockScaledTensor)


def test_the_reference_is_asked_for_nothing_new() -> None:
    """On a CPU the operands are codes, as the golden values were made."""
    plan = make_plan(SHIPPED["quartet2:fp4"])
    assert (plan.carrying.types, plan.carrying.wants, plan.pair) == ({}, {}, None)
    assert companion(Request("to_carrier", plan.spec("fprop.x"), torch.device("cpu")), "reference") is None
    operands = run_linear(SHIPPED["quartet2:fp4"]).operands.values()
    assert all(isinstance(operand, BlockScaledTensor) for operand in operands)


def test_the_table_names_the_carriers() -> None:
    with carrier_backend(FP8):
        applied = apply_recipe(TinyLlama(1), "quartet")
    row = next(row for row in applied.rows if row.carriers)
    assert row.carriers == dict.fromkeys(("fprop", "dgrad", "wgrad"), "e5m2 x e4m3fn")
    assert "gemm <cuda, e5m2 x e4m3fn>" in applied.table()
    assert row.to_json()["carriers"] == row.carriers


# ---------- parallel layers


PARALLEL = [(name, kind, sequence) for name in CARRIED for kind in ("column", "row") for sequence in (False, True)]


def parallel_layers() -> list[tuple[dict[str, Tensor], dict[str, Tensor], set[str], int]]:
    """(results of codes, of carriers; slots gathered packed, pairs written) of a rank's layer for each of PARALLEL."""
    found = []
    with megatron_groups(2):
        for name, kind, sequence in PARALLEL:
            layer = make_layer(kind, sequence)
            apply(layer, SHIPPED[name])
            expected = run_layer(layer, kind, sequence, tokens=256)
            with carrier_backend(FP8) as asked:
                layer = make_layer(kind, sequence)
                apply(layer, SHIPPED[name])
                results = run_layer(layer, kind, sequence, tokens=256)
            packed = {slot for slot, how in layer.plan.tally.gathers if how == "packed"}
            found.append((expected, results, packed, asked.calls.get("quantize_pair", 0)))
    return found


@pytest.mark.distributed
def test_tensor_and_sequence_parallel_layers_get_the_same_bits() -> None:
    """A rank's part travels as codes, whatever its GEMM reads."""
    for rank in run_ranks(parallel_layers, 2, timeout=300):
        for (name, kind, sequence), (expected, results, packed, pairs) in zip(PARALLEL, rank, strict=True):
            equal(list(results.values()), list(expected.values()))
            assert bool(packed) == sequence
            assert pairs == 1 + (name == "nvidia_nvfp4:fp4" and not (sequence and kind == "column"))
