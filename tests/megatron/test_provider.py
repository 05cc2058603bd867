"""The GPT that we build: equal to itself under tensor and sequence parallelism, compatible with Megatron's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fp4dist.errors import ConfigError
from fp4dist.megatron.provider import Fp4SpecProvider, padded_vocab_size, transformer_config
from fp4dist.megatron.upstream import MEGATRON_VERSION
from tests.distributed import megatron_groups, run_ranks
from tests.megatron.tiny import SEQUENCE, VOCAB, loss_of, tiny_batch, tiny_run

pytestmark = pytest.mark.distributed

VARIANTS: list[dict[str, Any]] = [{}, {"tie_embeddings": True}, {"qk_norm": True, "num_query_groups": None}]


def test_tensor_and_sequence_parallel_equal_one_rank() -> None:
    """Loss and every gradient, for TP = 2 with and without sequence parallelism."""
    for results in run_ranks(compare_layouts, 2):
        assert len(results) == 2 * len(VARIANTS)
        for case, (loss, expected, worst) in results.items():
            assert loss == pytest.approx(expected, abs=1e-6), case
            assert worst < 1e-6, case


def compare_layouts() -> dict[str, tuple[float, float, float]]:
    """Case -> (loss of TP = 2, loss of TP = 1, largest difference of a gradient)."""
    found = {}
    for variant in VARIANTS:
        expected, whole = gradients(**variant)
        for sequence_parallel in (False, True):
            loss, parts = gradients(tp=2, sequence_parallel=sequence_parallel, **variant)
            worst = max(float((part - whole_part(whole[name], part)).abs().max()) for name, part in parts.items())
            found[f"{variant} sequence_parallel={sequence_parallel}"] = (loss, expected, worst)
    return found


def gradients(tp: int = 1, sequence_parallel: bool = False, **model: Any) -> tuple[float, dict[str, Tensor]]:
    """Loss, and the gradient of each parameter with Megatron's marks of how it is sharded."""
    from fp4dist.megatron.provider import build_gpt, tp_partial_parameters

    with megatron_groups(tp) as groups:
        gpt = build_gpt(tiny_run(tp, 1, sequence_parallel, **model), torch.float32)
        loss = loss_of(gpt)
        loss.backward()
        for _, parameter in tp_partial_parameters(gpt):
            dist.all_reduce(parameter.grad, group=groups.get_tensor_model_parallel_group())
        found = {}
        for name, parameter in gpt.named_parameters():
            assert parameter.grad is not None
            for mark in ("tensor_model_parallel", "partition_dim", "partition_stride"):
                setattr(parameter.grad, mark, getattr(parameter, mark))
            found[name] = parameter.grad
        return loss.item(), found


def whole_part(whole: Tensor, part: Any) -> Tensor:
    """What this rank should have of a whole gradient."""
    if not part.tensor_model_parallel:
        return whole
    pieces = whole.chunk(2 * part.partition_stride, part.partition_dim)
    return torch.cat(pieces[dist.get_rank() :: 2], part.partition_dim)


def test_partial_parameters_are_those_that_megatron_sums() -> None:
    ours, megatrons = run_ranks(summed_by_megatron, 2)[0]
    assert ours == megatrons
    assert len(ours) == 5 + 4  # two norms a layer and the final one; two query/key norms a layer


