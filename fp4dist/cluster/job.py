"""A job to start: which run on which nodes, and what the site wants. Emitters turn it into launch files."""

from __future__ import annotations

import re
from typing import Literal

from fp4dist.cluster.environment import Setting, settings, signed
from fp4dist.spec.cluster import Layout, Topology
from fp4dist.spec.frozen import frozen

Launcher = Literal["srun", "deepspeed", "torchrun"]
_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,38}[a-z0-9])?")


@frozen
class Job:
    """One start of launch/pretrain.py. Text that reaches a shell or YAML is quoted or checked here."""

    name: str  # lower-case letters, digits and dashes: Kubernetes makes host names from it
    topology: Topology
    layout: Layout
    gpus: int
    nodes_per_domain: int  # that the job uses of each NVLink domain: Slurm's segment
    config: str  # the run file, relative to the repository
    topology_file: str = ""  # where the topology was read from, if it is not a shipped one
    overrides: tuple[str, ...] = ()  # `--set` of launch/pretrain.py
    launcher: Launcher = "srun"  # under Slurm
    hosts: tuple[str, ...] = ()  # in rank order, where they are known beforehand
    port: int = 29500
    time: str = "24:00:00"
    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    container: str | None = None  # an image for pyxis' --container-image
    image: str = "fp4dist:latest"  # for Kubernetes
    resources: tuple[str, ...] = ()  # further Kubernetes resources of a pod, such as rdma/ib=4
    bench: bool = True  # preflight also times collectives
    allow_degraded: bool = False
    nvls: bool = False

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(
                f"name = {self.name!r} must be lower-case letters, digits and dashes, at most 40, not at its ends;"
                " Kubernetes and Slurm make host and file names from it"
            )
        for key in ("time", "account", "partition", "qos", "container", "image"):
            value = getattr(self, key)
            if value is not None and not re.fullmatch(r"[\w@:/.,+#=-]+", value):
                raise ValueError(f"{key} = {value!r} has characters that a batch script cannot take; remove them")
        if self.gpus % self.slots:
            raise ValueError(
                f"gpus = {self.gpus} is not a multiple of the {self.slots} of a node; a node is not shared between jobs"
            )
        if self.nodes % self.nodes_per_domain:
            raise ValueError(
                f"{self.nodes} nodes are not a multiple of nodes_per_domain = {self.nodes_per_domain}; every NVLink"
                " domain gives equally many"
            )
        if self.hosts and len(self.hosts) != self.nodes:
            raise ValueError(f"{len(self.hosts)} hosts are given, the job needs {self.nodes}")

    @property
    def slots(self) -> int:
        """Ranks of a node."""
        return min(self.gpus, self.topology.host.gpus)

    @property
    def nodes(self) -> int:
        """Nodes of the job."""
        return self.gpus // self.slots

    @property
    def domains(self) -> int:
        """NVLink domains (racks of an NVL72) that it spans."""
        return self.nodes // self.nodes_per_domain

    @property
    def cpu(self) -> bool:
        """Whether the ranks run on CPUs."""
        return self.topology.gpu.family == "cpu"

    @property
    def multinode_nvlink(self) -> bool:
        """Whether NVLink joins several of its nodes, which needs IMEX."""
        return self.topology.mnnvl and self.nodes_per_domain > 1

    @property
    def where(self) -> list[str]:
        """Options that tell preflight which nodes these are."""
        return ["--topology", self.topology_file or self.topology.name]

    @property
    def variables(self) -> dict[str, str]:
        """The signed environment of every rank."""
        return signed(self.settings)

    @property
    def settings(self) -> list[Setting]:
        """The variables with their reasons."""
        mnnvl = self.multinode_nvlink and not self.allow_degraded
        return settings(self.topology, self.layout, ranks=self.gpus, nvls=self.nvls, mnnvl=mnnvl)

    @property
    def command(self) -> list[str]:
        """What a launcher starts once for every rank."""
        numa = 0 if self.cpu else self.topology.host.gpus_per_numa
        sets = [word for override in self.overrides for word in ("--set", override)]
        program = ["python", "-u", "launch/pretrain.py", "--config", self.config, *sets]
        return ["launch/rank.sh", "--gpus-per-numa", str(numa), *program]

    @property
    def title(self) -> str:
        """One line about the job, for the head of every file."""
        where = f"{self.domains} x {self.nodes_per_domain} nodes of {self.topology.name}"
        return f"{self.name}: {self.gpus} ranks on {where}, {self.layout.label()}, dp{self.layout.dp(self.gpus)}"
