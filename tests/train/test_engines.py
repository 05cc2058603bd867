"""Both engines train the same model: equal losses, equal gradient norms, exact skips, exact continuation."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fp4dist.megatron.sites import gpt_sites
from fp4dist.nn.apply import apply_recipe
from fp4dist.nn.comm import SLOT_DIMS
from fp4dist.numerics.codes import unpack
from fp4dist.spec.load import load_run
from fp4dist.spec.run import RunConfig
from fp4dist.train import data, loop, schedule
from fp4dist.train.engine import OnItsWay, masked_mean
from fp4dist.train.world import World, open_world
from tests.distributed import run_ranks
from tests.train.tiny_run import (
    FP4,
    curve,
    losses,
    metrics,
    other_dir,
    run_without_picture,
    tiny_run,
    write_counting_tokens,
)

pytestmark = pytest.mark.distributed
ZERO = {f"zero{stage}": ("engine.kind=deepspeed", f"engine.zero_stage={stage}") for stage in range(4)}
KINDS = {"megatron": ("engine.kind=megatron",), **ZERO}


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return str(write_counting_tokens(tmp_path))


def train_all(folder: str, cases: dict[str, tuple[str, ...]]) -> dict[str, Any]:
    """Name -> (losses, gradient norms, validation losses, optimizer) of a run for each case, one after the other."""
    results = {}
    for name, overrides in cases.items():
        config = tiny_run(Path(folder), *overrides, name=name)
        summary = run_without_picture(config)
        dist.barrier()  # rank 0 has written the metrics that all read
        lines = metrics(config)
        norms = [line["grad_norm"] for line in lines if "loss" in line]
        results[name] = (losses(config), norms, [v for _, v in summary.val_losses])
    return results


def assert_same_training(results: dict[str, Any], reference: Any, tolerance: float) -> None:
    for name, found in results.items():
        for values, expected, looser in zip(found, reference, (1, 10, 1), strict=True):  # norms differ first
            assert values == pytest.approx(expected, rel=looser * tolerance), name


def test_engines_and_zero_stages_agree_in_fp32_and_bf16(folder: str) -> None:
    bf16 = {f"{name}_bf16": (*o, "train.dtype=bf16") for name, o in KINDS.items()}
    (results,) = run_ranks(train_all, 1, folder, KINDS | bf16, timeout=300)
    reference = results["megatron"]
    assert reference[0][-1] < reference[0][0] - 0.2, "the tiny model must learn, or equality says nothing"
    assert_same_training({n: r for n, r in results.items() if n in KINDS}, reference, 2e-6)
    assert_same_training({n: r for n, r in results.items() if n in bf16}, results["megatron_bf16"], 5e-3)


def test_two_ranks_equal_one_in_data_and_tensor_parallel(folder: str) -> None:
    """Also with sequence parallelism and query/key norms, whose gradients must be summed over tensor-parallel ranks."""
    tp = ("parallel.tp=2", "parallel.sequence_parallel=true", "model.qk_norm=true")
    one = {"megatron": KINDS["megatron"], "qk": (*KINDS["megatron"], "model.qk_norm=true")}
    two = {
        "dp2_megatron": KINDS["megatron"],
        "dp2_zero1": KINDS["zero1"],
        "dp2_zero3": KINDS["zero3"],
        "tp2_megatron": (*KINDS["megatron"], *tp),
        "tp2_zero1": (*KINDS["zero1"], *tp),
    }
    (alone,) = run_ranks(train_all, 1, folder, one)
    first, second = run_ranks(train_all, 2, folder, two, timeout=300)
    assert first == second, "ranks must agree on every number"
    assert_same_training({n: r for n, r in first.items() if not n.startswith("tp2")}, alone["megatron"], 1e-5)
    assert_same_training({n: r for n, r in first.items() if n.startswith("tp2")}, alone["qk"], 1e-5)


# -- FP4 recipes and the layout

# every rounding, rotation, block shape and source of operands; tests/recipes trains all recipes
KINDS_OF_RECIPES = (FP4, "quartet2", "luq", "mxfp4_h32", "zhou2502")
WIDE = (  # so that every block and rotation divides what a rank of two holds
    "model.hidden_size=256", "model.ffn_hidden_size=256", "model.num_attention_heads=8", "model.num_query_groups=8",
    "model.seq_length=64", "train.micro_batch_size=2", "train.steps=3", "train.eval_every=3",
)  # fmt: skip


def test_data_parallel_ranks_draw_the_noise_of_one(folder: str) -> None:
    """A micro-batch's codes depend on its global number alone, so the losses are equal, not only close."""
    cases = {name: (*WIDE, f"recipe={name}") for name in KINDS_OF_RECIPES}
    (alone,) = run_ranks(train_all, 1, folder, cases, timeout=300)
    first, second = run_ranks(train_all, 2, folder, cases, timeout=300)
    assert first == second, "ranks must agree on every number"
    assert len({tuple(found[0]) for found in alone.values()}) == len(KINDS_OF_RECIPES), "each recipe trains differently"
    for name, found in first.items():
        assert found[0] == pytest.approx(alone[name][0], abs=1e-6), name


