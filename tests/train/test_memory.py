"""The memory model against sums made by hand, and the dry run."""

from __future__ import annotations

from pathlib import Path

import pytest

from fp4dist.errors import ConfigError, RecipeMismatch
from fp4dist.megatron.sites import count_parameters, gpt_sites
from fp4dist.nn.assign import assign
from fp4dist.spec.load import load_run, shipped
from fp4dist.spec.run import MoeConfig, RunConfig
from fp4dist.train.loop import dry_run
from fp4dist.train.memory import estimate, readable
from tests.train.tiny_run import FP4, tiny_run, with_overrides

BLOCKS = 2 * (128 * 64 + 64 * 64 + 256 * 64 + 64 * 128)
TABLES = 2 * 128 * 64
NORMS = 5 * 64


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return tiny_run(tmp_path)


def test_one_rank_holds_every_parameter(config: RunConfig) -> None:
    needed = estimate(config, 1, element=4)
    assert needed.parameters == count_parameters(config.model) == BLOCKS + TABLES + NORMS
    assert (needed.weights, needed.gradients, needed.optimizer) == tuple(b * needed.parameters for b in (4, 4, 8))
    assert needed.logits == 2 * 32 * 128 * 8
    tokens, per_layer = 2 * 32, 4 * 64 + (2 * 64 + 2 * 32) + 3 * 128
    assert needed.activations == 4 * tokens * 2 * per_layer
    assert needed.total == sum(size for _, size in needed.largest())


def test_bf16_has_a_master_copy_and_data_parallelism_cuts_it(config: RunConfig) -> None:
    one, four = (estimate(config, dp, element=2) for dp in (1, 4))
    assert (one.weights, one.gradients, one.optimizer) == tuple(b * one.parameters for b in (2, 4, 12))
    assert four.optimizer == one.optimizer // 4
    assert (four.weights, four.gradients) == (one.weights, one.gradients)


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "optimizer"), [(0, 2, 4, 12), (1, 2, 4, 3), (2, 2, 1, 3), (3, 0.5, 1, 3)]
)
def test_zero_stages(config: RunConfig, stage: int, weights: float, gradients: float, optimizer: float) -> None:
    needed = estimate(with_overrides(config, "engine", kind="deepspeed", zero_stage=stage), 4, element=2)
    for found, bytes_each in ((needed.weights, weights), (needed.gradients, gradients), (needed.optimizer, optimizer)):
        assert found == int(bytes_each * needed.parameters)


def test_tensor_and_pipeline_parallelism_cut_the_blocks(config: RunConfig) -> None:
    cut = with_overrides(config, "parallel", tp=2, pp=2)
    assert estimate(cut, 1, element=4).parameters == BLOCKS // 4 + TABLES // 2 // 2 + NORMS // 2
    whole, split = (
        estimate(with_overrides(config, "parallel", tp=2, sequence_parallel=s), 1, element=4).activations
        for s in (False, True)
    )
    assert split < whole < estimate(config, 1, element=4).activations


def test_sizes_for_people() -> None:
    assert readable(3 * 2**20) == "3 MiB"
    assert readable(5 * 2**29) == "2.50 GiB"


def test_a_dry_run_needs_no_process_group(config: RunConfig, tmp_path: Path) -> None:
    text = dry_run(tiny_run(tmp_path, f"recipe={FP4}", "train.dtype=auto"))
    for part in ("resolved configuration", "num_layers: 2", "linear_fc1", "nvfp4 1x16", "memory of that rank"):
        assert part in text
    assert f"parameters: {count_parameters(config.model):,} (tiny)" in text
    assert "dtype: auto" not in text
    assert not (tmp_path / "run").exists(), "nothing is written"


def test_a_dry_run_finds_what_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(RecipeMismatch, match="128"):
        dry_run(tiny_run(tmp_path, "recipe=quartet2"))
    with pytest.raises(ConfigError, match="WORLD_SIZE = 1"):
        dry_run(tiny_run(tmp_path, "parallel.tp=2"))
    with pytest.raises(ConfigError, match=r"cp = 1 \* 1 \* 2 = 2"):
        dry_run(tiny_run(tmp_path, "parallel.cp=2"))


