"""Ranks onto GPUs: how many of a domain a job uses, and which link each process group crosses."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, gcd
from pathlib import Path

from fp4dist.errors import ConfigError
from fp4dist.spec.cluster import Axis, Layout, Topology
from fp4dist.spec.load import load_spec

_WHOLE_SHARE = 0.5  # of a domain's usable GPUs: below it, equal parts waste NVLink, and the last domain is left short


def load_topology(name_or_path: str | Path) -> Topology:
    """Read a topology by shipped name or by path."""
    return load_spec(Topology, "topology", name_or_path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A process group: `inside` of its members share a NVLink domain, and it reaches over `across` domains."""

    inside: int
    across: int

    @property
    def size(self) -> int:
        """Ranks of the group."""
        return self.inside * self.across


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """A job of `gpus` on a topology: `per_domain` GPUs in each of `domains`; the last may hold fewer (`uneven`)."""

    topology: Topology
    layout: Layout
    gpus: int
    per_domain: int
    domains: int
    uneven: bool
    warnings: tuple[str, ...]

    @property
    def segment(self) -> int:
        """Nodes that must lie in one domain: Slurm's --segment."""
        return max(1, min(self.per_domain, self.gpus) // self.topology.host.gpus)

    def span(self, axis: Axis | str) -> Span:
        """The group of `axis`: tp, cp, pp, dp, ep, etp, edp (copies of an expert), data (dp with cp: gradients)."""
        if axis == "data":
            cp, dp = self.span("cp"), self.span("dp")
            return Span(inside=cp.inside * dp.inside, across=cp.across * dp.across)
        stride, size = _grid(self.layout, self.gpus)[axis]
        return _span(stride, size, self.per_domain)

    def link(self, axis: Axis | str) -> str:
        """Name of the slowest link that the group of `axis` uses; `none` for a group of one."""
        span = self.span(axis)
        if span.size == 1:
            return "none"
        return (self.topology.across if span.across > 1 else self.topology.inside).name


def place(topology: Topology, gpus: int, layout: Layout) -> Placement:
    """Spread a job over as few domains as hold it in equal parts.

    Raises ConfigError where the cluster has too few GPUs, or where the layout's groups do not divide the job.
    """
    _check(topology, gpus, layout)
    per_domain, domains, uneven = _parts(topology, gpus)
    placement = Placement(
        topology=topology,
        layout=layout,
        gpus=gpus,
        per_domain=per_domain,
        domains=domains,
        uneven=uneven,
        warnings=(),
    )
    warnings = tuple(_warnings(placement))
    return Placement(
        topology=topology,
        layout=layout,
        gpus=gpus,
        per_domain=per_domain,
        domains=domains,
        uneven=uneven,
        warnings=warnings,
    )


def _check(topology: Topology, gpus: int, layout: Layout) -> None:
    if gpus < 1:
        raise ConfigError(f"gpus = {gpus} must be at least 1")
    if topology.domains is not None and gpus > topology.domains * topology.gpus_per_domain:
        held = topology.domains * topology.gpus_per_domain
        raise ConfigError(f"topology {topology.name} has {held} GPUs, the job asks for {gpus}; raise its `domains`")
    try:
        dp = layout.dp(gpus)
        layout.expert_dp(gpus)
    except ValueError as e:
        raise ConfigError(f"layout {layout.label()}: {e}") from e
    if layout.fsdp > 1 and (dp * layout.cp) % layout.fsdp:
        raise ConfigError(
            f"layout {layout.label()}: fsdp = {layout.fsdp} must divide the {dp * layout.cp} ranks that hold equal"
            " weights (dp * cp)"
        )
    if layout.order == "tp-cp-ep-pp-dp" and layout.pp > 1 and layout.ep * layout.etp not in (1, layout.tp * layout.cp):
        raise ConfigError(
            f"layout {layout.label()}: order {layout.order} needs ep * etp = tp * cp, since experts are spread over the"
            " ranks of a stage that follow each other; use order tp-cp-ep-dp-pp"
        )


def _parts(topology: Topology, gpus: int) -> tuple[int, int, bool]:
    """(GPUs used in a domain, domains, whether the last domain holds fewer)."""
    if gpus <= topology.gpus_per_domain:
        return gpus, 1, False
    node, all_nodes = topology.host.gpus, topology.nodes_per_domain
    kept = all_nodes - topology.spare_nodes  # spares stay free where the job divides so; else they are used
    for nodes in (kept, *(n for n in range(all_nodes, 0, -1) if n != kept)):
        equal = nodes * node
        if gpus % equal == 0 and equal >= _WHOLE_SHARE * topology.usable_per_domain:
            return equal, gpus // equal, False
    return topology.usable_per_domain, ceil(gpus / topology.usable_per_domain), True


def _grid(layout: Layout, gpus: int) -> dict[str, tuple[int, int]]:
    """(stride, size) of every group, in ranks."""
    dp, edp = layout.dp(gpus), layout.expert_dp(gpus)
    tp_cp, experts = layout.tp * layout.cp, layout.etp * layout.ep
    inner = layout.order == "tp-cp-ep-pp-dp"
    return {
        "tp": (1, layout.tp),
        "cp": (layout.tp, layout.cp),
        "dp": (tp_cp * (layout.pp if inner else 1), dp),
        "pp": (tp_cp if inner else tp_cp * dp, layout.pp),
        "etp": (1, layout.etp),
        "ep": (layout.etp, layout.ep),
        "edp": (experts * (layout.pp if inner else 1), edp),
    }


def _span(stride: int, size: int, per_domain: int) -> Span:
    """How a regular group falls into blocks of `per_domain` ranks."""
    room = max(1, per_domain // stride)
    inside = size if size <= room and per_domain % (stride * size) == 0 else gcd(size, room)
    return Span(inside=inside, across=size // inside)


def _warnings(placement: Placement) -> list[str]:
    topology, layout, found = placement.topology, placement.layout, []
    node, nodes = topology.host.gpus, ceil(placement.gpus / topology.host.gpus)
    if placement.gpus % node and placement.gpus > node:
        found.append(f"{placement.gpus} GPUs are not whole nodes of {node}: the last one is partly idle")
    if placement.uneven:
        found.append(
            f"{nodes} nodes have no divisor near {topology.nodes_per_domain} (nodes of a domain): domains are filled"
            f" unevenly and --segment cannot keep groups together; use a multiple of"
            f" {topology.nodes_per_domain - topology.spare_nodes} nodes"
        )
    if topology.spare_nodes and placement.per_domain > topology.usable_per_domain:
        found.append(
            f"{placement.per_domain} GPUs of a domain leave fewer than {topology.spare_nodes} spare nodes: one broken"
            " node stops the job until it is repaired"
        )
    names = {"tp": "tensor-parallel", "cp": "context-parallel", "ep": "expert-parallel"}
    for axis, words in names.items():
        span = placement.span(axis)
        if span.across > 1:
            found.append(
                f"{words} groups ({axis} = {span.size}) cross {span.across} NVLink domains: their traffic is on"
                f" {topology.across.name} at {topology.across.gb_per_s:g} GB/s instead of {topology.inside.gb_per_s:g}"
            )
    if layout.pp > 1 and placement.span("pp").across > 1 and placement.domains > 1:
        found.append(f"pipeline stages lie in different domains (order {layout.order})")
    return found