def codes_of_the_first_step(folder: str, overrides: tuple[str, ...]) -> dict[tuple[str, str], torch.Tensor]:
    """(linear, slot) -> this rank's codes [R, C] in a model's first step."""
    found: dict[tuple[str, str], torch.Tensor] = {}
    config = tiny_run(Path(folder), *overrides, name="codes")
    with open_world(config) as world:
        engine, applied, batches = build(config, world)
        for target in applied.targets:
            kernels = target.module.plan.kernels
            for slot in [s for s in SLOT_DIMS if s in kernels]:

                def recording(*args: Any, _to: Any = (target.site.path, slot), _kernel: Any = kernels[slot]) -> Any:
                    quantized = _kernel(*args)
                    found[_to] = unpack(quantized.codes)
                    return quantized

                kernels[slot] = recording
        applied.set_step(0, 3)
        engine.train_step(1, batches)
        engine.close()
    return found


@pytest.mark.parametrize("recipe", ["quartet2", "tetrajet_v2_core"])
def test_codes_of_a_whole_model_do_not_depend_on_tensor_parallelism(folder: str, recipe: str) -> None:
    """Noise and scales are those of the whole, also of SwiGLU's gate and up, which a rank holds in two pieces.

    Only the order of GEMM sums is left to differ: its last bits flip few codes of the last layer, where backward
    begins, and more in the layers before it, which are not compared.
    """
    overrides = (*WIDE, f"recipe={recipe}", "train.micro_batch_size=4")
    (whole,) = run_ranks(codes_of_the_first_step, 1, folder, overrides)
    ranks = run_ranks(codes_of_the_first_step, 2, folder, (*overrides, "parallel.tp=2"))
    for (path, slot), codes in whole.items():
        if "layers.0" in path and not slot.startswith("fprop"):
            continue  # a flipped code changes the gradients of every layer before it
        site = next(s for s in gpt_sites(tiny_run(Path(folder), *overrides).model) if s.path == path)
        parts = [rank[path, slot] for rank in ranks]
        if site.split in SLOT_DIMS[slot]:
            axis = SLOT_DIMS[slot].index(site.split)
            stretches = zip(*(part.chunk(site.pieces, axis) for part in parts), strict=True)
            together = torch.cat([piece for stretch in stretches for piece in stretch], axis)
        else:
            together = parts[0]
        share = (together != codes).double().mean().item()
        assert share < (1e-3 if slot.startswith("fprop") else 0.03), f"{path} {slot}: {share:.2%} of the codes differ"


def train_on_text(folder: str, *overrides: str) -> list[float]:
    """Five steps of the quick start's model, two layers of it, on its text."""
    prefix = f"{folder}/austen"
    config = load_run(
        "quickstart",
        [f"run.dir={folder}/run{len(overrides)}", f"data.train=[{prefix}]", f"data.valid=[{prefix}_valid]",
         "model.num_layers=2", "optim.lr=5e-4", "train.stop_after=5", "train.eval_samples=8",
         "checkpoint.every=0", "logging.tensorboard=false", *overrides],
    )  # fmt: skip
    run_without_picture(config)
    dist.barrier()
    return losses(config)


