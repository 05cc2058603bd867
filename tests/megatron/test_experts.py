"""Mixtures of experts: grouped experts give the bits of sequential ones, recipe bf16 gives Megatron's, and neither the
dispatcher nor expert and tensor parallelism change what a model learns.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fp4dist.errors import ConfigError
from fp4dist.megatron.provider import transformer_config
from fp4dist.nn.apply import AppliedRecipe, apply_recipe
from fp4dist.spec.load import load_recipe
from fp4dist.spec.recipe import Recipe, Rule
from tests.distributed import RankError, megatron_groups, run_ranks
from tests.megatron.tiny import tiny_batch, tiny_experts, tiny_run

pytestmark = pytest.mark.distributed

SEEDS, STEPS = (0, 1), 3  # a step's two micro-batches
FP4 = ("nvidia_nvfp4", "tetrajet_v2_core")
Case = tuple[Any, ...]
Outcome = tuple[list[float], dict[str, Tensor]]  # loss before each step, last gradients by global name


def train(
    ep: int = 1,
    tp: int = 1,
    recipe: str | None = None,
    *,
    dispatcher: str = "alltoall",
    grouped: bool = True,
    rate: float = 0.5,
    **moe: Any,
) -> Outcome:
    """Three steps of plain gradient descent on SEEDS, with Megatron's DDP; recipe None: Megatron's own linears."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    from fp4dist.megatron.initialize import global_parameters

    with megatron_groups(tp, ep=ep) as groups:
        fields = tiny_experts(dispatcher=dispatcher, grouped_gemm=grouped, **{"shared_ffn_hidden_size": 128} | moe)
        gpt, applied = build(tiny_run(tp, ep=ep, sequence_parallel=tp > 1, **fields), recipe)
        ddp: Any = DistributedDataParallel(gpt.config, DistributedDataParallelConfig(), gpt)
        rank, size = groups.get_data_parallel_rank(), groups.get_data_parallel_world_size()
        mine = SEEDS[rank::size]
        MoEAuxLossAutoScaler.main_loss_backward_scale = torch.tensor(1.0 / len(mine))  # as Megatron's schedules do
        losses = []
        for step in range(STEPS):
            ddp.zero_grad_buffer()
            total = torch.zeros(())
            for i, seed in enumerate(mine):
                if applied is not None:
                    applied.clock.step, applied.clock.micro_batch = step, i * size + rank
                tokens, positions, labels = tiny_batch(seed + 10 * step)
                loss = ddp(tokens, positions, None, labels=labels).float().mean() / len(mine)
                loss.backward()
                total += loss.detach()
            finalize_model_grads([ddp])
            dist.all_reduce(total, group=groups.get_data_parallel_group())
            losses.append(float(total) / size)
            with torch.no_grad():
                for parameter in gpt.parameters():
                    parameter -= rate * parameter.main_grad  # type: ignore[operator]
        if applied is not None:
            applied.check_counts()
        return losses, {name: p.main_grad.clone() for name, p in global_parameters(gpt)}  # type: ignore[misc,operator]


def build(config: Any, recipe: Recipe | str | None) -> tuple[Any, AppliedRecipe | None]:
    from fp4dist.megatron.provider import build_gpt
    from fp4dist.megatron.sites import gpt_sites

    gpt = build_gpt(config, torch.float32, linears="megatron" if recipe is None else "fp4dist")
    if recipe is None:
        return gpt, None
    return gpt, apply_recipe(gpt, recipe, sites=gpt_sites(config.model), tokens=None)


def same(a: Outcome, b: Outcome) -> bool:
    """Bit for bit."""
    return a[0] == b[0] and a[1].keys() == b[1].keys() and all(torch.equal(a[1][name], b[1][name]) for name in a[1])


def close(a: Outcome, b: Outcome, places: float = 1e-5) -> bool:
    """Losses, and those gradients that both have whole."""
    shared = [name for name in a[1] if name in b[1] and a[1][name].shape == b[1][name].shape]
    assert any("local_experts" in name for name in shared)
    assert any("router" in name for name in shared)
    losses = all(abs(p - q) < places for p, q in zip(a[0], b[0], strict=True))
    return losses and all(float((a[1][name] - b[1][name]).abs().max()) < 1e-6 for name in shared)


