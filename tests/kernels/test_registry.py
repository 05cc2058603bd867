"""Backends are chosen in a fixed order, by reasons that are said; the slow reference never slips onto a GPU."""

from __future__ import annotations

import pytest
import torch

from fp4dist.errors import KernelUnavailable
from fp4dist.kernels import registry
from fp4dist.kernels.registry import AUTO_ORDER, Request, declare_missing, explain, kernel, resolve
from fp4dist.spec.recipe import QuantSpec
from fp4dist.spec.run import BackendConfig
from tests.generators import spec

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)  # naming a GPU needs none
NV = spec("nvfp4")


@pytest.fixture
def empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry of this test's own."""
    monkeypatch.setattr(registry, "_KERNELS", {})
    monkeypatch.setattr(registry, "_MISSING", {})


def register(backend: str, reason: str | None = None) -> None:
    kernel("quantize", backend=backend, supports=lambda _: reason)(lambda *args: (backend, *args))  # type: ignore[arg-type]


def chosen(kind: str = "auto", device: torch.device = CPU, *, allow_reference: bool = False) -> str:
    config = BackendConfig(kind=kind, allow_reference=allow_reference)  # type: ignore[arg-type]
    return resolve(Request("quantize", NV, device), config).backend


def refusal(kind: str = "auto", device: torch.device = CPU) -> str:
    with pytest.raises(KernelUnavailable) as caught:
        chosen(kind, device)
    return str(caught.value)


@pytest.mark.parametrize("op", ["quantize", "requantize", "dequantize", "amax", "matmul", "grouped_matmul"])
def test_the_reference_has_every_operation(op: str) -> None:
    assert resolve(Request(op, NV, CPU), BackendConfig()).backend == "reference"  # type: ignore[arg-type]


@pytest.mark.usefixtures("empty")
def test_auto_takes_the_first_that_can() -> None:
    assert AUTO_ORDER == ("cuda", "triton", "reference")
    for backend in reversed(AUTO_ORDER):
        register(backend)
        assert chosen() == backend
    register("cuda", "needs sm_100 or newer")
    assert chosen() == "triton"


@pytest.mark.usefixtures("empty")
def test_a_kernel_is_called_with_what_it_is_given() -> None:
    register("triton")
    found = resolve(Request("quantize", NV, CPU), BackendConfig())
    assert found(1, 2) == ("triton", 1, 2)


@pytest.mark.usefixtures("empty")
def test_supports_sees_the_request() -> None:
    seen: list[Request] = []

    def supports(request: Request) -> str | None:
        seen.append(request)
        return None

    kernel("quantize", backend="triton", supports=supports)(lambda: None)
    request = Request("quantize", NV, GPU)
    resolve(request, BackendConfig())
    assert seen == [request]


@pytest.mark.usefixtures("empty")
def test_no_backend_lists_each_reason() -> None:
    declare_missing("cuda", "the CUDA extension is not built")
    register("triton", "C = 4100 is not a multiple of 128")
    assert refusal().splitlines() == [
        "no backend can run quantize(nvfp4 1x16) on cpu:",
        "    cuda       the CUDA extension is not built",
        "    triton     C = 4100 is not a multiple of 128",
        "    reference  has no quantize",
        "  set backend.allow_reference: true to run the (slow, bit-identical) reference",
    ]


@pytest.mark.usefixtures("empty")
def test_plain_operands_are_named_so() -> None:
    with pytest.raises(KernelUnavailable, match=r"no backend can run amax\(plain\) on cpu"):
        resolve(Request("amax", None, CPU), BackendConfig())


@pytest.mark.usefixtures("empty")
def test_the_reference_is_refused_on_a_gpu_unless_allowed() -> None:
    register("reference")
    assert "    reference  refused on a GPU: backend.allow_reference is false" in refusal(device=GPU)
    assert chosen(device=GPU, allow_reference=True) == "reference"
    assert chosen("reference", GPU) == "reference"  # asked for by name
    assert chosen() == "reference"


@pytest.mark.usefixtures("empty")
def test_a_named_backend_is_the_only_one_tried() -> None:
    register("reference")
    register("triton", "needs a GPU")
    assert chosen("reference") == "reference"
    message = refusal("triton")
    assert "triton     needs a GPU" in message
    assert "reference  " not in message
    assert message.endswith("set backend.kind: auto, or reference for the (slow, bit-identical) reference")
    assert "cuda       has no quantize" in refusal("cuda")


@pytest.mark.usefixtures("empty")
def test_explanations_for_the_table() -> None:
    register("reference")
    register("triton", "needs a GPU")
    declare_missing("cuda", "not built")
    request = Request("quantize", NV, CPU)
    assert explain(request, BackendConfig()) == {"cuda": "not built", "triton": "needs a GPU", "reference": "yes"}


def test_requests_can_be_cache_keys() -> None:
    assert len({Request("quantize", NV, CPU), Request("quantize", QuantSpec(format=NV.format), CPU)}) == 1
