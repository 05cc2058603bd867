"""install() and apply(): models that Megatron's own builders make, in FP4, in every layout; Megatron-LM's seam."""

from __future__ import annotations

import gc
import hashlib
import json
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec as ImportSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fp4dist.errors import CheckpointError, ConfigError, Fp4DistError, RecipeMismatch
from fp4dist.nn.apply import AppliedRecipe
from fp4dist.spec.build import build
from fp4dist.spec.recipe import Recipe
from tests.distributed import megatron_groups, run_ranks
from tests.megatron.tiny import SEQUENCE, VOCAB, tiny_batch

LAYERS, BATCH = 4, 2
MOE = dict(num_moe_experts=4, moe_router_topk=2, add_bias_linear=False, moe_token_dispatcher_type="alltoall")


def stock_config(**changes: Any) -> Any:
    """A GPT-3 style model: biases, LayerNorm, GELU, all that our own engine does not build."""
    from fp4dist.megatron.upstream import TransformerConfig, without_known_warnings

    fields: dict[str, Any] = dict(
        num_layers=LAYERS,
        hidden_size=64,
        ffn_hidden_size=128,
        num_attention_heads=4,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        pipeline_dtype=torch.float32,
    )
    with without_known_warnings():
        return TransformerConfig(**(fields | changes))


def stock_model(
    config: Any, *, pre: bool = True, post: bool = True, vp_stage: int | None = None, spec: Any = None
) -> Any:
    """What gpt_builders.py of Megatron-LM does with --transformer-impl local."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec

    if spec is None and config.num_moe_experts:
        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization=config.normalization)
    elif spec is None:
        spec = get_gpt_layer_local_spec(None, False, config.qk_layernorm, normalization=config.normalization)
    model = GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=VOCAB,
        max_sequence_length=SEQUENCE,
        pre_process=pre,
        post_process=post,
        share_embeddings_and_output_weights=False,
        position_embedding_type="learned_absolute",
        vp_stage=vp_stage,
    )
    fill(model)
    return model


def fill(model: Any) -> None:
    """Weights by name, the same for every layout (layer numbers are global, shards are cut from the whole)."""
    from megatron.core import parallel_state

    tp, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    expert = (model.config.num_moe_experts or 0) // parallel_state.get_expert_model_parallel_world_size()
    expert *= parallel_state.get_expert_model_parallel_rank()
    offset = model.decoder.layers[0].layer_number - 1 if len(model.decoder.layers) else 0
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if "layers" in parts:
            place = parts.index("layers") + 1
            parts[place] = str(int(parts[place]) + offset)
        if "local_experts" in parts:
            place = parts.index("local_experts") + 1
            parts[place] = str(int(parts[place]) + expert)
        seed = int.from_bytes(hashlib.sha256(".".join(parts).encode()).digest()[:4], "little")
        shape = list(parameter.shape)
        axis = parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None
        if axis is not None:
            shape[axis] *= tp
        whole = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05
        if "layernorm" in name and name.endswith("weight"):
            whole += 1
        with torch.no_grad():
            parameter.copy_(whole if axis is None else whole.chunk(tp, axis)[rank])


def attention_mask(size: int = BATCH) -> Tensor:
    """As GPTDataset makes it: True where a query must not look."""
    return torch.ones(SEQUENCE, SEQUENCE).tril().expand(size, 1, -1, -1) < 0.5


def loss_of(model: nn.Module, seed: int = 0, mask: Tensor | None = None) -> Tensor:
    tokens, positions, labels = tiny_batch(seed)
    return model(tokens, positions, mask, labels=labels).float().mean()


def train(model: nn.Module, applied: AppliedRecipe | None, steps: int = 3) -> list[float]:
    """One process: plain SGD, two micro-batches a step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for step in range(steps):
        if applied is not None:
            applied.set_step(step, steps)
        total = 0.0
        for i in range(2):
            loss = loss_of(model, seed=2 * step + i, mask=attention_mask()) / 2
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


# ---------------------------------------------------------------- one process


