"""What the planner tries: every dimension that divides the job, nothing that its engines' schedules refuse."""

from __future__ import annotations

from collections import Counter

from fp4dist.cluster.explain import why
from fp4dist.cluster.planner import Job, candidates, engines_run, plan
from fp4dist.cluster.schedule import program
from fp4dist.cluster.topology import load_topology
from fp4dist.spec.load import load_model

NVL72 = load_topology("gb200_nvl72")


def job(model: str, gpus: int, gbs: int, **more: object) -> Job:
    config = load_model(model)
    words = {"precision": "nvfp4", "seq": config.seq_length} | more
    return Job(model=config, topology=NVL72, gpus=gpus, gbs=gbs, **words)  # type: ignore[arg-type]


def test_experts_are_spread_and_cut() -> None:
    """Together ep and etp divide the ranks of a stage, and an expert is cut inside a node at most."""
    found = list(candidates(job("qwen3_235b", 128, 1024), Counter()))
    assert {layout.etp for layout in found} == {1, 2, 4}
    assert {layout.ep for layout in found} >= {8, 16, 32, 64, 128}
    assert all(128 % (layout.ep * layout.etp * layout.pp) == 0 for layout in found)
    assert all(layout.etp == layout.ep == 1 for layout in candidates(job("llama3_8b", 16, 64), Counter()))


def test_chosen_pipelines_have_a_schedule() -> None:
    """Interleaved micro-batches go around in groups of pp: another number is never proposed."""
    work = job("llama3_70b", 48, 144)
    interleaved = [layout for layout in candidates(work, Counter()) if layout.vpp > 1]
    assert interleaved
    for layout in interleaved:
        micro_batches = work.gbs // (layout.micro_batch * layout.dp(work.gpus))
        assert program(0, layout.pp, layout.vpp, micro_batches)


def test_why_speaks_of_every_dimension() -> None:
    work = job("qwen3_235b", 64, 512, precision="mxfp8")
    found = plan(work)
    assert found.chosen is not None
    text = "\n".join(why(work, found.chosen))
    assert all(f"\n  {key} = " in text for key in ("tp", "pp", "cp", "ep", "etp", "fsdp", "micro_batch"))
    assert found.runnable is None or engines_run(work, found.runnable.layout)