def equalities(ep: int) -> dict[Case, bool]:
    """What must hold bit for bit in one layout."""
    found: dict[Case, bool] = {}
    for dispatcher in ("alltoall", "allgather"):
        megatrons = train(ep, dispatcher=dispatcher)
        for grouped in (True, False):
            ours = train(ep, recipe="bf16", dispatcher=dispatcher, grouped=grouped)
            found["bf16 = Megatron", dispatcher, grouped] = same(ours, megatrons)
    for recipe in FP4:
        together, by_one = train(ep, recipe=recipe), train(ep, recipe=recipe, grouped=False)
        found["grouped = sequential", recipe] = same(together, by_one)
        found["FP4 is not bf16", recipe] = not same(together, megatrons)
        if recipe == FP4[-1]:  # both lay out an expert's tokens by rank; they sum a token's experts differently
            found["dispatchers", recipe] = close(together, train(ep, recipe=recipe, dispatcher="allgather"))
    return found


@pytest.fixture(scope="module")
def one_process() -> Outcome:
    return run_ranks(train, 1, 1, 1, "bf16")[0]


def test_on_one_rank() -> None:
    found = run_ranks(equalities, 1, 1)[0]
    assert all(found.values()), found


def test_on_two_expert_parallel_ranks(one_process: Outcome) -> None:
    """The same equalities with EP = 2; and recipe bf16 gives what one process computes from both micro-batches."""
    for found, layouts in run_ranks(two_ranks, 2):
        assert all(found.values()), found
        for layout, outcome in layouts.items():
            assert close(one_process, outcome), layout


def two_ranks() -> tuple[dict[Case, bool], dict[str, Outcome]]:
    layouts = {f"ep {ep} dp 2 {dispatcher}": train(ep, 1, "bf16", dispatcher=dispatcher)
               for ep in (1, 2) for dispatcher in ("alltoall", "allgather")}  # fmt: skip
    layouts["ep 1 tp 2"] = train(1, 2, "bf16")
    layouts["ep 2 tp 2"] = train(2, 2, "bf16")
    return equalities(2), layouts


def test_expert_and_tensor_parallel(one_process: Outcome) -> None:
    """Four ranks: EP 2 or 4 x TP 2 with sequence parallelism x DP 2, experts whole on each rank (etp 1)."""
    for found, layouts in run_ranks(four_ranks, 4):
        assert all(found.values()), found
        for layout, outcome in layouts.items():
            assert close(one_process, outcome), layout


def four_ranks() -> tuple[dict[Case, bool], dict[str, Outcome]]:
    layouts = {f"ep {ep} tp 2 {dispatcher}": train(ep, 2, "bf16", dispatcher=dispatcher)
               for ep, dispatcher in ((2, "alltoall"), (2, "allgather"), (4, "alltoall"))}  # fmt: skip
    found: dict[Case, bool] = {
        ("bf16 = Megatron",): same(layouts["ep 2 tp 2 alltoall"], train(2, 2)),
        ("grouped = sequential",): same(train(2, 2, "nvidia_nvfp4"), train(2, 2, "nvidia_nvfp4", grouped=False)),
        ("every copy of an expert has noise of its own",): len(set(_parts(tp=2, cp=2))) == 4,
        ("data-parallel ranks differ by micro-batch",): set(_parts(tp=2)) == {(0, 2), (1, 2)},
        ("alone",): set(_parts()) == {(0, 1)},
    }
    return found, layouts


def _parts(**sizes: int) -> list[tuple[int, int]]:
    """Each rank's (number, of how many) among those that route parts of one micro-batch."""
    from fp4dist.megatron.experts import _token_part

    with megatron_groups(**sizes):
        part = _token_part()
        found = [(0, 0)] * dist.get_world_size()
        dist.all_gather_object(found, (part.index, part.size))
        return found


def test_fp4_layouts_stay_near_each_other() -> None:
    """Data parallelism changes no bit. With EP an expert's logical tensor holds the tokens of several ranks, so other
    codes, and with them now and then another routing.
    """
    one = run_ranks(fp4_layouts, 1, [1])[0][1]
    for layouts in run_ranks(fp4_layouts, 2, [1, 2]):
        assert same(one, layouts[1])
        assert layouts[2][0] != one[0]
        assert layouts[2][0] == pytest.approx(one[0], abs=5e-3)


