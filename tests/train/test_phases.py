"""Phases of a run: every way to start, the rate they bring, what a probe leaves behind, and exact continuation."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fp4dist.errors import ConfigError
from fp4dist.nn.phases import Phases
from fp4dist.spec.phases import LrShape, Manual
from fp4dist.spec.recipe import Phase, Recipe
from fp4dist.train import data, loop, optim, phase
from fp4dist.train.schedule import PipelineSchedule
from fp4dist.train.world import open_world
from tests.distributed import run_ranks
from tests.train.tiny_run import curve, metrics, run_without_picture, tiny_run, write_counting_tokens

STEPS, SWITCH = 6, 3  # the phase's first step is SWITCH + 1
RECIPE = """
name: {name}
linears:
  fp4:
    fprop: {{x: nvfp4, w: {{format: nvfp4, block: [16, 16]}}}}
    dgrad:
      dy: &sr {{format: nvfp4, rounding: stochastic, allow_bias: true, scale: {{kind: absmax, headroom: 17/16}},
                amax: {{kind: hindsight}}}}
      w: {{format: nvfp4, block: [16, 16], source: reuse}}
    wgrad: {{dy: *sr, x: *sr}}
  forward:
    fprop: {{x: nvfp4, w: {{format: nvfp4, block: [16, 16]}}}}
