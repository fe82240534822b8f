"""State space duality in plain torch: four ways to compute one and the same sequence map.

The map of one head, with a state S of shape (p, n):

    S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T          y_t = S_t C_t

`ssd_recurrent` follows that line word for word, `ssd_step` is one turn of it, `ssd_matrix` writes
the map as a lower triangular matrix (attention without softmax), and `ssd_chunked` mixes both
views: the matrix inside a chunk, the recurrence between chunks. They agree in output, final state
and gradients.

Letters: b batch, l seqlen, h n_heads, g n_groups, p headdim, n d_state, c chunks, q positions in a
chunk. A position with dt = 0 leaves the state as it is and adds nothing to it: that is padding.

Source: Dao & Gu 2024, arXiv 2405.21060, sections 3, 5 and 6.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor


def ssd_recurrent(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Run the recurrence one position after the other: slow, and the reference for everything else.

    Args:
        x: (batch, seqlen, n_heads, headdim).
        dt: (batch, seqlen, n_heads), after softplus, >= 0.
        A: (n_heads,), < 0.
        B: (batch, seqlen, n_groups, d_state), n_groups divides n_heads.
        C: (batch, seqlen, n_groups, d_state).
        initial_state: (batch, n_heads, headdim, d_state), or None for zeros.

    Returns:
        y like x, and the final state (batch, n_heads, headdim, d_state), at least float32.
    """
    state = initial_state
    if state is None:
        state = x.new_zeros(*x.shape[:1], *x.shape[2:], B.shape[-1])
    state = state.to(_state_dtype(x))
    outputs = []
    for t in range(x.shape[1]):
        y, state = ssd_step(x[:, t], dt[:, t], A, B[:, t], C[:, t], state=state)
        outputs.append(y)
    return torch.stack(outputs, dim=1), state


def ssd_step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Advance the recurrence by one position.

    Args:
        x: (batch, n_heads, headdim).
        dt: (batch, n_heads), after softplus, >= 0.
        A: (n_heads,), < 0.
        B: (batch, n_groups, d_state).
        C: (batch, n_groups, d_state).
        state: (batch, n_heads, headdim, d_state).

    Returns:
        y like x, and the new state (batch, n_heads, headdim, d_state), at least float32.
    """
    high = _state_dtype(x)
    B, C = (_per_head(t, x.shape[-2]).to(high) for t in (B, C))
    decay = torch.exp(dt.to(high) * A.to(high))
    added = (x.to(high) * dt.to(high)[..., None])[..., None] * B[..., None, :]  # (b, h, p, n)
    state = state.to(high) * decay[..., None, None] + added
    y = (state * C[..., None, :]).sum(-1)
    return y.to(x.dtype), state


def ssd_matrix(dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Write the map as a matrix: y = M @ x, head by head, from a zero initial state.

    M[i, j] = (C_i . B_j) exp(sum of dt A over j+1..i) dt_j for j <= i, and 0 above the diagonal:
    C plays the query, B the key, x the value, and the decay stands where softmax stood.

    Args:
        dt: (batch, seqlen, n_heads), after softplus, >= 0.
        A: (n_heads,), < 0.
        B: (batch, seqlen, n_groups, d_state).
        C: (batch, seqlen, n_groups, d_state).

    Returns:
        (batch, n_heads, seqlen, seqlen), at least float32.
    """
    high, n_heads = _state_dtype(B), dt.shape[-1]
    B, C = (_per_head(t, n_heads).to(high).transpose(1, 2) for t in (B, C))  # (b, h, l, n)
    dt = dt.to(high).transpose(1, 2)  # (b, h, l)
    decay = torch.exp(segsum(dt * A.to(high)[:, None]))
    return (C @ B.mT) * decay * dt[..., None, :]