def test_a_dry_run_checks_both_pieces_of_a_context_parallel_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """48 samples x 16 tokens / cp 2 = 128 x 3 tokens, in two pieces of 64 x 3."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    wide = ("recipe=quartet2", "model.hidden_size=128", "model.num_attention_heads=4", "model.num_query_groups=4")
    sizes = ("model.seq_length=16", "parallel.cp=2", "train.global_batch_size=96")
    with pytest.raises(RecipeMismatch, match="2 pieces of the sequence"):
        dry_run(tiny_run(tmp_path, *wide, *sizes, "train.micro_batch_size=48"))
    assert "cp 2" in dry_run(tiny_run(tmp_path, *wide, *sizes, "train.micro_batch_size=32"))


def test_gathered_codes_stand_beside_the_weights(config: RunConfig, tmp_path: Path) -> None:
    """nvidia_nvfp4 quantizes every block weight in 16 x 16, the last layers' in high precision; two layers have none of
    these, so its rules are those of a deeper model.
    """
    deep = tiny_run(tmp_path, f"recipe={FP4}", "model.num_layers=8", "engine.fp4_param_gather=true")
    table = dry_run(deep)
    assert "codes" not in table.rpartition("the large buffers")[2], "one rank has nothing to gather"
    plain, coded = (estimate(with_overrides(deep, "engine", fp4_param_gather=on), 2, element=2) for on in (False, True))
    layers = sum(row.linear != "bf16" for row in assign(gpt_sites(deep.model), deep.recipe).rows) / 4
    assert layers >= 4
    assert coded.codes == layers * BLOCKS / 2 * (1 / 2 + 1 / 256)
    assert coded.total - plain.total == coded.codes
    assert estimate(with_overrides(deep, "parallel", tp=2, pp=2), 2, element=2).codes == coded.codes // 4


@pytest.mark.parametrize("name", ["quickstart", "llama_124m", "llama_350m"])
@pytest.mark.parametrize("recipe", ["bf16", FP4, "quartet2"])
def test_every_shipped_run_fits_its_recipes(name: str, recipe: str) -> None:
    assert name in shipped("runs")
    assert "total" in dry_run(load_run(name, [f"recipe={recipe}"]))


def test_experts_are_cut_by_expert_parallelism_alone(config: RunConfig) -> None:
    """4 experts of 64, top 2, in place of each layer's MLP."""
    moe = with_overrides(config, "model", moe=MoeConfig(num_experts=4, top_k=2, ffn_hidden_size=64))
    experts, attention = 2 * 4 * 3 * 64 * 64, BLOCKS - 2 * (256 * 64 + 64 * 128)
    dense = attention + TABLES + NORMS + 2 * 4 * 64
    whole = estimate(moe, 1, element=4)
    assert whole.parameters == count_parameters(moe.model) == dense + experts
    split = estimate(with_overrides(moe, "parallel", ep=2), 2, element=4)
    assert split.parameters == dense + experts // 2
    assert split.optimizer == 8 * (dense // 2 + experts // 2)
    tokens, attention_kept = 2 * 32, 4 * 64 + 2 * 64 + 2 * 32
    assert whole.activations == 4 * tokens * 2 * (attention_kept + 2 * (64 + 3 * 64))


def test_context_parallelism_interleaving_and_recomputation(config: RunConfig) -> None:
    whole = estimate(config, 1, element=4)
    pieces = estimate(with_overrides(config, "parallel", cp=2), 1, element=4)
    assert (pieces.activations, pieces.logits) == (whole.activations // 2, whole.logits // 2)
    assert pieces.optimizer == whole.optimizer // 2
    deep = with_overrides(with_overrides(config, "train", global_batch_size=64), "model", num_layers=8)
    plain, interleaved = (
        estimate(with_overrides(deep, "parallel", pp=4, vpp=vpp), 1, element=4).activations for vpp in (1, 2)
    )
    assert interleaved == plain * 5.5 / 4
    tokens, per_layer = 2 * 32, 4 * 64 + (2 * 64 + 2 * 32) + 3 * 128
    full = estimate(with_overrides(config, "train", recompute="full"), 1, element=4).activations
    assert full == 4 * tokens * (2 * 64 + per_layer)
    selective = estimate(with_overrides(config, "train", recompute="selective"), 1, element=4).activations
    assert selective == 4 * tokens * 2 * (per_layer - 3 * 128)
