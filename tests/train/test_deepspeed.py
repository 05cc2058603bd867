"""The DeepSpeed engine: equal to the Megatron engine in every layout, its settings, its checkpoints, its gradients."""

from __future__ import annotations

import argparse
import contextlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fp4dist.errors import CheckpointError, ConfigError, Fp4DistError
from fp4dist.nn import function
from fp4dist.train.world import open_world
from tests.distributed import run_ranks
from tests.train.test_engines import EXPECTED, assert_same_training, build, interrupted_and_whole, skip_behaviour
from tests.train.tiny_run import FP4, curve, losses, metrics, run_without_picture, tiny_run, write_counting_tokens

pytestmark = pytest.mark.distributed
Overrides = tuple[str, ...]
SHORT = ("train.steps=4", "train.eval_every=4", "train.micro_batch_size=1", "checkpoint.every=0")
PP = ("parallel.pp=2", "model.num_layers=4")
TIED = "model.tie_embeddings=true"
SP = ("parallel.tp=2", "parallel.sequence_parallel=true", "model.qk_norm=true")
BF16 = "train.dtype=bf16"
MOE = "model.moe={num_experts: 4, top_k: 2, ffn_hidden_size: 64, aux_loss_coeff: 0.1}"


def zero(stage: int, *settings: str) -> Overrides:
    """Overrides for ZeRO `stage`; `settings` are engine.deepspeed keys with their values."""
    return ("engine.kind=deepspeed", f"engine.zero_stage={stage}", *(f"engine.deepspeed.{s}" for s in settings))


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return str(write_counting_tokens(tmp_path))


# -- the same training as under Megatron's engine


def train_all(folder: str, cases: dict[str, Overrides]) -> dict[str, Any]:
    """Name -> (losses, gradient norms, validation losses) of a short run for each case."""
    results = {}
    for name, overrides in cases.items():
        config = tiny_run(Path(folder), *SHORT, *overrides, name=name)
        summary = run_without_picture(config)
        dist.barrier()  # rank 0 has written the metrics that all read
        norms = [line["grad_norm"] for line in metrics(config) if "loss" in line]
        results[name] = (losses(config), norms, [v for _, v in summary.val_losses])
    return results


def assert_equal_to_megatron(results: dict[str, Any], tolerance: float) -> None:
    """Cases are called <layout> under Megatron's engine and <layout>:<what> under DeepSpeed."""
    for name in results:
        layout, _, what = name.partition(":")
        if what:
            assert_same_training({name: results[name]}, results[layout], tolerance)


def check_ranks(world: int, folder: str, cases: dict[str, Overrides], tolerance: float = 1e-6) -> dict[str, Any]:
    first, *others = run_ranks(train_all, world, folder, cases, timeout=300)
    assert all(other == first for other in others), "ranks must agree on every number"
    assert_equal_to_megatron(first, tolerance)
    return first


def test_every_zero_stage_under_tensor_sequence_and_context_parallelism(folder: str) -> None:
    """SP and query/key norms leave partial gradients on each rank, context parallelism a part of the loss."""
    cases = {"tp": ("parallel.tp=2",), "sp": SP, "cp": ("parallel.cp=2",)}
    cases |= {f"tp:zero{stage}": ("parallel.tp=2", *zero(stage)) for stage in (0, 2)}
    cases |= {f"sp:zero{stage}": (*SP, *zero(stage)) for stage in (1, 3)}
    cases |= {f"cp:zero{stage}": ("parallel.cp=2", *zero(stage)) for stage in (0, 3)}
    check_ranks(2, folder, cases)


def test_bf16_with_fp32_master_weights(folder: str) -> None:
    """Losses in bf16 differ by what bf16 rounds; gradient norms, taken in fp32, show what is counted how often."""
    tied = (*PP, TIED, BF16)
    cases = {"tp": ("parallel.tp=2", BF16), "pp": tied, "pp:zero0": (*tied, *zero(0)), "pp:zero1": (*tied, *zero(1))}
    cases |= {f"tp:zero{stage}": ("parallel.tp=2", BF16, *zero(stage)) for stage in (0, 1, 2, 3)}
    results = check_ranks(2, folder, cases, tolerance=5e-3)
    for name, (_, norms, _) in results.items():
        assert norms[0] == pytest.approx(results[name.partition(":")[0]][1][0], rel=1e-4), name


