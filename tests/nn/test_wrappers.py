"""Fp4Linear inside what users wrap models in: DDP, FSDP2, checkpointing, autocast, torch.compile, saved state."""

from __future__ import annotations

import copy
import io
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from fp4dist.errors import RecipeMismatch
from fp4dist.nn.apply import AppliedRecipe, apply_recipe
from fp4dist.nn.linear import Fp4Linear, convert, revert
from fp4dist.nn.sites import find_linears, named_modules
from fp4dist.spec.load import load_recipe
from fp4dist.spec.recipe import Recipe, Rule
from tests.distributed import run_ranks
from tests.tiny_llama import BATCH, SEQUENCE, TinyLlama, make_tokens

STEPS, RANKS = 2, 2
Losses = dict[tuple[int, int], float]  # (step, global micro-batch) -> loss
Wrap = Callable[[TinyLlama], nn.Module]


def batch(step: int, micro_batch: int) -> Tensor:
    return make_tokens(100 * step + micro_batch)


def train(
    model: nn.Module,
    applied: AppliedRecipe,
    mine: Sequence[int],
    *,
    sync: Callable[[bool], None] = lambda last: None,
) -> Losses:
    """A plain loop over this rank's micro-batches, numbered globally as `mine` says; gradients are their mean."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses: Losses = {}
    for step in range(STEPS):
        for i, number in enumerate(mine):
            applied.set_step(step, STEPS, micro_batch=i)
            sync(i == len(mine) - 1)
            loss = model(batch(step, number))
            (loss / len(mine)).backward()
            losses[step, number] = loss.item()
        optimizer.step()
        optimizer.zero_grad()
    applied.check_counts()
    return losses


def chosen(backward: bool) -> Recipe:
    """Or one whose backward quantizes the weight itself, which FSDP has freed and gathered again since forward."""
    linear = load_recipe("nvidia_nvfp4").linears["fp4_fprop_bf16"]
    rules = (Rule(roles=("qkv", "proj", "fc1", "fc2"), linear="fp4"),)
    return Recipe(name="backward", linears={"fp4": linear}, rules=rules) if backward else load_recipe("quartet2")


def one_process(micro_batches: int, backward: bool) -> tuple[Losses, list[Tensor]]:
    """The same run in one process: micro-batch i of rank r is number i * RANKS + r."""
    model = TinyLlama(2)
    applied = apply_recipe(model, chosen(backward), seed=1)
    losses = train(model, applied, range(micro_batches * RANKS))
    return losses, [p.detach() for p in model.parameters()]


def own(micro_batches: int) -> list[int]:
    return [i * RANKS + dist.get_rank() for i in range(micro_batches)]


# ---------- ranks


def everything_on_two_ranks(folder: str) -> dict[str, Any]:
    """All cases of one process group: DDP, FSDP2 in its forms, distributed checkpoint, independent noise."""
    seen: dict[str, Any] = {name: ddp(**case) for name, case in DDP.items()}
    seen |= {name: fsdp(**case) for name, case in FSDP.items()}
    seen["noise"] = noise()
    seen["saved"] = distributed_checkpoint(folder)
    seen["refused"] = refusals()
    return seen


DDP: dict[str, dict[str, Any]] = {"ddp": {"after": True}, "ddp, accumulating": {"micro_batches": 2}}
FSDP: dict[str, dict[str, Any]] = {
    "fsdp": {},
    "fsdp, recipe after, weights kept": {"after": True, "reshard": False},
    "fsdp, accumulating, checkpointing": {"recompute": True, "micro_batches": 2},
    "fsdp, bf16": {"mixed": True},
    "fsdp, weights read in backward": {"backward": True},
}


def ddp(*, micro_batches: int = 1, after: bool = False) -> tuple[Losses, list[Tensor], list[str]]:
    model = TinyLlama(2)
    if after:
        wrapped = nn.parallel.DistributedDataParallel(model)
        applied = apply_recipe(wrapped, "quartet2", seed=1)
    else:
        applied = apply_recipe(model, "quartet2", seed=1)
        wrapped = nn.parallel.DistributedDataParallel(model)
    sync = partial(setattr, wrapped, "require_backward_grad_sync")  # as its no_sync() does
    losses = train(wrapped, applied, own(micro_batches), sync=sync)
    return losses, [p.detach() for p in model.parameters()], [row.site.path for row in applied.rows]


def shard(model: TinyLlama, *, mixed: bool = False, reshard: bool = True) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh("cpu", (RANKS,))
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if mixed else MixedPrecisionPolicy()
    for unit in (*model.model.layers, model):
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)


def fsdp(
    *, micro_batches: int = 1, after: bool = False, recompute: bool = False, backward: bool = False, **options: bool
) -> tuple[Losses, list[Tensor], list[str]]:
    model = TinyLlama(2)
    if recompute:
        for i, layer in enumerate(model.model.layers):
            model.model.layers[i] = checkpoint_wrapper(layer)
    if after:
        shard(model, **options)
    applied = apply_recipe(model, chosen(backward), seed=1)
    if not after:
        shard(model, **options)
    linear = next(m for m in model.modules() if isinstance(m, Fp4Linear))
    assert hasattr(linear.weight, "placements")  # sharded outside forward and backward
    resident: list[int] = []
    linear.register_forward_hook(lambda module, *_: resident.append(module.weight.untyped_storage().nbytes()))

    def sync(last: bool) -> None:
        model.set_requires_gradient_sync(last)  # type: ignore[operator]

    losses = train(model, applied, own(micro_batches), sync=sync)
    whole = [p.full_tensor().detach() for p in model.parameters()]  # type: ignore[attr-defined]
    assert resident[0] == 128 * 128 * linear.weight.element_size() // (2 if options.get("mixed") else 1)
    return losses, whole, [row.site.path for row in applied.rows]


def noise() -> list[int]:
    """Clock of a rank that says nothing, that names its micro-batch, and that shares its data with every other rank."""
    applied = apply_recipe(TinyLlama(1), "quartet2")
    first = applied.clock.micro_batch
    applied.set_step(5, 10)
    silent = applied.clock.micro_batch
    applied.set_step(5, 10, micro_batch=3)
    named = applied.clock.micro_batch
    shared = apply_recipe(TinyLlama(1), "quartet2", data_parallel=(0, 1))
    shared.set_step(5, 10, micro_batch=3)
    return [first, silent, named, shared.clock.micro_batch]


def distributed_checkpoint(folder: str) -> bool:
    """Save a sharded FP4 model with torch's distributed checkpoint, load it into another one under another recipe."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    def make(seed: int, recipe: str) -> TinyLlama:
        model = TinyLlama(2, seed=seed)
        apply_recipe(model, recipe)
        shard(model)
        return model

    source, target = make(0, "quartet2"), make(1, "bf16")
    dcp.save(get_model_state_dict(source), checkpoint_id=folder)
    state = get_model_state_dict(target)
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(target, state)
    pairs = zip(source.parameters(), target.parameters(), strict=True)
    return all(torch.equal(a.full_tensor(), b.full_tensor()) for a, b in pairs)  # type: ignore[attr-defined]


