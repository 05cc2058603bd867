"""The scaling law with efficiencies: what precision does to parameters (forward) and to tokens (backward).

    L(N, D) = (A / (N eff_N)^alpha + B / (D eff_D)^beta)^gamma + E                      arXiv:2505.14669

N parameters of the blocks, D tokens, L nats. Stage 1 fits the six constants to full-precision runs, stage 2 one or both
efficiencies to a method's runs with those constants held. Both minimize the Huber loss of ln L by damped Gauss-Newton
steps from many starts at once. The constants are badly determined by a few sizes: look at the intervals.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fp4dist.errors import DataError

CONSTANTS = ("A", "alpha", "B", "beta", "E", "gamma")
DELTA = 1e-4  # of Huber, on ln L: the paper's
_LOGARITHMIC = (0, 2, 4)  # constants that are fitted as their logarithms
_ITERATIONS = 1500
Array = np.ndarray


@dataclass(frozen=True, slots=True)
class Point:
    """One finished run: parameters and tokens (both not in logarithms), final loss in nats."""

    parameters: float
    tokens: float
    loss: float


@dataclass(frozen=True, slots=True)
class Law:
    """The six constants."""

    A: float
    alpha: float
    B: float
    beta: float
    E: float
    gamma: float

    def loss(self, parameters: float, tokens: float, eff_n: float = 1.0, eff_d: float = 1.0) -> float:
        """Predicted loss in nats."""
        size = self.A / (parameters * eff_n) ** self.alpha
        data = self.B / (tokens * eff_d) ** self.beta
        return (size + data) ** self.gamma + self.E


@dataclass(frozen=True, slots=True)
class Fit:
    """A fitted law. cost: sum of Huber losses of ln L;  residuals   predicted - measured loss of each point, nats."""

    law: Law
    cost: float
    residuals: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Efficiency:
    """How many parameters and tokens of full precision one of a method is worth; 1 where it was held."""

    eff_n: float
    eff_d: float
    cost: float


def fit(points: Sequence[Point], delta: float = DELTA) -> Fit:
    """Stage 1. Raises DataError for points that cannot determine the six constants."""
    _check(points)
    logs = _logs(points)
    found, costs = _minimize(_starts(points), np.ones((1, len(points))), logs, delta)
    best = int(np.argmin(costs))
    law = _law(found[best])
    residuals = tuple(law.loss(p.parameters, p.tokens) - p.loss for p in points)
    return Fit(law, float(costs[best]), residuals)


def bootstrap(points: Sequence[Point], best: Law, number: int = 400, seed: int = 0, delta: float = DELTA) -> list[Law]:
    """Laws of resampled points: each draws as many points as there are, with repetition. Start: the best law.

    Draws that leave fewer than two sizes or three budgets are drawn again.
    """
    _check(points)
    draw, weights = np.random.default_rng(seed), []
    while len(weights) < number:
        counts = np.bincount(draw.integers(len(points), size=len(points)), minlength=len(points))
        kept = [p for p, n in zip(points, counts, strict=True) if n]
        if len({p.parameters for p in kept}) >= 2 and len({p.tokens for p in kept}) >= 3 and len(kept) >= 7:
            weights.append(counts)
    start = np.repeat(_vector(best)[None], number, axis=0)
    found, _ = _minimize(start, np.array(weights, dtype=float), _logs(points), delta)
    return [_law(p) for p in found]


def efficiency(law: Law, points: Sequence[Point], which: str, delta: float = DELTA) -> Efficiency:
    """Stage 2. which: `n` (a method that quantizes forward alone), `d` (backward alone) or `both`."""
    if which not in ("n", "d", "both"):
        raise ValueError(f"which = {which!r} must be n, d or both")
    free = [i for i, name in enumerate(("n", "d")) if which in (name, "both")]
    if len(points) < len(free):
        raise DataError(f"{len(points)} points for {len(free)} efficiencies: enter more runs of this method")
    ln_n, ln_d, ln_l = _logs(points)
    best = (math.inf, 0.0, 0.0)
    for start in itertools.product(*((0.0, -0.5, -1.5) if i in free else (0.0,) for i in (0, 1))):
        x = np.array(start)
        damping, cost, r, jac = 1e-3, math.inf, np.zeros(0), np.zeros((0, 2))
        for _ in range(300):
            trial, slopes = _predict(law, ln_n + x[0], ln_d + x[1])
            new = float(_huber(trial - ln_l, delta).sum())
            if cost == math.inf:
                cost, r, jac = new, trial - ln_l, slopes
            step = np.zeros(2)
            W = np.minimum(1.0, delta / np.maximum(np.abs(r), 1e-300))
            hess = (jac * W[:, None]).T @ jac
            inner = hess[np.ix_(free, free)] + damping * np.diag(np.diag(hess)[free])
            step[free] = np.linalg.solve(inner, ((jac * W[:, None]).T @ r)[free])
            tried, tried_slopes = _predict(law, ln_n + (x - step)[0], ln_d + (x - step)[1])
            lower = float(_huber(tried - ln_l, delta).sum())
            if lower < cost:
                x, cost, r, jac, damping = x - step, lower, tried - ln_l, tried_slopes, damping / 3
            else:
                damping *= 4
            if damping > 1e12:
                break
        best = min(best, (cost, float(x[0]), float(x[1])))
    return Efficiency(math.exp(best[1]), math.exp(best[2]), best[0])


def interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """The central interval of bootstrap values."""
    low, high = np.quantile(np.array(values), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


# ---------- numbers


def _check(points: Sequence[Point]) -> None:
    sizes, budgets = {p.parameters for p in points}, {p.tokens for p in points}
    if len(points) < 7 or len(sizes) < 2 or len(budgets) < 3:
        raise DataError(
            f"{len(points)} runs of {len(sizes)} sizes and {len(budgets)} budgets cannot determine the law's six"
            " constants; it needs at least 7 runs, 2 sizes and 3 budgets"
        )
    if bad := [p for p in points if min(p.parameters, p.tokens, p.loss) <= 0]:
        raise DataError(f"{bad[0]}: parameters, tokens and loss must be positive")


def _logs(points: Sequence[Point]) -> tuple[Array, Array, Array]:
    values = np.log(np.array([(p.parameters, p.tokens, p.loss) for p in points], dtype=np.float64))
    return values[:, 0], values[:, 1], values[:, 2]


def _law(p: Array) -> Law:
    return Law(*(math.exp(x) if i in _LOGARITHMIC else float(x) for i, x in enumerate(p)))


def _vector(law: Law) -> Array:
    values = [getattr(law, name) for name in CONSTANTS]
    return np.array([math.log(x) if i in _LOGARITHMIC else x for i, x in enumerate(values)])


def _starts(points: Sequence[Point]) -> Array:
    """[S, 6]: a grid of exponents; A and B such that their terms are of the size of the losses."""
    n = np.exp(np.mean([math.log(p.parameters) for p in points]))
    d = np.exp(np.mean([math.log(p.tokens) for p in points]))
    lowest = min(p.loss for p in points)
    grid = itertools.product((0.3, 0.6), (0.3, 0.6), (0.2, 0.5, 0.8), (0.3, 1.0), (0.3, 3.0))
    rows = []
    for alpha, beta, below, gamma, share in grid:
        term = ((1 - below) * lowest) ** (1 / gamma)
        rows.append(
            [math.log(term * share) + alpha * math.log(n), alpha, math.log(term) + beta * math.log(d), beta,
             math.log(below * lowest), gamma]
        )  # fmt: skip
    return np.array(rows)


def _huber(r: Array, delta: float) -> Array:
    size = np.abs(r)
    return np.where(size < delta, 0.5 * r * r, delta * (size - 0.5 * delta))


def _minimize(p: Array, weights: Array, logs: tuple[Array, Array, Array], delta: float) -> tuple[Array, Array]:
    """(p [S, 6], costs [S]) of S fits at once. weights [S or 1, points]."""

    def look(at: Array) -> tuple[Array, Array, Array]:
        with np.errstate(all="ignore"):  # a step too far is infinite, and not taken
            r, jac = _residuals(at, logs)
            cost = (weights * _huber(r, delta)).sum(1)
        return r, jac, np.where(np.isfinite(cost) & np.isfinite(jac).all((1, 2)), cost, np.inf)

    r, jac, cost = look(p)
    kept = np.isfinite(cost)
    p, r, jac, cost = p[kept], r[kept], jac[kept], cost[kept]
    weights = weights if len(weights) == 1 else weights[kept]
    damping, eye = np.full(len(p), 1e-3), np.eye(6)
    for _ in range(_ITERATIONS):
        W = weights * np.minimum(1.0, delta / np.maximum(np.abs(r), 1e-300))
        hess = np.einsum("sni,sn,snj->sij", jac, W, jac)
        g = np.einsum("sni,sn->si", jac, W * r)
        diagonal = np.einsum("sii->si", hess)
        hess = hess + ((damping[:, None] * diagonal) + 1e-300)[:, :, None] * eye
        tried = p - np.linalg.solve(hess, g[..., None])[..., 0]
        r_new, slopes_new, cost_new = look(tried)
        better = cost_new < cost
        p, r = np.where(better[:, None], tried, p), np.where(better[:, None], r_new, r)
        jac, cost = np.where(better[:, None, None], slopes_new, jac), np.where(better, cost_new, cost)
        damping = np.clip(np.where(better, damping / 3, damping * 4), 1e-12, 1e8)
    return p, cost


def _residuals(p: Array, logs: tuple[Array, Array, Array]) -> tuple[Array, Array]:
    """(ln predicted - ln measured [S, points], its derivatives [S, points, 6])."""
    ln_n, ln_d, ln_l = logs
    a, alpha, b, beta, e, gamma = (p[:, i : i + 1] for i in range(6))
    size, data = np.exp(a - alpha * ln_n), np.exp(b - beta * ln_d)
    total = size + data
    power, floor = total**gamma, np.exp(e)
    loss = power + floor
    slope = gamma * power / total / loss
    parts = [
        slope * size,
        -slope * size * ln_n,
        slope * data,
        -slope * data * ln_d,
        floor / loss,
        power * np.log(total) / loss,
    ]
    return np.log(loss) - ln_l, np.stack([np.broadcast_to(x, loss.shape) for x in parts], -1)


def _predict(law: Law, ln_n: Array, ln_d: Array) -> tuple[Array, Array]:
    """(ln loss [points], its derivatives by ln N and ln D [points, 2])."""
    size, data = law.A * np.exp(-law.alpha * ln_n), law.B * np.exp(-law.beta * ln_d)
    total = size + data
    power = total**law.gamma
    loss = power + law.E
    slope = law.gamma * power / total / loss
    return np.log(loss), np.stack([-slope * size * law.alpha, -slope * data * law.beta], -1)
