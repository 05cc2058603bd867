"""The shipped launch examples: from which command line each folder of launch/examples is written.

python -m tests.cluster.examples writes them again; tests/cluster/test_launch.py compares.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fp4dist.cluster import launch_command
from fp4dist.cluster.job import Job
from fp4dist.cluster.launch import write

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "launch" / "examples"
EXAMPLES: dict[str, tuple[str, ...]] = {
    "gb200_tray": ("--gpus", "4"),
    "gb200_rack": ("--gpus", "64", "--hosts", "gb-r01-t[01-16]"),
    "gb200_8_racks": ("--gpus", "512", "--hosts", ",".join(f"gb-r{r:02d}-t[01-16]" for r in range(1, 9))),
}


def example(name: str) -> Job:
    """The job of one folder."""
    parser = argparse.ArgumentParser()
    launch_command.add_arguments(parser)
    config = f"launch/examples/{name}/run.yaml"
    args = parser.parse_args(["--config", config, "--topology", "gb200_nvl72", *EXAMPLES[name]])
    return launch_command.job_of(args)[0]


if __name__ == "__main__":
    for each in EXAMPLES:
        print(*write(example(each), FOLDER / each), sep="\n")
