"""The chunked scan of Mamba-2 in two kernels, for inference: it keeps no gradients.

A sequence is cut into segments, and a segment into chunks. The first kernel finds what each segment
alone adds to the state at its end. The second begins each segment with the state that those before
it leave, then goes through its chunks with the state in registers: inside a chunk the masked matrix
of state space duality, between chunks the recurrence (`workbench.mamba.ssd` says both). It ends
with the skip, the gate and the norm, so that the output is written once. Only one state a segment
goes through memory, where a kernel for each step of the usual algorithm writes one a chunk.

Tiles are powers of two. A headdim of 80 is two of them, 64 + 16; d_state is filled up to 128, for
Hopper multiplies 64 rows at once or not at all. A state is (n, p) in registers, (p, n) in memory.
Strides over rows are constants, so that one address serves many rows. This module needs Triton;
import it only where that is installed.

Both tiles of a product are made before either is used, so that they do not follow each other in the
same shared memory: ptxas 12.8, which Triton 3.6 brings, then takes a wide tile's address for that
of a narrow one from a register that nothing has written, and Hopper reads outside of its memory.

Source: arXiv 2405.21060, section 6; segments of several chunks are ours.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tile(pointer, row_stride: tl.constexpr, rows, left, n, WIDTH: tl.constexpr):
    """Load (rows, n); zeros beyond the rows that are left and beyond WIDTH."""
    return tl.load(
        pointer + rows[:, None] * row_stride + n[None, :],
        mask=(rows < left)[:, None] & (n < WIDTH)[None, :], other=0.0,
    )  # fmt: skip


@triton.jit
def _state(pointer, n, p, N: tl.constexpr, P: tl.constexpr):
    """Load (n, p) from (p, n) in memory."""
    inside = (n < N)[:, None] & (p < P)[None, :]
    return tl.load(pointer + p[None, :] * N + n[:, None], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _keep(pointer, state, n, p, N: tl.constexpr, P: tl.constexpr):
    """Store (n, p) as (p, n)."""
    inside = (n < N)[:, None] & (p < P)[None, :]
    tl.store(pointer + p[None, :] * N + n[:, None], state, mask=inside)


@triton.jit
def _rate(A, head, IS_LOG: tl.constexpr):
    """Return A of a head, scaled for powers of two, which a GPU computes natively."""
    rate = tl.load(A + head).to(tl.float32)
    if IS_LOG:
        rate = -tl.exp(rate)
    return rate * LOG2_E


@triton.jit
def _advanced(S0, S1, x0, x1, B, weight, decay, TWO: tl.constexpr, PRECISION: tl.constexpr):
    """Carry a state over a chunk: decay it, and add B^T (weight x)."""
    x0 = (x0.to(tl.float32) * weight[:, None]).to(B.dtype)
    if TWO:
        x1 = (x1.to(tl.float32) * weight[:, None]).to(B.dtype)
    S0 = tl.dot(tl.trans(B), x0, S0 * decay, input_precision=PRECISION)
    if TWO:
        S1 = tl.dot(tl.trans(B), x1, S1 * decay, input_precision=PRECISION)
    return S0, S1


@triton.jit
def _scores(C, B, rows, step, since_start, skip, PRECISION: tl.constexpr):
    """Compute the matrix of a chunk: (C_i . B_j) decay from j to i, times dt_j, for j <= i.

    The skip is a constant on its diagonal.
    """
    scores = tl.dot(C, tl.trans(B), input_precision=PRECISION)
    scores *= tl.exp2(since_start[:, None] - since_start[None, :]) * step[None, :]
    scores = tl.where(rows[:, None] >= rows[None, :], scores, 0.0)
    return (scores + tl.where(rows[:, None] == rows[None, :], skip, 0.0)).to(C.dtype)


@triton.jit
def _from_state(C, S, from_start, PRECISION: tl.constexpr):
    """Compute (rows, p): what the state leaves of the past."""
    return tl.dot(C, S, input_precision=PRECISION) * from_start[:, None]


@triton.jit
def _gated(y, z, z_row: tl.constexpr, rows, left, p, P: tl.constexpr):
    """Multiply (rows, p) by SiLU of the gate, if there is one."""
    if z is not None:
        gate = _tile(z, z_row, rows, left, p, P).to(tl.float32)
        y = y * gate / (1 + tl.exp(-gate))
    return y


@triton.jit
def _write(out, y, weight, scale, rows, row_stride: tl.constexpr, left, p, P: tl.constexpr):
    """Store (rows, p), normalised if there is a norm's weight."""
    inside = (p < P)[None, :]
    if weight is not None:
        w = tl.load(weight + p, mask=p < P, other=0.0).to(tl.float32)
        y = y * scale[:, None] * w[None, :]
    tl.store(out + rows[:, None] * row_stride + p[None, :], y, mask=(rows < left)[:, None] & inside)


