"""How often to save: the interval that loses least time to saving, to work done twice and to restarts.

Young 1974: sqrt(2 save mtbf). Daly 2006, "A higher order estimate of the optimum checkpoint
interval for restart dumps":
the expansion below, and the expected wall time of a run under failures that come as a Poisson process.
"""

from __future__ import annotations

from math import exp, expm1, log2, sqrt

# Llama 3 (arXiv:2407.21783, 3.3.4): 419 unexpected interruptions in 54 days on 16,384 H100.
GPU_MTBF_HOURS = 16384 * 54 * 24 / 419
_RESTART_S = (512, 250.0, 5120, 490.0)  # MLPerf v5.1, Llama 3.1 405B: seconds before the first step at two sizes


def job_mtbf_s(gpus: int, gpu_mtbf_hours: float = GPU_MTBF_HOURS) -> float:
    """Mean seconds between interruptions of a job of `gpus`."""
    return gpu_mtbf_hours * 3600 / gpus


def restart_s(gpus: int) -> float:
    """Seconds from an interruption to the next step: linear in log2 of the size between and beyond two jobs."""
    small, fast, large, slow = _RESTART_S
    slope = (slow - fast) / (log2(large) - log2(small))
    return max(30.0, fast + slope * (log2(gpus) - log2(small)))


def young(save_s: float, mtbf_s: float) -> float:
    """Seconds of work between saves, first order."""
    return sqrt(2 * save_s * mtbf_s)


def daly(save_s: float, mtbf_s: float) -> float:
    """Seconds of work between saves, higher order; the mean time between failures where saving takes that long."""
    if save_s >= 2 * mtbf_s:
        return mtbf_s
    ratio = save_s / (2 * mtbf_s)
    return young(save_s, mtbf_s) * (1 + sqrt(ratio) / 3 + ratio / 9) - save_s


def goodput(interval_s: float, save_s: float, restart: float, mtbf_s: float) -> float:
    """Useful share of the wall time: work / (M e^(R/M) (e^((work + save)/M) - 1)) for each interval of `work`."""
    wall = mtbf_s * exp(restart / mtbf_s) * expm1((interval_s + save_s) / mtbf_s)
    return interval_s / wall
