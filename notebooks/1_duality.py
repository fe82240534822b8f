# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 1 · Attention and its dual
#
# **The idea:** leave the softmax out of attention, and the same sum can be worked out in two
# ways: as a matrix, all positions at once, or as a state that is carried from token to token.
# Mamba-2 is built on that (Dao & Gu 2024, [arXiv 2405.21060](https://arxiv.org/abs/2405.21060);
# here `workbench/mamba/ssd.py`).
#
# You will build the state space dual from attention in five small steps, on twelve tokens, and
# then find the same thing inside a real model. Reading time: 45 minutes. No training.

# %%
import time

import workbench as wb  # before torch, whose threads then sleep while they wait
import torch
from torch.utils.flop_counter import FlopCounterMode

from workbench.mamba.ssd import segsum, ssd_chunked, ssd_matrix, ssd_recurrent
from workbench.views.charts import curves_figure, matrices_figure
from workbench.views.lessons import check, versions

torch.manual_seed(0)
print(versions())

# %% [markdown]
# ## Step 1 · Attention, one head
#
# Each position $t$ has a query, a key and a value. We write them with the letters of the state
# space world, which are those of the code: **C** for the query, **B** for the key, **x** for the
# value. $n$ (`d_state`) is the width of C and B, $p$ (`headdim`) that of x, $l$ the number of
# positions.
#
# $$ y_t = \sum_{s \le t} \mathrm{softmax}_s\!\left(\frac{C_t^\top B_s}{\sqrt n}\right) x_s $$
#
# (Vaswani et al. 2017, [arXiv 1706.03762](https://arxiv.org/abs/1706.03762), equation 1.)

# %%
l, n, p = 12, 8, 4
C, B, x = torch.randn(l, n), torch.randn(l, n), torch.randn(l, p)

causal = torch.ones(l, l, dtype=torch.bool).tril()
scores = C @ B.T / n**0.5
softmax = scores.masked_fill(~causal, -torch.inf).softmax(-1)
y_attention = softmax @ x
print(y_attention.shape)

# %% [markdown]
# ## Step 2 · Without the softmax
#
# What is left is a matrix with a triangle of zeros, times x. Nothing else.
#
# **Exercise 1.** Write `linear_attention(C, B, x)`: the matrix of all $C_t^\top B_s$, with zeros
# where $s > t$, times x. No scale, no softmax. One line is enough.

# %% tags=["exercise"]
def linear_attention(C, B, x):
    return ...  # your turn


# %% tags=["solution"]
def linear_attention(C, B, x):
    return (C @ B.T).tril() @ x


# %%
def by_hand(C, B, x):
    """The same sum, written as slowly as the formula."""
    rows = [sum((C[t] @ B[s]) * x[s] for s in range(t + 1)) for t in range(len(x))]
    return torch.stack(rows)


check(
    "Exercise 1",
    (lambda: linear_attention(C, B, x).shape == x.shape,
     "return a tensor shaped like x, (l, p): a matrix of (l, l) times x."),
    (lambda: torch.allclose(linear_attention(C, B, x)[0], by_hand(C, B, x)[0], atol=1e-5),
     "position 0 must see itself and nothing later: is your triangle the lower one?"),
    (lambda: torch.allclose(linear_attention(C, B, x), by_hand(C, B, x), atol=1e-5),
     "the first row is right, but later ones are not: no softmax, no scale, key s times value s."),
)  # fmt: skip

# %%
linear = (C @ B.T).tril()
matrices_figure({"softmax attention": softmax, "without softmax": linear})

# %% [markdown]
# The rows of the left matrix are positive and sum to 1; on the right there are negative weights
# (orange) and no row sum is kept. This is **not** the same map, and a model that was trained with
# the left one will not work with the right one: that is why there is a lesson on initialisation,
# and one on distillation. What the right one has is a second form.
#
# ## Step 3 · The state
#
# In $y_t = \sum_{s \le t} (C_t^\top B_s)\, x_s$ nothing but $C_t$ depends on $t$. So it can stand
# outside of the sum:
#
# $$ y_t = \Big(\underbrace{\sum_{s \le t} x_s B_s^\top}_{S_t}\Big)\, C_t
#    \qquad\text{with}\qquad S_t = S_{t-1} + x_t B_t^\top $$
#
# $S_t$ is a matrix of $p \times n$ numbers, whatever $t$ is. Softmax forbids this step: it mixes
# $C_t$ and $B_s$ in a way that no product of the two can be pulled out of (Katharopoulos et al.
# 2020, [arXiv 2006.16236](https://arxiv.org/abs/2006.16236), section 3.2).
#
# **Exercise 2.** Write one turn: given the state and the new C, B, x of one position, return the
# output and the new state. `torch.outer` may help.

# %% tags=["exercise"]
def turn(state, C_t, B_t, x_t):
    state = state  # your turn: what does this token add?
    y_t = None  # your turn: how is the state read?
    return y_t, state


