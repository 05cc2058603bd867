"""Files of finished runs' losses, each with its source, as points for the scaling law."""

from __future__ import annotations

import json
from dataclasses import field
from pathlib import Path

from fp4dist.errors import DataError
from fp4dist.spec.frozen import frozen
from fp4dist.spec.load import load_spec
from fp4dist.study.law import Point
from fp4dist.study.plan import BASELINE

Method = tuple[str, str]  # how the forward and the backward pass are quantized; bf16: not at all
FULL: Method = (BASELINE, BASELINE)


@frozen
class Series:
    """One method's runs. losses   size -> steps -> final loss in nats"""

    forward: str
    backward: str
    losses: dict[str, dict[int, float]]


@frozen
class Losses:
    """A file under configs/scaling/. source   who measured them, where they are written;  parameters   size -> N of the
    blocks;  laws   constants that others have published, for comparison
    """

    source: str
    tokens_per_step: int
    parameters: dict[str, int]
    series: tuple[Series, ...]
    laws: dict[str, dict[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.source:
            raise ValueError("source is empty; enter only losses whose source you name")
        for one in self.series:
            if unknown := set(one.losses) - set(self.parameters):
                raise ValueError(f"losses of {sorted(unknown)}, whose parameters are not given")


def load_losses(name_or_path: str | Path, without: tuple[str, ...] = ()) -> tuple[Losses, dict[Method, list[Point]]]:
    """(the file, its points by method), by shipped name or by path. without   sizes that are left out"""
    file = load_spec(Losses, "scaling", name_or_path)
    if unknown := set(without) - set(file.parameters):
        raise DataError(f"{name_or_path}: has no sizes {sorted(unknown)}; it has {', '.join(file.parameters)}")
    points: dict[Method, list[Point]] = {}
    for one in file.series:
        points[one.forward, one.backward] = [
            Point(file.parameters[size], steps * file.tokens_per_step, loss)
            for size, losses in one.losses.items()
            if size not in without
            for steps, loss in losses.items()
        ]
    return file, points


def study_points(results: Path) -> dict[Method, list[Point]]:
    """The points of a study's results.json: its baseline as full precision, other arms as quantized in both passes."""
    points: dict[Method, list[Point]] = {}
    try:
        cells = json.loads(results.read_text(encoding="utf-8"))["cells"]
    except (ValueError, KeyError, TypeError) as e:
        raise DataError(f"{results}: not the results.json of a study's report ({type(e).__name__}: {e})") from e
    for cell in cells:
        if losses := list(cell["losses"].values()):
            method = FULL if cell["arm"] == BASELINE else (cell["arm"], cell["arm"])
            mean = sum(losses) / len(losses)
            points.setdefault(method, []).append(Point(cell["block_parameters"], cell["tokens"], mean))
    if FULL not in points:
        raise DataError(f"{results}: has no finished run of {BASELINE}, which the law is fitted to")
    return points
