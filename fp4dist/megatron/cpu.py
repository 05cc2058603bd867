"""What Megatron-core needs to train on a machine without a GPU (gloo instead of NCCL). A GPU run is never touched.

Two rules keep it narrow:
1. A torch function is replaced only if without a GPU it can do nothing but raise.
2. Everything else is changed inside Megatron. Its `device="cuda"` and its comparisons with type names such as
   'torch.cuda.FloatTensor' are constants of some forty functions; they are exchanged in the compiled code of the
   modules in RETARGETED, so that torch.zeros, Tensor.type and all their other callers stay as they are.

`tests/megatron/test_cpu.py` takes the shims away one at a time and expects the error that each docstring names.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor

from fp4dist.megatron.upstream import rope_utils, tensor_parallel, token_dispatcher

log = logging.getLogger("fp4dist")
_random = tensor_parallel.random

# modules on the way of a training step or a checkpoint whose functions name the device 'cuda' or a torch.cuda type
RETARGETED = (
    "megatron.core.dist_checkpointing.exchange_utils",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.optimizer.distrib_optimizer",
    "megatron.core.optimizer.grad_scaler",
    "megatron.core.optimizer.optimizer",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.tensor_parallel.data",
    "megatron.core.utils",
)
_CONSTANTS = {
    "cuda": "cpu",
    "torch.cuda.FloatTensor": "torch.FloatTensor",
    "torch.cuda.HalfTensor": "torch.HalfTensor",
    "torch.cuda.BFloat16Tensor": "torch.BFloat16Tensor",
}

_installed: tuple[str, ...] = ()


def install_cpu_shims() -> tuple[str, ...]:
    """Let Megatron-core run on the CPU; returns the names of the shims in force, () on a machine with a GPU.

    The first call says in the log what it did, later ones do nothing. There is no way back within a process.
    """
    global _installed
    if torch.cuda.is_available() or _installed:
        return _installed
    for install in SHIMS.values():
        install()
    _installed = tuple(SHIMS)
    log.info("no GPU: Megatron-core runs on the CPU by means of %d shims: %s", len(_installed), ", ".join(_installed))
    return _installed


def _current_device() -> None:
    """torch.cuda.current_device() is the CPU: Megatron allocates with `device=torch.cuda.current_device()` everywhere.

    Without: torch.cuda._lazy_init raises 'Torch not compiled with CUDA enabled', or 'Found no NVIDIA driver' with a
    CUDA build of torch; first in RotaryEmbedding.forward.
    """
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment]


def _tensor_cuda() -> None:
    """Tensor.cuda() returns the tensor itself: optimizer state on loading, copies of a tied embedding.

    Without: the same error, first in LanguageModule.setup_embeddings_and_output_layer.
    """
    Tensor.cuda = lambda self, *_args, **_kwargs: self  # type: ignore[method-assign]


def _synchronize() -> None:
    """torch.cuda.synchronize() does nothing: a CPU has no stream to wait for.

    Without: the same error in dist_checkpointing's writer, timers and pipeline communication.
    """
    torch.cuda.synchronize = lambda device=None: None


def _current_stream() -> None:
    """torch.cuda.current_stream() is a stream on which everything is done already.

    Without: the same error in _ParamAndGradBucketGroup.start_grad_sync of Megatron-core 0.19 and later.
    """
    torch.cuda.current_stream = lambda device=None: _DoneStream()  # type: ignore[assignment,return-value]


def _rng_tracker() -> None:
    """The tracker of named RNG states forks the CPU generator.

    Without: the same error in model_parallel_cuda_manual_seed and in activation recomputation.
    """
    _random.CudaRNGStatesTracker = CpuRNGStatesTracker
    _random._get_cuda_rng_state = _get_rng_state
    _random._set_cuda_rng_state = _set_rng_state
    # a tracker that exists already is of the old class and cannot have worked
    _random._CUDA_RNG_STATE_TRACKER = None
    _random._CUDA_RNG_STATE_TRACKER_INITIALIZED = False


def _device_names() -> None:
    """'cuda' is 'cpu' and 'torch.cuda.FloatTensor' is 'torch.FloatTensor' in the functions of RETARGETED.

    Without: the same error, first in MixedPrecisionOptimizer; then TypeError 'Wrapped parameter must be one of
    torch.cuda.FloatTensor' in DistributedOptimizer and AssertionError in clip_grad_by_total_norm_fp32.
    """
    for name in RETARGETED:
        module = import_module(name)
        for function in _functions(module):
            function.__code__ = _retarget(function.__code__)


def _moe_stream() -> None:
    """The all-to-all dispatcher of experts has a stream for copying its counts to the CPU, where they are already.

    Without: RuntimeError 'torch.cuda.Stream requires CUDA support', or the same error with a CUDA build of torch, in
    MoEAlltoAllTokenDispatcher.__init__.
    """
    dispatcher: Any = token_dispatcher.MoEAlltoAllTokenDispatcher
    dispatcher.cuda_dtoh_stream = _DoneStream()


def _moe_splits() -> None:
    """Of that copy's effect there remains: its callers find the splits as numpy arrays.

    Without: AttributeError in MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize, which records an event there.
    """
    dispatcher: Any = token_dispatcher.MoEAlltoAllTokenDispatcher
    dispatcher._maybe_dtoh_and_synchronize = _splits_to_numpy


def _pinned_rope() -> None:
    """The positions of a context-parallel rank are picked by an index that is not in pinned memory.

    Without: RuntimeError 'pin_memory=True requires a CUDA or other accelerator backend' in RotaryEmbedding.forward.
    """
    code = rope_utils.get_pos_emb_on_this_cp_rank.__code__
    unpinned = tuple(False if constant is True else constant for constant in code.co_consts)
    rope_utils.get_pos_emb_on_this_cp_rank.__code__ = code.replace(co_consts=unpinned)


SHIMS: dict[str, Callable[[], None]] = {
    "current_device": _current_device,
    "tensor_cuda": _tensor_cuda,
    "synchronize": _synchronize,
    "current_stream": _current_stream,
    "rng_tracker": _rng_tracker,
    "device_names": _device_names,
    "pinned_rope": _pinned_rope,
    "moe_stream": _moe_stream,
    "moe_splits": _moe_splits,
}


class _DoneStream:
    """A torch.cuda.Stream without work."""

    def wait_stream(self, stream: Any) -> None:
        """Nothing to wait for."""

    def wait_event(self, event: Any) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""


def _splits_to_numpy(self: Any, point: str, tokens_per_expert: Tensor | None = None) -> Tensor | None:
    """Of _maybe_dtoh_and_synchronize what is left on a CPU: splits as numpy arrays, which its callers expect."""
    if not self.drop_and_pad and point == self.cuda_dtoh_point:
        for name in ("input_splits", "output_splits", "output_splits_tp"):
            splits = getattr(self, name)
            setattr(self, name, splits.numpy() if isinstance(splits, Tensor) else splits)
    return tokens_per_expert


class CpuRNGStatesTracker(_random.CudaRNGStatesTracker):
    """Megatron's tracker over torch's CPU generator, the only one that this machine draws from."""

    def add(self, name: str, seed: int) -> None:
        """Keep the state that `seed` gives under `name`."""
        if seed in self.seeds_ or name in self.states_:
            raise ValueError(f"RNG state {name!r} or its seed {seed} is already taken; reset() the tracker first")
        self._is_initialized = True
        self.seeds_.add(seed)
        self.states_[name] = torch.Generator().manual_seed(seed).get_state()

    @contextmanager
    def fork(self, name: str = _random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Generator[None]:
        """Draw from state `name` inside the block, then go on with the state from before it.

        Not Megatron's own, which logs a warning whenever the CPU generator has moved: here it is meant to.
        """
        if name not in self.states_:
            raise KeyError(f"RNG state {name!r} was not added; call model_parallel_cuda_manual_seed(seed) first")
        before, before_name = torch.get_rng_state(), self._current_state_name
        if before_name in self.states_:
            self.states_[before_name] = before
        torch.set_rng_state(self.states_[name])
        self._current_state_name = name
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            self._current_state_name = before_name
            torch.set_rng_state(self.states_.get(before_name, before))


def _get_rng_state(device: Any = "cpu", clone: bool = False, graph_safe: bool = False) -> Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: Tensor, device: Any = -1, graph_safe: bool = False) -> None:
    torch.set_rng_state(new_state)


def _functions(module: ModuleType) -> Iterator[FunctionType]:
    """Every function whose source is this module: its own, its classes' methods, and those inside decorators."""
    owners = [module, *(o for o in vars(module).values() if inspect.isclass(o) and o.__module__ == module.__name__)]
    for member in [member for owner in owners for member in vars(owner).values()]:
        function = member.fget if isinstance(member, property) else member
        while function is not None:
            if isinstance(function, FunctionType) and function.__code__.co_filename == module.__file__:
                yield function
            # decorated functions, classmethods and staticmethods hold the original here
            function = getattr(function, "__wrapped__", None)


def _retarget(code: CodeType) -> CodeType:
    """The same code with _CONSTANTS exchanged, in inner functions and in tuples of constants too."""
    return code.replace(co_consts=tuple(map(_retarget_constant, code.co_consts)))


def _retarget_constant(constant: Any) -> Any:
    if isinstance(constant, CodeType):
        return _retarget(constant)
    if isinstance(constant, str):
        return _CONSTANTS.get(constant, constant)
    if isinstance(constant, tuple | frozenset) and any(c in _CONSTANTS for c in constant if isinstance(c, str)):
        return type(constant)(map(_retarget_constant, constant))
    return constant