def fp4_layouts(sizes: list[int]) -> dict[int, Outcome]:
    return {ep: train(ep, recipe="nvidia_nvfp4", rate=0.02) for ep in sizes}


def test_models_of_every_kind() -> None:
    """A dense first layer, one expert a token, no load balancing, router in the model's dtype, no shared expert."""
    for case, (losses, expected, table) in run_ranks(variants, 1)[0].items():
        assert losses == expected, case
        assert losses[-1] != losses[0]
        assert "router" in table


def variants() -> dict[str, tuple[list[float], list[float], str]]:
    cases: dict[str, dict[str, Any]] = {
        "dense first": dict(first_dense_layers=1),
        "switch": dict(top_k=1, aux_loss_coeff=0.0, router_dtype="model", shared_ffn_hidden_size=0),
    }
    found = {}
    for case, moe in cases.items():
        losses, _ = train(recipe="bf16", **moe)
        expected, _ = train(**moe)
        with megatron_groups():
            _, applied = build(tiny_run(**tiny_experts(**moe)), "nvidia_nvfp4")
            assert applied is not None
            found[case] = losses, expected, applied.table()
    return found


def test_weights_do_not_depend_on_expert_parallelism() -> None:
    whole, parts = run_ranks(weights, 1, 1)[0], run_ranks(weights, 2, 2)
    assert parts[0].keys() | parts[1].keys() == whole.keys()
    assert len(parts[0].keys() & parts[1].keys()) == len(whole) - 2 * 4 * 2  # all but the experts' fc1 and fc2
    for part in parts:
        for name, weight in part.items():
            assert torch.equal(weight, whole[name]), name
    experts = [tuple(w.flatten()[:4].tolist()) for name, w in whole.items() if name.endswith("linear_fc1.weight")]
    assert len(set(experts)) == len(experts) == 2 * 4


def weights(ep: int) -> dict[str, Tensor]:
    from fp4dist.megatron.initialize import global_parameters
    from fp4dist.megatron.provider import build_gpt

    with megatron_groups(ep=ep):
        gpt = build_gpt(tiny_run(ep=ep, **tiny_experts()), torch.float32)
        return {name: parameter.detach() for name, parameter in global_parameters(gpt)}


def test_rules_reach_experts_by_their_global_number() -> None:
    """A rule for expert 3 alone: rank 1 of EP = 2 runs it, as its local expert 1, with the whole model's number."""
    for whole, (mine, numbers, promised) in zip([False, True], run_ranks(expert_three, 2), strict=True):
        assert promised == ["decoder.layers.0.mlp.experts.local_experts.3.linear_fc1"]
        assert mine == (["decoder.layers.0.mlp.experts.local_experts.1.linear_fc1"] if whole else [])
        assert numbers


def expert_three() -> tuple[list[str], bool, list[str]]:
    from fp4dist.megatron.sites import gpt_sites
    from fp4dist.nn.sites import find_linears

    fp4 = load_recipe("nvidia_nvfp4").linears["fp4"]
    rule = Rule(path="decoder.layers.0.*.local_experts.3.linear_fc1", linear="fp4")
    with megatron_groups(ep=2):
        config = tiny_run(ep=2, **tiny_experts())
        gpt, applied = build(config, Recipe(name="three", linears={"fp4": fp4}, rules=(rule,)))
        assert applied is not None
        plans = {path: getattr(m, "plan", None) for path, m in gpt.named_modules()}
        mine = [path for path, plan in plans.items() if plan is not None and plan.kernels]
        sites = {site.path: site for site in gpt_sites(config.model)}
        found = [site for site, _, _ in find_linears(gpt)]
        return mine, all(sites[s.path] == s for s in found), [r.site.path for r in applied.rows if r.linear == "fp4"]


def test_the_table_lists_every_expert_and_counts_them() -> None:
    text, roles, share, counted = run_ranks(table, 1)[0]
    assert "linear_fc1   [256 x 128] layers 0-1 (8 expert linears): fp4" in text
    assert "router       [4 x 128] layers 0-1: bf16" in text
    assert roles == {"qkv": 2, "proj": 2, "router": 2, "expert": 16, "fc1": 2, "fc2": 2, "head": 1}
    assert share == 1.0
    assert counted == 3 * (16 + 8)  # three GEMMs: experts once, dense linears once


