"""Fit the twelve constants of the time model to points: least squares of log(predicted / measured), with priors.

The priors are wide (a factor) and physical; they decide only what the points leave open, and keep a constant from
taking over a cause that is not its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from math import log
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fp4dist.cluster.constants import Constants
from fp4dist.cluster.points import Point

# constant: (value expected, factor of one standard deviation)
PRIORS: dict[str, tuple[float, float]] = {
    "bf16": (0.6, 1.2),
    "fp8": (0.62, 1.15),
    "mxfp8": (0.62, 1.15),
    "nvfp4": (0.52, 1.2),
    "attention": (0.5, 1.12),
    "memory": (0.8, 1.1),  # H100: a copy reaches 0.88
    "gap_us": (3.0, 1.2),
    "tensor": (0.6, 1.25),
    "data": (0.4, 1.35),
    "expert": (1.0, 1.25),  # HybridEP on 8 GB200: 520 to 616 GB/s of 900
    "scan": (0.1, 1.6),
    "power": (1.2, 1.3),
}
_NOISE, _NOISE_MOE = 0.05, 0.07  # of one point, relative: runs and versions of the software
_STEP, _ITERATIONS, _SETTLED = 1e-3, 25, 1e-4
_ROBUST = 2.0  # residuals beyond so many standard deviations count as outliers, with falling weight (Huber)

Vector = NDArray[np.floating[Any]]


def fit(points: Sequence[Point], start: Constants | None = None) -> Constants:
    """Constants that explain `points` best (Levenberg-Marquardt on logarithms), from the priors or from `start`."""
    names = [f.name for f in dataclasses.fields(Constants)]
    theta = np.array([log(getattr(start, n) if start else PRIORS[n][0]) for n in names])
    damping, here = 1e-2, _residuals(theta, names, points)
    for _ in range(_ITERATIONS):
        slopes = _jacobian(theta, here, names, points)
        weight = _weights(here)
        normal = slopes.T @ (weight[:, None] * slopes)
        step = np.linalg.solve(normal + damping * np.diag(np.diag(normal)), -slopes.T @ (weight * here))
        tried = _residuals(theta + step, names, points)
        if _loss(tried) < _loss(here):
            theta, here, damping = theta + step, tried, damping / 5
            if float(np.max(np.abs(step))) < _SETTLED:
                break
        else:
            damping *= 5
    return _constants(theta, names)


def relative_error(point: Point, constants: Constants) -> float:
    """Predicted over measured, minus one."""
    return point.predict(constants).step_time_s / point.seconds - 1


def leave_one_out(points: Sequence[Point]) -> dict[str, float]:
    """Relative error of each point under constants that were fitted to all the others."""
    start = fit(points)
    return {p.id: relative_error(p, fit([q for q in points if q.id != p.id], start)) for p in points}


def summary(errors: Sequence[float]) -> tuple[float, float]:
    """(median, worst) of |error|."""
    sizes = [abs(e) for e in errors]
    return (median(sizes), max(sizes)) if sizes else (0.0, 0.0)


def _constants(theta: Vector, names: list[str]) -> Constants:
    return Constants(**{n: float(np.exp(t)) for n, t in zip(names, theta, strict=True)})


def _residuals(theta: Vector, names: list[str], points: Sequence[Point]) -> Vector:
    """In standard deviations: points, then priors."""
    constants = _constants(theta, names)
    data = [log(p.predict(constants).step_time_s / p.seconds) / (_NOISE_MOE if p.moe else _NOISE) for p in points]
    prior = [(t - log(PRIORS[n][0])) / log(PRIORS[n][1]) for n, t in zip(names, theta, strict=True)]
    return np.array([*data, *prior])


def _jacobian(theta: Vector, here: Vector, names: list[str], points: Sequence[Point]) -> Vector:
    columns = []
    for i in range(len(theta)):
        moved = theta.copy()
        moved[i] += _STEP
        columns.append((_residuals(moved, names, points) - here) / _STEP)
    return np.stack(columns, axis=1)


def _weights(residuals: Vector) -> Vector:
    return np.minimum(1.0, _ROBUST / np.maximum(np.abs(residuals), 1e-9))


def _loss(residuals: Vector) -> float:
    size = np.abs(residuals)
    return float(np.sum(np.where(size <= _ROBUST, 0.5 * size**2, _ROBUST * (size - 0.5 * _ROBUST))))