def summed_by_megatron() -> tuple[list[str], list[str]]:
    """Names that we list, and those whose gradients finalize_model_grads changes over the TP group."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

    from fp4dist.megatron.provider import build_gpt, tp_partial_parameters

    with megatron_groups(2):
        gpt = build_gpt(tiny_run(2, 1, True, qk_norm=True), torch.float32)
        ours = [name for name, _ in tp_partial_parameters(gpt)]
        ddp: Any = DistributedDataParallel(gpt.config, DistributedDataParallelConfig(), gpt)
        for parameter in gpt.parameters():
            parameter.main_grad.fill_(1.0)  # type: ignore[union-attr]
        finalize_model_grads([ddp])
        return ours, [name for name, parameter in gpt.named_parameters() if float(parameter.main_grad.max()) == 2.0]


def test_our_model_is_megatrons_own() -> None:
    """Our linears without a plan: Megatron's bits. Megatron's stock GPT with the same weights: its attention rounds
    otherwise, so equal up to that; the same checkpoint keys.
    """
    report = run_ranks(compare_with_stock, 1)[0]
    assert report["linears"]
    assert report["loss"] == pytest.approx(report["stock"], abs=1e-6)
    assert report["gradient"] < 1e-6
    assert report["keys"]


def compare_with_stock() -> dict[str, Any]:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from fp4dist.megatron.provider import build_gpt

    with megatron_groups() as groups:
        config = tiny_run(qk_norm=True)
        ours, same = build_gpt(config, torch.float32), build_gpt(config, torch.float32, linears="megatron")
        stock = GPTModel(
            config=transformer_config(config, torch.float32),
            transformer_layer_spec=get_gpt_layer_local_spec(qk_layernorm=True, normalization="RMSNorm"),
            vocab_size=VOCAB,
            max_sequence_length=config.model.seq_length,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=False,
        )
        stock.load_state_dict(ours.state_dict())
        for model in (ours, same):
            loss_of(model).backward()
        mask = torch.ones(1, 1, config.model.seq_length, config.model.seq_length, dtype=torch.bool).triu(1)
        tokens, positions, labels = tiny_batch()
        theirs = stock(tokens, positions, mask, labels=labels).mean()
        theirs.backward()
        pairs = list(zip(ours.parameters(), same.parameters(), stock.parameters(), strict=True))
        metadata = {"dp_cp_group": groups.get_data_parallel_group(with_context_parallel=True)}
        keys = [
            {entry.key: type(entry) for entry in model.sharded_state_dict(metadata=metadata).values()}
            for model in (ours, stock)
        ]
        return {
            "linears": all(torch.equal(a.grad, b.grad) for a, b, _ in pairs),  # type: ignore[arg-type]
            "loss": loss_of(ours).item(),
            "stock": theirs.item(),
            "gradient": max(float((a.grad - c.grad).abs().max()) for a, _, c in pairs),  # type: ignore[operator]
            "keys": keys[0] == keys[1],
        }


def test_a_checkpoint_of_two_ranks_loads_on_one(tmp_path: Any) -> None:
    assert run_ranks(save_tp2_load_tp1, 2, str(tmp_path)) == [[], []]


def save_tp2_load_tp1(folder: str) -> list[str]:
    """Names of the parameters that differ after loading; none expected."""
    from megatron.core import dist_checkpointing

    from fp4dist.megatron.provider import build_gpt

    def sharded(model: Any, groups: Any) -> dict[str, Any]:
        return model.sharded_state_dict(
            metadata={"dp_cp_group": groups.get_data_parallel_group(with_context_parallel=True)}
        )

    with megatron_groups(2) as groups:
        saved = build_gpt(tiny_run(2, 1, True, seed=1), torch.float32)
        dist_checkpointing.save(sharded(saved, groups), folder)
    with megatron_groups() as groups:
        expected = build_gpt(tiny_run(seed=1), torch.float32)
        loaded = build_gpt(tiny_run(seed=2), torch.float32)
        loaded.load_state_dict(dist_checkpointing.load(sharded(loaded, groups), folder))
        pairs = zip(expected.named_parameters(), loaded.parameters(), strict=True)
        return [name for (name, weight), other in pairs if not torch.equal(weight, other)]


def test_two_pipeline_stages_equal_one() -> None:
    first, last = run_ranks(pipeline, 2)
    assert first[0] == last[0]
    assert last[1] == pytest.approx(last[0], abs=1e-6)


def pipeline() -> tuple[float, float | None]:
    """Loss of the whole model on this rank alone, and of the two-stage model (last stage only)."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from fp4dist.megatron.provider import build_gpt

    with megatron_groups():
        whole = build_gpt(tiny_run(), torch.float32)
        expected = sum(loss_of(whole, seed).item() for seed in range(3)) / 3

    def forward(batches: Any, model: Any) -> Any:
        tokens, positions, labels = next(batches)
        output = model(tokens, positions, None, labels=labels)
        return output, lambda per_token: (per_token.mean(), {"loss": per_token.mean().item()})

    with megatron_groups(pp=2) as groups:
        first, last = groups.is_pipeline_first_stage(), groups.is_pipeline_last_stage()
        stage = build_gpt(tiny_run(pp=2), torch.float32, pre_process=first, post_process=last)
        losses = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iter([tiny_batch(seed) for seed in range(3)]),
            model=[stage],
            num_microbatches=3,
            seq_length=SEQUENCE,
            micro_batch_size=2,
            forward_only=False,
        )
        return expected, sum(part["loss"] for part in losses) / 3 if last else None


def test_bf16_and_head_class() -> None:
    dtypes, head, masked = run_ranks(build_bf16, 1)[0]
    assert dtypes == {"torch.bfloat16"}
    assert head == ("Fp4ColumnParallelLinear", "ColumnParallelLinear")
    assert masked


def build_bf16() -> tuple[set[str], tuple[str, str], bool]:
    from fp4dist.megatron.provider import build_gpt

    with megatron_groups():
        ours = build_gpt(tiny_run(), torch.bfloat16)
        megatrons = build_gpt(tiny_run(), torch.bfloat16, linears="megatron")
        assert torch.isfinite(loss_of(ours))
        heads = type(ours.output_layer).__name__, type(megatrons.output_layer).__name__
        return {str(p.dtype) for p in ours.parameters()}, heads, torch.equal(loss_of(ours), loss_of(megatrons))


def test_vocabulary_padding_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "fp4dist"):
        assert padded_vocab_size(tiny_run(2)) == VOCAB
        assert not caplog.records
        assert padded_vocab_size(tiny_run(2, vocab_size=95)) == 96
    assert "model.vocab_size = 95 is padded to 96" in caplog.text


def test_refusals() -> None:
    with pytest.raises(ConfigError, match=r"train.dtype = torch.float16"):
        transformer_config(tiny_run(), torch.float16)
    with pytest.raises(ConfigError, match=r"model.head_dim = 15 must be even"):
        transformer_config(tiny_run(head_dim=15), torch.float32)


@pytest.mark.parametrize(
    ("linears", "grouped", "classes"),
    [
        ("megatron", False, ("SequentialMLP", "ColumnParallelLinear", "RowParallelLinear")),
        ("megatron", True, ("SequentialMLP", "ColumnParallelLinear", "RowParallelLinear")),
        ("fp4dist", False, ("Fp4SequentialExperts", "ExpertColumn", "ExpertRow")),
        ("fp4dist", True, ("Fp4GroupedExperts", "GroupedColumn", "GroupedRow")),
    ],
)
def test_classes_of_experts(linears: Any, grouped: bool, classes: tuple[str, str, str]) -> None:
    found: Any = Fp4SpecProvider(linears).grouped_mlp_modules(grouped)
    module, parts = found if MEGATRON_VERSION < (0, 17) else (found.func, found.keywords["submodules"])
    assert (module.__name__, parts.linear_fc1.__name__, parts.linear_fc2.__name__) == classes
