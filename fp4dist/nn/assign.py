"""Rules -> linears: which LinearRecipe every site gets, judged against the whole model's list of sites."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cached_property

from fp4dist.errors import RecipeMismatch
from fp4dist.nn.comm import SLOT_DIMS, Dim
from fp4dist.nn.filling import token_multiple, why_not_filled
from fp4dist.nn.sites import LinearSite
from fp4dist.spec.recipe import HIGH_PRECISION, SLOTS, LinearRecipe, Recipe, Rule
from fp4dist.spec.splits import LowRank

UNMATCHED = "no rule matches"


@dataclass(frozen=True, slots=True)
class Assignment:
    """What one site runs: `linear` is a name in the recipe, `why` says which rule decided.

    in_phase   phase -> (linear, why), of the enabled phases that have a rule for this site
    """

    site: LinearSite
    linear: str
    why: str
    in_phase: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    def during(self, recipe: Recipe, running: Collection[str]) -> tuple[str, str]:
        """(linear, why) while the phases named in `running` run.

        Phases act in the recipe's order, so later ones win. A phase's rule comes before all earlier ones; its `use`
        turns the names that rules have given, not what an earlier `use` has made of them.
        """
        given, linear, why = self.linear, self.linear, self.why
        for phase in recipe.phases:
            if phase.name not in running:
                continue
            if phase.name in self.in_phase:
                linear, why = self.in_phase[phase.name]
                given = linear
            elif given in phase.use:
                linear = phase.use[given]
        return linear, why

    def variants(self, recipe: Recipe) -> list[LinearRecipe]:
        """Every LinearRecipe that this site can come to run under, its first one first."""
        given, names = [self.linear], [self.linear]
        for phase in (p for p in recipe.phases if p.enabled):
            if phase.name in self.in_phase:
                given.append(self.in_phase[phase.name][0])
                names.append(given[-1])
            else:
                names += [phase.use[name] for name in given if name in phase.use]
        return [recipe.linear(name) for name in dict.fromkeys(names)]


@dataclass(frozen=True)
class Assignments:
    """All sites of a model under a recipe, and remarks to print (roles that the model lacks)."""

    rows: tuple[Assignment, ...]
    remarks: tuple[str, ...]

    @cached_property
    def by_path(self) -> dict[str, Assignment]:
        """Path -> assignment; a model with many experts has tens of thousands."""
        return {row.site.path: row for row in self.rows}

    def named(self, path: str) -> Assignment:
        """The assignment of the site at `path`; RecipeMismatch where the list of sites lacks it."""
        if path in self.by_path:
            return self.by_path[path]
        near = get_close_matches(path, list(self.by_path), 1)
        hint = f"; nearest: '{near[0]}'" if near else ""
        raise RecipeMismatch(f"the model's linear '{path}' is not in the list of {len(self.rows)} sites{hint}")


def assign(sites: Sequence[LinearSite], recipe: Recipe) -> Assignments:
    """Apply the ordered rules, and those of enabled phases; the first match wins.

    Raises RecipeMismatch where a rule cannot match.
    """
    num_layers = 1 + max((s.layer for s in sites if s.layer is not None), default=-1)
    remarks: list[str] = []

    def reach(rules: Sequence[Rule], prefix: str = "") -> list[_Reach]:
        return [_reach(rule, f"{prefix}rule {i}", sites, num_layers, remarks) for i, rule in enumerate(rules)]

    own = reach(recipe.rules)
    phases = {p.name: reach(p.assign, f"phase {p.name}, ") for p in recipe.phases if p.enabled and p.assign}
    rows = []
    for site in sites:
        in_phase = {name: hit for name, rules in phases.items() if (hit := _first(rules, site)) is not None}
        rows.append(Assignment(site, *(_first(own, site) or (HIGH_PRECISION, UNMATCHED)), in_phase))
    if recipe.wants_fp4 and all(v.is_high_precision for row in rows for v in row.variants(recipe)):
        raise RecipeMismatch(_nothing_became_fp4(rows, recipe))
    return Assignments(tuple(rows), tuple(remarks))


def describe(rule: Rule, num_layers: int) -> str:
    """A rule in words, fractions resolved to layer numbers."""
    words = ["/".join(rule.roles)] if rule.roles else []
    chosen = _layers(rule, num_layers)
    if chosen is not None:
        words.append(f"layers {chosen[0]}-{chosen[1]}")
    if rule.path:
        words.append(f"path {rule.path}")
    return " ".join(words) or "everything"


def check_shapes(
    site: LinearSite,
    recipe: LinearRecipe,
    *,
    tokens: int | None,
    tp: int,
    cp: int = 1,
    sequence_parallel: bool = False,
) -> None:
    """Every operand's rows and columns must divide by its block and rotation on each rank.

    tokens   tokens of one micro-batch on one context-parallel rank; None skips the check of T. They may be filled up
             with zero tokens where no parallelism splits them and no block takes moments over them
    cp       context-parallel ranks: with more than one, a rank holds two separate pieces of the sequence
    sequence_parallel   tensor-parallel ranks hold parts of the tokens
    """
    multiple, split = token_multiple(recipe), cp > 1 or sequence_parallel
    fills = site.role == "expert" or (tokens is not None and tokens % multiple > 0 and not split)
    if fills and multiple > 1 and (reason := why_not_filled(recipe)) is not None:
        raise RecipeMismatch(
            f"{site.path} {reason}; {'' if site.role == 'expert' else f'change the {tokens} tokens of a micro-batch, '}"
            "use an absmax scale or a block of fixed size, or give this layer to bf16 with a rule"
        )
    tokens = None if fills else tokens
    sizes: dict[Dim, int | None] = {"T": tokens, "O": site.out_features, "I": site.in_features}
    names = {"T": "tokens per micro-batch", "O": "output features", "I": "input features"}
    for slot in SLOTS:
        spec = recipe.slot(slot)
        if spec is None:
            continue
        for dim, multiple in zip(SLOT_DIMS[slot], (spec.rows_multiple, spec.columns_multiple), strict=True):
            size = sizes[dim]
            ranks = tp if dim == site.split else 1
            if isinstance(spec.split, LowRank) and (ranks > 1 or (dim == "T" and cp > 1)):
                raise RecipeMismatch(
                    f"{site.path} {slot}: split = lowrank needs the whole matrix, but its {names[dim]} are split over"
                    f" {'tp' if ranks > 1 else 'cp'} = {ranks if ranks > 1 else cp} ranks; use tp 1 and cp 1, split:"
                    " mean, or give this layer to bf16 with a rule"
                )
            pieces = site.pieces if ranks > 1 and dim == "O" else 2 if cp > 1 and dim == "T" else 1
            if size is not None and size % (multiple * ranks * pieces):  # a block must not straddle two of the pieces
                cut = f" / {pieces} {'pieces of the sequence' if dim == 'T' else 'stacked'}" if pieces > 1 else ""
                cut += f" / tp {ranks}" if ranks > 1 else ""
                split = f"{cut} = {size / ranks / pieces:g}" if cut else ""
                raise RecipeMismatch(
                    f"{site.path} {slot}: {names[dim]} = {size}{split} is not a multiple of {multiple},"
                    f" which {spec.label()} needs; change that size, use a smaller block or rotation,"
                    " or give this layer to bf16 with a rule"
                )


@dataclass(frozen=True, slots=True)
class _Reach:
    """What one rule gives, why, and to which paths."""

    linear: str
    why: str
    paths: frozenset[str]


def _first(rules: Sequence[_Reach], site: LinearSite) -> tuple[str, str] | None:
    """(linear, why) of the first of `rules` that reaches `site`."""
    return next(((r.linear, r.why) for r in rules if site.path in r.paths), None)


def _reach(rule: Rule, name: str, sites: Sequence[LinearSite], num_layers: int, remarks: list[str]) -> _Reach:
    """What a rule's conditions select, ignoring earlier rules."""
    if rule.roles is not None:
        lacking = [role for role in rule.roles if all(site.role != role for site in sites)]
        if lacking:
            remarks.append(f"{name}: the model has no {', '.join(lacking)}")
    selected = {site.path for site in sites if _matches(rule, site, num_layers)}
    absent_roles = rule.roles is not None and all(all(s.role != role for s in sites) for role in rule.roles)
    lost_path = rule.path is not None and not any(fnmatchcase(s.path, rule.path) for s in sites)
    if not selected and (lost_path or not absent_roles):
        near = get_close_matches(rule.path or "", [s.path for s in sites], 1, cutoff=0.3)
        hint = f"; nearest module path: '{near[0]}'" if near else ""
        raise RecipeMismatch(
            f"{name} ({describe(rule, num_layers)}) matches no linear of the model's {num_layers} layers{hint};"
            " fix its roles, layers or path, or remove it"
        )
    return _Reach(rule.linear, f"{name}: {describe(rule, num_layers)}", frozenset(selected))