rules: [{{roles: [qkv, proj, fc1, fc2], linear: fp4}}]
phases: [{phases}]
"""
CHANGE = (
    "use: {fp4: forward}, assign: [{roles: [fc2], linear: bf16}], optimizer_state: {exp_avg: bf16},"
    " lr: {warmup: 2, begin: current, peak: 0.5, end: 0.1, decay: linear}"
)
RESUMED_AT = {"step": [4], "last": [], "noise": [4, 2], "manual": [2]}  # inside of the phase, before it
STARTS = {
    "step": f"step: {SWITCH}",
    "last": "last: 0.5",
    "noise": f"trigger: {{kind: grad_noise, below: 1.0e+9, after: {SWITCH}, every: 1}}",
    "manual": "trigger: {kind: manual}",
}


def with_phase(folder: str, name: str, start: str, change: str = CHANGE) -> str:
    """The override that names a recipe with the phase `tail`."""
    file = Path(folder, f"{name}.yaml")
    if not dist.is_initialized() or dist.get_rank() == 0:
        file.write_text(RECIPE.format(name=name, phases=f"{{name: tail, {start}, {change}}}"), encoding="utf-8")
    if dist.is_initialized():
        dist.barrier()
    return f"recipe={file}"


pytestmark = pytest.mark.distributed


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return str(write_counting_tokens(tmp_path))


# -- the learning rate


def rates(tmp_path: Path, phases: Phases | None, *overrides: str, steps: int = 20) -> list[float]:
    config = tiny_run(tmp_path, f"train.steps={steps}", "optim.lr=2.0", "optim.warmup_steps=0", *overrides)
    optimizer = optim.make_adamw(torch.nn.Linear(2, 2), config, torch.device("cpu"))
    schedule = optim.make_schedule(optimizer, config, phases)
    forward = [optim.place_schedule(schedule, step) for step in range(1, steps + 1)]
    assert [optim.place_schedule(schedule, step) for step in range(steps, 0, -1)] == forward[::-1]
    assert {g["lr"] for g in optimizer.param_groups} == {forward[0]}
    return forward


def one_phase(start: dict[str, Any], **shape: Any) -> Phases:
    return Phases(Recipe(name="r", phases=(Phase(name="p", lr=LrShape(**shape), **start),)))


def test_warm_up_from_zero_then_cosine_to_the_last_step(tmp_path: Path) -> None:
    """Start 10, 4 steps up to 0.5 * lr, 6 steps down to 0.1 * lr: the first is a quarter, the last the end."""
    found = rates(tmp_path, one_phase({"step": 10}, warmup=4, peak=0.5, end=0.1), "optim.schedule=constant")
    assert found[:10] == [2.0] * 10
    assert found[10:14] == [0.25, 0.5, 0.75, 1.0]
    assert found[14:] == pytest.approx([0.2 + 0.8 * (1 + math.cos(math.pi * k / 6)) / 2 for k in range(1, 7)])
    assert found[-1] == pytest.approx(0.2)


def test_the_rate_that_the_phase_found_is_that_of_the_step_before(tmp_path: Path) -> None:
    """Cosine to 0 over 20 steps stands at 1 after 10; half of the ten steps go from there to 3 * 2, then down to 2."""
    shape = one_phase({"last": 0.5}, warmup=0.5, begin="current", peak=3.0, end=1.0, decay="linear")
    found = rates(tmp_path, shape, "optim.schedule=cosine")
    assert found[9] == pytest.approx(1.0)
    assert found[10:15] == pytest.approx([2.0, 3.0, 4.0, 5.0, 6.0])
    assert found[15:] == pytest.approx([5.2, 4.4, 3.6, 2.8, 2.0])


def test_a_constant_shape_and_no_warm_up(tmp_path: Path) -> None:
    assert rates(tmp_path, one_phase({"step": 18}, peak=0.25, decay="constant"))[18:] == [0.5, 0.5]


def test_the_rate_of_a_triggered_phase_follows_its_recorded_start(tmp_path: Path) -> None:
    phases = one_phase({"trigger": Manual()}, decay="linear")
    constant = "optim.schedule=constant"
    assert rates(tmp_path, phases, constant) == [2.0] * 20
    phases.enter(15, 20)
    phases.trigger("p")
    expected = [2.0] * 15 + [1.6, 1.2, 0.8, 0.4, 0.0]
    assert rates(tmp_path, phases, constant) == pytest.approx(expected)
    resumed = one_phase({"trigger": Manual()}, decay="linear")
    resumed.load_state_dict(phases.state_dict())
    assert rates(tmp_path, resumed, constant) == pytest.approx(expected)


def test_of_two_shapes_the_later_phase_of_the_recipe_rules_and_may_begin_in_the_earlier_one(tmp_path: Path) -> None:
    first = Phase(name="a", lr=LrShape(peak=0.5, decay="constant"), step=4)
    second = Phase(name="b", lr=LrShape(warmup=2, begin="current", decay="constant"), step=8)
    found = rates(tmp_path, Phases(Recipe(name="r", phases=(first, second))), "optim.schedule=constant", steps=12)
    assert found == [2.0] * 4 + [1.0] * 4 + [1.5, 2.0, 2.0, 2.0]


@pytest.mark.parametrize(("start", "refused"), [({"step": 14}, True), ({"step": 13}, False), ({"step": 30}, False)])
def test_a_warm_up_longer_than_its_phase_is_refused(tmp_path: Path, start: dict[str, int], refused: bool) -> None:
    (tmp_path / "r.yaml").write_text(f"name: r\nphases: [{{name: p, step: {start['step']}, lr: {{warmup: 6}}}}]\n")
    overrides = (f"recipe={tmp_path}/r.yaml", "train.steps=20")
    if refused:
        with pytest.raises(ConfigError, match=r"phase p .* for 6 steps, and starts 6 steps before train.steps = 20"):
            tiny_run(tmp_path, *overrides)
    else:
        tiny_run(tmp_path, *overrides)


# -- runs that switch


def train(folder: str, name: str, recipe: str, *overrides: str) -> list[tuple[Any, ...]]:
    """The curve of a run in the folder `name`."""
    common = (recipe, f"train.steps={STEPS}", "train.eval_every=2", "checkpoint.keep=9")
    config = tiny_run(Path(folder), *common, *overrides, name=name)
    run_without_picture(config)
    dist.barrier()  # rank 0 has written the metrics that all read
    return curve(config)


def go_back(run: Path, step: int) -> None:
    """Remove the checkpoints after `step`, as if the run had been killed before it wrote them."""
    for folder in (run / "checkpoints").glob("step_*"):
        if int(folder.name.removeprefix("step_")) > step:
            shutil.rmtree(folder)
    (run / "checkpoints" / "latest").unlink()


def start_and_resume(folder: str, engine: str, starts: list[str]) -> dict[str, Any]:
    """Name of a start -> its run's curve, phases in metrics.jsonl, and the curves of its continuations."""
    found: dict[str, Any] = {}
    for name in starts:
        run = Path(folder, name)
        options = (with_phase(folder, name, STARTS[name]), *engine.split(), "checkpoint.every=2")
        if name == "manual":
            train(folder, name, *options, f"train.stop_after={SWITCH}")
            if dist.get_rank() == 0:
                found["answer"] = phase.ask(run, "tail")
            dist.barrier()
        whole = train(folder, name, *options)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        continued = []
        for step in RESUMED_AT[name]:
            if dist.get_rank() == 0:
                go_back(run, step)
            dist.barrier()
            continued.append(train(folder, name, *options))
        found[name] = (whole, [(line["step"], line["phase"]) for line in lines if "phase" in line], continued)
    return found


