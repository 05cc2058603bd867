# pyright: basic, reportArgumentType=false, reportOperatorIssue=false
# Triton's own language: its kernels' parameters have no types.
"""Device code: which elements of a tile a thread loads, so that it holds whole runs of them.

Triton gives a thread neighbours along the dimension in which addresses are contiguous, and lays the threads of a warp
along the next ones. The order of dimensions that tie is no promise (up to 3.6 it was first to last, now it is last to
first), and with another one a quantizer exchanges every value between threads. Here all that tie are one dimension,
whose digits have an order: threads lie along the fastest ones, and a thread holds all of the slowest.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def runs(G: tl.constexpr, E: tl.constexpr, P: tl.constexpr):
    """(run [E / P * G, 1] below G, place in it [E / P * G, P] below E) of loads of G runs of E elements, of which a
    thread takes P at once; see `of_runs`.
    """
    i = tl.arange(0, E // P * G)[:, None]
    return i % G, i // G * P + tl.arange(0, P)[None, :]


@triton.jit
def of_runs(y, G: tl.constexpr, E: tl.constexpr):
    """[G, E] of what was loaded from the places of `runs`."""
    P: tl.constexpr = y.shape[1]
    return tl.reshape(tl.permute(tl.reshape(y, (E // P, G, P)), (1, 0, 2)), (G, E))


@triton.jit
def words(M: tl.constexpr, N: tl.constexpr, E: tl.constexpr, W: tl.constexpr):
    """(row, column), each [M * N], of loads of a tile [M, N] of words whose rows are contiguous: W threads side by side
    along them, the others along runs of E columns, which a thread holds; see `of_words`.
    """
    i = tl.arange(0, M * N)
    r = i // (W * (N // E)) % (M // W) * W + tl.max_contiguous(i % W, 1)  # one word a thread
    return r, i // W % (N // E) * E + i // (M * (N // E))


@triton.jit
def of_words(y, M: tl.constexpr, N: tl.constexpr, E: tl.constexpr, W: tl.constexpr):
    """[M / W, W, N / E, E] of what was loaded from the places of `words`."""
    return tl.permute(tl.reshape(y, (E, M // W, N // E, W)), (1, 3, 2, 0))


@triton.jit
def bytes_of_words(y, M: tl.constexpr, N: tl.constexpr, E: tl.constexpr, W: tl.constexpr, SAME: tl.constexpr):
    """The same of bytes, as int32. SAME: columns, a power of two, that share a byte: a thread computes with it once."""
    return tl.max_constancy(of_words(y, M, N, E, W).to(tl.int32), (1, 1, 1, SAME if SAME < E else E))
