"""What preflight expects of the nodes: the topology, the job's place on it, and what the operator allows."""

from __future__ import annotations

from fp4dist.spec.cluster import Topology
from fp4dist.spec.frozen import frozen


@frozen
class Expect:
    """The yardstick of all checks."""

    topology: Topology
    gpus_per_node: int
    segment: int = 1  # nodes that must share a NVLink domain
    hosts: tuple[str, ...] = ()  # in rank order; empty: judge the nodes that were captured
    kubernetes: bool = False  # IMEX daemons come from a ComputeDomain
    megatron: tuple[str, ...] = ()  # arguments of Megatron-LM's own script, where that is what runs
    allow_degraded: bool = False  # run over NICs alone where NVLink is degraded

    @property
    def gpu(self) -> bool:
        """Whether nodes have GPUs at all."""
        return self.topology.gpu.family != "cpu"

    @property
    def mnnvl(self) -> bool:
        """Whether NVLink joins several nodes of this job."""
        return self.topology.mnnvl and self.segment > 1