def refusals() -> list[str]:
    """A linear that is an FSDP unit of its own, and DTensor tensor parallelism."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh, said = init_device_mesh("cpu", (RANKS,)), []
    unit, tensor_parallel = TinyLlama(1), TinyLlama(1)
    fully_shard(unit.model.layers[0].mlp.up_proj, mesh=mesh)  # type: ignore[union-attr]
    apply_recipe(tensor_parallel, "quartet2")
    parallelize_module(tensor_parallel, mesh, {"model.layers.0.mlp.up_proj": ColwiseParallel()})
    for attempt in (lambda: apply_recipe(unit, "quartet2"), lambda: tensor_parallel(make_tokens())):
        try:
            attempt()
        except RecipeMismatch as error:
            said.append(str(error))
    return said


@pytest.mark.distributed
def test_ddp_and_fsdp_give_one_processs_results() -> None:
    """Bit for bit with one micro-batch a rank (a sum of two gradients has one order); with two, the first step is."""
    folder = tempfile.mkdtemp(prefix="dcp-")
    try:
        ranks = run_ranks(everything_on_two_ranks, RANKS, folder)
    finally:
        shutil.rmtree(folder)
    whole = {key: one_process(*key) for key in ((1, False), (2, False), (1, True))}
    paths = [site.path for site, _, _ in find_linears(TinyLlama(2))]
    for name, case in (DDP | FSDP).items():
        losses, weights = whole[case.get("micro_batches", 1), case.get("backward", False)]
        merged = ranks[0][name][0] | ranks[1][name][0]
        assert merged.keys() == losses.keys()
        assert all(rank[name][2] == paths for rank in ranks), name
        if case.get("mixed"):
            assert 0 < max(abs(merged[key] - losses[key]) for key in losses) < 0.1  # it learns, in another precision
        elif case.get("micro_batches", 1) == 1:
            assert merged == losses, name
            assert all(equal(rank[name][1], weights) for rank in ranks), name
        else:
            assert all(merged[key] == losses[key] for key in losses if key[0] == 0), name
            assert merged == pytest.approx(losses, abs=2e-3), name
    assert [rank["noise"] for rank in ranks] == [[0, 0, 6, 3], [1, 1, 7, 3]]
    assert all(rank["saved"] for rank in ranks)
    for said in (rank["refused"] for rank in ranks):
        assert "is a FSDPLinear, a subclass of torch.nn.Linear" in said[0]
        assert "apply the recipe before fully_shard" in said[0]
        assert "layers.0.mlp.up_proj: its weight is a DTensor in forward" in said[1]


README = """
import fp4dist
from torch.distributed.fsdp import fully_shard