def whole_story() -> dict[str, Any]:
    """Every case that needs no second rank, in one process, since install() has no way back."""
    import megatron.core.models.gpt.gpt_layer_specs as layer_specs

    from fp4dist.megatron import apply, install

    out: dict[str, Any] = {}
    with megatron_groups():
        kinds = {
            "gpt3": dict(),
            "llama": dict(
                normalization="RMSNorm",
                gated_linear_unit=True,
                activation_func=nn.functional.silu,
                add_bias_linear=False,
                num_query_groups=2,
                qk_layernorm=True,
            ),
        }
        kinds["experts"] = MOE
        stock, model = {}, None
        for kind, changes in kinds.items():
            model = stock_model(stock_config(**changes))
            stock[kind] = (sorted(model.state_dict()), train(model, None))
        with pytest.raises(ConfigError, match="a GPTModel exists already"):
            install("bf16")
        del model
        gc.collect()
        first = install("bf16")
        assert install("bf16") is first
        with pytest.raises(ConfigError, match=r"another recipe \(recipe bf16, now nvidia_nvfp4\)"):
            install("nvidia_nvfp4")
        assert layer_specs.LocalSpecProvider.__name__ == "StockSpecProvider"
        for kind, changes in kinds.items():
            keys, losses = stock[kind]
            model = stock_model(stock_config(**changes))
            assert sorted(model.state_dict()) == keys, kind
            applied = apply(model, "bf16", tokens=BATCH * SEQUENCE)
            ours = train(model, applied)
            assert all(abs(a - b) < 1e-5 for a, b in zip(ours, losses, strict=True)), (kind, ours, losses)
            model = stock_model(stock_config(**changes))
            applied = apply(model, "nvidia_nvfp4", tokens=BATCH * SEQUENCE)
            fp4 = train(model, applied)
            applied.check_counts()
            assert fp4 != ours
            assert all(abs(a - b) < 0.05 for a, b in zip(fp4, losses, strict=True)), (kind, fp4, losses)
            if kind != "experts":  # whose share depends on the tokens that each one gets
                assert applied.counts()["fp4_share"] == pytest.approx(0.75)  # the last of four layers stays
            out[kind] = fp4
        for grouped in (False, True):
            model = stock_model(stock_config(**MOE, moe_grouped_gemm=grouped))
            assert train(model, apply(model, "nvidia_nvfp4")) == out["experts"], grouped
        out["specs"] = specs_story()
        refusals()
    return out


def specs_story() -> bool:
    """--spec objects give the model of the local spec, before and after install alike."""
    from fp4dist.megatron import specs
    from fp4dist.megatron.layers import Fp4ColumnParallelLinear

    qk_norm: dict[str, Any] = dict(qk_layernorm=True, normalization="RMSNorm")
    with pytest.raises(ConfigError, match=r"qk_layernorm = True: use --spec fp4dist.megatron.specs gpt_layer_qk_norm"):
        stock_model(stock_config(**qk_norm), spec=specs.gpt_layer)
    cases: list[tuple[Any, dict[str, Any]]] = [(specs.gpt_layer, {}), (specs.gpt_layer_qk_norm, qk_norm)]
    for spec, changes in cases:
        ours, local = stock_model(stock_config(**changes), spec=spec), stock_model(stock_config(**changes))
        assert list(ours.state_dict()) == list(local.state_dict())
        assert torch.equal(loss_of(ours), loss_of(local))
        assert isinstance(ours.decoder.layers[0].mlp.linear_fc1, Fp4ColumnParallelLinear)
    return True


def latent_attention() -> None:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import MLATransformerConfig

    fields: dict[str, Any] = dict(num_layers=1, hidden_size=64, num_attention_heads=4, use_cpu_initialization=True)
    config = MLATransformerConfig(**fields, gradient_accumulation_fusion=False, rope_type="rope")
    stock_model(config, spec=get_gpt_layer_local_spec(multi_latent_attention=True))


def refusals() -> None:
    """Settings under which FP4 would be lost or wrong."""
    from fp4dist.megatron import apply

    with pytest.raises(ConfigError, match=r"TransformerConfig.fp4 = 'e2m1' \(--fp4-format\).*silently do nothing"):
        stock_model(stock_config(fp4="e2m1"))
    model = stock_model(stock_config())
    for name, value in {
        "fp4": "e2m1",
        "fp8": "hybrid",
        "cuda_graph_impl": "local",
        "mtp_num_layers": 1,
        "overlap_moe_expert_parallel_comm": True,
    }.items():
        before = getattr(model.config, name)
        setattr(model.config, name, value)
        with pytest.raises(ConfigError, match=name):
            apply(model, "nvidia_nvfp4")
        setattr(model.config, name, before)
    with pytest.raises(ConfigError, match=r"k_channels, v_channels \(--multi-latent-attention\).*needs Transformer"):
        latent_attention()
    with pytest.raises(RecipeMismatch, match=r"a Linear has no decoder\.layers"):
        apply(nn.Linear(16, 16), "nvidia_nvfp4")
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

    from fp4dist.megatron import specs

    layer: Any = specs.gpt_layer.submodules
    parts = layer.self_attention.submodules
    kept = parts.linear_qkv, parts.linear_proj
    try:
        parts.linear_qkv, parts.linear_proj = ColumnParallelLinear, RowParallelLinear
        foreign = stock_model(stock_config(), spec=specs.gpt_layer)
    finally:
        parts.linear_qkv, parts.linear_proj = kept
    for block in foreign.decoder.layers:
        block.mlp = nn.Identity()
    with pytest.raises(RecipeMismatch, match=r"none of fp4dist's linears: build it after .* --transformer-impl local"):
        apply(foreign, "nvidia_nvfp4")