# %% tags=["solution"]
def turn(state, C_t, B_t, x_t):
    state = state + torch.outer(x_t, B_t)
    return state @ C_t, state


# %%
def run_turns(turn):
    state, rows = torch.zeros(p, n), []
    for t in range(l):
        y_t, state = turn(state, C[t], B[t], x[t])
        rows.append(y_t)
    return torch.stack(rows)


check(
    "Exercise 2",
    (lambda: turn(torch.zeros(p, n), C[0], B[0], x[0])[1].shape == (p, n),
     "the state must keep its shape (p, n): torch.outer(x_t, B_t), not the other way round."),
    (lambda: turn(torch.zeros(p, n), C[0], B[0], x[0])[1].abs().sum() > 0,
     "the state is still empty after the first token: add what the token brings."),
    (lambda: turn(torch.zeros(p, n), C[0], B[0], x[0])[0].shape == (p,),
     "the output is one value per channel, (p,): the state times C_t."),
    (lambda: torch.allclose(run_turns(turn), by_hand(C, B, x), atol=1e-5),
     "it runs, but differs from the sum: update the state first, then read it."),
)  # fmt: skip

# %% [markdown]
# ## Step 4 · Forgetting
#
# A state that only ever adds fills up. Mamba-2 lets it fade: before a token is added, the state
# is multiplied by $a_t = e^{\Delta_t A}$, a number between 0 and 1, because $A < 0$ and the step
# $\Delta_t > 0$ (in the code `dt`). The step also weighs what the token adds:
#
# $$ S_t = e^{\Delta_t A}\, S_{t-1} + \Delta_t\, x_t B_t^\top \qquad y_t = S_t\, C_t $$
#
# As a matrix: $M_{ts} = (C_t^\top B_s)\; e^{A(\Delta_{s+1} + \dots + \Delta_t)}\; \Delta_s$ for
# $s \le t$ (arXiv 2405.21060, equation 3 and section 5). The decay stands where softmax stood.
# The head of a language model that looks at neighbours forgets fast, another slowly; A is one
# learned number for each head, and $\Delta_t$ comes from the token itself.

# %%
A = torch.tensor([-0.5])  # one head
dt = torch.full((1, l, 1), 0.6)  # (batch, seqlen, n_heads)
dt[0, 6] = 4.0  # a token that makes the head forget
heads = [t[None, :, None, :] for t in (x, B, C)]  # (batch, seqlen, n_heads, ...)
x4, B4, C4 = heads

fading = torch.exp(segsum(dt[0, :, 0] * A))
M = ssd_matrix(dt, A, B4, C4)[0, 0]
matrices_figure({"without softmax": linear, "decay": fading, "Mamba-2: product, times dt": M})

# %% [markdown]
# At position 6 the head took a large step: all that was before is nearly gone. Such a choice is
# what "selective" means in Mamba (Gu & Dao 2023, [arXiv
# 2312.00752](https://arxiv.org/abs/2312.00752)).
#
# **Exercise 3.** With $\Delta = 0.1$ at every token, which A halves the state every 10 tokens?

# %% tags=["exercise"]
A_half = ...  # your turn, a number

# %% tags=["solution"]
A_half = -(torch.log(torch.tensor(2.0)) / (10 * 0.1)).item()  # exp(10 * 0.1 * A) = 1/2

# %%
check(
    "Exercise 3",
    (lambda: isinstance(A_half, float | int), "give a number: A, not the decay."),
    (lambda: A_half < 0, "A is below 0, else the state would grow."),
    (lambda: abs(torch.exp(torch.tensor(10 * 0.1 * A_half)) - 0.5) < 1e-3,
     "after ten steps the factor is exp(10 * 0.1 * A), which should be 1/2: take the logarithm."),
)  # fmt: skip

# %% [markdown]
# ## Step 5 · Chunks
#
# The matrix costs about $l^2 (n + p)$ multiplications a head, the recurrence about $3\, l\, n\,
# p$, but one position after the other: a GPU, or even a CPU, waits. So cut the sequence into
# chunks of $q$ positions: **inside** a chunk the matrix, **between** chunks the state. That is
# about $l\,q\,(n + p) + 3\,l\,n\,p$ multiplications, all in matrix products: linear in $l$ (arXiv
# 2405.21060, section 6). `chunk_size` is 64 by default here.

# %%
y_turns, _ = ssd_recurrent(x4, dt, A, B4, C4)
y_chunks, _ = ssd_chunked(x4, dt, A, B4, C4, chunk_size=4)
y_matrix = (M @ x)[None, :, None]

blocks = M.clone()
for start in range(0, l, 4):
    blocks[start : start + 4, :start] = 0
matrices_figure({"whole": M, "inside chunks of 4": blocks, "between, by the state": M - blocks})

