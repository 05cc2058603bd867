"""A study of a model of 0.3 M parameters: pairing, resuming, the table, and what is refused."""

from __future__ import annotations

import json
import math
import re
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from fp4dist.errors import ConfigError, DataError
from fp4dist.nn.plan import resolve_kernels
from fp4dist.spec.load import load_recipe
from fp4dist.spec.run import BackendConfig
from fp4dist.study.model import Llama, initialize, schedule
from fp4dist.study.pieces import expected, read_records, work
from fp4dist.study.plan import Job, Study, digest, every_linear, fingerprint, jobs, load_study
from fp4dist.study.report import verdict, write_report
from fp4dist.study.results import read_results
from fp4dist.study.statistics import Arms, half_interval
from fp4dist.study.tokens import Stream, held_out_batches, training_batches
from fp4dist.study.training import Data, Training, load_data
from tests.train.token_runs import write_tokens
from tools import screen_forward

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]
VOCAB, LENGTH = 64, 32


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Two arms, two seeds, 6 steps of 8 sequences; tokens count upwards, which can be learned."""
    folder = tmp_path_factory.mktemp("study")
    rng = np.random.default_rng(0)
    for name, documents in (("train", 60), ("held_out", 9)):
        texts = [(rng.integers(0, VOCAB) + rng.integers(1, 4) * np.arange(60)) % VOCAB for _ in range(documents)]
        write_tokens(folder / name, texts)
    model = {
        "name": "mini", "num_layers": 1, "hidden_size": 128, "ffn_hidden_size": 128, "num_attention_heads": 2,
        "num_query_groups": 1, "vocab_size": VOCAB, "seq_length": 64,
    }  # fmt: skip
    (folder / "mini.yaml").write_text(yaml.safe_dump(model), encoding="utf-8")
    raw = {
        "name": "small", "sizes": [{"model": str(folder / "mini.yaml"), "lr": 0.01, "micro_batch": 4}],
        "tokens": [6 * 8 * LENGTH], "baseline_tokens": [3 * 8 * LENGTH], "seeds": [1, 2], "batch": 8,
        "seq_length": LENGTH, "evaluations": 1, "source": "nowhere", "ordering": ["fine", "coarse"],
        "train": [str(folder / "train")], "valid": [str(folder / "held_out")],
        "arms": [
            {"recipe": "bf16"},
            {"recipe": "quartet2", "name": "fine", "published": 0.05},
            {"recipe": "nvidia_nvfp4", "name": "coarse", "every_linear": True, "published": 0.08},
        ],
    }  # fmt: skip
    (folder / "small.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    return load_study(folder / "small.yaml")


def record_file(out: Path, job: Job) -> Path:
    """Where `work` writes the record of a run."""
    return out / job.study.name / f"{job.name}.json"


@pytest.fixture(scope="module")
def data(study: Study) -> Data:
    return load_data(study.train, study.valid, CPU)


@pytest.fixture(scope="module")
def out(study: Study, data: Data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs."""
    folder = tmp_path_factory.mktemp("records")
    assert work(jobs(study), data, CPU, folder, deadline=math.inf) == []
    return folder


