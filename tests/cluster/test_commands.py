"""plan and predict as a user types them: output, files, exit status."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from fp4dist.cluster.__main__ import main
from fp4dist.cluster.pictures import schedule
from fp4dist.spec.load import load_run

PREDICT = [  # one word an item
    "predict",
    "--model",
    "llama3_405b",
    "--topology",
    "gb200_nvl72",
    "--gpus",
    "512",
    "--layout",
    "tp=4,pp=8,vpp=8,cp=2,ep=1",
    "--precision",
    "nvfp4",
    "--gbs",
    "1152",
    "--mbs",
    "1",
    "--seq",
    "8192",
]
PLAN = ["plan", "--model", "llama3_8b", "--topology", "gb200_nvl72", "--gpus", "8", "--gbs", "64", "--recipe"]


def test_predict_prints_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PREDICT, "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert out["step_time_s"] == pytest.approx(sum(out["breakdown"].values()))
    assert out["memory_gb"] == pytest.approx(sum(out["memory"].values()))
    assert out["tflops_per_gpu"] > 0
    assert out["layout"]["dp"] == 8
    assert out["layout"]["order"] in ("tp-cp-ep-dp-pp", "tp-cp-ep-pp-dp")


def test_predict_speaks_to_people_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(PREDICT) == 0
    text = capsys.readouterr().out
    assert "matrix products" in text
    assert "rank map" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--gpus": "500"}, "not a multiple of tp * pp * cp"),
        ({"--layout": "vp=4"}, "did you mean 'vpp'"),
        ({"--layout": "tp=4,tp=2"}, "given twice"),
        ({"--layout": "tp=x"}, "whole number"),
        ({"--layout": "tp=0"}, "at least 1"),
        ({"--model": "llama3_405"}, "did you mean 'llama3_405b'"),
        ({"--topology": "gb200"}, "no file for 'gb200'"),
        ({"--gbs": "0"}, "--gbs = 0 must be at least 1"),
    ],
)
def test_errors_are_one_line(change: dict[str, str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = list(PREDICT)
    for key, value in change.items():
        words[words.index(key) + 1] = value
    assert main(words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_plan_writes_a_run_that_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    assert main([*PLAN, "nvidia_nvfp4", "--write", str(path), "--pictures", str(tmp_path), "--why"]) == 0
    text = capsys.readouterr().out
    assert "codec of each axis" in text
    assert "tp = " in text
    config = load_run(path)
    assert config.model.name == "llama3_8b"
    assert config.train.global_batch_size == 64
    assert config.recipe.name == "nvidia_nvfp4"
    assert config.comm is None, "no gradient leaves its NVLink domain"
    for name in ("timeline.svg", "timeline.png", "racks.svg", "racks.png"):
        assert (tmp_path / name).stat().st_size > 1000


def test_plan_for_cpu_ranks_is_a_run_of_gloo_ranks(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    words = ["plan", "--model", "tiny", "--topology", "cpu", "--gpus", "4", "--gbs", "8", "--recipe", "bf16"]
    assert main([*words, "--write", str(path)]) == 0
    config = load_run(path)
    assert config.train.dtype == "fp32"
    assert config.data.prepare is not None


def test_plan_says_by_how_much_and_what_helps(capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "plan",
        "--model",
        "llama3_70b",
        "--topology",
        "h100_hgx",
        "--gpus",
        "8",
        "--gbs",
        "8",
        "--precision",
        "fp8",
    ]
    assert main(words) == 3
    text = capsys.readouterr().out
    assert "too many" in text
    assert "surely fits on" in text


def test_why_not_names_the_cause(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PLAN, "bf16", "--why", "tp=8"]) == 0
    assert "tp8 mbs1: +" in capsys.readouterr().out


def test_gradients_are_written_as_codes_where_that_gains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On 80 domains a step has few micro-batches to hide sums under: the run file asks for codes unless told not."""
    path = tmp_path / "run.yaml"
    words = "plan --model llama3_405b --topology gb200_nvl72 --gpus 5120 --gbs 1280 --fix tp=4,pp=8,vpp=8,cp=2,ep=1"
    assert main([*words.split(), "--recipe", "nvidia_nvfp4", "--write", str(path)]) == 0
    assert "--write puts comm: {grad_reduce: auto, topology: gb200_nvl72} into the run file" in capsys.readouterr().out
    comm = load_run(path).comm
    assert comm is not None
    assert (comm.grad_reduce, comm.topology) == ("auto", "gb200_nvl72")
    assert "less with comm:" in path.read_text()
    for more in (["nvidia_nvfp4", "--comm", "none"], ["bf16"]):
        assert main([*words.split(), "--write", str(path), "--recipe", *more]) == 0
        assert load_run(path).comm is None


def test_405b_on_eight_racks_keeps_copies_inside(tmp_path: Path) -> None:
    """Data parallel across racks, everything else inside: the layout of the published jobs, found and written."""
    path = tmp_path / "run.yaml"
    words = "plan --model llama3_405b --topology gb200_nvl72 --gpus 512 --recipe nvidia_nvfp4 --gbs 1152 --seq 8192"
    assert main([*words.split(), "--write", str(path)]) == 0
    config = load_run(path)
    assert config.comm is None, "codes would save too little"
    parallel = config.parallel
    assert parallel.tp * parallel.pp * parallel.cp <= 64
    assert parallel.order == "tp-cp-ep-pp-dp"


def test_dimensions_can_be_decided(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PLAN, "bf16", "--fix", "tp=2,cp=2", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["ranked"]
    assert rows
    assert all(row["layout"]["tp"] == row["layout"]["cp"] == 2 for row in rows)


def test_plan_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PLAN, "bf16", "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    times = [row["step_time_s"] for row in out["ranked"]]
    assert times == sorted(times)  # one rack: nothing spans domains


def test_the_drawn_schedule_is_1f1b() -> None:
    """It is m + pp - 1 forward and backward passes long, and no stage does two things at once."""
    stages, micro = 4, 6
    rows = schedule(stages, micro, 1.0, 2.0)
    assert max(start + length for row in rows for start, length, _ in row) == (micro + stages - 1) * 3.0
    for row in rows:
        assert len(row) == 2 * micro
        assert all(a[0] + a[1] <= b[0] + 1e-9 for a, b in pairwise(row))


def test_the_planner_needs_no_torch() -> None:
    """It runs on a laptop, where neither torch nor Megatron is installed."""
    code = (
        "import sys; from fp4dist.cluster.__main__ import main;"
        f" status = main({[*PREDICT, '--json']!r}); sys.exit(status or ('torch' in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