def test_every_trigger_switches_the_same_run_which_resumes_exactly(folder: str) -> None:
    found, second = run_ranks(start_and_resume, 2, folder, "engine.kind=megatron", list(STARTS), timeout=300)
    assert second == {name: result for name, result in found.items() if name != "answer"}, "ranks agree"
    reasons = {
        "step": "tail: step 3",
        "last": "tail: the last 0.5 of the run",
        "noise": "times its quantization noise, under 1e+09",
        "manual": "tail: asked for",
    }
    reference = found["step"][0]
    for name, reason in reasons.items():
        whole, noted, continued = found[name]
        assert whole == reference, f"{name}: the start decides, not its cause"
        assert [step for step, _ in noted] == [SWITCH + 1]
        assert reason in noted[0][1]
        assert continued == [whole] * len(continued), name
    assert found["answer"].startswith("phase tail starts with the next step")
    never, _ = run_ranks(one_curve, 2, folder, "never", STARTS["step"].replace("3", "99"))
    assert never[: SWITCH + 1] == reference[: SWITCH + 1], "before the phase nothing differs"
    assert never[SWITCH + 1][1:] != reference[SWITCH + 1][1:]
    rate = [line[2] for line in reference[1:]]
    before = [line[2] for line in never[1:]]
    assert rate[:SWITCH] == before[:SWITCH]
    assert rate[SWITCH:] == pytest.approx([(before[2] + 4e-3) / 2, 4e-3, 8e-4])


def one_curve(folder: str, name: str, start: str, *overrides: str) -> list[tuple[Any, ...]]:
    return train(folder, name, with_phase(folder, name, start), *overrides)


def test_phases_under_deepspeed(folder: str) -> None:
    engine = "engine.kind=deepspeed engine.zero_stage=0"
    (found,) = run_ranks(start_and_resume, 1, folder, engine, ["step", "manual"], timeout=300)
    whole, noted, continued = found["step"]
    assert noted == [(SWITCH + 1, "tail: step 3")]
    assert found["manual"][0] == whole
    assert [*continued, *found["manual"][2]] == [whole] * 2
    with pytest.raises(ConfigError, match=r"engine.kind = deepspeed: phase tail .* grad_noise"):
        tiny_run(Path(folder), with_phase(folder, "noise", STARTS["noise"]), *engine.split())


# -- measuring the gradient's noise


def watched(folder: str, *overrides: str) -> list[Any]:
    """Curves of a run that measures before every step and never switches, and of one that does not measure."""
    start = "trigger: {kind: grad_noise, below: 1.0e-9, every: 1}"
    measured = one_curve(folder, "measured", start, *overrides)
    plain = one_curve(folder, "plain", "step: 99", *overrides)
    ratios = [line.get("grad_noise") for line in metrics(tiny_run(Path(folder), name="measured"))]
    return [measured, plain, ratios[1:]]


NOISY = ("train.micro_batch_size=1", "model.hidden_size=128", "model.ffn_hidden_size=128")  # divide by tp too
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one": (1, ()),
    "bf16": (1, ("train.dtype=bf16",)),
    "dp2_codes": (2, ("engine.fp4_param_gather=true",)),
    "tp2": (2, ("parallel.tp=2", "parallel.sequence_parallel=true")),
    "pp2": (2, ("parallel.pp=2",)),
}


def watched_all(folder: str, layouts: list[str]) -> dict[str, Any]:
    out = {}
    for name in layouts:
        place = Path(folder, name)
        place.mkdir(exist_ok=True)
        if dist.get_rank() == 0:
            write_counting_tokens(place)
        dist.barrier()
        out[name] = watched(str(place), *NOISY, *LAYOUTS[name][1], "train.steps=2", "train.eval_every=0")
    return out