def test_every_run_has_a_record_that_says_what_it_was(study: Study, out: Path) -> None:
    records = {r["run"]: r for r in read_records(out)}
    assert set(records) == {job.name for job in jobs(study)}
    for job in jobs(study):
        r = records[job.name]
        assert r["steps"] == job.steps
        assert [h["step"] for h in r["held_out"]] == [job.steps // 2 + job.steps % 2, job.steps]
        assert r["counted_share"] == pytest.approx(r["fp4_share"])
        assert r["fp4_share"] == (0.0 if r["arm"] == "bf16" else 1.0)
        assert r["loss"] < r["curve"][0][1]
        assert digest(r["config"]) == r["hash"]
        assert {"torch", "triton"} <= r["versions"].keys()


def test_runs_of_a_seed_start_from_one_model_and_read_the_same_samples(study: Study, out: Path) -> None:
    """The first loss differs by quantization alone, another seed's by far more."""
    first = {(r["arm"], r["seed"], r["budget"]): r for r in read_records(out)}
    budget = study.tokens[0]
    losses = {key: r["held_out"][0]["loss"] for key, r in first.items() if key[2] == budget}
    between = abs(losses["bf16", 1, budget] - losses["bf16", 2, budget])
    assert abs(losses["fine", 1, budget] - losses["bf16", 1, budget]) < between
    hashes = {r["hash"] for r in first.values()}
    assert len(hashes) == len(first)


def test_a_finished_run_is_not_repeated_and_a_claimed_one_is_left(study: Study, data: Data, out: Path) -> None:
    done = {f.name: f.stat().st_mtime_ns for f in out.rglob("*.json")}
    removed = record_file(out, jobs(study)[0])
    removed.rename(out / "kept.aside")
    claim = removed.parent / "claims" / removed.stem
    claim.write_text("1", encoding="utf-8")
    try:
        assert work(jobs(study), data, CPU, out, deadline=math.inf) == []
        assert not removed.exists()
    finally:
        claim.unlink()
        (out / "kept.aside").rename(removed)
    assert {f.name: f.stat().st_mtime_ns for f in out.rglob("*.json")} == done


def test_a_record_counts_for_every_study_that_has_its_run(study: Study, data: Data, out: Path, tmp_path: Path) -> None:
    other = replace(study, name="other", arms=study.arms[:2], ordering=())
    assert work(jobs(other), data, CPU, out, deadline=math.inf) == []
    assert not list((out / "other").glob("*.json"))
    text = write_report(other, read_records(out), tmp_path)
    assert "Missing" not in text
    assert "| fine | 100% | 2 |" in text
    assert "coarse" not in text
    renamed = replace(other, arms=(study.arms[0], replace(study.arms[1], name="finest")))
    assert "| finest | 100% | 2 |" in write_report(renamed, read_records(out), tmp_path)


def test_a_field_of_a_later_version_makes_no_other_run(study: Study) -> None:
    job = jobs(study)[1]
    config = job.config({})
    later = json.loads(json.dumps(config))
    del later["recipe"]["linears"]["fp4"]["fprop"]["x"]["outlier"]  # as it was before the field existed
    assert later != json.loads(json.dumps(config))
    assert fingerprint(later) == job.fingerprint
    later["recipe"]["linears"]["fp4"]["fprop"]["x"]["block"] = [1, 32]
    assert fingerprint(later) != job.fingerprint


def test_a_record_of_another_configuration_stays_and_is_named(study: Study, data: Data, out: Path) -> None:
    changed = replace(study, clip_grad=2.0)
    job = jobs(changed)[0]
    before = record_file(out, job).read_bytes()
    (failure,) = work([job], data, CPU, out, deadline=math.inf)
    assert "record of another configuration" in failure
    assert record_file(out, job).read_bytes() == before
    assert f"Missing: {len(jobs(changed))} of {len(jobs(changed))} runs" in write_report(changed, [], out / "nowhere")


def test_an_arm_may_have_fewer_seeds(study: Study) -> None:
    fewer = replace(study, arms=(*study.arms[:2], replace(study.arms[2], seeds=(1,))))
    assert {j.name for j in jobs(study)} - {j.name for j in jobs(fewer)} == {
        j.name for j in jobs(study) if j.seed == 2 and "coarse" in j.name
    }
    with pytest.raises(ValueError, match="seeds \\[7\\], which are none of the study's"):
        replace(study, arms=(*study.arms[:2], replace(study.arms[2], seeds=(7,))))


@pytest.mark.parametrize("arm", ["fine"])
def test_a_cut_run_goes_on_with_the_same_bits(
    study: Study, data: Data, out: Path, arm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fp4dist.study.training._WINDOW", 1)
    job = next(j for j in jobs(study) if j.name.endswith(f"{arm}-s1"))
    whole = json.loads(record_file(out, job).read_text(encoding="utf-8"))
    file = tmp_path / "cut.pt"
    pieces = 0
    record = None
    while record is None:
        training = Training(job, data, CPU)
        pieces += 1
        record = training.run(time.monotonic() if pieces < 3 else math.inf, file)  # a step, then the deadline
        assert (record is None) == file.exists()
    assert pieces == 3
    assert record["loss"] == whole["loss"]
    assert record["curve"][-1][0] == job.steps
    assert record["hash"] == whole["hash"]


def test_the_last_piece_finishes_a_cut_run_or_leaves_it(
    study: Study, data: Data, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut after a step; too little time for what is left; enough."""
    monkeypatch.setattr("fp4dist.study.training._WINDOW", 1)
    job = next(j for j in jobs(study) if j.name.endswith("fine-s1"))
    whole = json.loads(record_file(out, job).read_text(encoding="utf-8"))
    like = tmp_path / "records" / "like.json"  # the other seed's, which says how long a run takes
    like.parent.mkdir()
    other = {**whole, "config": {**whole["config"], "seed": 2}, "seconds": 600.0}
    like.write_text(json.dumps(other), encoding="utf-8")
    state = tmp_path / "state"

    def last_piece(seconds: float) -> None:
        deadline = time.monotonic() + seconds
        assert work([job], data, CPU, tmp_path / "records", deadline=deadline, state=state, last=True) == []

    partial = state / study.name / f"{job.name}.pt"
    assert Training(job, data, CPU).run(time.monotonic(), partial) is None
    left = expected(job, tmp_path / "records", partial)
    assert left == pytest.approx(600 * (1 - 1 / job.steps))
    last_piece(left - 60)
    assert not record_file(tmp_path / "records", job).exists()
    last_piece(left + 60)
    assert json.loads(record_file(tmp_path / "records", job).read_text(encoding="utf-8"))["loss"] == whole["loss"]
    assert not list(state.rglob("*.*"))


def test_a_run_that_cannot_end_in_time_is_not_begun_for_long(study: Study, data: Data) -> None:
    job = jobs(study)[0]
    training = Training(job, data, CPU)
    assert training.run(time.monotonic() - 1, None) is None


def test_a_run_is_not_begun_when_its_like_took_longer_than_is_left(study: Study, data: Data, out: Path) -> None:
    job = next(j for j in jobs(study) if j.name.endswith("fine-s1"))
    records = {r["run"]: r for r in read_records(out)}
    took = [r["seconds"] for r in records.values() if r["arm"] == "fine"]
    assert expected(job, out) == pytest.approx(sum(took) / len(took))
    record_file(out, job).rename(out / "kept.aside")
    try:
        assert work([job], data, CPU, out, deadline=time.monotonic() + 0.5 * min(took)) == []
        assert not record_file(out, job).exists()
    finally:
        (out / "kept.aside").rename(record_file(out, job))
    assert expected(job, out / "nowhere") == 0.0


def test_the_table_names_gaps_order_and_what_is_missing(study: Study, out: Path, tmp_path: Path) -> None:
    records = read_records(out)
    text = write_report(study, records, tmp_path)
    arms = Arms.of(records)
    cell = ("mini", study.tokens[0], "fine")
    losses = {(r["arm"], r["seed"]): r["loss"] for r in records if r["budget"] == study.tokens[0]}
    expected = [losses["fine", s] - losses["bf16", s] for s in (1, 2)]
    gap = arms.difference(cell, "bf16")
    assert gap is not None
    assert gap.mean == pytest.approx(sum(expected) / 2)
    assert gap.half == pytest.approx(12.706 * abs(expected[0] - expected[1]) / 2)
    pooled = arms.noise(*cell[:2])
    assert pooled is not None
    assert (pooled.arms, pooled.seeds, pooled.freedom) == (3, 2, 2)
    row = (
        f"| fine | 100% | 2 | {(losses['fine', 1] + losses['fine', 2]) / 2:.4f} | {gap.text()} | {pooled.half(2):.4f} |"
    )
    assert row in text
    assert "| fine < coarse |" in text
    assert "+0.0300" in text  # the published difference
    assert re.search(r"^\| coarse \| [^|]* \| 0.0800 \| 1.60 \| [0-9.]+ \|$", text, re.M)
    assert "Missing" not in text
    pictures = {"gaps.png", "cost.png", "losses.png", "curves.png"}
    assert {f.name for f in tmp_path.iterdir()} == pictures | {"results.json", "table.md"}
    assert pictures == set(re.findall(r"\((\w+\.png)\)", text))
    fewer = write_report(study, [r for r in records if r["arm"] != "fine"], tmp_path)
    assert "Missing: 2 of 8 runs" in fewer
    assert "| fine < coarse" not in fewer
    one = write_report(study, [r for r in records if r["seed"] == 1], tmp_path)
    assert one.count("**One seed: no interval here says what another seed would give.**") == 1  # bf16 alone has no gap
    assert "(one seed)" in one


def test_a_report_is_made_again_from_its_results(study: Study, out: Path, tmp_path: Path) -> None:
    """To the byte, pictures too; results.json is a fraction of the records."""
    first, second = tmp_path / "first", tmp_path / "second"
    write_report(study, read_records(out), first)
    write_report(study, read_results(first / "results.json"), second)
    for file in first.iterdir():
        assert file.read_bytes() == (second / file.name).read_bytes(), file.name
    (tmp_path / "other.json").write_text("[]", encoding="utf-8")
    with pytest.raises(DataError, match="not a report's"):
        read_results(tmp_path / "other.json")


@pytest.mark.parametrize("file", sorted(ROOT.glob("docs/studies/*/results.json")), ids=lambda f: f.parent.name)
def test_a_committed_page_is_what_its_results_give(file: Path, tmp_path: Path) -> None:
    page = write_report(load_study(file.parent.name), read_results(file), tmp_path)
    assert page == (file.parent / "table.md").read_text(encoding="utf-8")
    assert file.read_text(encoding="utf-8") == (tmp_path / "results.json").read_text(encoding="utf-8")


def test_time_to_quality_follows_its_formula() -> None:
    """bf16 falls by 0.1 for each doubling; an arm 0.05 behind at 0.8 of its time needs 2^0.5 of the tokens."""

    def run(arm: str, budget: int, loss: float, seconds: float) -> dict[str, object]:
        return {"model": "m", "budget": budget, "arm": arm, "seed": 1, "loss": loss, "step_seconds": seconds}

    arms = Arms.of([run("bf16", 100, 3.0, 1.0), run("bf16", 50, 3.1, 1.0), run("x", 100, 3.05, 0.8)])
    assert arms.time_to_quality(("m", 100, "x")) == pytest.approx(math.sqrt(2) * 0.8)
    assert Arms.of([run("bf16", 100, 3.0, 1.0), run("x", 100, 3.05, 0.8)]).time_to_quality(("m", 100, "x")) is None


@pytest.mark.parametrize(
    ("mean", "half", "word"),
    [(0.1, 0.05, "holds"), (-0.1, 0.05, "reversed"), (0.01, 0.05, "not resolved"), (0.1, math.nan, "one seed")],
)
def test_a_pair_is_judged_by_its_interval(mean: float, half: float, word: str) -> None:
    assert verdict(mean, half).startswith(word)


def of_losses(losses: dict[str, dict[int, float]]) -> Arms:
    """Arms of one model and budget."""
    return Arms.of(
        {"model": "m", "budget": 1, "arm": arm, "seed": seed, "loss": loss}
        for arm, found in losses.items()
        for seed, loss in found.items()
    )


def test_noise_is_what_means_of_arms_and_seeds_leave() -> None:
    """Of two arms it is the paired test; of more, the residual of least squares."""
    two = of_losses({"bf16": {1: 3.0, 2: 3.01}, "x": {1: 3.05, 2: 3.09}, "y": {1: 3.2}})
    noise, gap = two.noise("m", 1), two.difference(("m", 1, "x"), "bf16")
    assert noise is not None
    assert gap is not None
    assert (noise.arms, noise.seeds, noise.freedom) == (2, 2, 1)
    assert noise.half(2) == pytest.approx(gap.half)
    rng = np.random.default_rng(0)
    table = rng.normal(size=(4, 3))
    names = ("bf16", "x", "y", "z")
    many = of_losses({arm: dict(enumerate(row)) for arm, row in zip(names, table, strict=True)}).noise("m", 1)
    design = np.hstack([np.kron(np.eye(4), np.ones((3, 1))), np.kron(np.ones((4, 1)), np.eye(3))])
    rest = table.ravel() - design @ np.linalg.lstsq(design, table.ravel(), rcond=None)[0]
    assert many is not None
    assert many.freedom == 6
    assert many.deviation == pytest.approx(float(np.sqrt((rest**2).sum() / 6)))
    assert many.half(3) == pytest.approx(2.447 * many.deviation * math.sqrt(2 / 3))
    assert of_losses({"bf16": {1: 3.0}, "x": {1: 3.1}}).noise("m", 1) is None


def test_late_losses_are_compared_on_the_same_samples() -> None:
    """The last quarter of 80 steps is two windows; with two seeds the interval is over seeds."""

    def run(arm: str, seed: int, extra: tuple[float, float]) -> dict[str, object]:
        curve = [[step, 9.0 if step <= 60 else 3.0 + extra[step // 80], 1.0] for step in range(10, 81, 10)]
        return {"model": "m", "budget": 1, "arm": arm, "seed": seed, "loss": 3.0, "steps": 80, "curve": curve}

    one = Arms.of([run("bf16", 1, (0.0, 0.1)), run("x", 1, (0.04, 0.16))]).late(("m", 1, "x"), "bf16")
    assert one is not None
    assert one.mean == pytest.approx(0.05)
    assert one.half == pytest.approx(12.706 * 0.01)  # of 0.04 and 0.06
    base = [run("bf16", seed, (0.0, 0.0)) for seed in (1, 2)]
    two = Arms.of([*base, run("x", 1, (0.1, 0.3)), run("x", 2, (0.3, 0.5))]).late(("m", 1, "x"), "bf16")
    assert two is not None
    assert two.per_seed == {1: pytest.approx(0.2), 2: pytest.approx(0.4)}
    assert two.half == pytest.approx(12.706 * 0.1)


def test_the_interval_is_students() -> None:
    """Against the textbook: mean of 1, 2, 3 has 4.303 * 1 / sqrt(3)."""
    assert half_interval([1.0, 2.0, 3.0]) == pytest.approx(4.303 / math.sqrt(3))
    assert math.isnan(half_interval([1.0]))


def test_an_ordering_arm_has_every_block_linear_and_no_phase() -> None:
    recipe = every_linear(load_recipe("nvidia_nvfp4"))
    assert [r.linear for r in recipe.rules] == ["fp4"]
    assert recipe.phases == ()
    assert every_linear(load_recipe("bf16")) == load_recipe("bf16")


def test_held_out_batches_count_every_sequence_once(data: Data) -> None:
    stream = data.valid[0]
    counted = 0
    for text, labels in held_out_batches(stream, 4, LENGTH):
        assert text.shape == labels.shape == (4, LENGTH)
        counted += int((labels >= 0).sum())
    assert counted == stream.samples(LENGTH) * LENGTH


def test_samples_are_a_permutation_and_too_few_are_refused(data: Data) -> None:
    stream = Stream.__new__(Stream)
    stream.tokens = torch.arange(8 * 4 + 1, dtype=torch.int32)
    kwargs = {"seed": 3, "batch": 4, "micro_batch": 2, "length": 4, "start": 0, "epochs": 1}
    steps = list(training_batches(stream, steps=2, **kwargs))  # type: ignore[arg-type]
    firsts = torch.cat([text[:, 0] for step in steps for text, _ in step])
    assert sorted(firsts.tolist()) == list(range(0, 32, 4))
    assert firsts.tolist() != list(range(0, 32, 4))
    for text, labels in steps[0]:
        assert torch.equal(text + 1, labels)
    with pytest.raises(DataError, match="epochs"):
        list(training_batches(stream, steps=3, **kwargs))  # type: ignore[arg-type]


def test_the_head_in_chunks_gives_torchs_loss_and_gradients(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fp4dist.study.model._CHUNK", 24)
    job = jobs(study)[0]
    model = Llama(job.model, torch.float32)
    initialize(model, 1)
    text = torch.randint(VOCAB, (2, LENGTH))
    labels = torch.randint(VOCAB, (2, LENGTH))
    model(text, labels).backward()
    mine = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    monkeypatch.setattr(
        "fp4dist.study.model._HeadLoss",
        type("Plain", (), {"apply": staticmethod(
            lambda h, w, y, _: torch.nn.functional.cross_entropy(h @ w.t(), y))}),
    )  # fmt: skip
    model(text, labels).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(mine[name], p.grad, rtol=1e-4, atol=1e-7)


def test_the_schedule_is_one_cycle() -> None:
    rates = [schedule(step, 100, 0.1, 0.01, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.01)
    assert max(rates) == rates[10] == 1.0
    assert rates[-1] == pytest.approx(0.1)
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_what_a_study_refuses(study: Study) -> None:
    with pytest.raises(ConfigError, match="no arms"):
        jobs(study, ("nothing",))
    with pytest.raises(ConfigError, match="no seeds"):
        jobs(study, seeds=(7,))
    with pytest.raises(ValueError, match="bf16"):
        replace(study, arms=study.arms[1:])
    with pytest.raises(ValueError, match="two have one name"):
        replace(study, arms=(*study.arms, study.arms[0]))


@pytest.mark.parametrize("name", ["ordering", "full", "house", "law"])
def test_shipped_studies_load_and_every_arm_has_fast_kernels(name: str) -> None:
    """A run that would fall back to the reference on a GPU ends there with an error."""
    pytest.importorskip("triton")
    shipped = load_study(name)
    for job in jobs(shipped, seeds=shipped.seeds[:1]):
        assert job.model.seq_length == 512
        assert job.model.hidden_size % 128 == 0
        for linear in job.recipe.linears.values():
            kernels = resolve_kernels(linear, torch.device("cuda"), BackendConfig(kind="triton"))
            assert {kernel.backend for kernel in kernels.values()} <= {"triton"}


def test_the_shipped_screen_is_one_for_a_cpu() -> None:
    screen = load_study("screen")
    assert {job.model.name for job in jobs(screen)} == {"tiny"}
    assert {len(job.recipe.phases) for job in jobs(screen)} == {0}  # a look at a forward pass at one time


def test_the_forward_screen_measures_bf16s_weights(study: Study, data: Data, out: Path) -> None:
    """bf16's own loss is that of its record; another arm's differs, and is not what that arm reaches by training."""
    found = screen_forward.losses_of(study, data, CPU, 1)
    records = {(r["arm"], r["seed"], r["budget"]): r["loss"] for r in read_records(out)}
    assert found["bf16"] == records["bf16", 1, study.tokens[0]]
    assert found["fine"] not in (found["bf16"], records["fine", 1, study.tokens[0]])
    assert screen_forward.table(study, [found]).splitlines()[-2] == f"| fine | {found['fine'] - found['bf16']:+.4f} |"
