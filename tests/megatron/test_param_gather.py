"""Weights gathered as codes: bit for bit the codes of the gathered weight, and never a stale value unseen."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fp4dist.errors import CheckpointError, RecipeMismatch
from fp4dist.nn.apply import AppliedRecipe, apply_recipe
from fp4dist.numerics.tensor import BlockScaledTensor
from fp4dist.spec.blocks import Ceil, FourOverSix, Hadamard, Stochastic
from fp4dist.spec.formats import MXFP4, NVFP4
from fp4dist.spec.recipe import Dgrad, Fprop, LinearRecipe, Phase, QuantSpec, Recipe, Rule
from tests.distributed import megatron_groups, run_ranks
from tests.train.tiny_run import curve, run_without_picture, tiny_run, write_counting_tokens

pytestmark = pytest.mark.distributed
SHAPES = ((96, 160), (64, 96), (32, 224), (160, 32), (64, 64))  # [O, I] of a rank's linears
WEIGHTS = {
    "nvfp4 16x16": QuantSpec(format=NVFP4, block=(16, 16)),
    "nvfp4 1x16": QuantSpec(format=NVFP4),
    "4/6 16x16": QuantSpec(format=NVFP4, block=(16, 16), scale=FourOverSix()),
    "4/6 mae": QuantSpec(format=NVFP4, scale=FourOverSix(metric="mae")),
    "mxfp4": QuantSpec(format=MXFP4),
    "mxfp4 ceil 32x32": QuantSpec(format=MXFP4, block=(32, 32), scale=Ceil()),
    "nvfp4 of a shard": QuantSpec(format=NVFP4, block=(16, 16), amax_scope="shard"),
}
SPREAD = {"ordinary": 1.0, "tiny": 1e-30, "huge": 1e30, "not finite": float("nan")}


def one_weight_recipe(weight: QuantSpec, **recipe: Any) -> Recipe:
    """Every linear's weight quantized once; the last linear stays in high precision."""
    linear = LinearRecipe(
        fprop=Fprop(x=QuantSpec(format=NVFP4), w=weight),
        dgrad=Dgrad(
            dy=QuantSpec(format=NVFP4),
            w=QuantSpec(format=NVFP4, source="requant"),
        ),
    )
    rules = (Rule(path="*4*", linear="bf16"), Rule(path="*", linear="fp4"))
    return Recipe(name="one", linears={"fp4": linear}, rules=rules, **recipe)


class Stack(nn.Module):
    """Linears of SHAPES with norms between them and an embedding before, in a buffer that no slice cuts evenly."""

    def __init__(self, config: Any) -> None:
        from fp4dist.megatron.layers import Fp4ColumnParallelLinear

        super().__init__()
        self.embedding = nn.Embedding(37, 24)
        common: dict[str, Any] = dict(config=config, init_method=nn.init.normal_, bias=False)
        tp = config.tensor_model_parallel_size
        self.linears = nn.ModuleList(Fp4ColumnParallelLinear(i, o * tp, **common) for o, i in SHAPES)
        self.norms = nn.ParameterList(torch.randn(inputs) for _, inputs in SHAPES)


def wrapped(recipe: Recipe, dtype: torch.dtype = torch.bfloat16, **ddp: Any) -> tuple[Any, AppliedRecipe]:
    """(Stack in Megatron's DDP, its recipe)."""
    from megatron.core import parallel_state as ps
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=1,
        hidden_size=64,
        num_attention_heads=4,
        use_cpu_initialization=True,
        tensor_model_parallel_size=ps.get_tensor_model_parallel_world_size(),
        gradient_accumulation_fusion=False,
    )
    model = Stack(config).to(dtype)
    applied = apply_recipe(model, recipe)
    settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True, **ddp)
    return DistributedDataParallel(config, settings, model), applied


def own_slices(chunk: Any) -> Iterator[Tensor]:
    """What this rank's optimizer writes."""
    for group in chunk.bucket_groups:
        for bucket in group.buckets:
            yield bucket.param_data.chunk(group.intra_distributed_optimizer_instance_size)[
                group.intra_distributed_optimizer_instance_rank
            ]


