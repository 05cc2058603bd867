"""The table of every linear: shape, six formats, kernels, why not FP4. Printed by rank 0 and kept as layers.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fp4dist.nn.parts import Cost, costs
from fp4dist.nn.plan import gemm_kind
from fp4dist.nn.sites import LinearSite
from fp4dist.spec.load import recipe_hash
from fp4dist.spec.recipe import BLOCK_ROLES, GEMMS, SLOTS, LinearRecipe, Recipe


@dataclass(frozen=True, slots=True)
class LinearRow:
    """One line of the table.

    kernels   slot or GEMM -> backend (empty in a dry run)
    gather    slot -> packed or high, where sequence parallelism gathers its tokens (of this rank's linears)
    carriers  GEMM -> type in which its operands are multiplied (bfloat16, e5m2 ...), where it reads carriers
    """

    site: LinearSite
    linear: str
    recipe: LinearRecipe
    why: str
    kernels: dict[str, str]
    gather: dict[str, str] = field(default_factory=dict)
    carriers: dict[str, str] = field(default_factory=dict)

    def kinds(self) -> dict[str, str]:
        """GEMM -> fp4, fp8, mixed or bf16."""
        return {gemm: gemm_kind(self.recipe, gemm) for gemm in GEMMS}

    def costs(self) -> dict[str, Cost]:
        """GEMM -> FLOPs on codes and beside them, for very many tokens; once, however often it runs."""
        return costs(self.recipe, self.site.out_features, self.site.in_features)

    def side(self) -> dict[str, float]:
        """GEMM -> FLOPs beside its codes as a share of the GEMM's; only where there are any."""
        found = {gemm: cost.side / (cost.main + cost.side) for gemm, cost in self.costs().items()}
        return {gemm: share for gemm, share in found.items() if share}

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "path": self.site.path,
            "role": self.site.role,
            "layer": self.site.layer,
            "shape": [self.site.out_features, self.site.in_features],
            "linear": self.linear,
            "slots": {slot: self.recipe.word(slot) for slot in SLOTS},
            "gemms": self.kinds(),
            "kernels": self.kernels,
            "gather": self.gather,
            **({"carriers": self.carriers} if self.carriers else {}),
            "why": self.why,
            **({"side": side} if (side := self.side()) else {}),
        }


def fp4_share(rows: Sequence[LinearRow]) -> float:
    """Share of the FLOPs of block linears (heads and routers excluded) that run in FP4, both operands quantized.

    A model without known roles counts all of its linears. A GEMM counts as often as it runs: once a sample. What is
    multiplied beside the codes counts at its true size, as not FP4.
    """
    counted = [r for r in rows if r.site.role in BLOCK_ROLES] or list(rows)
    total = fp4 = 0.0
    for row in counted:
        runs = {gemm: row.recipe.repeats(gemm) for gemm in GEMMS}
        for gemm, found in row.costs().items():
            weight = row.site.token_share * runs[gemm]
            total += weight * (found.main + found.side)
            fp4 += weight * found.main if row.recipe.gemm_is_fp4(gemm) else 0.0
    return fp4 / total if total else 0.0


def table_json(rows: Sequence[LinearRow], recipe: Recipe, remarks: Sequence[str]) -> dict[str, Any]:
    """The content of layers.json."""
    return {
        "recipe": recipe.name,
        "recipe_hash": recipe_hash(recipe),
        "fp4_share_of_block_linear_flops": fp4_share(rows),
        "remarks": list(remarks),
        "linears": [row.to_json() for row in rows],
    }


def table_text(rows: Sequence[LinearRow], recipe: Recipe, remarks: Sequence[str]) -> str:
    """The table for a terminal: alike layers share a line."""
    share = f"{fp4_share(rows):.1%} of block-linear FLOPs in FP4"
    lines = [f"recipe {recipe.name} ({recipe.paper or 'no paper'}), {share} (bf16 stands for the model's own dtype)"]
    lines += [f"  note: {remark}" for remark in remarks]
    groups: dict[tuple[Any, ...], list[LinearRow]] = {}
    for row in rows:
        name = row.site.path.rsplit(".", 1)[-1]
        key = (name, row.site.role, row.site.out_features, row.site.in_features, row.linear, row.why)
        how = tuple(tuple(sorted(words.items())) for words in (row.kernels, row.gather, row.carriers))
        groups.setdefault((*key, *how), []).append(row)
    for members in groups.values():
        lines += _group_lines(members)
    return "\n".join(lines)


def _group_lines(members: Sequence[LinearRow]) -> list[str]:
    row = members[0]
    layers = [m.site.layer for m in members if m.site.layer is not None]
    where = f" layers {_ranges(layers)}" if layers else ""
    name = row.site.path.rsplit(".", 1)[-1]
    if row.site.role == "expert":
        where += f" ({len(members)} expert linears)"
    head = f"  {name:<12} [{row.site.out_features} x {row.site.in_features}]{where}: {row.linear} ({row.why})"
    if row.recipe.is_high_precision:
        return [head]
    lines = [head]
    for gemm in GEMMS:
        operands = [s for s in SLOTS if s.startswith(gemm)]
        texts = []
        for slot in operands:
            backend = f" <{row.kernels[slot]}>" if slot in row.kernels else ""
            gather = f" gather: {row.gather[slot]}" if slot in row.gather else ""
            texts.append(f"{slot.split('.')[1]}: {row.recipe.word(slot)}{backend}{gather}")
        carrier = f", {row.carriers[gemm]}" if gemm in row.carriers else ""
        matmul = f"  gemm <{row.kernels[gemm]}{carrier}>" if gemm in row.kernels else ""
        if gemm in (shares := row.side()):
            matmul += f"  {shares[gemm]:.1%} of it beside the codes"
        if row.recipe.repeats(gemm) > 1:
            matmul += f"  run {row.recipe.repeats(gemm)} times"
        lines.append(f"      {gemm}  {'  |  '.join(texts)}{matmul}")
    return lines


def _ranges(numbers: Sequence[int]) -> str:
    """0,1,2,5 -> 0-2,5."""
    parts: list[list[int]] = []
    for n in sorted(set(numbers)):
        if parts and n == parts[-1][-1] + 1:
            parts[-1].append(n)
        else:
            parts.append([n])
    return ",".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)
