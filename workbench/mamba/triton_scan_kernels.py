"""The chunked scan of Mamba-2 in two kernels, for inference: it keeps no gradients.

A sequence is cut into segments, and a segment into chunks. The first kernel finds what each segment
alone adds to the state at its end. The second begins each segment with the state that those before
it leave, then goes through its chunks with the state in registers: inside a chunk the masked matrix
of state space duality, between chunks the recurrence (`workbench.mamba.ssd` says both). It ends
with the skip, the gate and the norm, so that the output is written once. Only one state a segment
goes through memory, where a kernel for each step of the usual algorithm writes one a chunk.

A width that is no power of two, such as 80, is two tiles, 64 + 16: tensor cores want powers of two,
and filling up to 128 would waste half of the work. A state is (n, p) in registers, (p, n) in
memory. This module needs Triton; import it only where that is installed.

Source: arXiv 2405.21060, section 6; segments of several chunks are ours.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tile(pointer, row_stride, rows, left, n, WIDTH: tl.constexpr):
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
def _advanced(
    S00, S01, S10, S11, x0, x1, B0, B1, weight, decay,
    TWO_N: tl.constexpr, TWO_P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Carry a state over a chunk: decay it, and add B^T (weight x)."""
    x0 = (x0.to(tl.float32) * weight[:, None]).to(B0.dtype)
    S00 = tl.dot(tl.trans(B0), x0, S00 * decay, input_precision=PRECISION)
    if TWO_N:
        S10 = tl.dot(tl.trans(B1), x0, S10 * decay, input_precision=PRECISION)
    if TWO_P:
        x1 = (x1.to(tl.float32) * weight[:, None]).to(B0.dtype)
        S01 = tl.dot(tl.trans(B0), x1, S01 * decay, input_precision=PRECISION)
        if TWO_N:
            S11 = tl.dot(tl.trans(B1), x1, S11 * decay, input_precision=PRECISION)
    return S00, S01, S10, S11


@triton.jit
def _scores(
    C0, C1, B0, B1, rows, step, since_start, skip, TWO_N: tl.constexpr, PRECISION: tl.constexpr
):
    """Compute the matrix of a chunk: (C_i . B_j) decay from j to i, times dt_j, for j <= i.

    The skip is a constant on its diagonal.
    """
    scores = tl.dot(C0, tl.trans(B0), input_precision=PRECISION)
    if TWO_N:
        scores = tl.dot(C1, tl.trans(B1), scores, input_precision=PRECISION)
    scores *= tl.exp2(since_start[:, None] - since_start[None, :]) * step[None, :]
    scores = tl.where(rows[:, None] >= rows[None, :], scores, 0.0)
    return (scores + tl.where(rows[:, None] == rows[None, :], skip, 0.0)).to(C0.dtype)


@triton.jit
def _from_state(C0, C1, S0, S1, from_start, TWO_N: tl.constexpr, PRECISION: tl.constexpr):
    """Compute (rows, p): what the state leaves of the past."""
    y = tl.dot(C0, S0.to(C0.dtype), input_precision=PRECISION)
    if TWO_N:
        y = tl.dot(C1, S1.to(C0.dtype), y, input_precision=PRECISION)
    return y * from_start[:, None]


@triton.jit
def _gated(y, z, z_row, rows, left, p, P: tl.constexpr):
    """Multiply (rows, p) by SiLU of the gate, if there is one."""
    if z is not None:
        gate = _tile(z, z_row, rows, left, p, P).to(tl.float32)
        y = y * gate / (1 + tl.exp(-gate))
    return y


@triton.jit
def _write(out, y, weight, scale, rows, row_stride, left, p, P: tl.constexpr):
    """Store (rows, p), normalised if there is a norm's weight."""
    inside = (p < P)[None, :]
    if weight is not None:
        w = tl.load(weight + p, mask=p < P, other=0.0).to(tl.float32)
        y = y * scale[:, None] * w[None, :]
    tl.store(
        out + rows[:, None] * row_stride + p[None, :], y, mask=(rows < left)[:, None] & inside
    )