def update(chunk: Any, seed: int, spread: float = 1.0) -> None:
    """An optimizer's step: new values in this rank's slices and nowhere else."""
    generator = torch.Generator().manual_seed(1000 * seed + dist.get_rank())
    for own in own_slices(chunk):
        values = torch.randn(own.shape, generator=generator) * (spread if spread == spread else 1.0)
        own.copy_(values)
        if spread != spread:
            own[dist.get_rank() :: 997] = float("inf") if seed % 2 else float("nan")


def gathered(chunk: Any) -> dict[str, Tensor]:
    """Name -> the parameter that Megatron's gather would give, without touching the model."""
    from megatron.core import parallel_state as ps

    found = {}
    for group in chunk.bucket_groups:
        for bucket in group.buckets:
            whole = torch.empty_like(bucket.param_data)
            own = bucket.param_data.chunk(ps.get_data_parallel_world_size())[ps.get_data_parallel_rank()]
            dist.all_gather_into_tensor(whole, own.clone(), group=group.intra_distributed_optimizer_instance_group)
            for name, parameter in chunk.module.named_parameters():
                start = (parameter.data_ptr() - bucket.param_data.data_ptr()) // parameter.element_size()
                if parameter in bucket.params:
                    found[name] = whole[start : start + parameter.numel()].view(parameter.shape).clone()
    return found


def assert_same_codes(found: Any, expected: Any, name: str) -> None:
    assert isinstance(found, BlockScaledTensor), name
    assert isinstance(expected, BlockScaledTensor), name
    for part in ("codes", "scales", "global_scale"):
        a, b = getattr(found, part), getattr(expected, part)
        assert (a.shape, a.dtype) == (b.shape, b.dtype), (name, part)
        assert torch.equal(a.nan_to_num(nan=-1.0), b.nan_to_num(nan=-1.0)), (name, part)
    assert (found.format, found.block, found.rotation) == (expected.format, expected.block, expected.rotation)


