"""Where a model has linears and what each one does: the same role words for Megatron, Hugging Face and plain models."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2s
from typing import Protocol, runtime_checkable

from torch import nn

from fp4dist.errors import RecipeMismatch
from fp4dist.nn.comm import Dim, LinearComm
from fp4dist.nn.plan import LinearPlan

# Role -> last components of module paths: Megatron, Hugging Face, common plain names.
ROLE_NAMES: dict[str, str] = {
    "qkv": "linear_qkv q_proj k_proj v_proj qkv_proj query_key_value c_attn query key value"
    " wqkv qkv wq wk wv to_q to_k to_v",
    "proj": "linear_proj o_proj out_proj wo to_out",
    "fc1": "linear_fc1 gate_proj up_proj gate_up_proj dense_h_to_4h w1 w3 fc1 c_fc",
    "fc2": "linear_fc2 down_proj dense_4h_to_h w2 fc2",
    "head": "output_layer lm_head head output",
    "router": "router gate",
    "embedding": "word_embeddings embed_tokens wte",
}
_ROLE_OF = {name: role for role, names in ROLE_NAMES.items() for name in names.split()}
# Names that mean one thing inside attention and another (or nothing we know) elsewhere.
_ROLE_BY_PLACE = {"c_proj": ("proj", "fc2"), "dense": ("proj", "")}
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_EXPERT = re.compile(r"(^|\.)(local_)?experts(\.|$)")
_LAYER = re.compile(r"((?:^|\.)(?:layers|blocks|block|h|layer)\.)(\d+)(?=\.)")
# How tensor parallelism shards a role's weight [O, I].
ROLE_SPLIT: dict[str, Dim] = {"qkv": "O", "fc1": "O", "head": "O", "proj": "I", "fc2": "I"}


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearSite:
    """One linear of the whole, unsharded model.

    path   module path with global layer numbers; role   a word of `ROLES` or ""; layer   global number or None
    pieces matrices stacked in the weight's rows that tensor parallelism shards one by one (SwiGLU's gate and up: 2)
    """

    path: str
    role: str
    layer: int | None
    in_features: int
    out_features: int
    pieces: int = 1

    @property
    def number(self) -> int:
        """32 bits of the path: the layer half of the Philox key, the same for every parallel layout."""
        return int.from_bytes(blake2s(self.path.encode(), digest_size=4).digest(), "little")

    @property
    def split(self) -> Dim | None:
        """The weight dimension that tensor parallelism shards."""
        return ROLE_SPLIT.get(self.role)


@runtime_checkable
class Fp4Module(Protocol):
    """A linear that can run under a plan (ours; Megatron's own and torch's cannot)."""

    plan: LinearPlan | None

    @property
    def comm(self) -> LinearComm:
        """How the layer is sharded."""
        ...

    def set_plan(self, plan: LinearPlan | None) -> None:
        """Run under `plan` from now on."""
        ...

    def global_features(self) -> tuple[int, int]:
        """(in, out) of the unsharded layer."""
        ...


def role_of(path: str) -> str:
    """The role that the module path tells, or ""."""
    if _EXPERT.search(path):
        return "expert"
    last = path.rsplit(".", 1)[-1]
    if last in _ROLE_BY_PLACE:
        inside, outside = _ROLE_BY_PLACE[last]
        return inside if _ATTENTION.search(path) else outside
    return _ROLE_OF.get(last, "")


def global_path(path: str, layer_offset: int) -> str:
    """Renumber a pipeline stage's layers: `decoder.layers.0` of a stage that starts at layer 8: `decoder.layers.8`."""
    return _LAYER.sub(lambda m: f"{m[1]}{int(m[2]) + layer_offset}", path, count=1) if layer_offset else path


def layer_of(path: str) -> int | None:
    """The layer number in a path, or None outside the layer stack."""
    found = _LAYER.search(path)
    return int(found[2]) if found else None


def find_linears(model: nn.Module, layer_offset: int = 0) -> Iterator[tuple[LinearSite, str, nn.Module]]:
    """(site, local path, module) of every linear that can be given a plan: ours, and torch.nn.Linear."""
    for path, module in model.named_modules():
        features = _features(module)
        if features is not None:
            where = global_path(path, layer_offset)
            pieces: int = getattr(getattr(module, "comm", None), "pieces", 1)
            site = LinearSite(
                path=where,
                role=role_of(where),
                layer=layer_of(where),
                in_features=features[0],
                out_features=features[1],
                pieces=pieces,
            )
            yield site, path, module


def check_numbers(sites: Iterable[LinearSite]) -> None:
    """Two linears with one noise number would share their noise: improbable (2**-32 a pair), so refuse."""
    seen: dict[int, str] = {}
    for site in sites:
        other = seen.setdefault(site.number, site.path)
        if other != site.path:
            raise RecipeMismatch(
                f"{other} and {site.path} hash to the same noise number {site.number}; rename one module"
            )


def _features(module: nn.Module) -> tuple[int, int] | None:
    if isinstance(module, Fp4Module):
        return module.global_features()
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return None
