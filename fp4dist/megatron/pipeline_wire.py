"""Pipeline messages as codes: activations to the next stage, their gradients back.

A P2PCommunicator of Megatron's schedules whose tensors travel as uint8 records, whose length both sides know from the
shape. The n-th message of a direction in a step has the same noise key on both sides. Where no direction is coded
everything is Megatron's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import p2p_communication as p2p
from torch import Tensor

from fp4dist.comm.codec import Noise, decode, encode
from fp4dist.comm.compression import Compression
from fp4dist.comm.policy import Decision, decide_message, span_of
from fp4dist.errors import ConfigError
from fp4dist.spec.wire import Wire


class CodedPipeline(p2p.P2PCommunicator):
    """Of one rank in the pipeline `group`; `config` is the model's TransformerConfig.

    shape      of a stage's output, [S, B, H] as it travels;  messages   of each direction in a step
    """

    def __init__(
        self, group: Any, config: Any, compression: Compression, shape: tuple[int, ...], messages: int
    ) -> None:
        if config.variable_seq_lengths or getattr(config, "mtp_standalone", False):
            raise ConfigError("comm.pp_forward, pp_backward: shapes that vary between micro-batches are not supported")
        if getattr(config, "use_ring_exchange_p2p", False):
            raise ConfigError("comm.pp_forward, pp_backward: Megatron's ring exchange has no codes; switch it off")
        super().__init__(group, config)
        self._compression = compression
        self._decisions: dict[tuple[str, str], Decision] = {}
        numel = 1
        for size in shape:
            numel *= size
        stage, last = dist.get_rank(group), dist.get_world_size(group) - 1
        ways = (
            ("pp_forward", "out", self.next_rank, stage < last), ("pp_forward", "in", self.prev_rank, False),
            ("pp_backward", "out", self.prev_rank, stage > 0), ("pp_backward", "in", self.next_rank, False),
        )  # fmt: skip
        for direction, way, neighbour, sends in ways:  # `auto` weighs each link, so that both of its ends find the same
            assert neighbour is not None
            self._decisions[direction, way] = decide_message(
                compression.config, direction, "each micro-batch", numel=numel, itemsize=config.pipeline_dtype.itemsize,
                messages=messages if sends else 0, topology=compression.topology,
                span=span_of(sorted([dist.get_rank(), neighbour]), compression.topology),
            )  # fmt: skip
            if way == "out":
                compression.register(self._decisions[direction, way])
        self._step = -1
        self._counts: Counter[tuple[str, str]] = Counter()

    def _communicate(
        self,
        *,
        tensor_send_next: Tensor | None,
        tensor_send_prev: Tensor | None,
        recv_prev: bool,
        recv_next: bool,
        tensor_shape: Any,
        wait_on_reqs: bool = True,
    ) -> Any:
        """Megatron's: (tensor from the previous stage or None, from the next one or None, requests to wait for)."""
        config = self.config
        if all(self._wire(direction, way) is None for direction, way in self._decisions):
            return super()._communicate(
                tensor_send_next=tensor_send_next, tensor_send_prev=tensor_send_prev, recv_prev=recv_prev,
                recv_next=recv_next, tensor_shape=tensor_shape, wait_on_reqs=wait_on_reqs,
            )  # fmt: skip
        assert self.next_rank is not None
        assert self.prev_rank is not None
        into_prev = self._incoming("pp_forward", self.prev_rank, tensor_shape) if recv_prev else None
        into_next = self._incoming("pp_backward", self.next_rank, tensor_shape) if recv_next else None
        send = p2p._batched_p2p_ops if config.batch_p2p_comm else p2p._p2p_ops
        work = send(
            tensor_send_prev=self._outgoing("pp_backward", tensor_send_prev),
            tensor_recv_prev=into_prev.buffer if into_prev is not None else None,
            tensor_send_next=self._outgoing("pp_forward", tensor_send_next),
            tensor_recv_next=into_next.buffer if into_next is not None else None,
            group=self.pp_group,
            prev_pipeline_rank=self.prev_rank,
            next_pipeline_rank=self.next_rank,
        )
        arrivals = {"recv_prev": into_prev, "recv_next": into_next}
        tensors = tuple(a.tensor if a is not None else None for a in arrivals.values())
        if not wait_on_reqs:
            assert isinstance(work, dict), "Megatron waits at once for batched messages"
            return *tensors, {name: _Decoding(request, arrivals.get(name)) for name, request in work.items()}
        for request in work.values() if isinstance(work, dict) else work:
            request.wait()
        if config.batch_p2p_comm and config.batch_p2p_sync and torch.cuda.is_available():
            torch.cuda.synchronize()
        for arrival in arrivals.values():
            if arrival is not None:
                arrival.decode()
        return *tensors, None

    def _wire(self, direction: str, way: str) -> Wire | None:
        return self._compression.wire_of(self._decisions[direction, way])

    def _noise(self, direction: str, way: str) -> Noise:
        if self._step != self._compression.step:
            self._step = self._compression.step
            self._counts.clear()
        number = self._counts[direction, way]
        self._counts[direction, way] += 1
        return self._compression.noise(direction, number)

    def _outgoing(self, direction: str, tensor: Tensor | None) -> Tensor | None:
        """What is sent for `tensor`."""
        if tensor is None:
            return None
        plain, wire = tensor.numel() * tensor.element_size(), self._wire(direction, "out")
        if wire is None:
            return tensor
        message = encode(tensor.detach().contiguous(), wire, self._noise(direction, "out"), dist.get_rank())
        self._compression.ledger.book(direction, coded=message.numel(), plain=plain)
        return message

    def _incoming(self, direction: str, source: int, shape: Any) -> _Arrival:
        """A tensor to come, and the buffer that receives it."""
        wire = self._wire(direction, "in")
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        tensor = torch.empty(tuple(shape), dtype=self.config.pipeline_dtype, device=device, requires_grad=True)
        if wire is None:
            return _Arrival(tensor, tensor, None)
        buffer = torch.empty(wire.bytes_of(tensor.numel()), dtype=torch.uint8, device=device)
        noise = self._noise(direction, "in")

        def fill() -> None:
            values = decode(buffer, tensor.numel(), wire, noise, source)
            with torch.no_grad():
                tensor.copy_(values.view(tensor.shape))

        return _Arrival(tensor, buffer, fill)


class _Arrival:
    """A tensor to come, what receives it, and how it is made of that; None: it is what receives."""

    def __init__(self, tensor: Tensor, buffer: Tensor, fill: Callable[[], None] | None) -> None:
        self.tensor, self.buffer, self._fill = tensor, buffer, fill

    def decode(self) -> None:
        fill, self._fill = self._fill, None
        if fill is not None:
            fill()


class _Decoding:
    """A request of Megatron's that decodes what has come when it is waited for."""

    def __init__(self, request: Any, arrival: _Arrival | None) -> None:
        self._request, self._arrival = request, arrival

    def wait(self) -> None:
        self._request.wait()
        if self._arrival is not None:
            self._arrival.decode()