def ssd_chunked(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    chunk_size: int = 64,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the matrix form inside chunks and the recurrence between them, all as matrix products.

    Work is linear in seqlen. The large products run in the dtype of x (bfloat16 stays bfloat16),
    decays and states in at least float32, whatever autocast says.

    Args:
        x: (batch, seqlen, n_heads, headdim).
        dt: (batch, seqlen, n_heads), after softplus, >= 0.
        A: (n_heads,), < 0.
        B: (batch, seqlen, n_groups, d_state), n_groups divides n_heads.
        C: (batch, seqlen, n_groups, d_state).
        chunk_size: positions in a chunk; any seqlen is allowed.
        initial_state: (batch, n_heads, headdim, d_state), or None for zeros.

    Returns:
        y like x, and the final state (batch, n_heads, headdim, d_state), at least float32.

    Source: arXiv 2405.21060, listing 1.
    """
    length, n_heads, high = x.shape[1], x.shape[2], _state_dtype(x)
    chunk_size = min(chunk_size, length)
    with _without_autocast(x):
        dt = dt.to(high)
        x = (x * dt[..., None]).to(x.dtype)
        a = _into_chunks((dt * A.to(high))[..., None], chunk_size).squeeze(-1)  # (b, h, c, q)
        # Laid out once: each of the products below would do it again.
        x, B, C = (
            _into_chunks(_per_head(t, n_heads), chunk_size).contiguous() for t in (x, B, C)
        )
        since_start = a.cumsum(-1)  # log decay from the start of the chunk to each position

        # 1. Inside a chunk: the masked matrix of `ssd_matrix`.
        within = (C @ B.mT) * torch.exp(_segsum_fast(since_start)).to(x.dtype)
        y = within @ x  # (b, h, c, q, p)

        # 2. What each chunk alone would add to the state at its own end.
        until_end = torch.exp(since_start[..., -1:] - since_start).to(x.dtype)
        added = (x * until_end[..., None]).mT @ B  # (b, h, c, p, n)

        # 3. Between chunks: the same lower triangular form, one position for each chunk.
        states = _states_at_chunk_starts(added.to(high), since_start[..., -1], initial_state)

        # 4. What the state at the start of a chunk contributes to each position in it.
        from_start = C * torch.exp(since_start)[..., None].to(x.dtype)
        y = y + from_start @ states[:, :, :-1].to(x.dtype).mT
        y = y.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :length]
    return y, states[:, :, -1]


def segsum(a: Tensor) -> Tensor:
    """Sum every segment of the last axis: out[..., i, j] = a[j+1] + ... + a[i], -inf for j > i.

    With a = (a0, a1, a2) the rows are (0, -inf, -inf), (a1, 0, -inf), (a1 + a2, a2, 0). Each entry
    is summed on its own, so a large value elsewhere costs no precision. The fill stands before any
    exp: exp of a masked entry is then 0 with gradient 0, never inf * 0.

    Args:
        a: (..., t).

    Returns:
        (..., t, t).
    """
    t = a.shape[-1]
    lower = torch.ones(t, t, dtype=torch.bool, device=a.device).tril(-1)
    terms = a[..., :, None].expand(*a.shape, t).masked_fill(~lower, 0)
    return terms.cumsum(-2).masked_fill(lower.mT, -torch.inf)


def _segsum_fast(cumulative: Tensor) -> Tensor:
    """`segsum` as a difference of cumulative sums: exact enough for one chunk, and it fuses."""
    t = cumulative.shape[-1]
    upper = torch.ones(t, t, dtype=torch.bool, device=cumulative.device).triu(1)
    difference = cumulative[..., :, None] - cumulative[..., None, :]
    return difference.masked_fill(upper, -torch.inf)


def _states_at_chunk_starts(added: Tensor, log_decay: Tensor, initial: Tensor | None) -> Tensor:
    """Carry states from chunk to chunk: (b, h, c, p, n) -> (b, h, c + 1, p, n), final one last."""
    initial = torch.zeros_like(added[:, :, 0]) if initial is None else initial.to(added.dtype)
    contributions = torch.cat([initial[:, :, None], added], dim=2)
    decay = torch.exp(segsum(F.pad(log_decay, (1, 0))))  # (b, h, c + 1, c + 1)
    return (decay @ contributions.flatten(3)).unflatten(3, added.shape[3:])


def _into_chunks(t: Tensor, chunk_size: int) -> Tensor:
    """(b, l, h, d) -> (b, h, c, q, d); the last chunk is filled with zeros (dt = 0: idle)."""
    missing = -t.shape[1] % chunk_size
    if missing:
        t = F.pad(t, (0, 0, 0, 0, 0, missing))
    return t.unflatten(1, (-1, chunk_size)).permute(0, 3, 1, 2, 4)


def _per_head(t: Tensor, n_heads: int) -> Tensor:
    """(..., g, d) -> (..., h, d): each group serves n_heads / n_groups neighbouring heads."""
    n_groups = t.shape[-2]
    return t if n_groups == n_heads else t.repeat_interleave(n_heads // n_groups, dim=-2)


def _state_dtype(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


def _without_autocast(t: Tensor) -> AbstractContextManager:
    """Keep float32 products float32: autocast would round the decays between chunks to bfloat16."""
    kind = t.device.type
    return nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False)
