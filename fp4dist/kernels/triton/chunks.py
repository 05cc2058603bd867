# pyright: basic, reportArgumentType=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# Triton's own language: its kernels' parameters have no types, branches on constants look like run-time ones.
"""Device code that reads a tile for a quantizer so that few instructions are needed.

A thread has a chunk of E = 16 or 32 neighbouring columns of a row of the output: with 32, five of the seven stages of a
rotation of 128 stay in its registers. Of memory whose rows are the output's columns it reads words, which hold 2 bf16
or 8 codes of neighbouring rows; it keeps the words and takes one row out of them after the other.

READ  0: rows of a matrix whose columns are contiguous, in words of two bf16 or as they are; 1: one whose rows are
      (x^T); 2: codes of the transpose
S     steps of a program, a row of each word (READ 1, 2), or R / S rows (READ 0)
"""

from __future__ import annotations

import triton
import triton.language as tl

from fp4dist.kernels.triton import arithmetic as a
from fp4dist.kernels.triton import lanes


@triton.jit
def _load(at, inside, EVEN: tl.constexpr):
    """0 where not inside, which is not looked at if EVEN."""
    if EVEN:
        found = tl.load(at)
    else:
        found = tl.load(at, mask=inside, other=0)
    return found


@triton.jit
def _row_chunks(x, stride, row, col, rows, cols, R: tl.constexpr, N: tl.constexpr, E: tl.constexpr,
                EVEN: tl.constexpr):  # fmt: skip
    """[G, E] elements of a matrix with contiguous columns, G = R * N / E chunks in row-major order; 0 outside."""
    P: tl.constexpr = 128 // x.dtype.element_ty.primitive_bitwidth  # elements of a thread's vector
    run, place = lanes.runs(R * N // E, E, P)
    r, c = run // (N // E), run % (N // E) * E + place
    start = x + (row.to(tl.int64) * stride + col)
    y = _load(start + (r * stride + c), (row + r < rows) & (col + c < cols), EVEN)
    return lanes.of_runs(y, R * N // E, E)


@triton.jit
def _word_chunks(x, stride, row, col, rows, cols, S: tl.constexpr, R: tl.constexpr, N: tl.constexpr,
                 E: tl.constexpr, EVEN: tl.constexpr, LINE: tl.constexpr):  # fmt: skip
    """[G, E] words of a matrix with contiguous rows, each of S rows: G = R / S * N / E chunks; 0 outside.

    stride   words from one column to the next;  LINE   the same, known to the compiler, of whole tiles: a thread has
             one address, and its loads have distances. Else 0
    """
    W: tl.constexpr = 32 * E // N  # words side by side in a warp, whose other threads lie along the columns
    w, c = lanes.words(R // S, N, E, W)
    if LINE > 0:
        run = tl.arange(0, R // S * N) // (R // S * (N // E))  # of a thread's own columns
        word = tl.load(x + (col.to(tl.int64) * LINE + row // S) + ((c - run) * LINE + w) + run * LINE)
    else:
        start = x + (col.to(tl.int64) * stride + row // S)
        word = _load(start + (c * stride + w), (row + w * S < rows) & (col + c < cols), EVEN)
    return tl.reshape(lanes.of_words(word, R // S, N, E, W), (R // S * N // E, E))


@triton.jit
def _stored_scales(scales, row, col, rows, cols, QBR: tl.constexpr, QBC: tl.constexpr, R: tl.constexpr,
                   N: tl.constexpr, E: tl.constexpr, EVEN: tl.constexpr):  # fmt: skip
    """[G, E] int32 scale bytes of words of eight codes, as `_word_chunks` has them; blocks [QBR, QBC] of the codes."""
    W: tl.constexpr = 32 * E // N
    w, c = lanes.words(R // 8, N, E, W)
    place = (col // QBR + c // QBR) * (rows // QBC) + row // QBC + w * 8 // QBC  # tiles begin where blocks do
    stored = _load(scales + place, (row + w * 8 < rows) & (col + c < cols), EVEN)
    return tl.reshape(lanes.bytes_of_words(stored, R // 8, N, E, W, QBR), (R // 8 * N // E, E))


@triton.jit
def _flips(signs, M: tl.constexpr, N: tl.constexpr, E: tl.constexpr, ROT: tl.constexpr):
    """[M * N / E, E] int32 sign bits, set where the sign of a column (of a group of ROT) is -1."""
    i = tl.arange(0, M * N // E) % (N // E) * E % ROT
    word = tl.load(signs + i // 32) >> i % 32
    return word[:, None] << (31 - tl.arange(0, E) % ROT)[None, :] & -2147483648


@triton.jit
def _pair_flips(signs, M: tl.constexpr, N: tl.constexpr, E: tl.constexpr, ROT: tl.constexpr):
    """[M * N / E, E / 2] int32: the sign bits of two neighbouring columns, for words of two bf16."""
    i = tl.arange(0, M * N // E) % (N // E) * E % ROT
    word = (tl.load(signs + i // 32) >> i % 32)[:, None] >> (tl.arange(0, E // 2) * 2 % ROT)[None, :]
    return ((word << 15) & 0x8000) | ((word << 30) & -2147483648)


@triton.jit
def words_of(
    x, stride, qscales, signs, row, col, rows, cols,
    R: tl.constexpr, N: tl.constexpr, E: tl.constexpr, ROT: tl.constexpr, SIGNED: tl.constexpr, READ: tl.constexpr,
    S: tl.constexpr, QBR: tl.constexpr, QBC: tl.constexpr, QE8M0: tl.constexpr, EVEN: tl.constexpr,
    LINE: tl.constexpr = 0,
):  # fmt: skip
    """(words, decode scales of codes, sign bits) of the tile [R, N] at (row, col), each [G, E], for `rows_of`; zeros
    where it has no use for them. LINE: see `_word_chunks`.
    """
    G: tl.constexpr = R // S * N // E
    flips = tl.zeros((G, E), tl.int32)
    if SIGNED:
        flips = _flips(signs, R // S, N, E, ROT)
    word, scale = flips, flips
    if SIGNED & (READ == 0) & (x.dtype.element_ty == tl.int32):
        flips = _pair_flips(signs, R // S, N, E, ROT)
    if READ > 0:
        word = _word_chunks(x, stride, row, col, rows, cols, S, R, N, E, EVEN, LINE)
    if READ == 2:
        stored = _stored_scales(qscales, row, col, rows, cols, QBR, QBC, R, N, E, EVEN)
        if QE8M0:
            scale = a.decode_e8m0(stored)
        else:  # codes are decoded 2^126 too small: by 2^118 here, and by 2^8 in `rows_of`, where no product overflows
            scale = a.floats(stored << 20) * 1.329227995784916e36
            scale = tl.where(stored == 0x7F, float("nan"), scale * 3.3230699894622897e35)
    if SIGNED & (READ == 2):
        word = word ^ ((flips >> 31) & -2004318072)  # the sign bits of eight codes
    if SIGNED & (READ == 1) & (S == 2):
        word = word ^ ((flips >> 31) & -2147450880)  # of two bf16
    return word, scale, flips


@triton.jit
def rows_of(
    x, stride, outer, word, scale, flips, s, row, col, rows, cols,
    R: tl.constexpr, N: tl.constexpr, E: tl.constexpr, ROT: tl.constexpr, SIGNED: tl.constexpr, READ: tl.constexpr,
    S: tl.constexpr, QE8M0: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """[G, E] rotated fp32 values of step s: rows row + s, row + s + S, ... (READ 1, 2), or row + s * R / S and on."""
    if READ == 2:
        code = word << (28 - 4 * s)
        y = a.floats(((code >> 6) & 0x01C00000) | (code & -2147483648))
        y = y * 8.507059173023462e37 * scale * tl.load(outer) if QE8M0 else y * scale * (tl.load(outer) * 256.0)
    elif (READ == 1) & (S == 2):
        y = a.floats((word << (16 - 16 * s)) & -65536)
    elif (READ == 0) & (x.dtype.element_ty == tl.int32):
        word = _row_chunks(x, stride, row + s * (R // S), col // 2, rows, cols // 2, R // S, N // 2, E // 2, EVEN)
        if SIGNED:
            word = word ^ flips
        y = a.floats(tl.reshape(tl.join(word << 16, word & -65536), (R // S * N // E, E)))
    else:
        if READ == 0:
            word = _row_chunks(x, stride, row + s * (R // S), col, rows, cols, R // S, N, E, EVEN)
        if word.dtype == tl.bfloat16:  # by bits: the interpreter's cast loses subnormal numbers
            y = a.floats(word.to(tl.int16, bitcast=True).to(tl.int32) << 16)
        else:
            y = word
        if SIGNED:
            y = a.floats(a.bits(y) ^ flips)
    if ROT > 1:
        y = a.rotate(y, R // S * N // E, E, ROT)
    return y


@triton.jit
def of_pair(program, rows, cols, R: tl.constexpr, N: tl.constexpr, T_R: tl.constexpr, T_N: tl.constexpr):
    """(is it a tile of the transpose, row, column) of a program: those that read the same T_N x N elements of
    x [rows, cols] follow each other, so that the second reading finds them in the cache.
    """
    STRAIGHT: tl.constexpr = T_N // R
    EACH: tl.constexpr = STRAIGHT + N // T_R
    region, i = program // EACH, program % EACH
    across = tl.cdiv(cols, N)
    row, col = region // across * T_N, region % across * N
    turned = i >= STRAIGHT
    return turned, tl.where(turned, col + (i - STRAIGHT) * T_R, row + i * R), tl.where(turned, row, col)


@triton.jit
def store(values, at, row, col, rows, cols, M: tl.constexpr, S: tl.constexpr, C: tl.constexpr, EVEN: tl.constexpr):
    """[M * C] values into rows row, row + S, ... and C columns from `col` of a contiguous [rows, cols]."""
    r = tl.arange(0, M)[:, None] * S
    c = col + tl.arange(0, C)[None, :]
    to = at + (row.to(tl.int64) * cols + r * cols + c)
    values = tl.reshape(values, (M, C))
    if EVEN:
        tl.store(to, values)
    else:
        tl.store(to, values, mask=(row + r < rows) & (c < cols))


@triton.jit
def store_runs(
    values, at, row, col, rows, cols, M: tl.constexpr, S: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
    WHOLE: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """The same, where a thread holds runs of K values: it writes them at once, without an exchange with others.

    WHOLE   `cols` is a multiple of K, as is `col`
    """
    if WHOLE:
        cols, col = cols // K * K, col // K * K  # which the compiler cannot know otherwise
    run = tl.arange(0, M * C // K)[:, None]
    r, c = run // (C // K) * S, run % (C // K) * K + tl.arange(0, K)[None, :]
    to = at + (row.to(tl.int64) * cols + col + (r * cols + c))
    values = tl.reshape(values, (M * C // K, K))
    if EVEN:
        tl.store(to, values)
    else:
        tl.store(to, values, mask=(row + r < rows) & (col + c < cols))
