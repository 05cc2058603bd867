#!/usr/bin/env python
"""What a quantized forward pass costs a model that was trained without it: a cheap look before a study trains anything.

    python tools/screen_forward.py screen                 # minutes on a CPU

Trains the study's bf16 arm once for each of its seeds, then measures the held-out loss of those weights under every
arm's forward quantizers. The held-out tokens are the same, so small differences are resolved; what a recipe loses while
it trains is another matter: weights adapt to the quantizer, and the backward pass is not looked at.
"""

from __future__ import annotations

import argparse
import logging
import math
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from fp4dist.study.plan import BASELINE, Study, jobs, load_study, name_of
from fp4dist.study.statistics import half_interval
from fp4dist.study.training import Data, Training, load_data


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", help="a study file, or the name of a shipped one")
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    study, device = load_study(args.study), torch.device(args.device)
    data = load_data(study.train, study.valid, device)
    losses = [losses_of(study, data, device, seed) for seed in study.seeds]
    print(table(study, losses))
    return 0


def losses_of(study: Study, data: Data, device: torch.device, seed: int) -> dict[str, float]:
    """Arm -> held-out loss of the weights that bf16 reaches with `seed`."""
    runs = {name_of(job.arm): job for job in jobs(study, seeds=(seed,)) if job.tokens == study.tokens[0]}
    trained = Training(runs[BASELINE], data, device)
    record = trained.run(math.inf, None)
    assert record is not None
    found = {BASELINE: record["loss"]}
    for name, job in runs.items():
        if name == BASELINE:
            continue
        other = Training(job, data, device)
        other.model.load_state_dict(trained.model.state_dict())
        found[name] = other.evaluate(job.steps // 2)["loss"]  # before any phase for the end of a run
        print(f"seed {seed} {name}: {found[name] - found[BASELINE]:+.4f}", file=sys.stderr, flush=True)
    return found


def table(study: Study, losses: list[dict[str, float]]) -> str:
    """A row an arm: what its forward pass adds to bf16's loss, mean over seeds with a 95 % interval."""
    rows = [f"{len(losses)} seeds; bf16's held-out loss {statistics.fmean(each[BASELINE] for each in losses):.4f}", ""]
    rows += ["| forward of | loss added to bf16's weights |", "|---|---|"]
    for name in (name_of(arm) for arm in study.arms if name_of(arm) != BASELINE):
        added = [each[name] - each[BASELINE] for each in losses]
        half = half_interval(added)
        width = "" if math.isnan(half) else f" ± {half:.4f}"
        rows.append(f"| {name} | {statistics.fmean(added):+.4f}{width} |")
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
