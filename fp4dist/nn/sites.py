"""Where a model has linears and what each one does: the same role words for Megatron, Hugging Face and plain models."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2s
from typing import Protocol, runtime_checkable

from torch import nn

from fp4dist.errors import RecipeMismatch
from fp4dist.nn.comm import Dim, LinearComm
from fp4dist.nn.linear import is_conv1d
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
_LOCAL_EXPERT = re.compile(r"(?P<parent>.*)\.local_experts\.(?P<number>\d+)(?P<rest>.*)")
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}  # parts of a path that name no layer
_LAYER = re.compile(r"((?:^|\.)(?:layers|blocks|block|h|layer)\.)(\d+)(?=\.)")
# How tensor parallelism shards a role's weight [O, I].
ROLE_SPLIT: dict[str, Dim] = {"qkv": "O", "fc1": "O", "head": "O", "proj": "I", "fc2": "I"}


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearSite:
    """One linear of the whole, unsharded model.

    path   module path with global layer numbers; role   a word of `ROLES` or ""; layer   global number or None
    pieces matrices stacked in the weight's rows that tensor parallelism shards one by one (SwiGLU's gate and up: 2)
    token_share   of all tokens, the part that passes the linear if experts are used evenly
    """

    path: str
    role: str
    layer: int | None
    in_features: int
    out_features: int
    pieces: int = 1
    token_share: float = 1.0

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


def expert_path(path: str, first_experts: Mapping[str, int]) -> str:
    """Renumber a rank's experts: `...experts.local_experts.0` becomes 4 where first_experts[`...experts`] is 4."""
    found = _LOCAL_EXPERT.match(path)
    if found is None or found["parent"] not in first_experts:
        return path
    return f"{found['parent']}.local_experts.{int(found['number']) + first_experts[found['parent']]}{found['rest']}"


def experts_of(path: str) -> str | None:
    """The path of the experts that a linear belongs to, where they are numbered as Megatron does; else None."""
    found = _LOCAL_EXPERT.match(path)
    return found["parent"] if found is not None else None


def layer_of(path: str) -> int | None:
    """The layer number in a path, or None outside the layer stack."""
    found = _LAYER.search(path)
    return int(found[2]) if found else None


def named_modules(model: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    """(path, local path, module) of every module; `path` lacks what wrappers put into the local one.

    DDP, Megatron's wrappers and DeepSpeed's engine hold the model as `module`, torch.compile as `_orig_mod`, FSDP 1 and
    checkpoint_wrapper under names of their own. A layer's rules and noise must not depend on them.
    """
    outer, inner = "", model
    while (name := _wrapped(inner)) is not None:
        outer, inner = f"{outer}{name}.", inner.get_submodule(name)
    for local, module in model.named_modules():
        path = local[len(outer) :] if local.startswith(outer) else ""
        yield ".".join(part for part in path.split(".") if part not in _WRAPPERS), local, module


def named_parameters(model: nn.Module, layer_offset: int = 0) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of every trained parameter once; names have global layer and expert numbers, no wrappers."""
    first_experts: dict[str, int] = {}
    seen: set[int] = set()
    for path, _, module in named_modules(model):
        if isinstance(first := getattr(module, "first_expert", None), int):
            first_experts[path] = first
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                own = f"{path}.{name}" if path else name
                yield global_path(expert_path(own, first_experts), layer_offset), parameter


def find_linears(model: nn.Module, layer_offset: int = 0) -> Iterator[tuple[LinearSite, str, nn.Module]]:
    """(site, local path, module) of every linear that can be given a plan: ours, torch.nn.Linear, GPT-2's Conv1D.

    Also stacked expert weights [E, O, I] that no class of ours can run (Hugging Face's fused experts), a site for each,
    so that a rule which asks for FP4 there is told so.
    """
    first_experts: dict[str, int] = {}
    for path, local, module in named_modules(model):
        if isinstance(first := getattr(module, "first_expert", None), int):  # expert parallelism: a part of them
            first_experts[path] = first
        where = global_path(expert_path(path, first_experts), layer_offset)
        for name, parameter in _stacked_experts(where, module):
            yield (
                LinearSite(
                    path=f"{where}.{name}",
                    role="expert",
                    layer=layer_of(where),
                    in_features=parameter.shape[-1],
                    out_features=parameter.shape[-2],
                ),
                local,
                module,
            )
        features = _features(module)
        if features is not None:
            pieces: int = getattr(getattr(module, "comm", None), "pieces", 1)
            site = LinearSite(
                path=where,
                role=role_of(where),
                layer=layer_of(where),
                in_features=features[0],
                out_features=features[1],
                pieces=pieces,
                token_share=getattr(module, "token_share", 1.0),
            )
            yield site, local, module


def check_numbers(sites: Iterable[LinearSite]) -> None:
    """Two linears with one noise number would share their noise: improbable (2**-32 a pair), so refuse."""
    seen: dict[int, str] = {}
    for site in sites:
        other = seen.setdefault(site.number, site.path)
        if other != site.path:
            raise RecipeMismatch(
                f"{other} and {site.path} hash to the same noise number {site.number}; rename one module"
            )


def _wrapped(module: nn.Module) -> str | None:
    """The name under which a wrapper at the model's root holds the model; None where `module` is no wrapper.

    `module` is a likely name for a part of a model as well: only a module that has nothing else is a wrapper.
    """
    children = {name for name, _ in module.named_children()}
    found = children & _WRAPPERS or (children if children == {"module"} and not module._parameters else set())
    return found.pop() if found else None


def _stacked_experts(path: str, module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    if isinstance(module, Fp4Module) or not _EXPERT.search(path):
        return []
    return [(name, p) for name, p in module.named_parameters(recurse=False) if p.dim() == 3]


def _features(module: nn.Module) -> tuple[int, int] | None:
    if isinstance(module, Fp4Module):
        return module.global_features()
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if is_conv1d(module):
        weight = module.get_parameter("weight")
        return weight.shape[0], weight.shape[1]
    return None