def test_a_probe_leaves_no_trace_and_does_not_depend_on_the_layout(folder: str) -> None:
    (found,) = run_ranks(watched_all, 1, folder, [n for n, (world, _) in LAYOUTS.items() if world == 1])
    first, second = run_ranks(watched_all, 2, folder, [n for n, (w, _) in LAYOUTS.items() if w == 2], timeout=300)
    assert first == second
    found |= first
    for name, (measured, plain, ratios) in found.items():
        assert measured == plain, name
        assert len(ratios) == 2
        assert all(1 < r < 30 for r in ratios), (name, ratios)
        looser = 0.15 if name == "bf16" else 1e-3  # another path of weights
        assert ratios == pytest.approx(found["one"][2], rel=looser), name


def ratio_by_hand(folder: str) -> tuple[float, float]:
    """(engine.probe, |g| / |g_q - g| of two models, one without quantized backward operands) before the first step."""
    text = RECIPE.format(name="by_hand", phases="{name: tail, trigger: {kind: grad_noise}, use: {fp4: forward}}")
    Path(folder, "fp4.yaml").write_text(text)
    forward = text.replace("linear: fp4}", "linear: forward}").replace("use: {fp4: forward}", "use: {forward: fp4}")
    Path(folder, "forward.yaml").write_text(forward)
    one = ("train.global_batch_size=2", "optim.clip_grad=0")
    gradients, ratio = [], math.nan
    for name in ("fp4", "forward"):
        config = tiny_run(Path(folder), f"recipe={folder}/{name}.yaml", *one, name=name)
        with open_world(config) as world:
            engine, applied = loop.build_engine(config, world)
            sets = data.build_datasets(config, 1)

            def batches(sets: Any = sets, config: Any = config) -> Any:
                return data.train_iterator(sets, config, dp_rank=0, dp_size=1)

            applied.set_step(0, config.train.steps)
            if name == "fp4":
                ratio = engine.probe(batches())
            weights = [target.module.weight for target in applied.targets if target.site.role != "head"]
            engine._chunks[0].zero_grad_buffer()
            PipelineSchedule(config, world, engine._chunks, applied).run(batches(), 0, 1, forward_only=False)
            gradients.append(torch.cat([w.main_grad.flatten() for w in weights]).double())
            engine.close()
    g_q, g = gradients
    return ratio, float(g.norm() / (g_q - g).norm())


def test_the_measured_ratio_is_that_of_two_models(folder: str) -> None:
    ((measured, by_hand),) = run_ranks(ratio_by_hand, 1, folder)
    assert measured == pytest.approx(by_hand, rel=1e-7)
    assert 1 < measured < 30


# -- asking for a phase


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_counting_tokens(tmp_path)
    phases = (
        "{name: one, trigger: {kind: manual}, lr: {}}, {name: two, last: 0.5, lr: {}},"
        " {name: rest, trigger: {kind: manual}, lr: {}, enabled: false}"
    )
    text = RECIPE.format(name="asked", phases=phases)
    (tmp_path / "asked.yaml").write_text(re.sub(r"  forward:\n.*\n", "", text))
    config = tiny_run(tmp_path, f"recipe={tmp_path}/asked.yaml")
    run = tmp_path / "run"

    def told(*arguments: str, code: int = 2) -> str:
        assert phase.main([str(run), *arguments]) == code
        streams = capsys.readouterr()
        return streams.out if code == 0 else streams.err

    assert f"{run}: no config.resolved.yaml" in told("one")
    loop.RunFolder(run).claim(config)
    listed = "recipe asked has one (by hand); two (the last 0.5 of the run); rest (enabled: false)"
    assert f"phase 'tail': {listed}" in told("tail")
    assert "only phases with trigger: manual wait" in told("two")
    assert "set enabled: true" in told("rest")
    assert "phase one starts with the next step" in told("one", code=0)
    assert "it was asked for already" in told("one")
    phase.Requests(run / "phases").write("one", 4)
    assert "phase one: it runs since step 4" in told("one")
    (run / "phases" / "one.json").write_text("{}")
    assert "not a request for a phase" in told("one")
    (run / "phases" / "one.json").unlink()
    (run / "metrics.jsonl").write_text('{"step": 6}\n')
    assert "the run is over, it has done its 6 steps" in told("one")