def same(a: Tensor, b: Tensor) -> bool:
    """Equal, NaN in the same places."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(nan=0.0), b.nan_to_num(nan=0.0))


def finish(chunk: Any) -> None:
    """What forward hooks do where the gather overlaps it, then what the end of a backward pass does."""
    for group in chunk.bucket_groups:
        group.finish_param_sync(skip_next_bucket_dispatch=True)
    for group in chunk.bucket_groups:
        group.param_gather_dispatched = False


def compare_one_gather(chunk: Any, expected: dict[str, Tensor], name: str) -> int:
    """Codes and all other parameters are those of the gathered buffer; the number of elements that became NaN."""
    hidden = 0
    for i, linear in enumerate(chunk.module.linears):
        weight = expected[f"linears.{i}.weight"]
        if i == len(SHAPES) - 1:  # in high precision by the recipe
            assert linear.plan.delivered is None
            assert same(linear.weight, weight)
            continue
        whole = linear.plan.quantize("fprop.w", weight, linear.comm)
        assert_same_codes(linear.plan.delivered, whole, f"{name} linears.{i}")
        assert linear.plan.quantize_weight(linear.weight, linear.comm, training=False) is linear.plan.delivered
        unknown = linear.weight.isnan()
        assert (unknown | (linear.weight == weight)).all(), "a stale value must not look like a weight"
        hidden += int(unknown.sum())
    for other in ("embedding.weight", *(f"norms.{i}" for i in range(len(SHAPES)))):
        assert same(chunk.module.get_parameter(other), expected[other]), (name, other)
    return hidden


def compare_codes(tp: int) -> tuple[int, set[bool], bool]:
    """(NaN elements seen, whether payloads were evened out, whether slices cut block rows) over all specs."""
    from fp4dist.megatron.param_gather import Fp4ParamGather

    hidden, evened, cut = 0, set(), False
    settings = list(itertools.product((torch.bfloat16, torch.float32), (False, True)))
    with megatron_groups(tp):
        for case, name in enumerate(WEIGHTS):
            dtype, overlap = settings[(case + dist.get_world_size()) % len(settings)]
            ddp = dict(overlap_grad_reduce=True, overlap_param_gather=True, bucket_size=12_000) if overlap else {}
            chunk, applied = wrapped(one_weight_recipe(WEIGHTS[name]), dtype, **ddp)
            gather = Fp4ParamGather([chunk], applied)
            layouts = [bucket.layout for group in gather._groups for bucket in group.buckets]
            evened |= {layout.is_balanced for layout in layouts}
            cut |= any(layout.tails for layout in layouts)
            expected: dict[str, Tensor] = {}
            for seed, (spread_name, spread) in enumerate(SPREAD.items()):
                update(chunk, 10 * case + seed, spread)
                expected = gathered(chunk)
                chunk.start_param_sync()
                if overlap:
                    finish(chunk)
                hidden += compare_one_gather(chunk, expected, f"{name} {dtype} {spread_name}")
            gather.close()
            assert all(same(p, expected[n]) for n, p in chunk.module.named_parameters()), "close makes weights whole"
            assert all(linear.plan.delivered is None for linear in chunk.module.linears)
            assert "start_param_sync" not in vars(chunk.bucket_groups[0])
    return hidden, evened, cut


@pytest.mark.parametrize(("ranks", "tp"), [(2, 1), (3, 1), (4, 2)])
def test_codes_are_those_of_the_gathered_weight(ranks: int, tp: int) -> None:
    """Also where slices cut blocks, rows and bytes, under tensor parallelism, and with NaN and Inf."""
    for hidden, evened, cut in run_ranks(compare_codes, ranks, tp):
        assert hidden > 0
        assert True in evened
        assert cut


# -- bytes, hooks


def count_bytes() -> tuple[list[int], list[int], dict[str, Any]]:
    """(bytes that collectives brought in a coded gather, and in Megatron's), and what the gather says of them."""
    from fp4dist.megatron.param_gather import Fp4ParamGather

    brought: list[int] = []
    gather_into, exchange, reduce = dist.all_gather_into_tensor, dist.all_to_all_single, dist.all_reduce
    ranks = dist.get_world_size()

    def counted_gather(whole: Tensor, part: Tensor, *args: Any, **kwargs: Any) -> Any:
        brought.append(whole.nbytes - part.nbytes)
        return gather_into(whole, part, *args, **kwargs)

    def counted_exchange(out: Tensor, given: Tensor, sizes: list[int], *args: Any, **kwargs: Any) -> Any:
        brought.append(sum(n * out.element_size() for rank, n in enumerate(sizes) if rank != dist.get_rank()))
        return exchange(out, given, sizes, *args, **kwargs)

    def counted_reduce(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        brought.append(x.nbytes * 2 * (ranks - 1) // ranks)
        return reduce(x, *args, **kwargs)

    with megatron_groups():
        chunk, applied = wrapped(one_weight_recipe(WEIGHTS["nvfp4 16x16"]))
        update(chunk, 0)
        gather = Fp4ParamGather([chunk], applied)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dist, "all_gather_into_tensor", counted_gather)
            patch.setattr(dist, "all_to_all_single", counted_exchange)
            patch.setattr(dist, "all_reduce", counted_reduce)
            chunk.start_param_sync()
        coded, full = gather.bytes_of_a_step()
        assert gather.traffic.coded == coded
        assert (
            gather.traffic.spared
            == full
            == sum(
                bucket.param_data.nbytes * (ranks - 1) // ranks
                for group in chunk.bucket_groups
                for bucket in group.buckets
            )
        )
        gather.restore()
        assert gather.traffic.whole == full
        gather.restore()  # nothing left to do
        assert gather.traffic.whole == full
        return brought, [coded, full], {"report": gather.report()}


@pytest.mark.parametrize("ranks", [2, 3])
def test_bytes_are_those_of_the_collectives_and_close_to_the_formula(ranks: int) -> None:
    coded_numel = sum(o * i for o, i in SHAPES[:-1])
    other_bytes = 2 * (37 * 24 + SHAPES[-1][0] * SHAPES[-1][1] + sum(i for _, i in SHAPES))
    codes = coded_numel // 2 + coded_numel // 256 + 4 * (len(SHAPES) - 1)
    for brought, (coded, full), told in run_ranks(count_bytes, ranks):
        assert sum(brought) == coded
        # the gather itself, evened out; beyond it at most a 16-row tail, an uneven payload's bytes and the amaxes
        least = (ranks - 1) * (codes + other_bytes) // ranks
        assert least <= coded <= least + 2 * 16 * 224 + other_bytes + 64
        assert f"{coded:,} bytes reach it in a step instead of {full:,} ({coded / full:.0%}, " in told["report"]
        assert "4 weights" in told["report"]


def use_weights_otherwise() -> None:
    """Everything but a GEMM under the recipe finds whole weights, or refuses."""
    from fp4dist.megatron.param_gather import Fp4ParamGather

    with megatron_groups() as ps:
        phase = Phase(name="tail", use={"fp4": "bf16"}, step=7)
        chunk, applied = wrapped(one_weight_recipe(WEIGHTS["nvfp4 16x16"], phases=(phase,)), torch.float32)
        gather = Fp4ParamGather([chunk], applied)
        assert "from phase tail on" in gather.report()
        linear: Any = chunk.module.linears[0]
        x = torch.randn(16, SHAPES[0][1], generator=torch.Generator().manual_seed(1))

        def updated(seed: int) -> Tensor:
            update(chunk, seed)
            whole = gathered(chunk)["linears.0.weight"]
            chunk.start_param_sync()
            assert linear.plan.delivered is not None
            return whole

        whole = updated(0)
        with pytest.raises(CheckpointError, match=r"linears.0: .* call Fp4ParamGather.restore\(\) on all"):
            chunk.state_dict()
        gather.restore()
        assert torch.equal(chunk.state_dict()["linears.0.weight"], whole)

        whole = updated(1)
        metadata = {"dp_cp_group": ps.get_data_parallel_group(with_context_parallel=True)}
        saved = linear.sharded_state_dict(metadata=metadata)["weight"].data
        assert torch.equal(saved, whole), "saving gathers whole weights"

        whole = updated(2)
        linear.load_state_dict({"weight": 2 * whole}, strict=False)
        assert linear.plan.delivered is None, "loaded weights replace the codes"
        assert torch.equal(linear.weight, 2 * whole)

        whole = updated(3)
        applied.set_step(7, 10)
        y, _ = linear(x)
        assert torch.equal(y, x @ whole.t())
        assert all(not other.weight.isnan().any() for other in chunk.module.linears), "all are made whole at once"

        assert "from phase tail on" not in gather.report()
        assert " 0 weights" in gather.report()

        apply_recipe(chunk.module, one_weight_recipe(WEIGHTS["nvfp4 1x16"]))  # another spec
        update(chunk, 4)
        whole = gathered(chunk)["linears.0.weight"]
        chunk.start_param_sync()
        assert torch.equal(linear.weight, whole), "the gather that finds new plans is in high precision"
        whole = updated(5)
        assert_same_codes(linear.plan.delivered, linear.plan.quantize("fprop.w", whole, linear.comm), "new recipe")
        gather.close()


def test_whole_weights_come_back_before_anything_else_reads_them() -> None:
    run_ranks(use_weights_otherwise, 2)


def unfit_linears() -> dict[str, LinearRecipe]:
    """Linears whose weight is read otherwise than through one set of codes."""
    x = QuantSpec(format=NVFP4)
    master = Dgrad(dy=x, w=x)
    rotated = QuantSpec(format=NVFP4, rotation=Hadamard(size=16, signs="fixed"))
    noisy = QuantSpec(format=NVFP4, rounding=Stochastic(), allow_bias=True)
    return {
        "master": LinearRecipe(fprop=Fprop(x=x, w=x), dgrad=master),
        "no dgrad": LinearRecipe(fprop=Fprop(x=x, w=x)),
        "no fprop": LinearRecipe(dgrad=master),
        "noise": LinearRecipe(fprop=Fprop(x=x, w=noisy), dgrad=master),
        "rotated": LinearRecipe(fprop=Fprop(x=rotated, w=rotated), dgrad=master),
    }


REFUSALS = {
    "master": "dgrad.w (nvfp4 1x16) is quantized from the weight itself",
    "no dgrad": "its dgrad GEMM reads the weight in high precision",
    "no fprop": "its forward GEMM reads the weight in high precision",
    "noise": "fprop.w (nvfp4 1x16 sr) draws noise for each micro-batch",
    "rotated": "is rotated",
}


def refuse_all() -> dict[str, str]:
    """The message for each of them."""
    from fp4dist.megatron.param_gather import Fp4ParamGather

    messages = {}
    with megatron_groups():
        for case, linear in unfit_linears().items():
            chunk, applied = wrapped(Recipe(name=case, linears={"a": linear}, rules=(Rule(path="*", linear="a"),)))
            with pytest.raises(RecipeMismatch) as refused:
                Fp4ParamGather([chunk], applied)
            messages[case] = str(refused.value)
        chunk, applied = wrapped(one_weight_recipe(WEIGHTS["mxfp4"]))
        messages["alone"] = Fp4ParamGather([chunk], applied).report()
    return messages


def test_recipes_that_need_the_weight_itself_are_refused_with_the_reason_and_the_way_out() -> None:
    (messages,) = run_ranks(refuse_all, 1)
    assert messages.pop("alone") == "fp4_param_gather: one data-parallel rank, nothing to gather"
    assert set(messages) == set(REFUSALS)
    for case, message in messages.items():
        assert REFUSALS[case] in message, case
        assert "no weight can travel as codes under recipe" in message
        assert "switch fp4_param_gather off" in message


# -- whole runs

PHASED = """
extends: nvidia_nvfp4
name: phased
phases: [{name: tail, step: 4, use: {fp4: fp4_fprop_bf16}}]
"""
RUNS = {  # name -> overrides; phase at the fifth step, checkpoints after the third and the last
    "off": ("engine.fp4_param_gather=false",),
    "on": ("engine.fp4_param_gather=true",),
    "stopped": ("engine.fp4_param_gather=true", "train.stop_after=3"),
    "off_from_on": ("engine.fp4_param_gather=false", "checkpoint.load={on}"),
    "on_from_off": ("engine.fp4_param_gather=true", "checkpoint.load={off}"),
    "bf16_off": ("engine.fp4_param_gather=false", "train.dtype=bf16"),
    "bf16_on": ("engine.fp4_param_gather=true", "train.dtype=bf16", "engine.overlap=false"),
}


def train(folder: str, name: str, *overrides: str) -> list[tuple[Any, ...]]:
    """What must be reproducible of a run: losses, norms, validation losses of every step."""
    saved = {run: f"{folder}/{run}/checkpoints/step_00000003" for run in ("on", "off")}
    common = (f"recipe={folder}/phased.yaml", "checkpoint.every=3")
    config = tiny_run(Path(folder), *common, *(o.format(**saved) for o in overrides), name=name)
    run_without_picture(config)
    dist.barrier()  # rank 0 has written the metrics that all read
    return curve(config)


def train_all(folder: str) -> dict[str, Any]:
    """Curves by name; `resumed` is `stopped` going on."""
    curves = {name: train(folder, name, *overrides) for name, overrides in RUNS.items()}
    curves["resumed"] = train(folder, "stopped", "engine.fp4_param_gather=true")
    return curves


def test_losses_do_not_change_through_phases_and_checkpoints(tmp_path: Path) -> None:
    folder = write_counting_tokens(tmp_path)
    (folder / "phased.yaml").write_text(PHASED, encoding="utf-8")
    first, second = run_ranks(train_all, 2, str(folder), timeout=400)
    assert first == second
    off = first["off"]
    assert off[-1][1] < off[1][1] - 0.1, "the tiny model must learn, or equality says nothing"
    assert first["on"] == off
    assert first["resumed"] == off
    assert first["bf16_on"] == first["bf16_off"]
    assert first["bf16_on"] != off
    for name in ("off_from_on", "on_from_off"):
        begun, *rest = first[name]
        assert (begun[0], begun[-1]) == (3, off[3][-1]), "the loaded weights' validation loss"
        assert rest == [line for line in off if line[0] > 3], name


SPLIT = (  # experts in a buffer of their own, over two ranks, all the rest over four
    "recipe=nvidia_nvfp4", "model.moe={num_experts: 4, top_k: 2, ffn_hidden_size: 64}", "parallel.ep=2",
    "train.dtype=bf16", "train.global_batch_size=8", "train.steps=2", "train.eval_every=2",
)  # fmt: skip


def train_split(folder: str) -> dict[str, Any]:
    """Curves with and without the coded gather."""
    found = {}
    for gather in ("true", "false"):
        config = tiny_run(Path(folder), *SPLIT, f"engine.fp4_param_gather={gather}", name=f"split_{gather}")
        run_without_picture(config)
        dist.barrier()
        found[gather] = curve(config)
    return found


def test_losses_do_not_change_with_experts(tmp_path: Path) -> None:
    for curves in run_ranks(train_split, 4, str(write_counting_tokens(tmp_path)), timeout=300):
        assert curves["true"] == curves["false"]
        assert len(curves["true"]) == 3
