"""Clusters and layouts as frozen data: what the machine is, and which ranks of a job work together.

Units: GB = 1e9 bytes, GB/s and TFLOP/s of one GPU, one direction, dense. Node = the unit that boots (a tray of an
NVL72, an HGX box); domain = the GPUs that NVLink joins; rack = one domain of an NVL72, one or more nodes elsewhere.
"""

from __future__ import annotations

from typing import Literal

from fp4dist.spec.frozen import frozen

Precision = Literal["bf16", "fp8", "mxfp8", "nvfp4"]
Recompute = Literal["none", "selective", "mlp", "full"]
Axis = Literal["tp", "cp", "ep", "dp", "pp"]
# How Megatron numbers ranks, the fastest axis first. The second keeps a model's copy together: only DP spans racks.
Order = Literal["tp-cp-ep-dp-pp", "tp-cp-ep-pp-dp"]


@frozen
class Rates:
    """Dense TFLOP/s of the tensor cores by operand type; 0 where the device has none (such a GEMM runs as bf16)."""

    bf16: float
    fp8: float = 0.0
    fp4: float = 0.0

    def __post_init__(self) -> None:
        if self.bf16 <= 0 or min(self.fp8, self.fp4) < 0:
            raise ValueError(
                f"peak rates bf16 = {self.bf16}, fp8 = {self.fp8}, fp4 = {self.fp4} must be positive, or 0"
            )


@frozen
class Gpu:
    """One accelerator. `device` is a part of the name that the driver reports."""

    name: str
    device: str
    family: Literal["hopper", "blackwell", "cpu"]
    memory_gb: float  # that a process sees
    bandwidth_gb_s: float  # of its own memory, read plus write
    peak: Rates
    power_w: float
    gemm: Rates | None = None  # measured on a large GEMM; None: the fitted share of the peak
    copy_gb_s: float | None = None  # measured by a copy, read plus write; None: the fitted share of bandwidth_gb_s
    units: int = 148  # streaming multiprocessors: GEMMs come in waves of so many tiles

    def __post_init__(self) -> None:
        for key in ("memory_gb", "bandwidth_gb_s", "power_w"):
            if getattr(self, key) <= 0:
                raise ValueError(f"{key} = {getattr(self, key)} must be positive")


@frozen
class Link:
    """A way between GPUs, as one GPU sees it in one direction."""

    name: str
    gb_per_s: float
    latency_us: float

    def __post_init__(self) -> None:
        if self.gb_per_s <= 0 or self.latency_us < 0:
            raise ValueError(f"{self.name}: gb_per_s = {self.gb_per_s} must be positive, latency_us not negative")


@frozen
class Host:
    """A node: the processors beside the GPUs."""

    arch: Literal["aarch64", "x86_64"]
    gpus: int
    gpus_per_numa: int
    nics: int
    memory_gb: float
    c2c_gb_s: float = 0.0  # GPU to host memory, one direction; 0: PCIe, too slow to keep activations there

    def __post_init__(self) -> None:
        for key in ("gpus", "gpus_per_numa"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} = {getattr(self, key)} must be at least 1")


@frozen
class Topology:
    """A cluster of equal nodes.

    nodes_per_domain   nodes that NVLink joins: 18 trays of an NVL72, 1 HGX box
    spare_nodes        of them kept back for repairs: 2 of 18 leaves 64 of 72 GPUs
    domains            how many there are; None: as many as a job needs
    mnnvl              NVLink crosses nodes, which needs IMEX
    switches           NVLink switch trays of a domain: one that fails slows the whole domain
    """

    name: str
    gpu: Gpu
    host: Host
    nodes_per_domain: int
    spare_nodes: int = 0
    domains: int | None = None
    mnnvl: bool = False
    switches: int = 0
    inside: Link  # of a domain
    across: Link  # domains

    def __post_init__(self) -> None:
        if self.nodes_per_domain < 1 or not 0 <= self.spare_nodes < self.nodes_per_domain:
            raise ValueError(
                f"nodes_per_domain = {self.nodes_per_domain} must be at least 1 and more than spare_nodes ="
                f" {self.spare_nodes}"
            )
        if self.mnnvl and self.nodes_per_domain == 1:
            raise ValueError("mnnvl: NVLink across nodes needs nodes_per_domain above 1")

    @property
    def gpus_per_domain(self) -> int:
        """GPUs that NVLink joins, spares included."""
        return self.host.gpus * self.nodes_per_domain

    @property
    def usable_per_domain(self) -> int:
        """GPUs of a domain without its spare nodes."""
        return self.host.gpus * (self.nodes_per_domain - self.spare_nodes)


@frozen
class Layout:
    """Which ranks of a job work together; data parallel is the rest.

    etp        tensor parallel inside an expert
    fsdp       ranks that share weights, gradients and optimizer state of what they would otherwise hold alike; 1:
               weights are whole on each and only the optimizer's state is cut (distributed optimizer, ZeRO 1)
    recompute  of activations in backward: none, selective (what is cheap to compute and large to keep: norms,
               activation functions, up-projections of MLA), mlp (the whole MLP or experts), full (every layer from
               its input)
    recomputed share of the layers that `full` applies to
    offload    share of the layers whose activations wait in host memory for backward
    """

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1
    fsdp: int = 1
    micro_batch: int = 1
    order: Order = "tp-cp-ep-dp-pp"
    recompute: Recompute = "none"
    recomputed: float = 1.0
    offload: float = 0.0
    engine: Literal["megatron", "deepspeed"] = "megatron"

    def __post_init__(self) -> None:
        for key in ("tp", "pp", "vpp", "cp", "ep", "etp", "fsdp", "micro_batch"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} = {getattr(self, key)} must be at least 1")
        if self.vpp > 1 and self.pp == 1:
            raise ValueError(f"vpp = {self.vpp} needs pp > 1: it interleaves the chunks of pipeline stages")
        if not 0 <= self.offload <= 1 or not 0 < self.recomputed <= 1:
            raise ValueError(f"offload = {self.offload} and recomputed = {self.recomputed} are shares of the layers")

    @property
    def copy(self) -> int:
        """GPUs of one copy of the dense model: tp * pp * cp."""
        return self.tp * self.pp * self.cp

    def dp(self, gpus: int) -> int:
        """Data-parallel ranks of a job of `gpus`."""
        if gpus < self.copy or gpus % self.copy:
            raise ValueError(
                f"{gpus} GPUs are not a multiple of tp * pp * cp = {self.tp} * {self.pp} * {self.cp} = {self.copy}"
            )
        return gpus // self.copy

    def expert_dp(self, gpus: int) -> int:
        """Copies of each expert."""
        cells = self.etp * self.ep * self.pp
        if gpus < cells or gpus % cells:
            raise ValueError(
                f"{gpus} GPUs are not a multiple of etp * ep * pp = {self.etp} * {self.ep} * {self.pp} = {cells}"
            )
        return gpus // cells

    def label(self) -> str:
        """Short text: tp4 pp8 vpp8 cp2."""
        keys = ("tp", "pp", "vpp", "cp", "ep", "etp", "fsdp")
        parts = [f"{k}{getattr(self, k)}" for k in keys if getattr(self, k) > 1]
        return " ".join([*(parts or ["dp only"]), f"mbs{self.micro_batch}"])
