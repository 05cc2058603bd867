"""The CUDA extension: absent with a reason, or equal to torch bit for bit (on a GPU, once it is built)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fp4dist.errors import KernelUnavailable
from fp4dist.kernels import cuda
from fp4dist.kernels import reference as reference  # registers the backend that `explain` lists last
from fp4dist.kernels.registry import Request, explain, resolve
from fp4dist.spec.run import BackendConfig

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SIZES = (1, 2, 7, 8, 31, 255, 256, 1000, 4096, 12_345, 1_048_579)
ON_CUDA = Request("amax", None, torch.device("cuda"))


class TestWithoutExtension:
    """What a machine without the compiled extension says."""

    def test_absence_is_a_reason_not_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cuda, "EXTENSION", "fp4dist._absent")
        reason = cuda.load_extension()
        assert reason is not None
        assert "not built" in reason
        assert "FP4DIST_CUDA=1 pip install --no-build-isolation" in reason

    def test_an_extension_that_does_not_load_says_why(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(_: str) -> None:
            raise ImportError("undefined symbol: _ZN3c10")

        monkeypatch.setattr(cuda, "import_module", broken)
        reason = cuda.load_extension()
        assert reason is not None
        assert "undefined symbol: _ZN3c10" in reason
        assert "rebuild" in reason

    @pytest.mark.skipif(cuda.MISSING is None, reason="the extension is built")
    def test_asking_for_it_names_the_reason(self) -> None:
        assert cuda.MISSING is not None
        with pytest.raises(KernelUnavailable, match="not built"):
            resolve(ON_CUDA, BackendConfig(kind="cuda"))
        assert explain(ON_CUDA, BackendConfig())["cuda"] == cuda.MISSING


def expected(x: Tensor) -> Tensor:
    return x.abs().amax().float()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.skipif(cuda.MISSING is not None, reason=str(cuda.MISSING))
class TestAmax:
    """`amax` of the extension against torch, on a GPU."""

    @pytest.fixture(autouse=True)
    def _seeded(self) -> None:
        torch.manual_seed(0)

    @staticmethod
    def amax(x: Tensor) -> Tensor:
        return resolve(Request("amax", None, x.device), BackendConfig(kind="cuda"))(x)

    def check(self, x: Tensor) -> None:
        result = self.amax(x)
        assert result.shape == ()
        assert result.dtype == torch.float32
        assert result.device == x.device
        assert torch.equal(result, expected(x)), (result, expected(x))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("size", SIZES)
    def test_equals_torch_at_every_alignment(self, size: int, dtype: torch.dtype) -> None:
        """Sizes around the vector width, each from every offset inside a 16-byte vector."""
        whole = torch.randn(size + 16, device="cuda").to(dtype)
        for offset in range(16 // dtype.itemsize + 1):
            self.check(whole[offset : offset + size])

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_every_position_is_read_and_no_neighbour(self, dtype: torch.dtype) -> None:
        """A single large value is found wherever it lies; values just outside are not."""
        size = 100
        for offset in (0, 1, 3):
            for position in range(size):
                whole = torch.full((size + 16,), 1e4, device="cuda", dtype=dtype)
                view = whole[offset : offset + size]
                view.fill_(0.5)
                view[position] = -2.0
                assert self.amax(view).item() == 2.0

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("size", [5, 4099, 3_000_001])
    def test_nan_and_infinity_propagate(self, size: int, dtype: torch.dtype) -> None:
        for position in (0, size // 2, size - 1):
            x = torch.randn(size, device="cuda").to(dtype)
            x[position] = float("-inf")
            assert self.amax(x).item() == float("inf")
            for sign in (1.0, -1.0):
                x[size // 3] = torch.copysign(torch.tensor(float("nan")), torch.tensor(sign))
                assert self.amax(x).isnan()

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_zeros_subnormals_and_the_largest_value(self, dtype: torch.dtype) -> None:
        smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        for value in (0.0, -0.0, smallest, -smallest, torch.finfo(dtype).max, torch.finfo(dtype).min):
            self.check(torch.full((1000,), value, device="cuda", dtype=dtype))
        assert not self.amax(torch.full((1000,), -0.0, device="cuda", dtype=dtype)).signbit()

    def test_all_16_bit_patterns(self) -> None:
        patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).cuda()
        for dtype in (torch.bfloat16, torch.float16):
            for x in patterns.view(dtype)[:, None].unbind(0)[::31]:
                assert torch.allclose(self.amax(x), expected(x), rtol=0, atol=0, equal_nan=True)

    def test_dense_layouts(self) -> None:
        x = torch.randn(3, 65, 33, device="cuda", dtype=torch.bfloat16)
        self.check(x)
        self.check(x.transpose(0, 2))
        self.check(x[1])
        self.check(torch.randn((), device="cuda"))

    def test_repeats_bit_for_bit_on_a_side_stream_and_in_a_graph(self) -> None:
        x = torch.randn(2_000_003, device="cuda", dtype=torch.bfloat16)
        first = self.amax(x)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            assert all(torch.equal(self.amax(x), first) for _ in range(20))
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = self.amax(x)
        x.mul_(-4.0)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(captured, 4 * first)

    def test_the_door(self) -> None:
        with pytest.raises(ValueError, match="is empty"):
            self.amax(torch.empty(0, 4, device="cuda"))
        with pytest.raises(ValueError, match="has gaps or overlaps"):
            self.amax(torch.randn(8, 8, device="cuda")[:, ::2])
        with pytest.raises(TypeError, match="must be bfloat16, float16 or float32"):
            self.amax(torch.zeros(4, dtype=torch.float64, device="cuda"))
        reason = explain(Request("amax", None, torch.device("cpu")), BackendConfig())["cuda"]
        assert reason == "needs a CUDA device, not cpu"

    def test_compiles_without_a_graph_break(self) -> None:
        x = torch.randn(1000, device="cuda")
        compiled = torch.compile(lambda t: torch.ops.fp4dist.amax(t) * 2.0, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), expected(x) * 2.0)