def table() -> tuple[str, dict[str, int], float, int]:
    from fp4dist.nn.report import fp4_share

    with megatron_groups():
        gpt, applied = build(tiny_run(**tiny_experts(shared_ffn_hidden_size=128)), "tetrajet_v2_core")
        assert applied is not None
        tokens, positions, labels = tiny_batch()
        gpt(tokens, positions, None, labels=labels).mean().backward()
        applied.check_counts()
        roles: dict[str, int] = {}
        for row in applied.rows:
            roles[row.site.role] = roles.get(row.site.role, 0) + 1
        return applied.table(), roles, fp4_share(applied.rows), applied.counts()["calls"]["fp4"]


def test_a_router_cannot_be_quantized() -> None:
    with pytest.raises(RankError, match=r"mlp\.router: .* asks for FP4, but this layer's class cannot run it"):
        run_ranks(quantized_router, 1)


def quantized_router() -> None:
    fp4 = load_recipe("nvidia_nvfp4").linears["fp4"]
    recipe = Recipe(name="all", linears={"fp4": fp4}, rules=(Rule(path="*", linear="fp4"),))
    with megatron_groups():
        build(tiny_run(**tiny_experts(num_experts=16)), recipe)


def test_an_expert_without_tokens() -> None:
    """Called as the dispatcher does: an expert with none, one with a ragged number; also a rank with none at all."""
    for name, (zero, others, same_bits, calls) in run_ranks(starved, 1)[0].items():
        assert zero, name
        assert others, name
        assert same_bits, name
        assert calls, name


def starved() -> dict[str, tuple[bool, bool, bool, bool]]:
    found = {}
    with megatron_groups():
        for recipe in ("bf16", *FP4, "quartet2"):
            outcomes = []
            for grouped in (True, False):
                gpt, applied = build(tiny_run(**tiny_experts(grouped_gemm=grouped)), recipe)
                assert applied is not None
                experts = gpt.decoder.layers[0].mlp.experts
                x = torch.randn(50, 128, generator=torch.Generator().manual_seed(0)).requires_grad_()
                probs = torch.rand(50, generator=torch.Generator().manual_seed(1)).requires_grad_()
                y, bias = experts(x, torch.tensor([17, 0, 33, 0]), probs)
                assert bias is None
                y.square().sum().backward()
                empty, _ = experts(x[:0], torch.tensor([0, 0, 0, 0]), probs[:0])
                assert empty.shape == (0, 128)
                empty.sum().backward()  # every weight still gets its (zero) gradient: DDP waits for all of them
                outcomes.append((y.detach(), x.grad, probs.grad, *(p.grad for p in experts.parameters())))
                outcomes.append(replayed(experts, x, probs))
            grads = {name: p.grad for name, p in experts.named_parameters()}
            starving = [g for name, g in grads.items() if ".1." in name or ".3." in name]
            fed = [g for name, g in grads.items() if ".0." in name or ".2." in name]
            idle = experts.local_experts[1].linear_fc1.plan.tally
            found[recipe] = (
                all(torch.equal(g, torch.zeros_like(g)) for g in starving),
                all(bool(g.ne(0).any()) for g in fed),
                all(torch.equal(a, b) for other in outcomes[1:] for a, b in zip(outcomes[0], other, strict=True)),
                not idle.calls and idle.unneeded == {"fprop", "dgrad", "wgrad"},
            )
    return found


def replayed(experts: Any, x: Tensor, probs: Tensor) -> tuple[Tensor, ...]:
    """The same under Megatron's recomputation."""
    from megatron.core import tensor_parallel

    x.grad = probs.grad = None
    experts.zero_grad()

    def forward(x: Tensor, probs: Tensor) -> Tensor:
        return experts(x, torch.tensor([17, 0, 33, 0]), probs)[0]

    y = tensor_parallel.checkpoint(forward, False, x, probs)
    y.square().sum().backward()
    empty = tensor_parallel.checkpoint(lambda x, p: experts(x, torch.zeros(4, dtype=torch.int64), p)[0],
                                       False, x[:0], probs[:0])  # fmt: skip
    empty.sum().backward()
    assert x.grad is not None
    assert probs.grad is not None
    return (y.detach(), x.grad, probs.grad, *(p.grad for p in experts.parameters()))


