"""All ranks of a job agree on what travels how, before the first byte of it does, or all stop with one message.

It goes through the job's store, not through a collective: ranks that disagree may not even take part in the same ones,
and a rank that never comes must not hang the others.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta

import torch.distributed as dist

from fp4dist.errors import EnvironmentMismatch

_calls: defaultdict[str, Iterator[int]] = defaultdict(itertools.count)


def agree(
    facts: Mapping[str, str], timeout_s: float, *, what: str = "comm", ranks: Sequence[int] | None = None
) -> None:
    """Return when all `ranks` (None: of the job) have called this with equal `facts`; a collective call.

    facts    name -> value;  what   tells this call from others of the same job: all its ranks give the same
    raises   EnvironmentMismatch on every rank, naming the first rank that differs and the facts in which it does, or
             the ranks that have not come within `timeout_s`
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    ranks = list(range(dist.get_world_size())) if ranks is None else list(ranks)
    store = dist.distributed_c10d._get_default_store()
    names = hashlib.sha256(repr(ranks).encode()).hexdigest()[:16]  # counted for each set of ranks by itself
    prefix = f"fp4dist/{what}/{names}/{next(_calls[names])}"
    mine = "\n".join(f"{name}={value}" for name, value in sorted(facts.items()))
    store.set(f"{prefix}/{dist.get_rank()}", mine)
    keys = [f"{prefix}/{rank}" for rank in ranks]
    try:
        store.wait(keys, timedelta(seconds=timeout_s))
    except (dist.DistStoreError, RuntimeError) as e:
        missing = [rank for rank, key in zip(ranks, keys, strict=True) if not store.check([key])]
        raise EnvironmentMismatch(
            f"{what}: ranks {missing} have not agreed on what travels how within comm.timeout_s = {timeout_s:g};"
            " start every rank with the same configuration, and look at their logs"
        ) from e
    everyone = [store.get(key).decode() for key in keys]
    odd = next((i for i, text in enumerate(everyone) if text != everyone[0]), None)
    if odd is None:
        return
    first, other = _parsed(everyone[0]), _parsed(everyone[odd])
    names = sorted(name for name in first.keys() | other.keys() if first.get(name) != other.get(name))
    told = ", ".join(f"{name} = {first.get(name, 'none')} / {other.get(name, 'none')}" for name in names)
    raise EnvironmentMismatch(
        f"{what}: rank {ranks[0]} and rank {ranks[odd]} differ: {told}; start every rank with the same"
        " configuration and versions"
    )


def _parsed(text: str) -> dict[str, str]:
    return dict(line.split("=", 1) for line in text.splitlines())