def test_zero_0_and_1_under_megatrons_schedules(folder: str) -> None:
    """1F1B and interleaved; the norm counts tied embeddings, which two stages hold, once."""
    interleaved = (*PP, TIED, "parallel.vpp=2")
    cases = {
        "pp": PP,
        "pp:zero0": (*PP, *zero(0)),
        "pp:zero1": (*PP, *zero(1)),
        "tied": (*PP, TIED),
        "tied:zero0": (*PP, TIED, *zero(0)),
        "tied:zero1": (*PP, TIED, *zero(1)),
        "vpp": interleaved,
        "vpp:zero1": (*interleaved, *zero(1)),
    }
    results = check_ranks(2, folder, cases)
    assert results["vpp:zero1"][0] == pytest.approx(results["tied"][0], rel=1e-6), "the schedule changes no number"
    assert results["pp"][0] != pytest.approx(results["tied"][0], rel=1e-4), "tied embeddings train differently"


def test_pipelines_times_tensor_and_data_parallelism(folder: str) -> None:
    sharded = (*PP, *SP, TIED)
    replicated = (*PP, TIED)
    cases = {"sp": sharded, "sp:zero1": (*sharded, *zero(1)), "dp": replicated, "dp:zero0": (*replicated, *zero(0))}
    cases |= {"dp:zero1": (*replicated, *zero(1))}
    check_ranks(4, folder, cases)


def test_experts_and_their_load_balancing_loss(folder: str) -> None:
    """Four micro-batches, so that a balancing loss that is not scaled with them would show.

    Megatron's engine comes last: its schedule leaves the scale behind for the process.
    """
    cases = {"moe:zero1": (MOE, *zero(1)), "moe:zero3": (MOE, *zero(3)), "moe": (MOE,)}
    check_ranks(1, folder, cases)


# -- steps that must not happen, and continuing


def test_a_pipeline_skips_a_step_that_is_not_finite(folder: str) -> None:
    cases: dict[str, Overrides] = {f"zero{stage}": (*PP, TIED, *zero(stage)) for stage in (0, 1)}
    cases |= {f"zero{stage}_bf16": (*PP, TIED, BF16, *zero(stage)) for stage in (0, 1)}
    cases["tp_bf16"] = ("parallel.tp=2", BF16, *zero(0))
    for results in run_ranks(skip_behaviour, 2, folder, cases, timeout=300):
        for name, log in results.items():
            assert log == EXPECTED, name


def test_resume_is_exact_under_a_pipeline(folder: str) -> None:
    fp4 = f"recipe={FP4}"
    cases = {"zero1": (*PP, TIED, fp4, *zero(1)), "bf16_vpp": (*PP, TIED, BF16, "parallel.vpp=2", *zero(1))}
    cases["zero0"] = (*PP, *zero(0))
    for results in run_ranks(interrupted_and_whole, 2, folder, cases, timeout=300):
        for name, (whole, parts) in results.items():
            assert parts == whole, name


# -- universal checkpoints


def train_three_steps(folder: str, cases: dict[str, Overrides]) -> None:
    for name, overrides in cases.items():
        run_without_picture(tiny_run(Path(folder), *overrides, "train.stop_after=3", name=name))


def convert(folder: str, names: Sequence[str]) -> None:
    """DeepSpeed's own program, in this process."""
    from deepspeed.checkpoint import ds_to_universal

    for name in names:
        state = Path(folder) / name / "checkpoints/step_00000003/state"
        args = argparse.Namespace(
            input_folder=str(state / "deepspeed"), output_folder=str(state / "universal"), num_extract_workers=1,
            num_merge_workers=1, keep_temp_folder=False, strict=True, inject_missing_state=False,
        )  # fmt: skip
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            ds_to_universal.main(args)