def _matches(rule: Rule, site: LinearSite, num_layers: int) -> bool:
    if rule.roles is not None and site.role not in rule.roles:
        return False
    if rule.path is not None and not fnmatchcase(site.path, rule.path):
        return False
    chosen = _layers(rule, num_layers)
    return chosen is None or (site.layer is not None and chosen[0] <= site.layer <= chosen[1])


def _layers(rule: Rule, num_layers: int) -> tuple[int, int] | None:
    """The inclusive range of global layer numbers a rule means; fractions round up, so at least one layer."""
    if rule.layers is not None:
        return rule.layers
    if rule.first is not None:
        return 0, _count(rule.first, num_layers) - 1
    if rule.last is not None:
        return num_layers - _count(rule.last, num_layers), num_layers - 1
    return None


def _count(n: float, num_layers: int) -> int:
    return min(int(n), num_layers) if n >= 1 else math.ceil(n * num_layers - 1e-9)


def _nothing_became_fp4(rows: Sequence[Assignment], recipe: Recipe) -> str:
    if not rows:
        return f"recipe {recipe.name} asks for FP4, but the model has no linear layers that fp4dist can run"
    asks = f"recipe {recipe.name} asks for FP4, but no linear of the model got it"
    taken = next((row for row in rows if row.why != UNMATCHED), None)
    if taken is not None:
        return (
            f"{asks}: {taken.site.path} has {taken.linear} by {taken.why}, which comes before the rules for FP4;"
            " use a model with more layers, or change or reorder the rules"
        )
    known = sorted({row.site.role for row in rows if row.site.role})
    roles = f"its roles are {', '.join(known)}" if known else "none of its module names tells a role"
    return (
        f"{asks}: {roles}, for example '{rows[0].site.path}';"
        " add a rule with a path, such as {path: '*', linear: fp4}"
    )
