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
# # 5 · Profiling
#
# **The idea:** a new token cannot come faster than its bytes can be fetched and its products
# computed. Whoever promises more has changed something else as well. You will work out both
# bounds with a pencil, measure two models in the same loop, and then take apart the most famous
# number of this field: the **3.6 times** of MaTVLM ([arXiv
# 2503.13440](https://arxiv.org/abs/2503.13440), abstract). Reading time: 45 minutes. No training.

# %%
import time

import workbench as wb
from workbench.models.families import decoder_layers
from workbench.steps.efficiency.budget import budget
from workbench.views.charts import curves_figure
from workbench.views.lessons import check, versions
from workbench.views.widgets import profile_explorer

print(versions())

# %% [markdown]
# ## Bytes: what a token has to fetch
#
# To write one token, a decoder reads every one of its weights once, all keys and values so far,
# and reads and writes every state. With $b$ bytes a number, in each layer of width $d$:
#
# $$ \underbrace{2\, d\, b\, t}_{\text{attention: keys and values of } t \text{ tokens}}
#    \qquad\text{or}\qquad
#    \underbrace{h\,p\,n \cdot 4 + 3\,(d_x + d_B + d_C)\, b}_{\text{Mamba-2: state, convolution}} $$
#
# `budget` computes exactly that from a model's sizes, and a plan; nothing is converted for it.

# %%
teacher = wb.load_teacher("pocket")
hybrid = wb.load("pocket-25")
for plan in (None, hybrid.plan):
    print(budget(teacher, plan, length=1024))

# %% [markdown]
# **Exercise 1.** `pocket` has 16 layers with $d$ = 256 and 4 bytes a number. How many bytes does
# one more token add to the cache of the teacher, and of the hybrid with 4 Mamba-2 layers?

# %% tags=["exercise"]
teacher_bytes_per_token = ...  # your turn
hybrid_bytes_per_token = ...  # your turn

# %% tags=["solution"]
teacher_bytes_per_token = 16 * 2 * 256 * 4
hybrid_bytes_per_token = (16 - 4) * 2 * 256 * 4

# %%
def added(plan):
    """Bytes that one more token adds to the cache, by `budget`."""
    shorter, longer = (budget(teacher, plan, length=n).cache_bytes for n in (100, 101))
    return longer - shorter