applied = fp4dist.apply_recipe(model, "quartet2")  # before fully_shard
for layer in model.model.layers:
    fully_shard(layer)
fully_shard(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for step, micro_batches in enumerate(batches):  # of this rank; ranks draw noise of their own
    for i, tokens in enumerate(micro_batches):
        applied.set_step(step, total_steps, micro_batch=i)  # so do micro-batches
        model.set_requires_gradient_sync(i == len(micro_batches) - 1)
        (model(tokens) / len(micro_batches)).backward()
    optimizer.step()
    optimizer.zero_grad()
"""


def readme_blocks(word: str) -> list[str]:
    """README's Python examples in which `word` occurs."""
    text = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
    return [block for block in re.findall(r"```python(\n.*?)```", text, re.DOTALL) if word in block]


def run_readme() -> tuple[dict[str, int], int]:
    model = TinyLlama(1)
    batches = [[batch(step, 2 * i + dist.get_rank()) for i in range(2)] for step in range(2)]
    names: dict[str, Any] = {"torch": torch, "model": model, "batches": batches, "total_steps": 2}
    exec(README, names)
    names["applied"].check_counts()
    return names["applied"].counts()["calls"], names["applied"].clock.micro_batch


@pytest.mark.distributed
def test_the_readmes_fsdp_example() -> None:
    """What README shows, run as it stands on two ranks."""
    assert run_ranks(run_readme, RANKS) == [({"fp4": 2 * 2 * 7 * 3}, 2 + rank) for rank in range(RANKS)]
    assert all(block == README for block in readme_blocks("fully_shard"))


# ---------- one process


def gradients(model: nn.Module, applied: AppliedRecipe, *, autocast: bool = False) -> list[Tensor]:
    """Loss and gradients of one step."""
    applied.set_step(2, 10)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(make_tokens())
    loss.backward()
    applied.check_counts()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def equal(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


def recomputed(model: TinyLlama, *, reentrant: bool) -> nn.Module:
    for layer in model.model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=reentrant)  # type: ignore[method-assign]
    return model


def wrapped_layers(model: TinyLlama) -> nn.Module:
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = checkpoint_wrapper(layer)
    return model


class Holder(nn.Module):
    """What DDP, Float16Module or an engine looks like from outside: the model as `module`, nothing else."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any) -> Any:
        return self.module(*args)


WRAPS: dict[str, Wrap] = {
    "checkpoint": partial(recomputed, reentrant=False),
    "reentrant checkpoint": partial(recomputed, reentrant=True),
    "checkpoint_wrapper": wrapped_layers,
    "module": lambda model: Holder(Holder(model)),
    "compiled, not traced": lambda model: torch.compile(model, backend="eager"),  # type: ignore[dict-item]
    "wrapped and compiled": lambda model: torch.compile(Holder(model), backend="eager"),  # type: ignore[dict-item]
    "compiled and wrapped": lambda model: Holder(torch.compile(model, backend="eager")),  # type: ignore[arg-type]
}


@pytest.mark.parametrize(
    ("name", "autocast"), [*((name, False) for name in WRAPS), ("checkpoint", True), ("reentrant checkpoint", True)]
)
def test_wrappers_change_no_bit_and_no_path(name: str, autocast: bool) -> None:
    """Whether the recipe comes before or after the wrapper."""
    torch.compiler.reset()
    bare = TinyLlama(1)
    expected = gradients(bare, apply_recipe(bare, "quartet2", seed=3), autocast=autocast)
    sites = [site for site, _, _ in find_linears(TinyLlama(1))]
    for after in (False, True):
        model = TinyLlama(1)
        before = None if after else apply_recipe(model, "quartet2", seed=3)
        wrapped = WRAPS[name](model)
        applied = before or apply_recipe(wrapped, "quartet2", seed=3)
        assert [row.site for row in applied.rows] == sites
        assert equal(gradients(wrapped, applied, autocast=autocast), expected), after
        assert applied.counts()["fp4_share"] == 1.0


def test_a_part_of_a_model_may_be_called_module() -> None:
    model = nn.ModuleDict({"module": nn.Linear(16, 16), "other": nn.Linear(16, 16)})
    assert [site.path for site, _, _ in find_linears(model)] == ["module", "other"]
    assert [(path, local) for path, local, _ in named_modules(Holder(nn.Sequential(nn.Linear(4, 4))))] == [
        ("", ""),
        ("", "module"),
        ("0", "module.0"),
    ]


class Residual(nn.Module):
    """Two linears between operations that a compiler may fuse but not round differently."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(128, 256), nn.Linear(256, 128)

    def forward(self, x: Tensor) -> Tensor:
        return (self.fc2(functional.relu(self.fc1(x * 2))) + x).clamp(-3, 3)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs a C++ compiler")
def test_compiled_with_inductor() -> None:
    """The bits of the eager model, the noise of every step, and every GEMM counted; recompilation has an end."""
    torch.compiler.reset()
    seen = []
    for compiled in (False, True):
        model = Residual()
        applied = apply_recipe(model, "quartet2", seed=3)
        run = torch.compile(model) if compiled else model
        x = torch.randn(128, 128, generator=torch.Generator().manual_seed(0))
        results: list[Tensor] = []
        for step in range(3):
            applied.set_step(step, 3)
            leaf = x.clone().requires_grad_()
            y = run(leaf)
            y.backward(x)
            assert leaf.grad is not None
            results += [y.detach(), leaf.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        applied.check_counts()
        assert applied.counts()["calls"] == {"fp4": 3 * 2 * 3}
        seen.append(results)
    assert equal(*seen)
    assert not torch.equal(seen[0][1], seen[0][7])  # another step, other noise


def test_state_goes_into_and_out_of_fp4() -> None:
    """Plain, through a file: the names are torch.nn.Linear's, the recipe is not part of the weights."""
    model = TinyLlama(1)
    plain_names = list(model.state_dict())
    apply_recipe(model, "quartet2", seed=3)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert list(state) == plain_names
    twin = TinyLlama(1, seed=5)
    twin.load_state_dict(state)
    applied = apply_recipe(twin, "quartet2", seed=3)
    assert equal(gradients(twin, applied), gradients(model, apply_recipe(model, "quartet2", seed=3)))
    assert torch.equal(copy.deepcopy(model)(make_tokens()), model(make_tokens()))


def test_another_recipe_and_back_to_torch() -> None:
    model, plain = TinyLlama(2), TinyLlama(2)
    parameters = list(model.parameters())
    apply_recipe(model, "nvidia_nvfp4", seed=3)
    applied = apply_recipe(model, "quartet2", seed=3)
    fresh = TinyLlama(2)
    assert equal(gradients(model, applied), gradients(fresh, apply_recipe(fresh, "quartet2", seed=3)))
    model.zero_grad()
    reverted = apply_recipe(model, "bf16")
    assert not any(isinstance(module, Fp4Linear) for module in model.modules())
    assert not any(hasattr(module, "plan") for module in model.modules())
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert equal(gradients(model, reverted), gradients(plain, apply_recipe(plain, "bf16")))
    assert reverted.counts()["uncounted"] == 14


def test_what_the_user_made_stays_the_users() -> None:
    """`revert` undoes `convert` and nothing else."""
    ours, theirs = Fp4Linear(16, 16), nn.Linear(16, 16)
    assert not revert(ours)
    assert type(ours) is Fp4Linear
    assert convert(theirs, "x") is theirs
    assert isinstance(theirs, Fp4Linear)
    assert revert(theirs)
    assert type(theirs) is nn.Linear
    assert not revert(theirs)


def test_a_forward_set_on_the_module_is_refused() -> None:
    model = TinyLlama(1)
    linear = model.model.layers[0].mlp.up_proj  # type: ignore[union-attr]
    linear.forward = linear.forward  # as accelerate's hooks do
    with pytest.raises(RecipeMismatch, match=r"layers.0.mlp.up_proj has a forward of its own"):
        apply_recipe(model, "quartet2")
    qkv = Recipe(name="r", linears=load_recipe("quartet2").linears, rules=(Rule(roles=("qkv",), linear="fp4"),))
    apply_recipe(model, qkv)  # in bf16 it may stay


def test_tokens_of_a_wrapped_model_are_checked_too() -> None:
    with pytest.raises(RecipeMismatch, match="change the 63 tokens of a micro-batch"):
        apply_recipe(Holder(TinyLlama(1)), "luq", tokens=63)
    apply_recipe(Holder(TinyLlama(1)), "luq", tokens=BATCH * SEQUENCE)
