"""What travels compressed, decided before the run from names, sizes and links, and told.

A bucket's segments (parameters) are coded unless their gradients must stay exact: vectors, embeddings, the LM head,
routers and norms, and what is too short to matter. For `auto` a bucket is also weighed: with n elements of b bytes to
reduce over W ranks, c bytes a coded element, a link of B and memory of M bytes a second,

    exact   latency + n b (W-1)/W / B
    coded   latency + n c (W-1)/W / B  +  fixed + n (b + 2 c + 4/W) / (h M)

the codec reads b, writes and reads c, and writes the fp32 sum of this rank's part. Across domains the first hop of a
two-level reduction stays inside the domain in high precision and the coded second hop carries n / L elements.

Two ranks exchange their halves in one of two ways, `pairs`:

    all_to_all   n c / 2 / (s B)                   s: share of a network's rate that NCCL reaches so
    all_gather   n c / 2 / B  +  n c / (h M)       over more connections; copies the own half, too
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fp4dist.errors import ConfigError
from fp4dist.spec.cluster import Topology
from fp4dist.spec.communication import CommConfig, Pairs
from fp4dist.spec.wire import Wire

SMALL = 4096  # elements of a tensor that is not worth coding
_COPY_SHARE = 0.8  # of the memory's bandwidth that streaming kernels reach
_FIXED_S = 30e-6  # launches and the all-to-all's start, beyond one collective's latency
# Of the rate of sockets between two H200, that an all-to-all reached: 0.66 (MS-EDEN) and 0.76 (nearest) at 256 MiB.
_PAIR_SHARE = 0.7
_CPU_S = 60e-9  # seconds an element that the reference codec takes on a CPU core
_WORD = r"(?:^|[._])"
_EXACT_NAMES = (
    ("embedding", re.compile(_WORD + r"(?:\w*embed\w*|wte|wpe)(?:\.|$)")),
    ("LM head", re.compile(_WORD + r"(?:output_layer|lm_head)(?:\.|$)")),
    ("router", re.compile(_WORD + r"(?:router|gate)\.weight$")),
    ("norm", re.compile(r"norm|(?:^|\.)ln_\w+\.")),
)


def why_exact(name: str, shape: Sequence[int]) -> str | None:
    """Why the gradient of parameter `name` stays in high precision; None: it may be coded."""
    for word, pattern in _EXACT_NAMES:
        if pattern.search(name):
            return word
    if len(shape) < 2:
        return "vector"
    numel = 1
    for size in shape:
        numel *= size
    return f"under {SMALL} elements" if numel < SMALL else None


@dataclass(frozen=True, slots=True)
class Span:
    """Where a group's ranks lie: `inside` of them in each of `domains` that NVLink joins.

    regular   consecutive ranks of the group share a domain, and each domain holds equally many: levels can be made
    """

    inside: int
    domains: int
    regular: bool = True

    @property
    def size(self) -> int:
        """Ranks."""
        return self.inside * self.domains


def span_of(ranks: Sequence[int], topology: Topology | None) -> Span:
    """The Span of a group with these global ranks; without a topology all share one domain."""
    if topology is None:
        return Span(len(ranks), 1)
    places = [rank // topology.usable_per_domain for rank in ranks]
    counts = [places.count(place) for place in dict.fromkeys(places)]
    regular = len(set(counts)) == 1 and places == sorted(places)
    return Span(max(counts), len(counts), regular)


def levels(config: CommConfig, span: Span, what: str) -> tuple[int, int] | None:
    """(ranks inside, groups of them) of a two-level collective; None: one level.

    Raises ConfigError where the sizes that were asked for do not fit the group of `what`.
    """
    sizes = config.sizes
    if sizes is None and config.error_feedback != "none":  # a sum coded inside belongs to no rank's error
        return None
    if sizes is None:
        two = span.domains > 1 and span.inside > 1 and span.regular
        return (span.inside, span.domains) if two else None
    inner, outer = sizes[0], 1
    for size in sizes[1:]:
        outer *= size
    if len(sizes) > 2 or inner * outer != span.size:
        raise ConfigError(
            f"comm.hierarchy = {list(sizes)}: {what} has {span.size} ranks, which two levels [inside, across] must"
            " multiply to; correct it, or leave it out"
        )
    return (inner, outer) if inner > 1 and outer > 1 else None


def pair_gain(topology: Topology) -> float:
    """Time of an all-to-all of two ranks of different domains over that of an all-gather; below 1 the latter loses."""
    link = topology.across.gb_per_s
    return (1 / _PAIR_SHARE) / (1 + 2 * link / (_COPY_SHARE * topology.gpu.bandwidth_gb_s))


def pairs_of(
    config: CommConfig, span: Span, two: tuple[int, int] | None, topology: Topology | None
) -> tuple[Pairs, str]:  # fmt: skip
    """How two ranks exchange a reduction's halves, and what to print of it; of more ranks the first is meaningless.

    two   levels of the reduction, of which the outer one may be between two ranks
    """
    members = span.size if two is None else two[1]
    if members != 2:
        return "all_to_all", ""
    if config.pairs != "auto":
        return config.pairs, f"pairs: {config.pairs} asked for"
    apart = topology is not None and span.domains == 2 and topology.gpu.family != "cpu"
    if topology is None or not apart:
        return "all_to_all", ""
    faster, name = pair_gain(topology), topology.across.name
    if faster > 1:
        return "all_gather", f"all-gather of two ranks over {name}: {faster:.2f}x of an all-to-all"
    return "all_to_all", f"all-to-all of two ranks over {name}: an all-gather is {faster:.2f}x of it"


def gain(numel: int, wire: Wire, itemsize: int, span: Span, topology: Topology) -> float:
    """Expected time of a reduce-scatter in high precision over that of the coded one; below 1 coding loses."""
    n, b, c, size = float(numel), float(itemsize), wire.bytes_per_element, span.size
    inside, across = topology.inside, topology.across
    gpu = topology.gpu
    if gpu.family == "cpu":
        per_element = _CPU_S
    else:
        own = c if (size, span.domains) == (2, 2) else 0.0  # an all-gather's copy
        per_element = (b + 2 * c + own + 4 / size) / (_COPY_SHARE * gpu.bandwidth_gb_s * 1e9)
    if span.domains == 1:
        share, rate, latency = (size - 1) / size, inside.gb_per_s * 1e9, inside.latency_us * 1e-6
        exact = latency + n * b * share / rate
        return exact / (latency + n * c * share / rate + _FIXED_S + n * per_element)
    latency, apart = across.latency_us * 1e-6, (span.domains - 1) / span.domains
    hop = n * b * (span.inside - 1) / span.inside / (inside.gb_per_s * 1e9)
    part = n / span.inside
    exact = latency + max(hop, part * b * apart / (across.gb_per_s * 1e9))  # a ring runs both links at once
    coded = latency + hop + part * c * apart / (across.gb_per_s * 1e9) + _FIXED_S + part * per_element
    return exact / coded


def break_even(wire: Wire, itemsize: int, span: Span, topology: Topology) -> int | None:
    """Elements from which on coding pays; None where it never does."""
    low, high = 1, 2**34
    if gain(high, wire, itemsize, span, topology) <= 1:
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if gain(middle, wire, itemsize, span, topology) > 1 else (middle + 1, high)
    return low


@dataclass(frozen=True, slots=True)
class Decision:
    """What becomes of one bucket, or of one kind of message.

    direction   a field of CommConfig;  place   which bucket or message
    wire        of its coded elements; None: all of it travels as the engine sends it
    numel       its elements;  coded   those that are coded
    before      bytes that a rank sends of it in a step, as the engine does;  after   with this decision
    gain        expected time before over after; None where no topology is known
    why         reasons for what stays exact
    levels      (ranks inside, groups of them) of a reduction on two levels
    pairs       how its halves are exchanged where only two ranks do
    """

    direction: str
    place: str
    wire: Wire | None
    numel: int
    coded: int
    before: int
    after: int
    gain: float | None
    why: str
    levels: tuple[int, int] | None = None
    pairs: Pairs = "all_to_all"

    def row(self) -> tuple[str, ...]:
        """The cells of the table."""
        return (
            self.direction,
            self.place,
            self.wire.label() if self.wire is not None else "-",
            f"{self.numel:,}",
            f"{self.coded / self.numel:.0%}" if self.numel else "-",
            f"{self.before:,}",
            f"{self.after:,}",
            f"{self.gain:.2f}x" if self.gain is not None else "?",
            self.why,
        )


def decide(
    config: CommConfig, direction: str, place: str, *, numel: int, coded: int, itemsize: int, span: Span,
    topology: Topology | None, why: str, halves: int = 1,
) -> Decision:  # fmt: skip
    """The Decision for a bucket of `numel` elements of `itemsize` bytes, `coded` of which may be coded.

    halves   2 for an all-reduce, whose sum travels again
    """
    wire, size = config.wire(direction), span.size
    share = halves * (size - 1) / size
    before = round(numel * itemsize * share)

    def left(reason: str) -> Decision:
        return Decision(direction, place, None, numel, 0, before, before, None, reason)

    if wire is None:
        return left("not asked for")
    if size == 1:
        return left("one rank")
    if not coded:
        return left(why or "nothing to code")
    expected = gain(coded, wire, itemsize, span, topology) if topology is not None else None
    if config.choice_is_auto(direction):
        least = config.min_numel
        if least != "auto" and coded < least:
            return left(f"{coded:,} elements are fewer than min_numel = {least:,}")
        if least == "auto" and expected is not None and expected <= 1:
            assert topology is not None
            from_on = break_even(wire, itemsize, span, topology)
            beyond = f"pays from {from_on:,} elements on" if from_on is not None else "never pays on this link"
            return left(f"{wire.label()} {beyond}")
        if span.domains > 1 and span.inside > 1 and levels(config, span, place) is None:
            return left("one level over several domains would put more on the network than a ring does")
    after = round((numel - coded) * itemsize * share + wire.bytes_of(-(-coded // size)) * (size - 1) * halves)
    return Decision(direction, place, wire, numel, coded, before, after, expected, why)


def decide_message(
    config: CommConfig, direction: str, place: str, *, numel: int, itemsize: int, messages: int, span: Span,
    topology: Topology | None, share: float = 1.0,
) -> Decision:  # fmt: skip
    """The Decision for messages of `numel` elements, `share` of which leaves the rank, `messages` of them in a step."""
    wire = config.wire(direction)
    before = round(numel * itemsize * share) * messages

    def left(reason: str) -> Decision:
        return Decision(direction, place, None, numel, 0, before, before, None, reason)

    if wire is None:
        return left("not asked for")
    expected = gain(numel, wire, itemsize, span, topology) if topology is not None else None
    if config.choice_is_auto(direction) and expected is not None and expected <= 1:
        return left(f"{wire.label()} does not pay on this link")
    after = round(wire.bytes_of(numel) * share) * messages
    return Decision(direction, place, wire, numel, numel, before, after, expected, "")


def table(decisions: Iterable[Decision]) -> str:
    """The decisions in columns, with totals."""
    decisions = list(decisions)
    head = ("direction", "what", "wire", "elements", "coded", "bytes before", "after", "gain", "what stays, and why")
    rows = [head, *(d.row() for d in decisions)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head) - 1)]
    lines = [
        "  ".join([*(cell.ljust(w) for cell, w in zip(row[:-1], widths, strict=True)), row[-1]]).rstrip()
        for row in rows
    ]
    before, after = sum(d.before for d in decisions), sum(d.after for d in decisions)
    share = f" ({after / before:.1%})" if before else ""
    return "\n".join([*lines, f"bytes that this rank sends in a step: {before:,} before, {after:,} after{share}"])


def digest(config: CommConfig, decisions: Iterable[Decision]) -> str:
    """16 hex digits of everything on which the ranks of a group must agree."""
    text = repr((config, [(d.direction, d.place, d.wire, d.numel, d.coded, d.levels, d.pairs) for d in decisions]))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
