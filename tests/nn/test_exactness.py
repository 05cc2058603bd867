"""Elements that FP8 carriers cannot hold: counted, merged over ranks, and a GEMM that lost some takes bf16 ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from fp4dist.errors import CheckpointError
from fp4dist.nn.apply import AppliedRecipe, apply_recipe
from tests.distributed import run_ranks
from tests.nn.carriers import FP8, OTHER_FP8, carrier_backend
from tests.tiny_llama import TinyLlama, make_tokens

MLP = "model.layers.0.mlp"
WIDE = torch.Size((128, 256))  # fprop's operands of down_proj, dgrad's of gate_proj and up_proj; 128 tokens
FALLEN = {(f"{MLP}.down_proj", "fprop"), (f"{MLP}.gate_proj", "dgrad"), (f"{MLP}.up_proj", "dgrad")}


def make() -> tuple[TinyLlama, AppliedRecipe]:
    torch.manual_seed(0)
    model = TinyLlama(1)
    return model, apply_recipe(model, "quartet", seed=3)


def carriers(applied: AppliedRecipe) -> dict[tuple[str, str], str]:
    return {(row.site.path, gemm): kind for row in applied.rows for gemm, kind in row.carriers.items()}


def test_a_gemm_that_lost_elements_takes_bf16_from_the_next_step_on() -> None:
    with carrier_backend(FP8) as asked:
        model, applied = make()
        assert applied.exactness is not None
        assert applied.set_step(0, 10) == []
        model(make_tokens()).backward()
        assert applied.lost() == 0
        assert applied.set_step(1, 10) == []
        asked.loses = lambda q: 3 if q.shape == WIDE else 0
        loss = model(make_tokens())
        loss.backward()
        model(make_tokens()).backward()  # another micro-batch: the most in one carrier counts
        assert set(carriers(applied).values()) == {"e5m2 x e4m3fn"}, "the present step is left as it is"
        assert applied.lost() == 6 * 3
        messages = applied.set_step(2, 10)
        assert len(messages) == 3
        assert f"step 2: {MLP}.down_proj fprop.x: 3 elements did not fit its FP8 carrier in step 1" in messages[0]
        assert set(applied.exactness.fallen) == FALLEN
        assert {at for at, kind in carriers(applied).items() if kind == "bfloat16"} == FALLEN
        asked.types.clear()
        asked.loses = lambda _: 0
        same = model(make_tokens())
        same.backward()
        assert {torch.bfloat16, FP8, OTHER_FP8} == set(asked.types)
        assert applied.lost() == 0
        assert applied.set_step(3, 10) == [], "told once"


def test_a_step_that_runs_again_counts_once() -> None:
    with carrier_backend(FP8) as asked:
        model, applied = make()
        assert applied.exactness is not None
        applied.set_step(0, 10)
        model(make_tokens()).backward()
        applied.settle()
        asked.loses = lambda _: 1
        model(make_tokens()).backward()  # a retraced step
        applied.set_step(1, 10)
        assert applied.lost() == 0
        assert not applied.exactness.fallen


def test_passes_without_gradients_and_passes_aside_count_nothing() -> None:
    with carrier_backend(FP8) as asked:
        model, applied = make()
        applied.set_step(0, 10)
        asked.loses = lambda _: 1
        with torch.no_grad():
            model(make_tokens())
        with applied.aside():
            model(make_tokens()).backward()
        assert applied.lost() == 0


def test_without_fp8_nothing_is_watched() -> None:
    model, applied = make()
    assert applied.exactness is not None
    assert not applied.exactness.watched
    applied.set_step(0, 10)
    model(make_tokens()).backward()
    assert applied.lost() == 0
    with carrier_backend():
        assert not (apply_recipe(TinyLlama(2), "nvidia_nvfp4").exactness or applied.exactness).watched


def test_state_is_plain_and_travels() -> None:
    with carrier_backend(FP8) as asked:
        model, applied = make()
        applied.set_step(0, 10)
        asked.loses = lambda q: 2 if q.shape == WIDE else 0
        model(make_tokens()).backward()
        applied.settle()
        state: dict[str, Any] = applied.state_dict()
        other = make()[1]
        other.load_state_dict(state)
        assert other.exactness is not None
        assert other.state_dict()["exactness"] == state["exactness"]
        assert {at for at, kind in carriers(other).items() if kind == "bfloat16"} == FALLEN
        assert other.set_step(1, 10) == [], "not news"
        state["exactness"]["in_bf16"][0][0] = "elsewhere"
        with pytest.raises(CheckpointError, match="elsewhere takes bf16 carriers, and the model has no such linear"):
            make()[1].load_state_dict(state)


def test_a_phase_keeps_what_has_fallen() -> None:
    with carrier_backend(FP8) as asked:
        model, applied = make()
        applied.set_step(0, 10)
        asked.loses = lambda q: 2 if q.shape == WIDE else 0
        model(make_tokens()).backward()
        applied.set_step(1, 10)
        applied._switch()
        assert {at for at, kind in carriers(applied).items() if kind == "bfloat16"} == FALLEN


def lose_on_the_last_rank() -> tuple[int, set[tuple[str, str]], list[str]]:
    with carrier_backend(FP8) as asked:
        model, applied = make()
        applied.set_step(0, 10)
        if dist.get_rank() == dist.get_world_size() - 1:
            asked.loses = lambda q: 5 if q.shape == WIDE else 0
        model(make_tokens()).backward()
        lost, messages = applied.lost(), applied.set_step(1, 10)
        assert applied.exactness is not None
        return lost, {at for at, kind in carriers(applied).items() if kind == "bfloat16"}, messages


@pytest.mark.distributed
def test_all_ranks_leave_fp8_together() -> None:
    first, second = run_ranks(lose_on_the_last_rank, 2)
    assert first == second
    assert first[:2] == (30, FALLEN)
