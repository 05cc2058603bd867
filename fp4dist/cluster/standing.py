"""Where the published layout of a point stands among those that the planner would choose."""

from __future__ import annotations

from dataclasses import dataclass

from fp4dist.cluster.planner import Job, family, plan
from fp4dist.cluster.points import Point
from fp4dist.cluster.topology import load_topology
from fp4dist.spec.load import load_model, load_recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """place: from 1; None: not among the ranked. slower: predicted time of the published layout over the best one's."""

    place: int | None
    ranked: int
    slower: float
    best: str

    def text(self) -> str:
        """Short."""
        where = f"{self.place} of {self.ranked}" if self.place else f"none of {self.ranked}"
        return f"{where} ({self.slower:+.1%}; first: {self.best})"


def standing(point: Point) -> Standing:
    """Plan the point's job and look for its layout: tp, pp, cp, ep and fsdp equal."""
    job = Job(
        model=load_model(point.model),
        topology=load_topology(point.topology),
        gpus=point.gpus,
        gbs=point.gbs,
        seq=point.seq,
        precision=point.precision,
        recipe=load_recipe(point.recipe) if point.recipe else None,
    )
    found = plan(job)
    wanted = family(point.layout)
    place = next((i + 1 for i, p in enumerate(found.ranked) if family(p.quick.layout) == wanted), None)
    first = found.ranked[0] if found.ranked else None
    theirs = found.ranked[place - 1].quick.step_time_s if place else point.predict().step_time_s
    return Standing(
        place=place,
        ranked=len(found.ranked),
        slower=theirs / first.quick.step_time_s - 1 if first else 0.0,
        best=first.quick.layout.label() if first else "nothing fits",
    )
