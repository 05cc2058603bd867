"""Which calls of a profiler's trace travel."""

from __future__ import annotations

from typing import Any

from fp4dist.comm.trace import Seen, _collectives


def call(elements: int, ts: float, group: int | None) -> list[dict[str, Any]]:
    """An all-reduce as the profiler writes it, with what NCCL's process group notes in it."""
    where = {"cat": "cpu_op", "tid": 1}
    args = {"Input Dims": [[[elements]], []], "Input type": ["TensorList", ""]}
    found = [{**where, "name": "c10d::allreduce_", "ts": ts, "dur": 10.0, "args": args}]
    note = {**where, "name": "record_param_comms", "ts": ts + 2.0, "dur": 5.0, "args": {"Group size": group}}
    return [*found, note] if group is not None else found


def test_calls_of_groups_of_one_rank_do_not_travel() -> None:
    events = [*call(8192, 0.0, 1), *call(5000, 20.0, 2), *call(6000, 40.0, None)]
    assert list(_collectives(events)) == [Seen("allreduce_", "", 5000), Seen("allreduce_", "", 6000)]
