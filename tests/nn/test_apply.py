"""apply_recipe on a plain torch model: who runs FP4, what is counted, when phases start, and every refusal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from fp4dist.errors import ConfigError, KernelUnavailable, RecipeMismatch
from fp4dist.nn.apply import AppliedRecipe, apply_recipe, plan_table
from fp4dist.nn.linear import Fp4Linear
from fp4dist.nn.sites import find_linears
from fp4dist.spec.load import config_root, load_recipe
from fp4dist.spec.recipe import GEMMS, Fprop, LinearRecipe, Phase, Recipe, Rule
from fp4dist.spec.run import BackendConfig
from tests.generators import normal, spec
from tests.nn.one_linear import make_plan
from tests.tiny_llama import TinyLlama, make_sites, make_tokens

BLOCK = ("qkv", "proj", "fc1", "fc2")
QUARTET2 = load_recipe("quartet2").linears["fp4"]
FORWARD = LinearRecipe(fprop=Fprop(x=spec("nvfp4"), w=spec("nvfp4")))


def one_rule(linear: LinearRecipe = QUARTET2, *, phases: Sequence[Phase] = (), **condition: Any) -> Recipe:
    rule = Rule(linear="fp4", **(condition or {"path": "*"}))
    linears = {"fp4": linear}
    if phases:
        linears["forward"] = FORWARD
    return Recipe(name="r", linears=linears, rules=(rule,), phases=tuple(phases))


def train_step(model: TinyLlama) -> float:
    model.zero_grad()
    loss = model(make_tokens())
    loss.backward()
    return loss.item()


def gradients(seed: int, micro_batch: int = 0) -> torch.Tensor:
    model = TinyLlama(1)
    applied = apply_recipe(model, "quartet2", seed=seed)
    applied.clock.micro_batch = micro_batch
    train_step(model)
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


# ---------- what is replaced


def test_linears_become_fp4_in_place_and_others_stay() -> None:
    model = TinyLlama(4)
    parameters = dict(model.named_parameters())
    keys = list(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    applied = apply_recipe(model, "nvidia_nvfp4", seed=3)
    for site, path, module in find_linears(model):
        quantized = site.layer is not None and site.layer < 3
        assert type(module) is (Fp4Linear if quantized else nn.Linear), path
    assert list(model.state_dict()) == keys
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert applied.clock.seed == 3
    assert len(applied.targets) == 3 * 7
    assert all(t.module.plan is not None and t.module.plan.clock is applied.clock for t in applied.targets)
    before = parameters["model.layers.0.mlp.up_proj.weight"].detach().clone()
    train_step(model)
    optimizer.step()
    assert not torch.equal(parameters["model.layers.0.mlp.up_proj.weight"], before)


def test_a_bf16_recipe_changes_nothing() -> None:
    model, twin = TinyLlama(1), TinyLlama(1)
    applied = apply_recipe(model, "bf16")
    assert applied.targets == ()
    assert not any(isinstance(m, Fp4Linear) for m in model.modules())
    assert train_step(model) == train_step(twin)
    applied.check_counts()
    assert applied.counts()["fp4_share"] == 0.0


def test_recipes_by_name_path_and_object() -> None:
    for recipe in ("quartet2", config_root() / "recipes" / "quartet2.yaml", load_recipe("quartet2")):
        assert apply_recipe(TinyLlama(1), recipe).recipe == load_recipe("quartet2")


def test_a_shared_linear_is_replaced_wherever_it_is_held() -> None:
    model = TinyLlama(2)
    shared = model.model.layers[0].mlp
    model.model.layers[1].mlp.up_proj = shared.up_proj  # type: ignore[union-attr]
    apply_recipe(model, "quartet2")
    assert isinstance(shared.up_proj, Fp4Linear)
    assert model.model.layers[1].mlp.up_proj is shared.up_proj  # type: ignore[union-attr]


def test_hooks_survive() -> None:
    model, seen = TinyLlama(1), []
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: seen.append(1))  # type: ignore[union-attr]
    apply_recipe(model, "quartet2")
    train_step(model)
    assert seen == [1]


def test_the_seed_and_the_clock_decide_the_noise() -> None:
    base = gradients(1)
    assert torch.equal(gradients(1), base)
    assert not torch.equal(gradients(2), base)
    assert not torch.equal(gradients(1, micro_batch=1), base)


def test_a_second_recipe_replaces_the_first() -> None:
    model = TinyLlama(1)
    apply_recipe(model, "quartet2")
    train_step(model)
    applied = apply_recipe(model, one_rule(FORWARD, roles=("fc1",)))
    assert applied.counts()["calls"] == {}  # the first recipe's counts are gone
    train_step(model)
    applied.check_counts()
    assert applied.counts()["calls"]["fp4"] == 2
    assert apply_recipe(model, "bf16").to_json()["fp4_share_of_block_linear_flops"] == 0


# ---------- counting


def test_what_ran_is_what_the_table_says() -> None:
    model = TinyLlama(2)
    applied = apply_recipe(model, "quartet2")
    train_step(model)
    applied.check_counts()
    counts, table = applied.counts(), applied.to_json()
    assert counts["calls"] == {"fp4": 2 * 7 * 3}
    assert counts["flops"] == {"fp4": 2 * 3 * 2 * 128 * (4 * 128 * 128 + 3 * 128 * 256)}
    assert counts["fp4_share"] == table["fp4_share_of_block_linear_flops"] == 1.0
    assert counts["uncounted"] == 0
    row = next(r for r in table["linears"] if r["role"] == "fc2")
    assert row["kernels"] == dict.fromkeys((*row["slots"], *GEMMS), "reference")
    assert "<reference>" in applied.table()
    applied.reset_counts()
    assert applied.counts()["calls"] == {}


def test_layers_left_in_torch_are_uncounted() -> None:
    model = TinyLlama(4)
    applied = apply_recipe(model, "nvidia_nvfp4")
    train_step(model)
    applied.check_counts()
    assert applied.counts()["uncounted"] == 7
    assert applied.counts()["fp4_share"] == 1.0


def test_evaluation_is_not_counted() -> None:
    model = TinyLlama(1)
    applied = apply_recipe(model, "quartet2")
    with torch.no_grad():
        model(make_tokens())
    assert applied.counts()["calls"] == {}


def test_a_layer_that_did_not_run_is_found() -> None:
    model = TinyLlama(1)
    applied = apply_recipe(model, "quartet2")
    with pytest.raises(RecipeMismatch, match=r"q_proj fprop: the table promises fp4, but nothing ran; is the"):
        applied.check_counts()
    model(make_tokens())
    with pytest.raises(RecipeMismatch, match=r"q_proj dgrad: the table promises fp4, but nothing ran"):
        applied.check_counts()


def test_a_layer_whose_plan_is_gone_is_found() -> None:
    model = TinyLlama(1)
    applied = apply_recipe(model, "quartet2")
    model.model.layers[0].mlp.down_proj.set_plan(None)  # type: ignore[union-attr]
    train_step(model)
    with pytest.raises(RecipeMismatch, match=r"layers.0.mlp.down_proj fprop: .* promises fp4, but nothing ran"):
        applied.check_counts()


def test_a_layer_that_ran_otherwise_is_found() -> None:
    model = TinyLlama(1)
    applied = apply_recipe(model, "quartet2")
    model.model.layers[0].mlp.down_proj.set_plan(make_plan(FORWARD))  # type: ignore[union-attr]
    train_step(model)
    with pytest.raises(RecipeMismatch, match=r"down_proj dgrad: the table promises fp4, but bf16 ran"):
        applied.check_counts()


def test_gradients_that_nobody_asks_for_may_be_absent() -> None:
    model = TinyLlama(1)
    model.model.embed_tokens.requires_grad_(False)  # the first linears then need no input gradient
    model.model.layers[0].input_layernorm.requires_grad_(False)  # type: ignore[union-attr]
    model.model.layers[0].mlp.down_proj.requires_grad_(False)  # type: ignore[union-attr]
    applied = apply_recipe(model, "quartet2")
    train_step(model)
    applied.check_counts()
    assert applied.counts()["calls"]["fp4"] == 7 * 3 - 3 - 1


# ---------- phases


def tail(**start: Any) -> Phase:
    return Phase(name="tail", use={"fp4": "forward"}, **start)


def test_a_phase_starts_at_its_step_and_keeps_the_counters() -> None:
    model = TinyLlama(1)
    applied = apply_recipe(model, one_rule(roles=BLOCK, phases=[tail(last=0.25)]))
    assert [applied.set_step(step, 8) for step in range(6)] == [[]] * 6
    train_step(model)
    told = "step 6: phase tail starts (the last 0.25 of the run), 33.3% of block-linear FLOPs in FP4"
    assert applied.set_step(6, 8) == [told]
    assert (applied.clock.step, applied.clock.micro_batch) == (6, 0)
    assert applied.to_json()["fp4_share_of_block_linear_flops"] == pytest.approx(1 / 3)
    assert applied.set_step(7, 8) == []
    train_step(model)
    assert applied.counts()["calls"] == {"fp4": 7 * 3 + 7, "bf16": 7 * 2}
    applied.check_counts()  # kinds of the table before the phase count as well
    applied.reset_counts()
    train_step(model)
    applied.check_counts()
    assert applied.counts()["calls"] == {"fp4": 7, "bf16": 14}


def test_going_back_leaves_the_phase() -> None:
    applied = apply_recipe(TinyLlama(1), one_rule(roles=BLOCK, phases=[tail(step=3)]))
    assert applied.set_step(3, 8) != []
    assert applied.set_step(2, 8) == []
    assert applied.to_json()["fp4_share_of_block_linear_flops"] == 1


def test_a_disabled_phase_never_starts() -> None:
    applied = apply_recipe(TinyLlama(2), "nvidia_nvfp4")
    assert [applied.set_step(step, 10) for step in (0, 5, 9)] == [[], [], []]
    recipe = load_recipe("nvidia_nvfp4")
    recipe = replace(recipe, phases=(replace(recipe.phases[0], enabled=True),))
    applied = apply_recipe(TinyLlama(2), recipe)
    assert applied.set_step(81, 100) == []
    (message,) = applied.set_step(82, 100)
    assert message == "step 82: phase fprop_tail starts (the last 0.18 of the run), 33.3% of block-linear FLOPs in FP4"


def test_later_phases_win() -> None:
    phases = [tail(step=1), Phase(name="end", use={"fp4": "bf16"}, step=2)]
    applied = apply_recipe(TinyLlama(1), one_rule(roles=BLOCK, phases=phases))
    shares = []
    for step in range(3):
        applied.set_step(step, 3)
        shares.append(applied.to_json()["fp4_share_of_block_linear_flops"])
    assert shares == [1.0, pytest.approx(1 / 3), 0.0]


def test_a_layer_that_a_phase_will_quantize_is_ready_for_it() -> None:
    """A linear that starts in bf16 and is quantized later has to be ours from the beginning."""
    recipe = Recipe(
        name="r",
        linears={"fp4": QUARTET2, "later": LinearRecipe()},
        rules=(Rule(roles=("fc1",), linear="fp4"), Rule(roles=("qkv", "proj", "fc2"), linear="later")),
        phases=(Phase(name="on", use={"later": "fp4"}, step=1),),
    )
    model = TinyLlama(1)
    applied = apply_recipe(model, recipe)
    train_step(model)
    applied.check_counts()
    applied.set_step(1, 2)
    applied.reset_counts()
    train_step(model)
    applied.check_counts()
    assert applied.counts()["fp4_share"] == applied.to_json()["fp4_share_of_block_linear_flops"] == 1.0


def test_what_a_phase_needs_is_checked_before_the_first_step() -> None:
    wide = LinearRecipe(fprop=Fprop(x=spec("eden"), w=spec("eden")))
    phase = Phase(name="p", use={"fp4": "wide"}, step=5)
    recipe = Recipe(
        name="r", linears={"fp4": FORWARD, "wide": wide}, rules=(Rule(path="*", linear="fp4"),), phases=(phase,)
    )
    message = r"down_proj fprop.x: input features = 64 is not a multiple of 128"
    with pytest.raises(RecipeMismatch, match=message):
        apply_recipe(TinyLlama(1, inner=64), recipe)
    with torch.device("meta"):
        sites = [site for site, _, _ in find_linears(TinyLlama(1, inner=64))]
    with pytest.raises(RecipeMismatch, match=message):
        plan_table(sites, recipe)


def test_phases_of_a_dry_run() -> None:
    applied = plan_table(make_sites(2), one_rule(roles=BLOCK, phases=[tail(step=1)]))
    assert applied.set_step(1, 2) == ["step 1: phase tail starts (step 1), 33.3% of block-linear FLOPs in FP4"]


def test_dropped_caches() -> None:
    model = TinyLlama(1)
    applied = apply_recipe(model, "quartet2")
    applied.clock.cache_weights = True
    before = train_step(model)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.mul_(-0.5)  # a checkpoint is loaded: same step, other weights
    applied.drop_caches()
    applied.clock.cache_weights = False
    after = train_step(model)
    applied.clock.cache_weights = True
    assert train_step(model) == after != before


# ---------- refusals


def test_sizes_are_checked_when_the_recipe_is_applied() -> None:
    with pytest.raises(RecipeMismatch, match=r"down_proj fprop.x: input features = 200 is not a multiple of 16"):
        apply_recipe(TinyLlama(1, inner=200), one_rule(FORWARD, roles=("fc1", "fc2")))
    with pytest.raises(RecipeMismatch, match=r"q_proj fprop.x: tokens would be filled up .* change the 63 tokens"):
        apply_recipe(TinyLlama(1), "luq", tokens=63)
    apply_recipe(TinyLlama(1), "quartet2", tokens=63)  # filled up
    with pytest.raises(RecipeMismatch, match=r"dgrad.dy: output features = 128 / tp 2 = 64 is not a multiple of 128"):
        plan_table(make_sites(1), load_recipe("quartet2"), tp=2)


def test_subclasses_of_linear_are_not_overwritten() -> None:
    class Lora(nn.Linear):
        pass

    model = TinyLlama(1)
    model.model.layers[0].mlp.up_proj = Lora(128, 256)  # type: ignore[union-attr]
    with pytest.raises(RecipeMismatch, match=r"up_proj is a Lora, a subclass of torch.nn.Linear whose forward"):
        apply_recipe(model, "quartet2")
    apply_recipe(model, one_rule(roles=("qkv",)))  # in bf16 it may stay


def test_a_model_that_is_a_linear() -> None:
    for linear in (nn.Linear(128, 128), Fp4Linear.of(nn.Linear(128, 128))):
        applied = apply_recipe(linear, one_rule())
        linear(normal(128, 128)).sum().backward()
        assert applied.counts()["calls"] == {"fp4": 2}


def test_fp4_asked_for_and_not_got() -> None:
    with pytest.raises(RecipeMismatch, match="asks for FP4, but no linear of the model got it"):
        apply_recipe(nn.Sequential(nn.Linear(16, 16), nn.ReLU()), "quartet2")
    with pytest.raises(RecipeMismatch, match="the model has no linear layers"):
        apply_recipe(nn.Sequential(nn.ReLU()), "quartet2")


def test_a_device_without_kernels() -> None:
    with torch.device("meta"):
        model = TinyLlama(1)
    with pytest.raises(KernelUnavailable, match=r"no backend can run quantize\(nvfp4 1x16 4/6\) on meta"):
        apply_recipe(model, "quartet2")
    applied = apply_recipe(model, "quartet2", backend=BackendConfig(allow_reference=True))
    assert applied.to_json()["linears"][0]["kernels"]["fprop.x"] == "reference"


# ---------- pipeline stages


def stages(num_layers: int) -> tuple[nn.Module, nn.Module]:
    """Two stages of a pipeline, each with local layer numbers; the second one has the head."""
    first, second = TinyLlama(num_layers // 2), TinyLlama(num_layers // 2)
    del first.lm_head
    return first, second


def test_stages_share_the_whole_models_rules() -> None:
    whole = make_sites(4)
    first, second = stages(4)
    recipe = load_recipe("nvidia_nvfp4")
    early = apply_recipe(first, recipe, sites=whole)
    late = apply_recipe(second, recipe, sites=whole, layer_offset=2)
    assert {t.site.layer for t in early.targets} == {0, 1}
    assert {t.site.layer for t in late.targets} == {2}  # the last layer of four stays in bf16
    assert [(r.site, r.linear) for r in early.rows] == [(r.site, r.linear) for r in late.rows]
    numbers = {t.site.number for t in (*early.targets, *late.targets)}
    assert numbers == {s.number for s in whole if s.layer is not None and s.layer < 3}


def test_chunks_of_one_stage() -> None:
    first, second = stages(4)
    applied = apply_recipe([first, second], "quartet2", sites=make_sites(4), layer_offset=[0, 2])
    assert {t.site.layer for t in applied.targets} == {0, 1, 2, 3}


def test_a_head_on_another_stage_is_no_error_but_one_that_cannot_run_is() -> None:
    first, second = stages(4)
    recipe = one_rule(FORWARD)
    assert apply_recipe(first, recipe, sites=make_sites(4)).targets
    second.lm_head = nn.Identity()  # a layer of that name whose class cannot run a plan
    message = r"^lm_head: rule 0: path \* asks for FP4, but this layer's class cannot run it"
    with pytest.raises(RecipeMismatch, match=message):
        apply_recipe(second, recipe, sites=make_sites(4), layer_offset=2)


def test_a_layer_here_that_cannot_run_is_an_error() -> None:
    model = TinyLlama(2)
    model.model.layers[1].mlp.up_proj = nn.Identity()  # type: ignore[union-attr]
    with pytest.raises(RecipeMismatch, match=r"layers.1.mlp.up_proj: rule 0: .* this layer's class cannot run it"):
        apply_recipe(model, "quartet2", sites=make_sites(2))


def test_sites_that_do_not_know_the_model() -> None:
    with pytest.raises(RecipeMismatch, match=r"'model.layers.1.self_attn.q_proj' is not in the list of 8 sites"):
        apply_recipe(TinyLlama(2), "quartet2", sites=make_sites(1))


def test_the_result_is_one_object() -> None:
    applied = apply_recipe(TinyLlama(1), "quartet2")
    assert isinstance(applied, AppliedRecipe)
    assert applied.active == frozenset()


# ---------- where and what a linear runs on


def test_a_model_that_moves_before_its_first_step_gets_kernels_of_the_new_device() -> None:
    """As by `model.cuda()` after `apply_recipe`, the other way round: this machine has no GPU to move to."""
    model, other = TinyLlama(1), TinyLlama(1)
    fresh = apply_recipe(other, "luq_hindsight")
    applied = apply_recipe(model, "luq_hindsight")
    for target in applied.targets:
        target.device = torch.device("cuda", 0)
        assert target.module.plan is not None
        target.module.plan.device = target.device
    with pytest.raises(
        RecipeMismatch, match=r"kernels were chosen for cuda:0, and its input is on cpu; move the model"
    ):
        model(make_tokens())
    old = applied.controllers
    assert applied.set_step(0, 3) == ["step 0: the model moved from cuda:0 to cpu, kernels chosen anew"]
    assert applied.controllers is not old
    assert applied.set_step(0, 3) == fresh.set_step(0, 3) == []
    assert train_step(model) == train_step(other)
    applied.check_counts()
    for both in (applied, fresh):
        both.set_step(1, 3)
    assert applied.state_dict()["controllers"]["settled"] == fresh.state_dict()["controllers"]["settled"] == 0
    assert train_step(model) == train_step(other)


def test_dtypes_that_nothing_quantizes_are_refused_by_name() -> None:
    with pytest.raises(RecipeMismatch, match=r"q_proj: its weight is float16, and FP4 linears take bf16 and fp32; use"):
        apply_recipe(TinyLlama(1).half(), "quartet2")
    linear = nn.Linear(128, 128)
    apply_recipe(linear, one_rule())
    with pytest.raises(RecipeMismatch, match="its input is float64, and FP4 linears take"):
        linear.double()(normal(16, 128).double())
    linear.float()
    with torch.autocast("cpu", torch.float16), pytest.raises(RecipeMismatch, match="its input is float16"):
        linear(normal(16, 128))


def test_vectors_and_no_tokens_at_all_as_torchs_linear_takes_them() -> None:
    linear = nn.Linear(128, 256)
    applied = apply_recipe(linear, one_rule(FORWARD))
    x = torch.empty(2, 0, 128, requires_grad=True)
    y = linear(x)
    y.sum().backward()
    assert y.shape == (2, 0, 256)
    assert x.grad is not None
    assert linear.weight.grad is not None
    assert not linear.weight.grad.any()
    applied.check_counts()  # nothing was to be multiplied
    vector = normal(1, 128)[0]
    assert torch.equal(linear(vector), linear(vector[None])[0])


def test_data_parallel_threads_are_refused() -> None:
    linear = nn.Linear(128, 128)
    apply_recipe(linear, one_rule())
    with pytest.raises(RecipeMismatch, match=r"use torch.nn.parallel.DistributedDataParallel, one process a GPU"):
        linear._replicate_for_data_parallel()  # type: ignore[operator]  # what nn.DataParallel calls


def test_frozen_first_layers_are_no_missing_gemms() -> None:
    """Where nothing below needs a gradient either, autograd never calls backward."""
    model = TinyLlama(2)
    applied = apply_recipe(model, "quartet2")
    for frozen in (model.model.layers[0], model.model.embed_tokens):
        frozen.requires_grad_(False)
    train_step(model)
    applied.check_counts()
    assert applied.counts()["calls"] == {"fp4": 7 + 3 * 7}


@pytest.mark.parametrize("step", [(-1, 3), (0, 0), (1.5, 3), (0, 3, -1)])
def test_steps_are_counted_from_0_in_whole_numbers(step: tuple[Any, ...]) -> None:
    with pytest.raises(ConfigError, match=r"needs whole numbers, step and micro_batch from 0, total from 1"):
        apply_recipe(nn.Linear(128, 128), one_rule()).set_step(*step)
