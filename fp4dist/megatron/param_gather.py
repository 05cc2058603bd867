"""Updated weights gathered as the codes that their GEMMs read: 0.5625 bytes an element instead of 2 or 4.

Megatron's distributed optimizer leaves every data-parallel rank with an equal slice of each bucket's flat parameter
buffer and gathers the slices in high precision. Where a recipe quantizes a weight once and takes every use from those
codes, `Fp4ParamGather` sends the codes instead:

    1  the rest of a block row that a slice cuts goes to the rank that owns it, in high precision (`GatherLayout`)
    2  MAX all-reduce of each weight's amax, over data-parallel and then tensor-parallel ranks: the scale of the whole
    3  each rank encodes its block rows with the kernel that would have encoded the gathered weight
    4  all-gather of codes and scales, and of the bucket's other parameters as they are

The codes are bit for bit those of the gathered weight, so losses do not change. What other ranks own of such a weight
is NaN in this rank's parameter from then on: nothing can read a stale value unseen. Whole weights come back by
themselves before a checkpoint (`sharded_state_dict`) and before a phase that reads them, otherwise by `restore`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fp4dist.errors import CheckpointError, RecipeMismatch
from fp4dist.megatron.coded_bucket import CodedBucket, CodedWeight, as_bytes, why_whole
from fp4dist.nn.apply import AppliedRecipe


@dataclass(slots=True)
class Traffic:
    """Bytes that reached this rank from others since the gather was taken over.

    coded    in gathers with codes: tails, amaxes, payloads;  whole   in gathers in high precision
    spared   what Megatron's own gather would have brought where the coded one ran
    """

    coded: int = 0
    whole: int = 0
    spared: int = 0


class Fp4ParamGather:
    """Takes over the parameter gather of model chunks that Megatron's DistributedDataParallel has wrapped.

    chunks    wrapped with use_distributed_optimizer, with or without overlap_param_gather
    applied   the recipe of these chunks

    From construction to `close` the chunks train as before, with the same losses. After each update every plan is
    given its weight's codes. `restore` and `close` are collectives over data-parallel ranks, and so is saving.

    Raises RecipeMismatch where no weight of the whole model can ever travel as codes.
    """

    def __init__(self, chunks: Sequence[Any], applied: AppliedRecipe) -> None:
        self.traffic = Traffic()
        self._chunks, self._applied = list(chunks), applied
        _refuse_useless(applied)
        groups = [g for chunk in chunks for g in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups)]
        self._groups = [_Group(g, self.traffic) for g in groups if g.intra_distributed_optimizer_instance_size > 1]
        self._weights = self._find_weights()
        self._hooks = [hook for weight in self._weights.values() for hook in self._watch(weight)]
        for group in self._groups:
            group.megatron.start_param_sync = partial(self._start, group)
        self._lay_out()

    def report(self) -> str:
        """What travels as codes, what does not and why, and the bytes of one step for this rank."""
        if not self._groups:
            return "fp4_param_gather: one data-parallel rank, nothing to gather"
        coded = [w for w in self._weights.values() if w.whole is None]
        elements = sum(w.parameter.numel() for w in coded)
        everything = sum(p.numel() for g in self._groups for b in g.buckets for p in b.parameters)
        bytes_in, whole = self.bytes_of_a_step()
        most = sum(g.most_bytes_in for g in self._groups)
        lines = [
            f"fp4_param_gather: {len(coded)} weights, {elements:,} of {everything:,} parameters of this rank, travel as"
            f" codes: {bytes_in:,} bytes reach it in a step instead of {whole:,} ({bytes_in / whole:.0%}, its peers at"
            f" most {most / whole:.0%}); in high precision as before:"
        ]
        reasons: dict[str, list[str]] = {}
        for target in self._applied.targets:
            weight = self._weights.get(cast(Any, getattr(target.module, "weight", None)))
            reason = weight.whole if weight is not None else _OUT_OF_REACH
            if reason is not None:
                reasons.setdefault(reason, []).append(target.site.path)
        for reason, paths in reasons.items():
            lines.append(f"  {paths[0]}{f' and {len(paths) - 1} more' if len(paths) > 1 else ''}: {reason}")
        rest = everything - sum(w.parameter.numel() for w in self._weights.values())
        lines.append(f"  {rest:,} parameters of other layers (embedding, norms, head)")
        return "\n".join([*lines, *_later_phases(self._applied)])

    def bytes_of_a_step(self) -> tuple[int, int]:
        """(with codes, in Megatron's gather) bytes that reach this rank from others in one gather of all buckets."""
        return sum(g.bytes_in for g in self._groups), sum(g.bytes_in_whole for g in self._groups)

    def restore(self) -> None:
        """Whole weights on every rank, gathered in high precision: a collective over data-parallel ranks.

        Does nothing where they are whole already, on which all ranks agree.
        """
        if any(w.is_stale for w in self._weights.values()) or any(g.waits for g in self._groups):
            self._gather_everything()

    def close(self) -> None:
        """Whole weights again, and Megatron's own gather."""
        self.restore()
        for hook in self._hooks:
            hook.remove()
        for weight in self._weights.values():
            del cast(Any, weight.module).sharded_state_dict  # the instance's; its class has another
        for group in self._groups:
            del group.megatron.start_param_sync
        self._groups, self._weights, self._hooks = [], {}, []

    # -- which weights

    def _find_weights(self) -> dict[nn.Parameter, CodedWeight]:
        """The weights of linears with plans that lie in our buckets and that no other module reads."""
        held = {p for g in self._groups for b in g.megatron.buckets for p in b.params_list}
        modules = (module for chunk in self._chunks for module in chunk.modules())
        readers = Counter(p for module in modules for p in module.parameters(recurse=False))
        found: dict[nn.Parameter, CodedWeight] = {}
        for target in self._applied.targets:
            weight = getattr(target.module, "weight", None)
            if isinstance(weight, nn.Parameter) and weight in held and weight.dim() == 2 and readers[weight] == 1:
                found[weight] = CodedWeight(target.site.path, target.module, weight)
        return found

    def _watch(self, weight: CodedWeight) -> Iterator[Any]:
        """Hooks around everything but a GEMM that reads or writes a weight through its module."""
        module: Any = weight.module
        save = module.sharded_state_dict

        def follow_plan(*_: Any) -> None:
            if not weight.follows_plan:
                self._follow_plans()

        def sharded_state_dict(*args: Any, **kwargs: Any) -> Any:
            self.restore()  # every rank makes its sharded state dict
            return save(*args, **kwargs)

        yield module.register_forward_pre_hook(follow_plan)
        yield module.register_state_dict_pre_hook(partial(_refuse_stale, weight))
        yield module.register_load_state_dict_post_hook(weight.set_whole)
        module.sharded_state_dict = sharded_state_dict

    def _follow_plans(self) -> bool:
        """Whether plans have changed (a phase, another recipe): then weights are made whole and judged anew."""
        if all(w.follows_plan for w in self._weights.values()):
            return False
        self._gather_everything()
        self._lay_out()
        return True

    def _lay_out(self) -> None:
        for weight in self._weights.values():
            weight.judge()
        for group in self._groups:
            group.buckets = [CodedBucket(b, self._weights, group.rank, group.size) for b in group.megatron.buckets]

    # -- the gather

    def _start(self, group: _Group, force_sync: bool = False) -> None:
        """Megatron's start_param_sync. With `force_sync` Megatron asks for whole weights."""
        if force_sync:
            group.gather_whole()
        elif not self._follow_plans():  # else they are whole now
            group.start()

    def _gather_everything(self) -> None:
        for group in self._groups:
            group.gather_whole()


class _Group:
    """One of Megatron's bucket groups: buckets that are gathered together."""

    def __init__(self, megatron: Any, traffic: Traffic) -> None:
        self.megatron, self.traffic = megatron, traffic
        self.ranks: dist.ProcessGroup = megatron.intra_distributed_optimizer_instance_group
        self.rank, self.size = dist.get_rank(self.ranks), dist.get_world_size(self.ranks)
        self.buckets: list[CodedBucket] = []

    @property
    def overlap(self) -> bool:
        """Whether gathers are started and waited for by forward hooks."""
        return self.megatron.ddp_config.overlap_param_gather

    @property
    def waits(self) -> bool:
        """Whether updated weights wait for the next forward pass to be gathered."""
        started, pending = self.megatron.param_gather_dispatched, self.megatron.param_gather_handle
        return self.overlap and (pending is not None or not started)

    @property
    def bytes_in(self) -> int:
        """Bytes that reach this rank in a gather with codes."""
        return self._amax_bytes + sum(b.layout.bytes_in[self.rank] for b in self.buckets)

    @property
    def most_bytes_in(self) -> int:
        """Bytes that reach the rank that gets most."""
        return self._amax_bytes + max(map(sum, zip(*(b.layout.bytes_in for b in self.buckets), strict=True)))

    @property
    def bytes_in_whole(self) -> int:
        """Bytes that reach this rank in Megatron's gather."""
        return sum(b.layout.bytes_in_whole for b in self.buckets)

    def gather_whole(self) -> None:
        """Megatron's own gather, waited for."""
        if self.megatron.param_gather_handle is not None:
            self.megatron.param_gather_handle.wait()
            self.megatron.param_gather_handle = None
        with torch.no_grad():
            type(self.megatron).start_param_sync(self.megatron, force_sync=True)
        self.traffic.whole += self.bytes_in_whole
        for bucket in self.buckets:
            for weight in bucket.weights.values():
                weight.set_whole()

    def start(self) -> None:
        """The gather with codes; with overlap it is left under way for Megatron's hooks to wait for."""
        assert self.megatron.param_gather_handle is None
        pending = self._start_gather()
        if self.overlap:
            self.megatron.param_gather_handle = pending
        else:
            pending.wait()
        self.megatron.param_gather_dispatched = True

    @torch.no_grad()
    def _start_gather(self) -> _Pending:
        """Encode this rank's part and send it off."""
        for bucket in self.buckets:
            self._exchange_tails(bucket)
        amaxes = self._logical_amaxes()
        pending = _Pending([], [])
        for bucket in self.buckets:
            part = self._even_out(bucket, bucket.payload({i: a for (b, i), a in amaxes.items() if b is bucket}))
            whole = part.new_empty(self.size * part.numel())
            pending.works.append(
                dist.all_gather_into_tensor(  # pyright: ignore[reportDeprecated] (the new name is not in torch 2.11)
                    whole, part, group=self.ranks, async_op=self.overlap
                )
            )
            pending.arriving.append((bucket, whole))
            self.traffic.coded += whole.numel() - part.numel()
            self.traffic.spared += bucket.layout.bytes_in_whole
        return pending

    def _exchange_tails(self, bucket: CodedBucket) -> None:
        """Complete the last block row of this rank's slice, in place: what follows the slice is of the same row."""
        layout, rank, size = bucket.layout, self.rank, bucket.layout.itemsize
        if not layout.tails:
            return
        sent = next((t for t in layout.tails if t.sender == rank), None)
        sizes_in, sizes_out = [0] * self.size, [0] * self.size
        for tail in layout.tails:
            if tail.owner == rank:
                sizes_in[tail.sender] = tail.end - tail.start
        if sent is not None:
            sizes_out[sent.owner] = sent.end - sent.start
        after = layout.slice_of(rank)[1]
        dist.all_to_all_single(
            as_bytes(bucket.data[after : after + sum(sizes_in)]),
            as_bytes(bucket.data[sent.start : sent.end] if sent else bucket.data[:0]),
            [n * size for n in sizes_in],
            [n * size for n in sizes_out],
            group=self.ranks,
        )
        self.traffic.coded += sum(sizes_in) * size

    def _logical_amaxes(self) -> dict[tuple[CodedBucket, int], Tensor]:
        """[] fp32 amax of each weight of which this rank encodes rows, over all ranks that hold parts of it."""
        places = [(bucket, index) for bucket in self.buckets for index in bucket.weights]
        if not places:
            return {}
        amaxes = torch.stack([amax for bucket in self.buckets for amax in bucket.own_amaxes()])
        dist.all_reduce(amaxes, op=dist.ReduceOp.MAX, group=self.ranks)
        self.traffic.coded += self._amax_bytes
        logical = {}
        for (bucket, index), amax in zip(places, amaxes.unbind(), strict=True):
            weight = bucket.weights[index]
            if bucket.own_rows(index).numel():  # tensor-parallel peers encode the same rows of their shards
                over_shards = weight.module.comm.reduce_max("fprop.w") if weight.spec.amax_scope == "tensor" else None
                logical[bucket, index] = over_shards(amax) if over_shards is not None else amax
        return logical

    def _even_out(self, bucket: CodedBucket, payload: Tensor) -> Tensor:
        """This rank's equal part of what is gathered: its payload padded, or its share of the bytes of all payloads."""
        layout = bucket.layout
        part = payload.new_empty(layout.contribution)
        if not layout.is_balanced:
            part[: payload.numel()] = payload
            return part
        received = [row[self.rank] for row in layout.moves]
        dist.all_to_all_single(
            part[: sum(received)], payload, received, list(layout.moves[self.rank]), group=self.ranks
        )
        self.traffic.coded += sum(received) - received[self.rank]
        return part

    @property
    def _amax_bytes(self) -> int:
        """A ring all-reduce of one fp32 a weight."""
        return 4 * sum(len(b.weights) for b in self.buckets) * 2 * (self.size - 1) // self.size


@dataclass(slots=True)
class _Pending:
    """The handle that Megatron waits for; then the codes are delivered."""

    works: list[Any]
    arriving: list[tuple[CodedBucket, Tensor]]

    def wait(self) -> None:
        """Wait for what is under way and put it where it belongs."""
        for work in self.works:
            if work is not None:
                work.wait()
        for bucket, gathered in self.arriving:
            bucket.deliver(gathered)


_OUT_OF_REACH = "its weight is frozen, shared with another module, or not one matrix in a buffer of several ranks"


def _refuse_useless(applied: AppliedRecipe) -> None:
    reasons = {why_whole(v) for a in applied.assigned.rows for v in a.variants(applied.recipe)}
    if applied.rows and None not in reasons:
        raise RecipeMismatch(
            f"fp4_param_gather: no weight can travel as codes under recipe {applied.recipe.name}"
            f" ({'; '.join(sorted(map(str, reasons)))}); use a recipe whose fprop.w rounds to nearest without a"
            " rotation and whose dgrad.w has source: reuse or requant, or switch fp4_param_gather off"
        )


def _later_phases(applied: AppliedRecipe) -> Iterator[str]:
    """What phases to come will change."""
    recipe = applied.recipe
    for phase in recipe.phases:
        if phase.enabled and phase.name not in applied.active:
            pairs = {(a.linear, a.during(recipe, {phase.name})[0]) for a in applied.assigned.rows}
            turned = {(why_whole(recipe.linear(a)), why_whole(recipe.linear(b))) for a, b in pairs}
            for before, after in turned:
                if before is None and after is not None:
                    yield f"  from phase {phase.name} on the weights that it changes: {after}"


def _refuse_stale(weight: CodedWeight, *_: Any) -> None:
    if weight.is_stale:
        raise CheckpointError(
            f"{weight.path}: this rank has only its own slice of the weight in high precision, the rest as codes"
            " (fp4_param_gather); call Fp4ParamGather.restore() on all data-parallel ranks before state_dict()"
        )
