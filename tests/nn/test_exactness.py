"""Elements that FP8 carriers cannot hold: counted, merged over ranks, and a GEMM that lost some takes bf16 ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from fp4dist.errors import CheckpointError
from fp4dist.nn.apply import AppliedRecipe, apply_recipe
from fp4dist.nn.carry import LADDER, words_of
from fp4dist.nn.exactness import Exactness
from fp4dist.spec.run import BackendConfig
from tests.distributed import run_ranks
from tests.nn.carriers import FP8, OTHER_FP8, carrier_backend
from tests.tiny_llama import TinyLlama, make_tokens

MLP = "model.layers.0.mlp"
WIDE = torch.Size((128, 256))  # fprop's operands of down_proj, dgrad's of gate_proj and up_proj; 128 tokens
FALLEN = {(f"{MLP}.down_proj", "fprop"), (f"{MLP}.gate_proj", "dgrad"), (f"{MLP}.up_proj", "dgrad")}


def make(again_after: int = 64) -> tuple[TinyLlama, AppliedRecipe]:
    torch.manual_seed(0)
    model = TinyLlama(1)
    return model, apply_recipe(model, "quartet", seed=3, backend=BackendConfig(fp8_again_after=again_after))


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
        other.load_state_dict(dict(state, exactness=None))
        assert "bfloat16" not in carriers(other).values(), "back to a checkpoint of before"
        older = {"in_bf16": [place[:4] for place in state["exactness"]["places"]]}
        other.load_state_dict(dict(state, exactness=older))
        assert {at for at, kind in carriers(other).items() if kind == "bfloat16"} == FALLEN
        state["exactness"]["places"][0][0] = "elsewhere"
        with pytest.raises(CheckpointError, match="elsewhere has left its FP8 carriers, and the model has no such"):
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


# ---------- forms


class Steps:
    """An Exactness of two linears that is told what each step's operands lost and spanned."""

    def __init__(self, again_after: int) -> None:
        self.exactness, self.step = Exactness(("a", "b"), torch.device("cpu"), True, again_after), 0

    def run(self, **said: tuple[int, int]) -> list[str]:
        """The news of a step. said: linear -> (elements that wgrad.dy lost, binades that it spans); wgrad.x spans 3."""
        for path, (lost, octaves) in said.items():
            for slot, number in (("wgrad.dy", octaves), ("wgrad.x", 3)):
                self.exactness.spreads(path)[slot].copy_(torch.tensor([200, 256 - (200 - number)]))
            self.exactness.slots(path)["wgrad.dy"].fill_(lost)
        self.exactness.settle(self.step)
        self.step += 1
        return [change.text() for change in self.exactness.news()]

    def form(self, path: str) -> int:
        return self.exactness.forms(path).get("wgrad", 0)


@pytest.mark.parametrize(
    ("first", "second", "form"),
    [(5, 20, 1), (12, 26, 1), (13, 20, 2), (26, 26, 2), (27, 3, 3), (3, 27, 3), (None, 3, 3), (3, None, 3)],
)
def test_a_gemm_takes_the_first_later_form_that_holds_both_operands(
    first: int | None, second: int | None, form: int
) -> None:
    exactness = Exactness(("a", "b"), torch.device("cpu"), True, 4)
    for slot, octaves in (("dgrad.dy", first), ("dgrad.w", second)):
        if octaves is not None:
            exactness.spreads("b")[slot].copy_(torch.tensor([130, 256 - (130 - octaves)]))
    exactness.slots("b")["dgrad.w"].fill_(7)
    exactness.settle(0)
    assert (exactness.forms("a"), exactness.forms("b")) == ({}, {"dgrad": form})
    (change,) = exactness.news()
    assert change.text().startswith("b dgrad.w: 7 elements did not fit its FP8 carrier in step 0; dgrad of this linear")
    assert change.text().endswith(f"takes {words_of(LADDER[form])} carriers from now on")
    assert list(exactness.fallen) == [("b", "dgrad")]


def test_who_is_close_to_the_limit_falls_along_and_nobody_else() -> None:
    steps = Steps(4)
    assert steps.run(a=(0, 28), b=(0, 28)) == []
    assert steps.run(a=(2, 29), b=(0, 26)) == [
        "a wgrad.dy: 2 elements did not fit its FP8 carrier in step 1; wgrad of this linear takes bf16 carriers from"
        " now on"
    ]
    assert steps.run(a=(0, 29), b=(0, 27)) == [], "nobody lost anything"
    other = Steps(4)
    assert other.run(a=(2, 29), b=(0, 27))[1:] == [
        "b wgrad.dy: block scales over 27 binades came close to what its FP8 carrier holds in step 0; wgrad of this"
        " linear takes bf16 carriers from now on"
    ]
    assert set(other.exactness.fallen) == {("a", "wgrad"), ("b", "wgrad")}


