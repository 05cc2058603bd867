"""torch's DistributedDataParallel with coded gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fp4dist.comm.ddp_hook import ddp_hook
from fp4dist.spec.communication import Canary, CommConfig
from tests.distributed import run_ranks

pytestmark = pytest.mark.distributed
STEPS = 40


class Model(nn.Module):
    """Predicts the next of 64 tokens, which counts upwards or, as often, is any."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(64, 128)
        self.up = nn.Linear(128, 256)
        self.norm = nn.LayerNorm(256)
        self.down = nn.Linear(256, 128)
        self.lm_head = nn.Linear(128, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.down(self.norm(torch.relu(self.up(self.embed_tokens(x))))))


def train(comm: CommConfig | None, steps: int = STEPS, first: int = 0) -> dict[str, Any]:
    torch.manual_seed(0)
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    model = Model().to(device)
    ddp = DistributedDataParallel(model, bucket_cap_mb=0.2)  # type: ignore[arg-type]
    hook = ddp_hook(ddp, comm, seed=5) if comm is not None else None
    if hook is not None:
        ddp.register_comm_hook(*hook)
        hook.state.step = first  # a run that goes on
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(dist.get_rank())
    losses, canaries = [], []
    for _ in range(steps):
        x = torch.randint(0, 64, (64,), generator=generator)
        chance = torch.randint(0, 64, (64,), generator=generator)
        target = torch.where(chance % 2 == 0, (x + 3) % 64, chance).to(device)
        loss = nn.functional.cross_entropy(ddp(x.to(device)), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / dist.get_world_size())
        canaries += [len(hook.state.last.findings)] if hook is not None else []
    found: dict[str, Any] = {"losses": losses, "weights": [p.detach().clone() for p in model.parameters()]}
    if hook is not None:
        state = hook.state
        found |= {"table": state.table(), "account": state.last.accounts["grad_reduce"], "step": state.step}
        now = [d for d in state.compression.decisions if not d.place.startswith("first")]
        found["announced"] = sum(d.after for d in now)
        found["findings"] = state.last.findings
        found["canaries"], found["errors"] = canaries, set(state.compression.feedback.errors)
        found["buckets"] = {d.place for d in now if d.wire is not None}
    return found


def train_four() -> list[dict[str, Any]]:
    coded = CommConfig(grad_reduce="nvfp4", canary=Canary(every=1))
    corrected = CommConfig(grad_reduce="nvfp4_nearest", error_feedback="ef")
    return [train(None), train(coded), train(corrected), train(coded, steps=3, first=7)]


def test_a_model_learns_as_with_exact_gradients() -> None:
    first, second = run_ranks(train_four, 2)
    exact, coded, corrected, resumed = first
    assert exact["losses"][-1] < exact["losses"][0] - 0.5
    for name, run in (("coded", coded), ("corrected", corrected)):
        assert sum(run["losses"][-10:]) == pytest.approx(sum(exact["losses"][-10:]), rel=0.01), name
        assert run["losses"] != exact["losses"], name
    for mine, theirs in zip(first, second, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine["weights"], theirs["weights"], strict=True))
    assert coded["step"] == STEPS
    assert resumed["step"] == 10
    assert coded["canaries"][2:] == [1] * (STEPS - 2), "no turn is wasted on DDP's first buckets, which are gone"
    assert corrected["errors"] == corrected["buckets"], "nor memory"
    assert coded["account"].coded + coded["account"].exact == coded["announced"]
    assert "LM head" in coded["table"]
    assert "embedding" in coded["table"]
    (finding, *_) = coded["findings"]
    assert finding.cosine > 0.98
    assert finding.one_shot == pytest.approx(1.5 * 9.3e-3, rel=0.3)  # half of the first coding, all of the second


def train_on_levels() -> dict[str, Any]:
    return train(CommConfig(grad_reduce="nvfp4", canary=Canary(every=1), hierarchy=(2, 2)), steps=6)


def test_two_levels_of_four_ranks() -> None:
    found = run_ranks(train_on_levels, 4)
    for rank in found:
        assert all(torch.equal(a, b) for a, b in zip(rank["weights"], found[0]["weights"], strict=True))
        assert rank["account"].coded + rank["account"].exact == rank["announced"]
        assert "2 x 2 ranks: bf16 inside" in rank["table"]
    (finding, *_) = found[0]["findings"]
    assert finding.cosine > 0.98
