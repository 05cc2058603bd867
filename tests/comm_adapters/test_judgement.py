"""What the guard makes of several ranks' findings, and what is kept, left and taken back; one process, no traffic."""

from __future__ import annotations

import math

import torch

from fp4dist.comm.canary import Finding
from fp4dist.comm.compression import Compression
from fp4dist.comm.policy import Span, decide
from fp4dist.spec.communication import CommConfig

FINE = Finding("bucket 0", 0, 9e-3, 9e-3, 0.0, 0.99, 0.1, 9e-3)
SHRUNK = Finding("bucket 0", 0, 8e-3, 8e-3, -0.2, 0.99, 0.1, 9e-3)  # a smaller error than FINE's, and a bias
NOTHING = Finding("bucket 0", 0, math.nan, math.nan, math.nan, math.nan, math.nan, 9e-3)
LOST = Finding("bucket 0", 0, math.inf, math.inf, math.nan, math.nan, 0.1, 9e-3)


def made() -> Compression:
    compression = Compression(CommConfig(grad_reduce="int4", error_feedback="ef"), seed=1)
    decision = decide(
        compression.config, "grad_reduce", "bucket 0", numel=8192, coded=8192, itemsize=4, span=Span(2, 1),
        topology=None, why="",
    )  # fmt: skip
    compression.register(decision, comparable=True)
    compression.begin_step(0)
    return compression


def test_one_copy_outside_is_enough_whatever_the_others_are() -> None:
    for findings, falls in (
        ([FINE], False),
        ([NOTHING], False),
        ([FINE, NOTHING], False),
        ([SHRUNK, NOTHING], True),  # a copy without gradients, of another pipeline stage
        ([NOTHING, SHRUNK], True),
        ([FINE, SHRUNK], True),
        ([LOST, FINE, NOTHING], True),
    ):
        compression = made()
        for finding in findings:
            compression.observe(finding)
        done = compression.finish_step()
        assert bool(compression.fallen) == falls, findings
        assert bool(done.fallbacks) == falls
        assert len(done.findings) == 1


def test_a_bucket_that_falls_keeps_no_errors() -> None:
    compression = made()
    compression.feedback.error("bucket 0", 8192, torch.device("cpu"))
    compression.observe(SHRUNK)
    compression.finish_step()
    assert compression.feedback.state_dict() == {}
    other = Compression(CommConfig(grad_reduce="int4"), seed=1)
    other.feedback.load_state_dict({"bucket 0": torch.ones(8192)})
    assert other.feedback.state_dict() == {}, "errors that nothing corrects are not held"


def test_a_roll_back_neither_validates_nor_forgets() -> None:
    compression = made()
    compression.begin_step(400)  # a canary's turn
    compression.observe(SHRUNK)
    compression.finish_step()
    compression.load_state_dict({"fallen": {"bucket 7": "step 150: earlier"}})  # a checkpoint of step 200
    compression.begin_step(200)
    assert compression.fallen.keys() == {"bucket 0", "bucket 7"}
    assert not compression.validating
    first = Compression(CommConfig(grad_reduce="int4", validate=2), seed=1)
    told = []
    for step in (400, 200, 201):
        first.begin_step(step)
        told.append(first.validating)
    assert told == [True, True, False], "the first two steps of a process, whatever their numbers are"


def test_between_steps_gradients_travel_exactly() -> None:
    """A probe that compares two gradients would see the wire's noise, and spend what feedback keeps."""
    compression = made()
    (decision,) = compression.decisions
    assert compression.wire_of(decision) is not None
    compression.finish_step()
    assert compression.wire_of(decision) is None
    compression.begin_step(1)
    assert compression.wire_of(decision) is not None


def test_a_section_bounds_and_checks_what_collectives_do() -> None:
    asked = Compression(CommConfig(grad_reduce="int4", check=True, sms=16), seed=1).options
    assert (asked.check, asked.sms) == (True, 16)
    usual = made().options
    assert (usual.check, usual.sms) == (None, None)


def test_a_bucket_that_is_gone_takes_no_canary_s_turn() -> None:
    compression = made()
    compression.feedback.error("bucket 0", 8192, torch.device("cpu"))
    compression.retire("bucket 0")
    assert not compression.watched("bucket 0")
    assert compression.feedback.state_dict() == {}