@triton.jit(do_not_specialize=["seqlen", "span", "segments"])
def states_kernel(
    x, B, dt, A, states, decays, seqlen, span, segments,
    x_batch, x_row, x_head, B_batch, B_row, B_head, dt_batch, dt_row, dt_head,
    X_REPEATS: tl.constexpr, B_REPEATS: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    P0: tl.constexpr, P1: tl.constexpr, N0: tl.constexpr, N1: tl.constexpr, Q: tl.constexpr,
    IS_LOG: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head, segment, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    start = segment.to(tl.int64) * span
    x += batch * x_batch + start * x_row + head // X_REPEATS * x_head
    B += batch * B_batch + start * B_row + head // B_REPEATS * B_head
    dt += batch * dt_batch + start * dt_row + head * dt_head
    rate = _rate(A, head, IS_LOG)
    rows = tl.arange(0, Q)
    n0, n1, p0, p1 = (
        tl.arange(0, N0), N0 + tl.arange(0, N1), tl.arange(0, P0), P0 + tl.arange(0, P1)
    )  # fmt: skip
    TWO_N: tl.constexpr = N0 < N
    TWO_P: tl.constexpr = P0 < P
    S00 = tl.zeros((N0, P0), tl.float32)
    S01 = tl.zeros((N0, P1), tl.float32)
    S10 = tl.zeros((N1, P0), tl.float32)
    S11 = tl.zeros((N1, P1), tl.float32)
    log_decay = 0.0
    # Only whole segments come here: the last one, which may be shorter, has nothing after it.
    for done in range(0, span, Q):
        step = tl.load(dt + (done + rows).to(tl.int64) * dt_row)
        since_start = tl.cumsum(step * rate, 0)
        total = tl.sum(step * rate, 0)
        x0, B0 = _tile(x, x_row, rows, Q, p0, P), _tile(B, B_row, rows, Q, n0, N)
        x1, B1 = x0, B0
        if TWO_P:
            x1 = _tile(x, x_row, rows, Q, p1, P)
        if TWO_N:
            B1 = _tile(B, B_row, rows, Q, n1, N)
        S00, S01, S10, S11 = _advanced(
            S00, S01, S10, S11, x0, x1, B0, B1, step * tl.exp2(total - since_start),
            tl.exp2(total), TWO_N, TWO_P, PRECISION,
        )  # fmt: skip
        log_decay += total
        x += Q * x_row
        B += Q * B_row
    slot = (batch * tl.num_programs(0) + head) * (segments - 1) + segment
    tl.store(decays + slot, log_decay)
    states += slot * P * N
    _keep(states, S00, n0, p0, N, P)
    if TWO_P:
        _keep(states, S01, n0, p1, N, P)
    if TWO_N:
        _keep(states, S10, n1, p0, N, P)
        if TWO_P:
            _keep(states, S11, n1, p1, N, P)


@triton.jit(do_not_specialize=["seqlen", "span", "segments"])
def scan_kernel(
    x, B, C, dt, A, D, z, norm_weight, states, decays, initial, final, out,
    seqlen, span, segments, eps,
    x_batch, x_row, x_head, B_batch, B_row, B_head, C_batch, C_row, C_head,
    dt_batch, dt_row, dt_head, z_batch, z_row,
    X_REPEATS: tl.constexpr, B_REPEATS: tl.constexpr, C_REPEATS: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, N0: tl.constexpr,
    N1: tl.constexpr, Q: tl.constexpr, IS_LOG: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head, segment, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(0)
    start = segment.to(tl.int64) * span
    x += batch * x_batch + start * x_row + head // X_REPEATS * x_head
    B += batch * B_batch + start * B_row + head // B_REPEATS * B_head
    C += batch * C_batch + start * C_row + head // C_REPEATS * C_head
    dt += batch * dt_batch + start * dt_row + head * dt_head
    out += ((batch * seqlen + start) * heads + head) * P
    skip = 0.0
    if D is not None:
        skip = tl.load(D + head).to(tl.float32)
    if z is not None:
        z += batch * z_batch + start * z_row + head * P
    if norm_weight is not None:
        norm_weight += head * P
    rate = _rate(A, head, IS_LOG)
    rows = tl.arange(0, Q)
    n0, n1, p0, p1 = (
        tl.arange(0, N0), N0 + tl.arange(0, N1), tl.arange(0, P0), P0 + tl.arange(0, P1)
    )  # fmt: skip
    TWO_N: tl.constexpr = N0 < N
    TWO_P: tl.constexpr = P0 < P
    S00 = tl.zeros((N0, P0), tl.float32)
    S01 = tl.zeros((N0, P1), tl.float32)
    S10 = tl.zeros((N1, P0), tl.float32)
    S11 = tl.zeros((N1, P1), tl.float32)
    sequence = batch * heads + head
    if initial is not None:
        initial += sequence * P * N
        S00 = _state(initial, n0, p0, N, P)
        if TWO_P:
            S01 = _state(initial, n0, p1, N, P)
        if TWO_N:
            S10 = _state(initial, n1, p0, N, P)
            if TWO_P:
                S11 = _state(initial, n1, p1, N, P)
    for before in tl.range(0, segment, loop_unroll_factor=1):  # to have several loads in flight
        slot = sequence * (segments - 1) + before
        decay = tl.exp2(tl.load(decays + slot))
        S00 = S00 * decay + _state(states + slot * P * N, n0, p0, N, P)
        if TWO_P:
            S01 = S01 * decay + _state(states + slot * P * N, n0, p1, N, P)
        if TWO_N:
            S10 = S10 * decay + _state(states + slot * P * N, n1, p0, N, P)
            if TWO_P:
                S11 = S11 * decay + _state(states + slot * P * N, n1, p1, N, P)
    for done in range(0, tl.minimum(span, seqlen - start).to(tl.int32), Q):
        left = (seqlen - start - done).to(tl.int32)
        step = tl.load(dt + (done + rows).to(tl.int64) * dt_row, mask=rows < left, other=0.0)
        x0, B0 = _tile(x, x_row, rows, left, p0, P), _tile(B, B_row, rows, left, n0, N)
        C0 = _tile(C, C_row, rows, left, n0, N)
        x1, B1, C1 = x0, B0, C0
        if TWO_P:
            x1 = _tile(x, x_row, rows, left, p1, P)
        if TWO_N:
            B1, C1 = _tile(B, B_row, rows, left, n1, N), _tile(C, C_row, rows, left, n1, N)
        since_start = tl.cumsum(step * rate, 0)
        total = tl.sum(step * rate, 0)
        from_start = tl.exp2(since_start)
        # The state first, so that its tiles are free before the scores take registers.
        y0 = _from_state(C0, C1, S00, S10, from_start, TWO_N, PRECISION)
        y1 = y0
        if TWO_P:
            y1 = _from_state(C0, C1, S01, S11, from_start, TWO_N, PRECISION)
        S00, S01, S10, S11 = _advanced(
            S00, S01, S10, S11, x0, x1, B0, B1, step * tl.exp2(total - since_start),
            tl.exp2(total), TWO_N, TWO_P, PRECISION,
        )  # fmt: skip
        scores = _scores(C0, C1, B0, B1, rows, step, since_start, skip, TWO_N, PRECISION)
        y0 = tl.dot(scores, x0, y0, input_precision=PRECISION)
        y0 = _gated(y0, z, z_row, rows, left, p0, P)
        squares = tl.sum(y0 * y0, 1)
        if TWO_P:
            y1 = tl.dot(scores, x1, y1, input_precision=PRECISION)
            y1 = _gated(y1, z, z_row, rows, left, p1, P)
            squares += tl.sum(y1 * y1, 1)
        scale = tl.rsqrt(squares / P + eps)
        _write(out, y0, norm_weight, scale, rows, heads * P, left, p0, P)
        if TWO_P:
            _write(out, y1, norm_weight, scale, rows, heads * P, left, p1, P)
        x += Q * x_row
        B += Q * B_row
        C += Q * C_row
        out += Q * heads * P
        if z is not None:
            z += Q * z_row
    if segment == segments - 1:
        final += sequence * P * N
        _keep(final, S00, n0, p0, N, P)
        if TWO_P:
            _keep(final, S01, n0, p1, N, P)
        if TWO_N:
            _keep(final, S10, n1, p0, N, P)
            if TWO_P:
                _keep(final, S11, n1, p1, N, P)