def convert_and_continue(
    folder: str, cases: dict[str, tuple[str, Overrides]], wholes: dict[str, Overrides]
) -> dict[str, Any]:
    """Curves of runs that start from other runs' checkpoints, and of runs from the start to the end."""
    if dist.get_rank() == 0:
        convert(folder, sorted({source for source, _ in cases.values()}))
    dist.barrier()
    curves = {}
    for name, (source, overrides) in cases.items():
        start = (f"checkpoint.load={folder}/{source}/checkpoints/step_00000003", "checkpoint.trusted=true")
        config = tiny_run(Path(folder), *overrides, *start, name=f"{name}_continued")
        run_without_picture(config)
        dist.barrier()
        curves[name] = curve(config, ("step", "loss", "val_loss"))
    for name, overrides in wholes.items():
        config = tiny_run(Path(folder), *overrides, name=name)
        run_without_picture(config)
        dist.barrier()
        curves[name] = curve(config, ("step", "loss", "val_loss"))
    return curves


def assert_continues(found: list[tuple[Any, ...]], whole: list[tuple[Any, ...]], name: str) -> None:
    """`found` starts with the evaluation at step 3; the rest is the end of `whole`."""
    (step, _, before), *rest = found
    *_, (_, _, at_3), fourth, fifth, sixth = whole
    assert (step, [line[0] for line in rest]) == (3, [4, 5, 6]), name
    assert before == pytest.approx(at_3, rel=1e-6), name
    for line, expected in zip(rest, (fourth, fifth, sixth), strict=True):
        assert line[1] == pytest.approx(expected[1], rel=1e-6), (name, line)
    assert rest[-1][2] == pytest.approx(sixth[2], rel=1e-6), name


def test_universal_checkpoints_fit_other_layouts(folder: str) -> None:
    """Two ranks to one: data, tensor (SwiGLU, rows, vocabulary) and pipeline parallelism, ZeRO 1 to 3, bf16."""
    saved = {
        "dp_zero2": zero(2),
        "dp_zero3": zero(3),
        "dp_bf16": (BF16, *zero(1)),
        "tp": ("parallel.tp=2", TIED, *zero(1)),
        "pp": ("parallel.pp=2", TIED, *zero(1)),
    }
    run_ranks(train_three_steps, 2, folder, saved, timeout=300)
    cases = {
        "2_to_1": ("dp_zero2", zero(1)),
        "3": ("dp_zero3", zero(3)),
        "bf16": ("dp_bf16", (BF16, *zero(1))),
        "tp": ("tp", (TIED, *zero(1))),
        "pp": ("pp", (TIED, *zero(1))),
    }
    wholes = {"whole": zero(1), "whole_tied": (TIED, *zero(1)), "whole_bf16": (BF16, *zero(1))}
    (curves,) = run_ranks(convert_and_continue, 1, folder, cases, wholes, timeout=300)
    for name, whole in {"2_to_1": "", "3": "", "bf16": "_bf16", "tp": "_tied", "pp": "_tied"}.items():
        assert_continues(curves[name], curves[f"whole{whole}"], name)


def test_universal_checkpoints_fit_larger_layouts(folder: str) -> None:
    run_ranks(train_three_steps, 1, folder, {"one": (TIED, *zero(1))}, timeout=300)
    tied = (TIED, *zero(1))
    cases = {"dp": ("one", tied), "tp": ("one", ("parallel.tp=2", *tied)), "pp": ("one", ("parallel.pp=2", *tied))}
    curves, other = run_ranks(convert_and_continue, 2, folder, cases, {"whole": tied}, timeout=300)
    assert curves == other
    for name in cases:
        assert_continues(curves[name], curves["whole"], name)