def test_module_hooks_run_before_a_weight_is_read() -> None:
    """Megatron's overlapped parameter gather and FSDP fill a weight in its module's forward pre-hook."""
    assert run_ranks(hooked, 1) == [(16, True)]


def hooked() -> tuple[int, bool]:
    """(hooks that ran in the two layers, whether the output is that of the weights they filled in)."""
    calls = []

    def late(module: Any, args: Any) -> None:
        calls.append(module)
        module.weight.data.copy_(module.real)

    with megatron_groups():
        gpt, _ = build(tiny_run(**tiny_experts()), "nvidia_nvfp4")
        tokens, positions, labels = tiny_batch()
        expected = gpt(tokens, positions, None, labels=labels)
        for name, module in gpt.named_modules():
            if ".local_experts." in name and name.endswith(("fc1", "fc2")):
                module.real = module.weight.detach().clone()
                module.weight.data.zero_()
                module.register_forward_pre_hook(late)
        equal = torch.equal(gpt(tokens, positions, None, labels=labels), expected)
        return len(calls), equal


def test_checkpoints_interchange(tmp_path: Any) -> None:
    """Megatron's own experts, ours one by one and ours grouped save the same keys and shapes; EP 2 loads on EP 1."""
    for keys, differing in run_ranks(save_and_load, 2, str(tmp_path)):
        assert keys
        assert differing == []


def save_and_load(folder: str) -> tuple[bool, list[str]]:
    """(keys are equal, names that differ after grouped EP 2 -> sequential EP 1 -> grouped EP 2)."""
    from megatron.core import dist_checkpointing

    def state(gpt: Any, groups: Any) -> dict[str, Any]:
        return gpt.sharded_state_dict(
            metadata={"dp_cp_group": groups.get_data_parallel_group(with_context_parallel=True)}
        )

    def described(gpt: Any, groups: Any) -> dict[str, Any]:
        found = {}
        for name, entry in state(gpt, groups).items():
            if "_extra_state" not in name:
                parts = entry.build() if hasattr(entry, "build") else [entry]
                found[name] = [(p.key, p.global_shape, p.global_offset, p.replica_id) for p in parts]
        return found

    def config(ep: int, grouped: bool, seed: int) -> Any:
        return tiny_run(ep=ep, seed=seed, **tiny_experts(grouped_gemm=grouped))

    differing = []
    with megatron_groups(ep=2) as groups:
        saved, _ = build(config(2, True, 1), "nvidia_nvfp4")
        kinds = [saved, build(config(2, False, 1), "nvidia_nvfp4")[0], build(config(2, False, 1), None)[0]]
        keys = [described(gpt, groups) for gpt in kinds]
        dist_checkpointing.save(state(saved, groups), f"{folder}/a" if _made(f"{folder}/a") else "")
    with megatron_groups() as groups:
        expected, _ = build(config(1, False, 1), None)
        loaded, _ = build(config(1, False, 2), "nvidia_nvfp4")
        loaded.load_state_dict(dist_checkpointing.load(state(loaded, groups), f"{folder}/a"))
        differing += _differing(expected, loaded)
        dist_checkpointing.save(state(loaded, groups), f"{folder}/b" if _made(f"{folder}/b") else "")
    with megatron_groups(ep=2) as groups:
        again, _ = build(config(2, True, 3), "bf16")
        again.load_state_dict(dist_checkpointing.load(state(again, groups), f"{folder}/b"))
        differing += _differing(saved, again)
    return keys[0] == keys[1] == keys[2], differing


def _made(folder: str) -> bool:
    """The folder exists on every rank that goes on."""
    from pathlib import Path

    Path(folder).mkdir(exist_ok=True)
    dist.barrier()
    return True


def _differing(a: Any, b: Any) -> list[str]:
    pairs = zip(a.named_parameters(), b.named_parameters(), strict=True)
    return [name for (name, p), (_, q) in pairs if not torch.equal(p, q)]


def test_refusals() -> None:
    with pytest.raises(ConfigError, match=r"parallel.tp = 2 with model.moe needs parallel.sequence_parallel: true"):
        transformer_config(tiny_run(2, **tiny_experts()), torch.float32)
    assert transformer_config(tiny_run(2, 1, True, **tiny_experts(top_k=1)), torch.float32).moe_router_pre_softmax