def test_one_process() -> None:
    assert run_ranks(whole_story, 1)[0]["specs"]


# ---------------------------------------------------------------- layouts


def build_chunks(config: Any) -> list[Any]:
    """What Megatron-LM's get_model does."""
    from megatron.core import parallel_state

    first, last = parallel_state.is_pipeline_first_stage(True), parallel_state.is_pipeline_last_stage(True)
    virtual = config.virtual_pipeline_model_parallel_size
    if virtual is None:
        return [stock_model(config, pre=first, post=last)]
    return [
        stock_model(config, pre=first and i == 0, post=last and i == virtual - 1, vp_stage=i) for i in range(virtual)
    ]


def run_schedule(chunks: Sequence[nn.Module], applied: AppliedRecipe, steps: int = 3) -> list[float]:
    """`train` under Megatron's pipeline schedules; losses on the last stage, broadcast to all."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

    def forward_step(batches: Iterator[int], model: Any) -> Any:
        tokens, positions, labels = tiny_batch(next(batches))
        output = model(tokens, positions, attention_mask(), labels=labels)

        def loss_function(losses: Tensor) -> Any:
            loss = losses.float().mean()
            return loss, {"loss": loss.detach().clone()}

        return output, loss_function

    config: Any = chunks[0].config
    parameters = [p for chunk in chunks for p in chunk.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    losses = []
    for step in range(steps):
        applied.set_step(step, steps)
        batches = [iter([2 * step, 2 * step + 1]) for _ in chunks]
        results = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=batches if len(chunks) > 1 else batches[0],
            model=list(chunks) if len(chunks) > 1 else chunks[0],
            num_microbatches=2,
            seq_length=SEQUENCE,
            micro_batch_size=BATCH,
            forward_only=False,
        )
        for parameter in parameters:
            if config.sequence_parallel and getattr(parameter, "sequence_parallel", False):
                dist.all_reduce(parameter.grad, group=parallel_state.get_tensor_model_parallel_group())
        optimizer.step()
        optimizer.zero_grad()
        total = torch.tensor(sum(float(r["loss"]) for r in results) / 2)
        dist.broadcast(total, dist.get_world_size() - 1)
        losses.append(total.item())
    return losses


LAYOUTS: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "tp2": (dict(tp=2), dict(tensor_model_parallel_size=2)),
    "tp2sp": (dict(tp=2), dict(tensor_model_parallel_size=2, sequence_parallel=True)),
    "pp2": (dict(pp=2), dict(pipeline_model_parallel_size=2)),
    "vpp2": (dict(pp=2), dict(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)),
    "pp2 recompute": (
        dict(pp=2),
        dict(
            pipeline_model_parallel_size=2,
            recompute_granularity="full",
            recompute_method="uniform",
            recompute_num_layers=1,
        ),
    ),
}


def layouts() -> dict[str, Any]:
    """Two ranks: each layout's table and losses."""
    from megatron.core import parallel_state

    from fp4dist.megatron import apply, install

    install("bf16")  # the provider; the recipe comes by apply
    out: dict[str, Any] = {}
    for name, (groups, fields) in LAYOUTS.items():
        virtual = fields.get("virtual_pipeline_model_parallel_size")
        if virtual:
            fields = fields | dict(overlap_p2p_comm=True, batch_p2p_comm=False)
        with megatron_groups(**groups):
            if virtual:
                parallel_state.set_virtual_pipeline_model_parallel_world_size(virtual)
                parallel_state.set_virtual_pipeline_model_parallel_rank(0)
            chunks = build_chunks(stock_config(**fields))
            applied = apply(chunks, "nvidia_nvfp4", seed=7, tokens=BATCH * SEQUENCE)
            losses = run_schedule(chunks, applied)
            applied.check_counts()
            out[name] = (
                [(r.site.path, r.linear, r.site.in_features, r.site.out_features) for r in applied.rows],
                losses,
            )
            if virtual:
                parallel_state.set_virtual_pipeline_model_parallel_world_size(None)
    with megatron_groups(ep=2):
        out["ep2"] = experts_step(stock_config(**MOE, expert_model_parallel_size=2, moe_grouped_gemm=True))
    out["checkpoint"] = checkpoint_story()
    return out