def refusals_to_load(folder: str) -> dict[str, str]:
    """Case -> message of a checkpoint of ZeRO 1 that is not converted."""
    train_three_steps(folder, {"one": zero(1)})
    messages = {}
    for name, overrides in {"stage": zero(2), "layout": (*zero(1), "parallel.tp=2")}.items():
        start = (f"checkpoint.load={folder}/one/checkpoints/step_00000003", "checkpoint.trusted=true")
        try:
            run_without_picture(tiny_run(Path(folder), *overrides, *start, name=name))
        except CheckpointError as e:
            messages[name] = str(e)
    return messages


def test_another_layout_names_the_conversion(folder: str) -> None:
    for messages in run_ranks(refusals_to_load, 2, folder):
        assert set(messages) == {"stage", "layout"}
        assert "engine.zero_stage = 1, this run has 2" in messages["stage"]
        state = f"{folder}/one/checkpoints/step_00000003/state"
        command = f"ds_to_universal --input_folder {state}/deepspeed --output_folder {state}/universal"
        assert all(command in message for message in messages.values())


# -- weight gradients


def fp32_gradients(folder: str, cases: dict[str, Overrides]) -> dict[str, tuple[int, list[str]]]:
    """Case -> (weights compared, those whose accumulated gradient is not the fp32 sum of what FP4 GEMMs gave)."""
    from deepspeed.utils import safe_get_full_grad

    results = {}
    for name, overrides in cases.items():
        config = tiny_run(Path(folder), *overrides, BF16, f"recipe={FP4}", name=name)
        given: dict[Any, list[torch.Tensor]] = {}
        with open_world(config) as world, pytest.MonkeyPatch.context() as patch:
            engine, applied, batches = build(config, world)
            original = function.hand_over

            def recording(weight: Any, dw: torch.Tensor, _to: Any = given, _f: Any = original) -> Any:
                if dw.dtype == torch.float32:
                    _to.setdefault(weight, []).append(dw.clone())
                return _f(weight, dw)

            patch.setattr(function, "hand_over", recording)
            wrong: list[str] = []

            def compare(_: bool, _given: Any = given, _wrong: Any = wrong) -> tuple[float, bool]:
                for weight, (first, second) in _given.items():
                    gradient: Any = safe_get_full_grad(weight)
                    if gradient.dtype != torch.float32 or not torch.equal(gradient.view(first.shape), first + second):
                        _wrong.append(str(tuple(first.shape)))
                return 1.0, False

            patch.setattr(engine, "_update", compare)
            applied.set_step(0, 6)
            engine.train_step(1, batches)
            rounded = [w for w, (a, _) in given.items() if torch.equal(a.bfloat16().float(), a)]
            assert not rounded, "a gradient that fits into bf16 cannot show the difference"
            engine.close()
        results[name] = (len(given), wrong)
    return results


def test_fp4_weight_gradients_reach_zero_in_fp32(folder: str) -> None:
    """Two micro-batches: bit for bit the fp32 sum, although `.grad` of a bf16 weight is normally bf16."""
    (found,) = run_ranks(fp32_gradients, 1, folder, {f"zero{stage}": zero(stage) for stage in range(4)}, timeout=300)
    for name, (compared, wrong) in found.items():
        assert compared >= 4, name
        assert not wrong, name


# -- settings that are passed through


def outcomes(folder: str, cases: dict[str, Overrides]) -> dict[str, str]:
    """Case -> the error's message, or the settings that DeepSpeed ended up with."""
    messages = {}
    for name, overrides in cases.items():
        config = tiny_run(Path(folder), *overrides, name=name)
        with open_world(config) as world:
            try:
                engine, _, _ = build(config, world)
            except Fp4DistError as e:
                messages[name] = f"{type(e).__name__}: {e}"
            else:
                messages[name] = str(engine._engine.config)
                engine.close()
    return messages


