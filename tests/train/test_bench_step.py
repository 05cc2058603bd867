"""tools/bench_step.py: both engines on a CPU with random tokens and with a run's own, its report, its errors."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from tests.megatron.tiny import MODEL
from tests.train.tiny_run import FP4, VOCAB, write_counting_tokens

TOOL = Path(__file__).resolve().parents[2] / "tools" / "bench_step.py"


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(TOOL), *arguments], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_step", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_step"] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def test_steps_of_two_recipes_under_both_engines(tmp_path: Path) -> None:
    write_counting_tokens(tmp_path)
    config = tmp_path / "run.yaml"
    config.write_text(
        json.dumps(
            {
                "run": {"name": "tiny"},
                "model": MODEL | {"vocab_size": VOCAB},
                "data": {"train": [str(tmp_path / "counting")], "split": "80,20,0"},
                "optim": {"lr": 8.0e-3},
                "train": {"steps": 6, "global_batch_size": 4, "micro_batch_size": 2, "dtype": "fp32"},
                "recipe": "bf16",
            }
        )
    )
    common = ("--config", str(config), "--steps", "2", "--warmup", "1", "--accumulate", "2", "--out")
    engines = ("--engine", "megatron", "--engine", "deepspeed")
    done = bench(*common, str(tmp_path / "out"), "--recipe", "bf16", "--recipe", FP4, *engines, "--profile")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "bench_step.json").read_text())
    assert (tmp_path / "out" / "bench_step.png").is_file()
    assert report["tokens_a_step"] == 2 * 2 * MODEL["seq_length"]
    assert report["data"] == [str(tmp_path / "counting")]
    found = {(r["engine"], r["recipe"]): r for r in report["results"]}
    assert len(found) == 4
    for (_, recipe), r in found.items():
        assert len(r["step_seconds"]) == 2
        assert len(r["losses"]) == 1 + 2 + 1  # warm-up, timed, profiled
        assert (r["ratio"] == 1) == (recipe == "bf16")
        assert r["profile"]["kinds"]
    for recipe in ("bf16", FP4):  # the engines see the same samples and give the same losses in fp32
        losses = [found[engine, recipe]["losses"] for engine in ("megatron", "deepspeed")]
        assert losses[0] == pytest.approx(losses[1], abs=1e-4)

    config.write_text(config.read_text().replace("counting", "absent"))
    done = bench(*common, str(tmp_path / "random"))
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "random" / "bench_step.json").read_text())["data"] == "random tokens"


def test_one_clear_error() -> None:
    done = bench("--recipe", "quartet3")
    assert done.returncode == 2
    assert "did you mean 'quartet'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NNT", "gemm"),
        ("void cudnn::fusion::compute_dot_do_o_specialized<true, 64>", "attention"),
        ("triton_per_fused__to_copy_add_mean_mul_pow_rsqrt_0", "norm"),
        ("triton_poi_fused_mul_silu_split_0", "swiglu"),
        ("triton_poi_fused__to_copy_add_arange_eq_exp_mul_sub_unsqueeze_0", "loss"),
        ("Memcpy DtoD (Device -> Device)", "copy"),
        ("void at::native::vectorized_elementwise_kernel<8, at::native::CUDAFunctor_add<c10::BFloat16>", "elementwise"),
        ("no such kernel", "other"),
    ],
)
def test_kernels_are_told_apart_by_name(tool: ModuleType, kernel: str, kind: str) -> None:
    assert tool.kind_of(kernel) == kind


def test_idle_times_are_those_in_which_no_kernel_runs(tool: ModuleType) -> None:
    """Kernels of other streams that overlap leave no gap; times of the host do not count. In us, out s."""

    def event(start: float, end: float, name: str, cuda: bool = True) -> SimpleNamespace:
        device = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
        return SimpleNamespace(device_type=device, time_range=SimpleNamespace(start=start, end=end), name=name)

    events = [event(100, 300, "b"), event(0, 200, "a"), event(120, 150, "c"), event(350, 400, "d"),
              event(200, 360, "host", cuda=False)]  # fmt: skip
    assert tool._gaps(events) == [(pytest.approx(50e-6), pytest.approx(300e-6), "b", "d")]
    assert tool._gaps([]) == []