def test_a_gemm_goes_back_after_clean_steps_and_waits_longer_each_time() -> None:
    steps, forms, told = Steps(3), [], []
    spans = [29] + [20] * 3 + [29] + [20] * 6 + [29] + [20] * 3 + [28] + [20] * 3 + [27] * 6 + [20] * 15
    for octaves in spans:
        lost = octaves == 29 and steps.form("a") < 3
        told += steps.run(a=(int(lost), octaves), b=(0, 3))
        forms.append(steps.form("a"))
    # it loses in steps 0, 4 and 11; windows have 3 steps, the first fall costs one, the second two, the third four
    assert forms == [3, 3, 3, 0, 3, 3, 3, 3, 3, 3, 0, 3] + [3] * 26 + [0, 0]
    back = [line for line in told if "again" in line]
    assert back[0] == (
        "a wgrad: block scales over at most 20 and 3 binades in the last 3 steps; this linear takes e5m2 x e4m3fn"
        " carriers again"
    )
    assert "in the last 6 steps" in back[1]
    never = Steps(0)
    never.run(a=(1, 29))
    assert [never.run(a=(0, 3)) for _ in range(9)] == [[]] * 9
    assert never.form("a") == 3


def test_a_resumed_run_goes_on_in_the_same_window() -> None:
    spans = [29] + [20] * 3 + [29, 28] + [20] * 12 + [0, 29, 3, 29] + [5] * 9
    whole = Steps(3)
    expected = []
    for octaves in spans:
        whole.run(a=(octaves == 29, octaves), b=(0, 9))
        expected.append(whole.form("a"))
    assert {0, 3} <= set(expected)
    parts, found = Steps(3), []
    for octaves in spans:
        parts.run(a=(octaves == 29, octaves), b=(0, 9))
        found.append(parts.form("a"))
        kept, fresh = parts.exactness.state_dict(), Exactness(("a", "b"), torch.device("cpu"), True, 3)
        fresh.load_state_dict(kept)
        assert fresh.state_dict() == kept
        parts.exactness = fresh
    assert found == expected
    parts.exactness.load_state_dict({})
    assert not parts.exactness.moved


def test_a_linear_follows_its_form_and_its_results_stay() -> None:
    """Every form multiplies the same values, codes that are turned or kept included."""
    with carrier_backend(FP8) as asked:
        model, applied = make(3)
        applied.set_step(0, 1000)
        asked.loses, asked.spans = (lambda q: q.shape == WIDE), lambda _: 13
        expected = model(make_tokens())
        expected.backward()
        told = applied.set_step(1, 1000)
        assert all(line.endswith("takes e5m2 x e5m2 carriers from now on") for line in told)
        assert set(carriers(applied).values()) == {"e5m2"}, "13 binades are close to the limit of every e4m3"
        asked.loses, asked.spans = (lambda _: 0), lambda _: 3
        applied.clock.step = 0  # the same noise
        assert torch.equal(model(make_tokens()), expected)
        applied.clock.step = 1
        changes = []
        for step in range(1, 5):
            model(make_tokens()).backward()
            changes.append(len(applied.set_step(step + 1, 1000)))
        assert changes == [0, 0, 3 * 7, 0], "all at once"
        assert set(carriers(applied).values()) == {"e5m2 x e4m3fn"}


def lose_on_the_last_rank() -> tuple[int, set[tuple[str, str]], list[str], dict[str, Any], list[str]]:
    with carrier_backend(FP8) as asked:
        model, applied = make(2)
        applied.set_step(0, 10)
        if dist.get_rank() == dist.get_world_size() - 1:
            asked.loses = lambda q: 5 if q.shape == WIDE else 0
        model(make_tokens()).backward()
        lost, messages = applied.lost(), applied.set_step(1, 10)
        assert applied.exactness is not None
        in_bf16 = {at for at, kind in carriers(applied).items() if kind == "bfloat16"}
        asked.loses, asked.spans = (lambda _: 0), (lambda _: 20 if dist.get_rank() else 3)
        back: list[str] = []
        for step in range(1, 4):  # one rank's operands span more than e4m3 holds
            model(make_tokens()).backward()
            back += applied.set_step(step + 1, 10)
        return lost, in_bf16, messages, applied.exactness.state_dict(), back


@pytest.mark.distributed
def test_all_ranks_leave_fp8_together() -> None:
    first, second = run_ranks(lose_on_the_last_rank, 2)
    assert first == second
    assert first[:2] == (30, FALLEN)
    assert len(first[4]) == 3
    assert all("over at most 20 and 20 binades in the last 2 steps" in line for line in first[4])
    assert all(line.endswith("this linear takes e5m2 x e5m2 carriers again") for line in first[4])
