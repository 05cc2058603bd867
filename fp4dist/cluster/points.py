"""Published and measured steps, which the time model is fitted to and judged by."""

from __future__ import annotations

from functools import cache
from typing import Literal

from fp4dist.cluster.constants import Constants
from fp4dist.cluster.shapes import shape_of
from fp4dist.cluster.timing import Prediction, predict
from fp4dist.cluster.topology import load_topology
from fp4dist.spec.cluster import Layout, Precision, Topology
from fp4dist.spec.frozen import frozen
from fp4dist.spec.load import load_model, load_recipe, load_spec
from fp4dist.spec.run import ModelConfig


@frozen
class Point:
    """One row. Exactly one of step_s, tokens_per_s_per_gpu and tflops_per_gpu (model FLOPs, as `flops_per_token`).

    use   fit: the constants are fitted to it; held: judged only; note: something of it had to be assumed, shown apart
    """

    id: str
    model: str
    topology: str
    gpus: int
    precision: Precision | None = None
    recipe: str | None = None  # instead of a precision
    layout: Layout = Layout()
    gbs: int
    seq: int
    step_s: float | None = None
    tokens_per_s_per_gpu: float | None = None
    tflops_per_gpu: float | None = None
    use: Literal["fit", "held", "note"]
    source: str
    assumed: str = ""

    def __post_init__(self) -> None:
        if [self.step_s, self.tokens_per_s_per_gpu, self.tflops_per_gpu].count(None) != 2:
            raise ValueError(f"{self.id}: give one of step_s, tokens_per_s_per_gpu and tflops_per_gpu")

    @property
    def seconds(self) -> float:
        """Measured seconds of a step."""
        if self.step_s is not None:
            return self.step_s
        rate = self.tokens_per_s_per_gpu
        if rate is None:
            assert self.tflops_per_gpu is not None
            rate = self.tflops_per_gpu * 1e12 / shape_of(_model(self.model)).flops_per_token(self.seq)
        return self.gbs * self.seq / (rate * self.gpus)

    @property
    def moe(self) -> bool:
        """Whether the model has experts."""
        return _model(self.model).moe is not None

    def predict(self, constants: Constants | None = None) -> Prediction:
        """What the model says of it."""
        return predict(
            _model(self.model),
            _topology(self.topology),
            self.gpus,
            self.layout,
            precision=self.precision,
            recipe=load_recipe(self.recipe) if self.recipe else None,
            gbs=self.gbs,
            seq=self.seq,
            constants=constants,
        )


@frozen
class Points:
    """What `configs/calibration/points.yaml` holds."""

    points: tuple[Point, ...]

    def __post_init__(self) -> None:
        ids = [p.id for p in self.points]
        if len(set(ids)) < len(ids):
            raise ValueError("two points have the same id")


@cache
def _model(name: str) -> ModelConfig:
    return load_model(name)


@cache
def _topology(name: str) -> Topology:
    return load_topology(name)


def load_points() -> tuple[Point, ...]:
    """The shipped points."""
    return load_spec(Points, "calibration", "points").points