def test_losses_on_text_do_not_depend_on_tensor_parallelism(tmp_path: Path) -> None:
    (alone,) = run_ranks(train_on_text, 1, str(tmp_path))
    first, second = run_ranks(train_on_text, 2, str(tmp_path), "parallel.tp=2")
    assert first == second
    assert alone[-1] < alone[0] - 0.1
    # one flipped code re-rolls the rounding of the layers before it, and Adam's first steps follow the gradient's sign:
    # 1.5e-3 was seen here with quartet2, 7e-4 with the whole quick start; the bits are compared in the test above
    assert first == pytest.approx(alone, abs=5e-3)


# -- steps that must not happen


def state_of(engine: Any) -> list[torch.Tensor]:
    """Copies of every weight, master weight, moment and step count of this rank."""
    if hasattr(engine, "_chunks"):
        engine._finish_gathers()  # of weights that the last step updated
        inner = [part.optimizer for part in engine._optimizer.chained_optimizers]
        (model,) = [chunk.module for chunk in engine._chunks]
    else:
        inner, model = [engine._adamw], engine._engine.module
    found = [p.ds_tensor if hasattr(p, "ds_tensor") else p for p in model.parameters()]
    for optimizer in inner:
        for group in optimizer.param_groups:
            for p in group["params"]:
                state = optimizer.state[p]
                found += [p, *(state[k] for k in ("step", "exp_avg", "exp_avg_sq") if k in state)]
    return [t.detach().clone() for t in found]


def build(
    config: RunConfig, world: World, gradient: Callable[[torch.Tensor], Any] | None = None
) -> tuple[Any, Any, Any]:
    """(engine, applied recipe, batches); `gradient` sees the final norm's gradient before anything else does."""
    datasets = data.build_datasets(config, world.dp_size)
    with pytest.MonkeyPatch.context() as patch:
        if gradient is not None:
            patch.setattr(
                loop, "apply_recipe", lambda model, *a, **k: hooked(apply_recipe(model, *a, **k), model, gradient)
            )
        engine, applied = loop.build_engine(config, world)
    return engine, applied, data.train_iterator(datasets, config, dp_rank=world.dp_rank, dp_size=world.dp_size)


def loss_module(engine: Any) -> Any:
    """The module in which the engine looks up masked_mean."""
    pipeline = hasattr(engine, "_chunks") or getattr(engine, "_pipeline", None) is not None
    return schedule if pipeline else sys.modules[type(engine).__module__]


def hooked(applied: Any, chunks: Any, gradient: Callable[[torch.Tensor], Any]) -> Any:
    if (norm := chunks[-1].decoder.final_layernorm) is not None:  # the last stage of a pipeline has it
        norm.weight.register_hook(gradient)
    return applied


def skip_behaviour(folder: str, cases: dict[str, tuple[str, ...]]) -> dict[str, list[Any]]:
    """Two good steps, one with an infinite gradient on the last rank, one with an infinite loss, one good step."""
    results: dict[str, list[Any]] = {}
    for name, overrides in cases.items():
        config = tiny_run(Path(folder), *overrides, name=name)
        with open_world(config) as world:
            poison = {"gradient": False, "loss": False}
            last = world.rank == world.size - 1
            gradient = lambda g, p=poison, last=last: g * math.inf if p["gradient"] and last else g  # noqa: E731
            engine, applied, batches = build(config, world, gradient)
            module = loss_module(engine)
            original = module.masked_mean
            module.masked_mean = lambda *a, p=poison, f=original: infinite(*f(*a)) if p["loss"] else f(*a)
            log = []
            for step, bad in enumerate((None, None, "gradient", "loss", None), start=1):
                applied.set_step(step - 1, config.train.steps)
                before = state_of(engine) if step > 1 else []
                if bad:
                    poison[bad] = True
                result = engine.train_step(step, batches)
                if bad:
                    poison[bad] = False
                after = state_of(engine)
                same = len(before) == len(after) and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
                log.append((result.skipped, same, math.isfinite(result.loss)))
            module.masked_mean = original
            engine.close()
        results[name] = log
    return results