def experts_step(config: Any) -> tuple[Any, float]:
    """Table and loss of one step of a model with experts."""
    from fp4dist.megatron import apply

    model = stock_model(config)
    applied = apply(model, "nvidia_nvfp4", tokens=BATCH * SEQUENCE)
    loss = loss_of(model)
    loss.backward()
    applied.check_counts()
    return [(r.site.path, r.linear, r.site.in_features, r.site.out_features) for r in applied.rows], loss.item()


def one_rank() -> tuple[Any, list[float], tuple[Any, float]]:
    from fp4dist.megatron import apply, install

    install("bf16")
    with megatron_groups():
        model = stock_model(stock_config())
        applied = apply(model, "nvidia_nvfp4", seed=7, tokens=BATCH * SEQUENCE)
        losses = train(model, applied)
        rows = [(r.site.path, r.linear, r.site.in_features, r.site.out_features) for r in applied.rows]
        return rows, losses, experts_step(stock_config(**MOE))


def checkpoint_story() -> bool:
    """Save at TP2, load at TP1: the stamp goes along, another recipe's is refused, none is accepted."""
    from megatron.core import dist_checkpointing, parallel_state

    from fp4dist.megatron import apply

    folders = [tempfile.mkdtemp() if dist.get_rank() == 0 else "" for _ in range(2)]
    dist.broadcast_object_list(folders)

    def state(model: Any) -> Any:
        return model.sharded_state_dict(
            metadata={"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
        )

    with megatron_groups(tp=2):
        model = stock_model(stock_config(tensor_model_parallel_size=2))
        dist_checkpointing.save(state(model), folders[1])  # no recipe: as stock Megatron writes it
        apply(model, "nvidia_nvfp4")
        assert model.decoder.layers[0].mlp.linear_fc1.get_extra_state()["recipe"] == "nvidia_nvfp4"
        dist_checkpointing.save(state(model), folders[0])
    with megatron_groups():

        def load(recipe: str, folder: str, **options: Any) -> Any:
            model = stock_model(stock_config())
            apply(model, recipe, **options)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.zero_()
            model.load_state_dict(dist_checkpointing.load(state(model), folder))
            return model

        expected = loss_of(load("bf16", folders[0]))  # an FP4 checkpoint into a bf16 run
        assert torch.equal(loss_of(load("bf16", folders[1])), expected)
        assert expected > 1
        for folder in folders:
            load("nvidia_nvfp4", folder)
        with pytest.raises(
            CheckpointError, match=r"trained with recipe nvidia_nvfp4 \(\w{16}\), this run uses nvidia_nvfp4_46"
        ):
            load("nvidia_nvfp4_46", folders[0])
        load("nvidia_nvfp4_46", folders[0], allow_recipe_change=True)
        load("nvidia_nvfp4_46", folders[1])
    return True


@pytest.mark.distributed
def test_layouts_and_checkpoints() -> None:
    table, losses, (experts, experts_loss) = run_ranks(one_rank, 1)[0]
    assert [path for path, linear, *_ in table if linear == "fp4"][-1] == "decoder.layers.2.mlp.linear_fc2"
    for found in run_ranks(layouts, 2, timeout=280):
        assert found["ep2"][0] == experts
        assert abs(found["ep2"][1] - experts_loss) < 1e-3
        for name in LAYOUTS:
            rows, theirs = found[name]
            assert rows == table, name
            assert all(abs(a - b) < 1e-3 for a, b in zip(theirs, losses, strict=True)), (name, theirs, losses)
        assert found["vpp2"][1] == found["pp2"][1]
        assert found["pp2 recompute"][1] == found["pp2"][1]  # a replay draws the noise of its first run
        assert found["checkpoint"]


# ---------------------------------------------------------------- Megatron-LM's seam


def fake_megatron_lm(args: SimpleNamespace, build: Any) -> Any:
    """The names that install() asks megatron.training for; the rest of Megatron-LM needs a GPU to import."""
    import megatron

    package, training = ModuleType("megatron.training"), ModuleType("megatron.training.training")
    for module in (package, training):
        module.__spec__ = ImportSpec(module.__name__, None, is_package=module is package)
        sys.modules[module.__name__] = module
    package.__path__ = []  # type: ignore[attr-defined]
    package.get_args = lambda: args  # type: ignore[attr-defined]
    package.training, megatron.training = training, package  # type: ignore[attr-defined]

    def get_model(*_: Any, **__: Any) -> list[Any]:
        return build()

    def train_loop(model: Sequence[nn.Module], seen: list[Any], applied: AppliedRecipe) -> None:
        for iteration in range(args.iteration, args.train_iters):
            args.curr_iteration = iteration
            training.train_step(model, seen, applied)
            model[0].eval()
            with torch.no_grad():
                loss_of(model[0])
            model[0].train()

    def train_step(model: Sequence[nn.Module], seen: list[Any], applied: AppliedRecipe) -> None:
        for _ in range(2):
            loss_of(model[0], mask=attention_mask()).backward()
            seen.append((applied.clock.step, applied.clock.micro_batch))

    training.train_step = train_step  # type: ignore[attr-defined]
    package.get_model = training.get_model = get_model  # type: ignore[attr-defined]
    training.train = train_loop  # type: ignore[attr-defined]
    return training


class Wrapper(nn.Module):
    """Like Megatron's DDP and Float16Module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def megatron_lm(folder: str) -> None:
    from megatron.core import num_microbatches_calculator

    from fp4dist.megatron import install
    from fp4dist.megatron.attention import SdpaAttention

    args = SimpleNamespace(
        seed=5,
        micro_batch_size=BATCH,
        seq_length=SEQUENCE,
        train_iters=5,
        iteration=2,
        save=folder,
        reset_attention_mask=False,
        context_parallel_size=1,
    )
    with megatron_groups():
        training = fake_megatron_lm(args, lambda: [Wrapper(Wrapper(stock_model(stock_config())))])
        original = training.get_model
        installed = install("nvidia_nvfp4")
        assert training.get_model is not original
        assert sys.modules["megatron.training"].get_model is training.get_model
        with pytest.raises(
            RecipeMismatch, match="recipe nvidia_nvfp4 is installed, but Megatron-LM trains a model that"
        ):
            training.train(None)
        num_microbatches_calculator.init_num_microbatches_calculator(0, None, 2 * BATCH, BATCH, 1)
        model = training.get_model()
        (applied,) = installed.applied
        masks = []
        for module in model[0].modules():
            if isinstance(module, SdpaAttention):
                module.register_forward_pre_hook(
                    lambda _, a, k: masks.append(a[3] if len(a) > 3 else k["attention_mask"]), with_kwargs=True
                )
        seen: list[Any] = []
        settled: list[int] = []
        settle = AppliedRecipe.settle
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(AppliedRecipe, "settle", lambda a, lr=None: (settled.append(a.clock.step), settle(a, lr))[1])
            training.train(model, seen, applied)
        assert settled[::2] == [2, 3, 4], "at the end of each step, where all ranks are"
        assert settled[1::2] == [2, 3], "and for whoever begins the next one without that"
        assert seen == [(2, 0), (2, 1), (3, 0), (3, 1), (4, 0), (4, 1)]
        assert applied.clock.seed == 5
        assert masks
        assert all(mask is None for mask in masks)
        assert json.loads(Path(folder, "layers.json").read_text())["recipe"] == "nvidia_nvfp4"
        # a layer that stops taking part after it was promised: found when the second iteration begins
        (model,) = training.get_model()
        for layer in model.module.module.decoder.layers[:1]:
            layer.mlp.linear_fc1.forward = lambda x: (x.new_zeros(*x.shape[:-1], 128), None)
        with pytest.raises(RecipeMismatch, match=r"layers.0.mlp.linear_fc1 fprop: the table promises fp4, but nothing"):
            training.train([model], [], installed.applied[1])


def test_megatron_lm(tmp_path: Path) -> None:
    run_ranks(megatron_lm, 1, str(tmp_path))


def test_module_runs_a_script(tmp_path: Path) -> None:
    """`python -m fp4dist.megatron`: the script sees its own arguments, its name and our parts."""
    script = tmp_path / "pretrain_something.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys
            import neighbour
            if __name__ == "__main__":
                from megatron.core.models.gpt import gpt_layer_specs
                print(sys.argv[1:], gpt_layer_specs.LocalSpecProvider.__module__, __file__ == sys.argv[0])
            """
        )
    )
    (tmp_path / "neighbour.py").write_text("")
    command = [sys.executable, "-m", "fp4dist.megatron", "--recipe", "bf16"]
    done = subprocess.run(
        [*command, str(script), "--recipe", "theirs"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "fp4dist installed with recipe bf16; rebound: megatron.core.models.backends.LocalSpecProvider" in done.stdout
    assert done.stdout.rstrip().endswith("['--recipe', 'theirs'] fp4dist.megatron.stock True")
    done = subprocess.run([*command, "missing.py"], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "missing.py does not exist" in done.stderr


# ---------------------------------------------------------------- masks


def test_causal_masks() -> None:
    from fp4dist.megatron.masks import CausalMasks

    masks = CausalMasks()
    causal = attention_mask()
    assert masks.reduce(causal) is None
    assert masks.reduce(None) is None
    documents = causal.clone()
    documents[1, :, 10:, :10] = True  # --reset-attention-mask: the second document does not see the first
    for kept in (documents, causal[..., :1], ~causal, causal.float()):
        assert masks.reduce(kept) is kept
    masks.check()
    size = SEQUENCE // 4
    zigzag = torch.cat([causal[:, :, size : 2 * size], causal[:, :, 2 * size : 3 * size]], 2)
    assert CausalMasks(1, 2).reduce(zigzag) is None
    assert CausalMasks(0, 2).reduce(zigzag) is zigzag


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_causal_masks_of_a_gpu_are_judged_later() -> None:
    from fp4dist.megatron.masks import CausalMasks

    masks = CausalMasks()
    causal = attention_mask().cuda()
    assert masks.reduce(causal) is None
    masks.check()
    assert masks.reduce(~causal) is None
    with pytest.raises(Fp4DistError, match="not plainly causal"):
        masks.check()
    masks.check()


def masks_in_attention() -> None:
    """Megatron's own attention and ours agree on both kinds of mask."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    from fp4dist.megatron.attention import SdpaAttention
    from fp4dist.megatron.upstream import AttnMaskType

    with megatron_groups():
        config = stock_config(masked_softmax_fusion=False)
        ours = SdpaAttention(config, 1, AttnMaskType.causal, "self")
        theirs = DotProductAttention(config, 1, AttnMaskType.causal, "self")
        q, k, v = (torch.randn(SEQUENCE, BATCH, 4, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
        documents = attention_mask()
        documents[1, :, 10:, :10] = True
        for mask, reduced in ((attention_mask(), None), (documents, documents)):
            assert torch.allclose(ours(q, k, v, reduced), theirs(q, k, v, mask), atol=1e-6)


def test_masks_in_attention() -> None:
    run_ranks(masks_in_attention, 1)


def test_recipes_that_a_foreign_loop_would_lose_a_part_of_are_refused() -> None:
    """Whatever is kept between steps, and a learning rate by phases; both entries, before anything is changed."""
    from fp4dist.megatron import apply, install

    held = {"format": "nvfp4", "amax": "hold"}
    plain: dict[str, Any] = {
        "name": "it",
        "linears": {"it": {"fprop": {"x": {"format": "nvfp4"}, "w": {"format": "nvfp4"}}}},
        "rules": [{"roles": ["fc1"], "linear": "it"}],
    }
    kept = plain | {"linears": {"it": {"fprop": {"x": held, "w": held}}}}
    clipped = plain | {"gradients": ["spike_clip"]}
    rates = plain | {"phases": [{"name": "end", "last": 0.5, "lr": {"decay": "linear"}}]}
    for data, words in (
        (kept, r"keeps state from step to step \(linears\.it\.fprop\.x\.amax: hold, .*w\.amax: hold\)"),
        (clipped, r"keeps state from step to step \(gradients: spike_clip\)"),
        (rates, r"sets the learning rate \(phases\.end\.lr\)"),
    ):
        recipe = build(Recipe, data)
        for enter in (install, lambda recipe: apply(nn.Linear(16, 16), recipe)):
            with pytest.raises(RecipeMismatch, match=rf"recipe it {words}.*launch/pretrain\.py"):
                enter(recipe)