check(
    "Exercise 1",
    (lambda: teacher_bytes_per_token in (added(None), added(None) // 2),
     "layers times (key + value) times d times bytes a number."),
    (lambda: teacher_bytes_per_token == added(None), "a token keeps a key and a value."),
    (lambda: hybrid_bytes_per_token == added(hybrid.plan),
     "only layers that attend keep anything for a token; a state does not grow."),
)  # fmt: skip

# %% [markdown]
# ## Measured, in one loop
#
# `profile` asks both models the same, in turns, in the same loop, so that neither has an engine of
# its own. The table says *prefill* (reading the prompt) and *decode* (writing) apart: one number
# for both would depend on the length of the answer. *Of roof* is how much of this machine's own
# bandwidth and arithmetic is used; *at most* is what Amdahl's law allows, *reachable* what is left
# of that when Mamba-2 pays for its own gate and states. All are explained below.

# %%
pictures = wb.load_data("pocket", split="test", limit=64)
one = next(s for s in pictures if s.family == "describe")
four = max((s for s in pictures if s.family == "several"), key=lambda s: len(s.images))
speed = wb.profile([teacher, hybrid], [one, four], repeats=2, max_new_tokens=12)
print(speed)

# %%
explorer = profile_explorer(speed)
explorer

# %% [markdown]
# Choose another figure above, and "in proportion". A small hybrid does not **write** faster: a
# token is many small operations, and starting them takes longer than doing them. The bytes are
# what they were computed to be; times are the machine's, and the machine has other things to do:
# a speed-up above *at most* is noise, so measure again.
#
# ## Products: what a prompt has to compute
#
# A prompt of $l$ tokens costs $2 N l$ operations for $N$ weights, and attention $4\, l^2 d$ more
# in each layer (scores, and the sum over values). The state does the same in about
# $2\,l\,q\,(n+p) h + 6\,l\,n\,p\,h$ (lesson 1). So attention matters in prefill from the length
# on at which $4\,l\,d$ is no longer small beside $2N$ a layer.

# %%
phi2 = dict(layers=32, d=2560, n_heads=32, headdim=80, d_state=80, weights=2_779_683_840, bytes=2)
per_layer = phi2["weights"] / phi2["layers"]
for length in (1_000, 10_000, 100_000):
    share = 4 * length * phi2["d"] / (2 * per_layer + 4 * length * phi2["d"])
    print(f"{length:>7,} tokens: {share:4.0%} of the operations go into scores and their sums")

# %% [markdown]
# ## Amdahl: what is left is left
#
# If a share $s$ of the time is spent in token mixing, and a student makes a fraction $r$ of the
# layers infinitely fast at it, the whole becomes at most $1 / (1 - r\,s)$ times as fast (Amdahl
# 1967). We measure $s$ in the teacher while it decodes.

# %%
def mixing_share(vlm, sample, n_tokens=12):
    """Share of decoding time that is spent inside self_attn, projections included."""
    spent, started = [0.0], [0.0]
    hooks = []
    for layer in decoder_layers(vlm.model):
        hooks += [
            layer.self_attn.register_forward_pre_hook(
                lambda *_: started.__setitem__(0, time.perf_counter())
            ),
            layer.self_attn.register_forward_hook(
                lambda *_: spent.__setitem__(0, spent[0] + time.perf_counter() - started[0])
            ),
        ]
    stream = wb.stream_answer(vlm, sample.images, sample.question, max_new_tokens=n_tokens)
    next(stream)  # the prefill
    spent[0], start = 0.0, time.perf_counter()
    for _ in stream:
        pass
    whole = time.perf_counter() - start
    for hook in hooks:
        hook.remove()
    return spent[0] / whole


share = mixing_share(teacher, one)
print(f"{share:.0%} of the time is spent in attention, its four projections included")

# %% [markdown]
# **Exercise 2.** Write `amdahl(share, ratio)`. What is the most that a hybrid with 25 % of its
# layers replaced could gain here? And with all of them?

# %% tags=["exercise"]
def amdahl(share, ratio):
    return ...  # your turn


# %% tags=["solution"]
def amdahl(share, ratio):
    return 1 / (1 - ratio * share)


# %%
check(
    "Exercise 2",
    (lambda: amdahl(0.5, 0.0) == 1, "without any layer replaced nothing gets faster: 1."),
    (lambda: abs(amdahl(0.5, 1.0) - 2) < 1e-9, "half of the time gone is 2 times as fast."),
    (lambda: abs(amdahl(0.4, 0.25) - 1 / 0.9) < 1e-9, "the time left is 1 - ratio * share."),
)  # fmt: skip
print(f"at most, 25 %: {1 / (1 - 0.25 * share):.2f} times; all layers: {1 / (1 - share):.2f} times")

# %% [markdown]
# And even that is too kind. A Mamba-2 layer keeps the projections, which most of this time goes
# to, and it brings a gate whose weights must be read and a state that is read and written with
# every token. At this machine's bandwidth that is some time $a$, as a share of the teacher's, and
# no more than $1 / (1 - r\,s + a)$ is *reachable*.
#
# ## Where 3.6 comes from
#
# The paper's teacher is TinyLLaVA with Phi-2: 32 layers, $d$ = 2560, 2.78 thousand million
# weights in 16 bits ([its config](https://huggingface.co/microsoft/phi-2)). The figures below
# were read off figure 1b of the paper with a ruler (± 0.5 tokens/s; one RTX 3090). Its memory
# moves at most 936 GB a second (NVIDIA's data sheet). So we can say what is possible.

# %%
lengths = [2048, 4096, 8192, 16384]
figure_1b = {"teacher": [41.3, 41.1, 37.8, 31.2], "25 %": [112, 105.6, 94.3, 79.0]}


def bytes_a_token(length, n_mamba):
    """Phi-2 with so many Mamba-2 layers of the paper: weights, cache, and states twice."""
    d, b = phi2["d"], phi2["bytes"]
    kv = (phi2["layers"] - n_mamba) * 2 * d * b * length
    state = phi2["n_heads"] * phi2["headdim"] * phi2["d_state"] * 4 + 3 * 3 * d * b
    new_weights = n_mamba * 6_666_000 * b  # z, dt, convolution, less the biases
    return phi2["weights"] * b + kv + new_weights + 2 * n_mamba * state


bound = [bytes_a_token(t, 0) / bytes_a_token(t, 8) for t in lengths]
seen = [h / t for h, t in zip(figure_1b["25 %"], figure_1b["teacher"], strict=True)]
reached = [
    bytes_a_token(t, 0) * v / 936e9 for t, v in zip(lengths, figure_1b["teacher"], strict=True)
]
print("tokens   speed-up in the figure   possible by bytes   the teacher's share of the bandwidth")
for row in zip(lengths, seen, bound, reached, strict=True):
    print("{:>6,}{:>20.2f} x{:>20.2f} x{:>26.0%}".format(*row))

# %%
curves_figure(
    {"figure 1b of the paper": (lengths, seen), "possible by bytes alone": (lengths, bound)},
    x="tokens", y="25 % hybrid over teacher, times", dotted=["possible by bytes alone"],
)  # fmt: skip

# %% [markdown]
# A quarter of the layers can save at most some 10 % of a token's bytes. The figure shows 2.5
# times. The last column says why: **the teacher used a third of what its memory could give**. In
# the authors' benchmark script the hybrid decodes from CUDA graphs with a static cache, the
# teacher in `generate`, which starts every small operation from Python (github.com/hustvl/MaTVLM,
# branch dev, `benchmark/tinyllava_benchmark_generation_speed.py`). That is a gain of the engine,
# and the teacher can have it, too. What Mamba-2 itself brings grows with length, and is mostly
# memory.
#
# **Exercise 3.** From which number of tokens on is one Mamba-2 layer's state of that model
# smaller than the keys and values of one attention layer? Count state and convolution as above.

# %% tags=["exercise"]
break_even = ...  # your turn, a number of tokens

# %% tags=["solution"]
break_even = (32 * 80 * 80 * 4 + 3 * 3 * 2560 * 2) / (2 * 2560 * 2)

# %%
check(
    "Exercise 3",
    (lambda: 1 < break_even < 10_000, "divide the bytes of a state by the bytes of one token."),
    (lambda: abs(break_even - 84.5) <= 1.0,
     "state: 32 * 80 * 80 numbers of 4 bytes, and 3 * 3 * 2560 of 2; token: 2 * 2560 of 2 bytes."),
)  # fmt: skip

# %% [markdown]
# ## What this lesson claimed

# %%
last = {row.model: row for row in speed.rows}  # the longer prompt stands last
tokens = {m: row.n_prompt_tokens + row.n_new_tokens - 1 for m, row in last.items()}
assert last["pocket"].kv_bytes == budget(teacher, length=tokens["pocket"]).kv_bytes
mine = budget(teacher, hybrid.plan, length=tokens["pocket-25"])
assert (last["pocket-25"].kv_bytes, last["pocket-25"].ssm_bytes) == (mine.kv_bytes, mine.ssm_bytes)
print("The cache holds what was computed, to the byte.")

assert last["pocket-25"].kv_bytes < last["pocket"].kv_bytes
print("A quarter of the layers saves a quarter of the keys and values.")

assert max(bound) < 1.2 < 2 < min(seen)
assert max(reached) < 0.4
print("Bytes allow less than 1.2 times; the rest of the paper's speed-up is the engine's.")

# %% [markdown]
# **Go on**: set `n_mamba` to 16 and `lengths` to 65,536: when does a hybrid reach 2 times by
# bytes alone? Next: [6 · Comparing](6_comparing.ipynb).