def infinite(mean: torch.Tensor, sums: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A loss that overflowed while its gradient did not."""
    return mean, sums * torch.tensor([math.inf, 1.0], dtype=sums.dtype)


EXPECTED = [(False, False, True), (False, False, True), (True, True, True), (True, True, False), (False, False, True)]


def test_a_step_that_is_not_finite_changes_nothing(folder: str) -> None:
    cases = KINDS | {f"{n}_bf16": (*o, "train.dtype=bf16") for n, o in KINDS.items() if n != "zero2"}
    (results,) = run_ranks(skip_behaviour, 1, folder, cases, timeout=300)
    for name, log in results.items():
        assert log == EXPECTED, name


def test_one_bad_rank_makes_all_ranks_skip(folder: str) -> None:
    cases = {"megatron": KINDS["megatron"], "zero1": KINDS["zero1"], "tp": (*KINDS["megatron"], "parallel.tp=2")}
    cases |= {f"tp_{n}": (*ZERO[n], "parallel.tp=2") for n in ("zero0", "zero1", "zero3")}
    for results in run_ranks(skip_behaviour, 2, folder, cases, timeout=300):
        for name, log in results.items():
            assert log == EXPECTED, name


def first_step_skipped(folder: str, cases: dict[str, tuple[str, ...]]) -> dict[str, bool]:
    """The very first step is bad, the next one good: optimizer state that does not exist yet must not break either."""
    good = {}
    for name, overrides in cases.items():
        config = tiny_run(Path(folder), *overrides, name=name)
        with open_world(config) as world:
            engine, applied, batches = build(config, world)
            module = loss_module(engine)
            original = module.masked_mean
            module.masked_mean = lambda *a, f=original: infinite(*f(*a))
            applied.set_step(0, 6)
            first = engine.train_step(1, batches)
            module.masked_mean = original
            applied.set_step(1, 6)
            second = engine.train_step(2, batches)
            good[name] = first.skipped and not second.skipped
            engine.close()
    return good


def test_the_first_step_may_be_skipped(folder: str) -> None:
    cases = KINDS | {"bf16_zero1": (*ZERO["zero1"], "train.dtype=bf16")}
    (good,) = run_ranks(first_step_skipped, 1, folder, cases, timeout=300)
    assert good == dict.fromkeys(cases, True)


# -- continuing


def interrupted_and_whole(folder: str, cases: dict[str, tuple[str, ...]]) -> dict[str, tuple[Any, Any]]:
    """(curve of an uninterrupted run, curve of one that stopped after step 2 and went on) for each case."""
    results = {}
    for name, overrides in cases.items():
        whole = tiny_run(Path(folder), *overrides, name=f"{name}_whole")
        run_without_picture(whole)
        parts = other_dir(whole, Path(folder) / f"{name}_parts")
        stopped = tiny_run(Path(folder), *overrides, "train.stop_after=2", name=f"{name}_whole")
        first = run_without_picture(other_dir(stopped, Path(folder) / f"{name}_parts"))
        assert (first.interrupted, first.steps) == (True, 2)
        dist.barrier()
        assert len(curve(parts)) == 3  # steps 0, 1, 2
        second = run_without_picture(parts)
        dist.barrier()
        assert not second.interrupted
        results[name] = (curve(whole), curve(parts))
    return results


def test_a_resumed_run_has_the_loss_stream_of_an_uninterrupted_one(folder: str) -> None:
    """Bit for bit, for both engines, under an FP4 recipe with stochastic rounding."""
    fp4 = f"recipe={FP4}"
    cases = {
        "megatron": (*KINDS["megatron"], fp4),
        "megatron_bf16": (*KINDS["megatron"], fp4, "train.dtype=bf16"),
        "zero1": (*KINDS["zero1"], fp4),
        "zero3_bf16": (*KINDS["zero3"], fp4, "train.dtype=bf16"),
    }
    (results,) = run_ranks(interrupted_and_whole, 1, folder, cases, timeout=300)
    for name, (whole, parts) in results.items():
        assert parts == whole, name


def test_resume_is_exact_on_two_ranks(folder: str) -> None:
    cases = {
        "megatron": (*KINDS["megatron"], f"recipe={FP4}"),
        "zero1": (*KINDS["zero1"], f"recipe={FP4}"),
        "tp2": (*KINDS["megatron"], "parallel.tp=2"),
        "vpp": (*KINDS["megatron"], f"recipe={FP4}", "parallel.pp=2", "parallel.vpp=2", "model.num_layers=4"),
        "cp2": (*KINDS["megatron"], f"recipe={FP4}", "parallel.cp=2"),
    }
    for results in run_ranks(interrupted_and_whole, 2, folder, cases, timeout=300):
        for name, (whole, parts) in results.items():
            assert parts == whole, name


def distinct_steps(folder: str) -> bool:
    """After a load, no two parameters share their step counter."""
    config = tiny_run(Path(folder), "train.stop_after=1")
    run_without_picture(config)
    with open_world(config) as world:
        engine, _, _ = build(config, world)
        engine.load(Path(config.run_dir) / "checkpoints/step_00000001/state", step=1, same_layout=True)
        steps = [s["step"] for part in engine._optimizer.chained_optimizers for s in part.optimizer.state.values()]
        assert all(step == 1 for step in steps)
        return len({step.data_ptr() for step in steps}) == len(steps) > 2


def test_loaded_step_counters_are_separate_tensors(folder: str) -> None:
    assert run_ranks(distinct_steps, 1, folder) == [True]


def save_with_two_load_with_one(folder: str, layouts: tuple[tuple[str, ...], ...]) -> dict[str, list[float]]:
    """Step 1 to 3 on two ranks, one run a layout."""
    for number, overrides in enumerate(layouts):
        run_without_picture(tiny_run(Path(folder), *overrides, "train.stop_after=3", name=f"layout{number}"))
    return {}


def continue_alone(folder: str, count: int) -> list[list[tuple[Any, ...]]]:
    """The rest of each of those runs on one rank."""
    curves = []
    for number in range(count):
        source = f"{folder}/layout{number}/checkpoints/step_00000003"
        config = tiny_run(Path(folder), f"checkpoint.load={source}", name=f"alone{number}")
        run_without_picture(config)
        curves.append(curve(config, ("step", "loss")))
    whole = tiny_run(Path(folder), name="reference")
    run_without_picture(whole)
    curves.append(curve(whole, ("step", "loss")))
    return curves


def test_megatron_checkpoints_can_change_their_layout(folder: str) -> None:
    layouts = (("parallel.tp=2",), ("parallel.pp=2",), ())
    run_ranks(save_with_two_load_with_one, 2, folder, layouts)
    ((*continued, whole),) = run_ranks(continue_alone, 1, folder, len(layouts))
    expected = {step: loss for step, loss in whole if loss is not None}
    for found in continued:
        assert [step for step, _ in found] == [3, 4, 5, 6]  # step 3: the weights it started with were evaluated
        for step, loss in found[1:]:
            assert loss == pytest.approx(expected[step], rel=1e-5)


def test_masked_mean_counts_only_what_the_mask_admits() -> None:
    loss_BS = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
    mask_BS = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    mean, sums = masked_mean(loss_BS, mask_BS)
    assert mean.item() == pytest.approx(37 / 3)
    assert sums.tolist() == [37.0, 3.0]
    nothing, none = masked_mean(loss_BS, torch.zeros_like(mask_BS))
    assert (nothing.item(), none.tolist()) == (0.0, [0.0, 0.0])


def test_a_number_on_its_way_to_the_host() -> None:
    assert OnItsWay(torch.tensor([2.5])).value() == 2.5
    assert OnItsWay(math.inf).value() == math.inf
