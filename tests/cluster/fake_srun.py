#!/usr/bin/env python
"""srun for tests: starts the tasks of a step on this machine, as many to a node as SLURM_NTASKS_PER_NODE says."""

from __future__ import annotations

import os
import subprocess
import sys


def main() -> int:
    options, command = {}, list(sys.argv[1:])
    while command and command[0].startswith("--"):
        key, _, value = command.pop(0)[2:].partition("=")
        options[key] = value
    tasks = int(options.get("ntasks", "1"))
    per_node = int(options.get("ntasks-per-node", 1 if options.get("nodes") else max(1, tasks // nodes(tasks))))
    env = {**os.environ, "SLURM_NTASKS": str(tasks), "SLURM_STEP_TASKS_PER_NODE": f"{per_node}(x{nodes(tasks)})"}
    running = [
        subprocess.Popen(command, env=env | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i % per_node)})
        for i in range(tasks)
    ]
    return max(p.wait() for p in running)


def nodes(tasks: int) -> int:
    return min(tasks, int(os.environ["SLURM_NNODES"]))


if __name__ == "__main__":
    sys.exit(main())