# %%
def seconds(compute, repeats=3):
    """The fastest of a few runs: what the machine can do when nothing disturbs it."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        compute()
        times.append(time.perf_counter() - start)
    return min(times)


def inputs(length, n_heads=4, width=32):
    shape = (1, length, n_heads, width)
    steps = torch.rand(1, length, n_heads)
    return torch.randn(shape), steps, -torch.rand(n_heads), torch.randn(shape), torch.randn(shape)


lengths = [128, 256, 512, 1024, 2048]
measured = {"matrix": [], "chunks": [], "recurrence": []}
with torch.no_grad():
    for length in lengths:
        xs, steps, As, Bs, Cs = inputs(length)
        whole = lambda: ssd_matrix(steps, As, Bs, Cs) @ xs.transpose(1, 2)
        measured["matrix"].append(seconds(whole))
        measured["chunks"].append(seconds(lambda: ssd_chunked(xs, steps, As, Bs, Cs)))
        if length <= 1024:  # slow
            measured["recurrence"].append(
                seconds(lambda: ssd_recurrent(xs, steps, As, Bs, Cs), repeats=1)
            )
curves_figure(
    {name: (lengths[: len(s)], [1e3 * v for v in s]) for name, s in measured.items()},
    x="positions", y="milliseconds", log=True,
)  # fmt: skip

# %% [markdown]
# Both axes are logarithmic: a straight line of slope 2 is quadratic growth, slope 1 linear. The
# recurrence is linear too, but takes a step for every position; in decoding, where tokens come
# one at a time, that is just right. Times are the machine's, and jump about; the multiplications
# do not, so let PyTorch count those.

# %%
def multiplications(compute):
    """Those of all matrix products in `compute`, as PyTorch counts them."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        compute()
    return counter.get_total_flops() // 2  # a multiplication and an addition are two operations


counted = {"matrix": [], "chunks": []}
for length in (512, 2048):
    xs, steps, As, Bs, Cs = inputs(length)
    whole = lambda: ssd_matrix(steps, As, Bs, Cs) @ xs.transpose(1, 2)
    counted["matrix"].append(multiplications(whole))
    counted["chunks"].append(multiplications(lambda: ssd_chunked(xs, steps, As, Bs, Cs)))
growth = {name: more / few for name, (few, more) in counted.items()}
for name, (few, more) in counted.items():
    print(f"{name}: {few / 1e6:5.0f} -> {more / 1e6:5.0f} million multiplications, "
          f"{growth[name]:4.1f} times as many for 4 times the positions, "
          f"{measured[name][-1] / measured[name][-3]:4.1f} times the time")  # fmt: skip

# %% [markdown]
# ## In a real model
#
# `pocket`, the teacher that comes with the workbench, is a vision-language model with sixteen
# decoder layers. `init="linear"` replaces a layer's attention by a mixer that computes exactly
# what you wrote in exercise 1: its own C, B and x, scaled, without softmax. We listen to the
# mixer's projections and do the sum ourselves.

# %%
teacher = wb.load_teacher("pocket")
student = wb.convert(
    teacher, wb.Plan(16, (3,)), init="linear", options={"rope": False, "bias": False, "gate": False}
)
mixer = student.model.get_decoder().layers[3].self_attn
print(mixer.config)

with torch.no_grad():
    hidden = torch.randn(1, 24, mixer.config.d_model)
    C_, B_, x_ = (proj(hidden)[0] for proj in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    by_heads = zip(*(t.split(64, dim=-1) for t in (C_, B_, x_)), strict=True)
    ours = torch.cat(
        [mixer.config.scale * (c @ b.T).tril() @ v for c, b, v in by_heads], dim=-1
    )
    ours = mixer.dense(ours)
    theirs = mixer(hidden)[0][0]
print(f"largest difference {float((ours - theirs).abs().max()):.1e}, "
      f"largest value {float(theirs.abs().max()):.1f}")  # fmt: skip

# %% [markdown]
# ## What this lesson claimed

# %%
tolerance = dict(atol=1e-4, rtol=1e-4)
assert torch.allclose(y_turns, y_chunks, **tolerance)
assert torch.allclose(y_turns, y_matrix, **tolerance)
print("Recurrence, matrix and chunks are one map.")

assert torch.allclose(by_hand(C, B, x), (C @ B.T).tril() @ x, **tolerance)
assert not torch.allclose(y_attention, (C @ B.T).tril() @ x / n**0.5, atol=0.1)
print("Without softmax, attention has a state; it is not the same map as with softmax.")

assert growth["matrix"] == 16
assert 4 <= growth["chunks"] < 5
print("Four times the positions: 16 times the work as a matrix, hardly more than 4 in chunks.")

assert torch.allclose(ours, theirs, **tolerance)
print("A mixer of the pocket model computes what you wrote in one line.")

# %% [markdown]
# **Go on**: change `chunk_size`, or set `dt[0, 6] = 0` (what happens to the row, and to the
# column? The answer is how the workbench treats padding). Next: [2 · Choosing
# layers](2_layers.ipynb).