@triton.jit(do_not_specialize=["span", "segments", "dt_batch", "dt_head"])
def states_kernel(
    x, B, dt, A, states, decays, span, segments,
    x_batch, B_batch, dt_batch, dt_head,
    x_row: tl.constexpr, x_head: tl.constexpr, B_row: tl.constexpr, B_head: tl.constexpr,
    dt_row: tl.constexpr,
    X_REPEATS: tl.constexpr, B_REPEATS: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    P0: tl.constexpr, P1: tl.constexpr, N2: tl.constexpr, Q: tl.constexpr,
    IS_LOG: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write what one segment of one head adds to the state, and log2 of its decay."""
    head, segment, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    start = segment.to(tl.int64) * span
    x += batch * x_batch + start * x_row + head // X_REPEATS * x_head
    B += batch * B_batch + start * B_row + head // B_REPEATS * B_head
    dt += batch * dt_batch + start * dt_row + head * dt_head
    rate = _rate(A, head, IS_LOG)
    rows = tl.arange(0, Q)
    n, p0, p1 = tl.arange(0, N2), tl.arange(0, P0), P0 + tl.arange(0, P1)
    TWO: tl.constexpr = P0 < P
    S0 = tl.zeros((N2, P0), tl.float32)
    S1 = tl.zeros((N2, P1), tl.float32)
    log_decay = 0.0
    # Only whole segments come here: the last one, which may be shorter, has nothing after it.
    for done in range(0, span, Q):
        step = tl.load(dt + (done + rows).to(tl.int64) * dt_row)
        since_start = tl.cumsum(step * rate, 0)
        total = tl.sum(step * rate, 0)
        b = _tile(B, B_row, rows, Q, n, N)
        x0 = _tile(x, x_row, rows, Q, p0, P)
        x1 = x0
        if TWO:
            x1 = _tile(x, x_row, rows, Q, p1, P)
        S0, S1 = _advanced(
            S0, S1, x0, x1, b, step * tl.exp2(total - since_start), tl.exp2(total), TWO, PRECISION
        )
        log_decay += total
        x += Q * x_row
        B += Q * B_row
    slot = (batch * tl.num_programs(0) + head) * (segments - 1) + segment
    tl.store(decays + slot, log_decay)
    states += slot * P * N
    _keep(states, S0, n, p0, N, P)
    if TWO:
        _keep(states, S1, n, p1, N, P)


@triton.jit(do_not_specialize=["seqlen", "span", "segments", "dt_batch", "dt_head"])
def scan_kernel(
    x, B, C, dt, A, D, z, norm_weight, states, decays, initial, final, out,
    seqlen, span, segments, eps,
    x_batch, B_batch, C_batch, dt_batch, dt_head, z_batch,
    x_row: tl.constexpr, x_head: tl.constexpr, B_row: tl.constexpr, B_head: tl.constexpr,
    C_row: tl.constexpr, C_head: tl.constexpr, dt_row: tl.constexpr, z_row: tl.constexpr,
    X_REPEATS: tl.constexpr, B_REPEATS: tl.constexpr, C_REPEATS: tl.constexpr, HEADS: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, N2: tl.constexpr,
    Q: tl.constexpr, IS_LOG: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Mix one segment of one head, finish it, and after the last one write the state."""
    head, segment, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    start = segment.to(tl.int64) * span
    x += batch * x_batch + start * x_row + head // X_REPEATS * x_head
    B += batch * B_batch + start * B_row + head // B_REPEATS * B_head
    C += batch * C_batch + start * C_row + head // C_REPEATS * C_head
    dt += batch * dt_batch + start * dt_row + head * dt_head
    out += ((batch * seqlen + start) * HEADS + head) * P
    skip = 0.0
    if D is not None:
        skip = tl.load(D + head).to(tl.float32)
    if z is not None:
        z += batch * z_batch + start * z_row + head * P
    if norm_weight is not None:
        norm_weight += head * P
    rate = _rate(A, head, IS_LOG)
    rows = tl.arange(0, Q)
    n, p0, p1 = tl.arange(0, N2), tl.arange(0, P0), P0 + tl.arange(0, P1)
    TWO: tl.constexpr = P0 < P
    S0 = tl.zeros((N2, P0), tl.float32)
    S1 = tl.zeros((N2, P1), tl.float32)
    sequence = batch * HEADS + head
    if initial is not None:
        initial += sequence * P * N
        S0 = _state(initial, n, p0, N, P)
        if TWO:
            S1 = _state(initial, n, p1, N, P)
    for before in tl.range(0, segment, loop_unroll_factor=4):  # to have several loads in flight
        slot = sequence * (segments - 1) + before
        decay = tl.exp2(tl.load(decays + slot))
        S0 = S0 * decay + _state(states + slot * P * N, n, p0, N, P)
        if TWO:
            S1 = S1 * decay + _state(states + slot * P * N, n, p1, N, P)
    for done in range(0, tl.minimum(span, seqlen - start).to(tl.int32), Q):
        left = (seqlen - start - done).to(tl.int32)
        step = tl.load(dt + (done + rows).to(tl.int64) * dt_row, mask=rows < left, other=0.0)
        b, c = _tile(B, B_row, rows, left, n, N), _tile(C, C_row, rows, left, n, N)
        x0 = _tile(x, x_row, rows, left, p0, P)
        x1 = x0
        if TWO:
            x1 = _tile(x, x_row, rows, left, p1, P)
        since_start = tl.cumsum(step * rate, 0)
        total = tl.sum(step * rate, 0)
        from_start = tl.exp2(since_start)
        # The state first, so that its tiles are free before the scores take registers.
        before0, before1 = S0.to(c.dtype), S1.to(c.dtype)
        y0 = _from_state(c, before0, from_start, PRECISION)
        y1 = y0
        if TWO:
            y1 = _from_state(c, before1, from_start, PRECISION)
        S0, S1 = _advanced(
            S0, S1, x0, x1, b, step * tl.exp2(total - since_start), tl.exp2(total), TWO, PRECISION
        )
        scores = _scores(c, b, rows, step, since_start, skip, PRECISION)
        y0 = tl.dot(scores, x0, y0, input_precision=PRECISION)
        y0 = _gated(y0, z, z_row, rows, left, p0, P)
        squares = tl.sum(y0 * y0, 1)
        if TWO:
            y1 = tl.dot(scores, x1, y1, input_precision=PRECISION)
            y1 = _gated(y1, z, z_row, rows, left, p1, P)
            squares += tl.sum(y1 * y1, 1)
        scale = tl.rsqrt(squares / P + eps)
        _write(out, y0, norm_weight, scale, rows, HEADS * P, left, p0, P)
        if TWO:
            _write(out, y1, norm_weight, scale, rows, HEADS * P, left, p1, P)
        x += Q * x_row
        B += Q * B_row
        C += Q * C_row
        out += Q * HEADS * P
        if z is not None:
            z += Q * z_row
    if segment == segments - 1:
        final += sequence * P * N
        _keep(final, S0, n, p0, N, P)
        if TWO:
            _keep(final, S1, n, p1, N, P)