def test_settings_are_merged_or_refused(folder: str) -> None:
    from fp4dist.train.deepspeed_settings import DECIDED

    cases = {key: zero(1, f"{key}=1") for key in DECIDED}
    cases |= {
        "below": zero(1, "bf16.enabled=true"),
        "section": zero(1, "zero_optimization=3"),
        "typo": zero(1, "prescale_gradient=true"),
        "unknown": zero(1, "qqqq=1"),
        "zero_typo": zero(3, "zero_optimization.zero_hpz_partition_sizes=2"),
        "value": zero(1, "zero_optimization.reduce_scatter=perhaps"),
        "quantized": zero(3, "zero_optimization.zero_quantized_weights=true"),
        "merged": zero(2, "zero_optimization.round_robin_gradients=true", "steps_per_print=7"),
        "later": zero(2, "prescale_gradients=true"),
    }
    (found,) = run_ranks(outcomes, 1, folder, cases, timeout=300)
    for key, way_out in DECIDED.items():
        assert found[key] == f"ConfigError: engine.deepspeed.{key}: fp4dist sets {key}; use {way_out} instead"
    assert "engine.deepspeed.bf16.enabled: fp4dist sets bf16; use train.dtype" in found["below"]
    assert "engine.deepspeed.zero_optimization = 3 must be a section" in found["section"]
    assert "has no such setting; did you mean prescale_gradients?" in found["typo"]
    assert "engine.deepspeed.qqqq: " in found["unknown"]
    assert "refuses zero_hpz_partition_sizes in its DeepSpeedZeroConfig (Extra inputs are not" in found["zero_typo"]
    assert "refuses reduce_scatter in its DeepSpeedZeroConfig" in found["value"]
    assert "zero_quantized_weights = True: DeepSpeed cannot build its quantizer kernels here" in found["quantized"]
    assert "'round_robin_gradients': True" in found["merged"]
    assert "'stage': 2" in found["merged"]
    assert "'steps_per_print': 7" in found["merged"]
    assert "refuses these settings (pre-scale gradients is not yet supported with ZeRO-2" in found["later"]


def secondary_partitions(folder: str) -> bool:
    """Whether ZeRO++ really keeps a second copy of the partitions within its group."""
    config = tiny_run(Path(folder), *zero(3, "zero_optimization.zero_hpz_partition_size=2"), name="hpz")
    with open_world(config) as world:
        engine, applied, batches = build(config, world)
        kept = False

        def look(_: bool) -> tuple[float, bool]:  # the update itself drops the copies
            nonlocal kept
            kept = any(p.ds_secondary_tensor is not None for p in engine._engine.module.parameters())
            return 1.0, False

        engine._update = look
        applied.set_step(0, 6)
        engine.train_step(1, batches)
        engine.close()
    return kept


def test_hierarchical_partitions_and_offload_change_no_number(folder: str) -> None:
    offload = "zero_optimization.offload_optimizer.device=cpu"
    cases = {
        "dp": (),
        "dp:hpz": zero(3, "zero_optimization.zero_hpz_partition_size=2"),
        "dp:offload": zero(2, offload),
        "dp:offload3": zero(3, offload),
    }
    check_ranks(2, folder, cases)
    assert run_ranks(secondary_partitions, 2, folder) == [True, True]


def test_what_deepspeed_cannot_run_is_refused(folder: str) -> None:
    cases = {
        "ep": (MOE, "parallel.ep=2", *zero(1)),
        "tp": (MOE, "parallel.tp=2", "parallel.sequence_parallel=true", *zero(1)),
    }
    cases["overlap"] = (*PP, *zero(1, "zero_optimization.overlap_comm=true"))
    for found in run_ranks(outcomes, 2, folder, cases):
        assert "parallel.ep = 2 with engine.kind = deepspeed" in found["ep"]
        assert "model.moe and parallel.tp = 2 with engine.kind = deepspeed" in found["tp"]
        assert "overlap_comm = True with parallel.pp = 2" in found["overlap"]
    with pytest.raises(ConfigError, match=r"ZeRO 2 and 3 reduce gradients inside every backward"):
        tiny_run(Path(folder), "parallel.pp=2", *zero(2))
