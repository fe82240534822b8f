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
# # 6 · Comparing
#
# **The idea:** "2 % worse on average" says little. Where do two models part, at which token, and
# on what kind of question? And what can a state of fixed size not do, however well it was
# trained? You will compare with error bars, read two answers token by token, and fill a state
# until it overflows. Reading time: 45 minutes. No training.

# %%
import math

import workbench as wb  # before torch, whose threads then sleep while they wait
import torch

from workbench.steps.quality.together import mean_kl, read_together
from workbench.views.charts import bars_figure, curves_figure
from workbench.views.lessons import check, versions
from workbench.views.widgets import answer_viewer

print(versions())

# %% [markdown]
# ## The same questions to both
#
# Four hybrids come with the workbench, from an eighth of Mamba-2 layers to nothing else. We take a
# quarter and all. They started alike, but were not trained equally long, so a difference between
# them is not the share's alone. `compare` asks the teacher and one of them the same, greedily.

# %%
teacher = wb.load_teacher("pocket")
hybrids = {name: wb.load(name) for name in ("pocket-25", "pocket-100")}
some = wb.load_data("pocket", split="test", limit=40)
short = [s for s in some if len(s.images) == 1 and s.family != "describe"][:12]

reports = {name: wb.compare(teacher, hybrid, short) for name, hybrid in hybrids.items()}
for report in reports.values():
    print(report, end="\n\n")

# %% [markdown]
# **Exercise 1.** A share $a$ of agreement measured on $n$ questions has a standard error of about
# $\sqrt{a(1-a)/n}$. Write it. Can these questions tell `pocket-25` from a hybrid that agrees 5
# points less?

# %% tags=["exercise"]
def standard_error(share, n):
    return ...  # your turn


# %% tags=["solution"]
def standard_error(share, n):
    return math.sqrt(share * (1 - share) / n)


# %%
check(
    "Exercise 1",
    (lambda: standard_error(1.0, 12) == 0, "if all agree, the formula gives 0 (and is too kind)."),
    (lambda: standard_error(0.5, 100) < standard_error(0.5, 25), "more questions, smaller error."),
    (lambda: abs(standard_error(0.5, 25) - 0.1) < 1e-9, "the square root of a (1 - a) / n."),
)  # fmt: skip
for name, report in reports.items():
    a, n = report.agreement, len(report.pairs)
    print(f"{name:<11} {a:6.1%} ± {math.sqrt(a * (1 - a) / n):.1%}")

# %% [markdown]
# Twelve questions are far too few for small differences. Whole words are a coarse measure as
# well: an answer is the same or it is not. The models' expectations say more, at every token.
#
# ## Token by token
#
# `read_together` makes both models read the same answer and returns, for every token, the KL of
# their expectations and what each would have said (`compare(...).kl` is its mean). The answers read
# are the reference ones, so both see the same past; otherwise a difference early on would be
# counted again and again.

# %%
judges = [s for s in some if s.family == "describe"][:2]
kl = {name: mean_kl(teacher, hybrid, judges) for name, hybrid in hybrids.items()}
bars_figure(kl, x="KL to the teacher, nats a token", chosen=["pocket-25"], height=150)

# %% [markdown]
# To see partings we take a student that parts: a quarter of the layers, with the paper's start, and
# not trained at all (lesson 3).

# %%
plan = wb.choose_layers(teacher, ratio=0.25)
untrained = wb.convert(teacher, plan, init="matvlm", name="untrained")
tokens = read_together(teacher, untrained, judges[:1])[0]
for token in sorted(tokens, key=lambda t: -t.kl_nats)[:6]:
    print(f"{token.text!r:>14} {token.kl_nats:6.2f} nats   teacher {token.teacher!r} "
          f"student {token.student!r}")  # fmt: skip

# %% [markdown]
# **Exercise 2.** Find the place (counted from 0) of the first token at which the two would have
# said something different. `token.agree` says whether they would have said the same.

# %% tags=["exercise"]
first_parting = ...  # your turn

# %% tags=["solution"]
first_parting = next(i for i, token in enumerate(tokens) if not token.agree)

# %%
check(
    "Exercise 2",
    (lambda: 0 <= first_parting < len(tokens), "a place in `tokens`, from 0."),
    (lambda: not tokens[first_parting].agree, "they agree there."),
    (lambda: all(t.agree for t in tokens[:first_parting]), "they part before that."),
)  # fmt: skip

# %% [markdown]
# ## Two answers, side by side
#
# Now each says what it wants; both read both answers, and the deeper the colour, the further
# apart they are. The pointer on a token shows what each expected. Most tokens are pale: the
# twelve layers that still attend know the grammar. The colour sits on what has to be **looked up**
# in the picture.

# %%
viewer = answer_viewer(teacher, untrained, judges)
viewer

# %%
said = viewer.value["answers"]["pocket"]
agreed = sum(t["teacher"] == t["student"] for t in said) / len(said)
print(f"On the teacher's answer both would have said the same in {agreed:.0%} of the places.")

# %% [markdown]
# ## What fits into a state
#
# Attention keeps every token and finds it again by its key. A state of $p \times n$ numbers is a
# sum of products $x_s B_s^\top$, and asking it with $C = B_s$ gives $x_s$ plus what all others
# left in that direction: for keys of length one, $S\,B_s = x_s + \sum_{r \ne s} x_r\,(B_r^\top
# B_s)$. Up to $n$ keys can stand at right angles to each other; more must overlap. How many pairs
# can be told apart? We store $m$ random pairs and ask for each: is the nearest value the right one?

# %%
def recall(m, n, p=16, rate=0.0, trials=20, seed=0):
    """Share of m pairs that a state with d_state n gives back, forgetting at `rate` a token."""
    generator = torch.Generator().manual_seed(seed)
    right = 0.0
    for _ in range(trials):
        B = torch.nn.functional.normalize(torch.randn(m, n, generator=generator), dim=-1)
        x = torch.randn(m, p, generator=generator).sign()
        age = torch.arange(m - 1, -1, -1.0)
        S = (x * torch.exp(-rate * age)[:, None]).T @ B  # (p, n)
        nearest = ((B @ S.T) @ x.T).argmax(-1)
        right += float((nearest == torch.arange(m)).float().mean())
    return right / trials


def recall_attention(m, n, p=16, trials=20, seed=0):
    """The same with softmax attention, which keeps every pair; the scores are sharp."""
    generator = torch.Generator().manual_seed(seed)
    right = 0.0
    for _ in range(trials):
        B = torch.nn.functional.normalize(torch.randn(m, n, generator=generator), dim=-1)
        x = torch.randn(m, p, generator=generator).sign()
        nearest = (((50 * B @ B.T).softmax(-1) @ x) @ x.T).argmax(-1)
        right += float((x[nearest] == x).all(-1).float().mean())
    return right / trials


pairs = [4, 8, 16, 32, 64, 128, 256]
kept = {
    "softmax attention, n = 64": (pairs, [recall_attention(m, 64) for m in pairs]),
    "state, n = 16": (pairs, [recall(m, 16) for m in pairs]),
    "state, n = 64": (pairs, [recall(m, 64) for m in pairs]),
    "state, n = 64, forgetting 3 %": (pairs, [recall(m, 64, rate=0.03) for m in pairs]),
}
curves_figure(kept, x="pairs stored", y="share recalled")

# %% [markdown]
# A larger `d_state` helps; forgetting makes room for what is new at the price of what is old; and
# softmax attention does not care. That recall is where models with a fixed state fall behind is
# known from Zoology ([arXiv 2312.04927](https://arxiv.org/abs/2312.04927)) and *Repeat After Me*
# ([arXiv 2402.01032](https://arxiv.org/abs/2402.01032)). So a hybrid keeps some attention: a
# single layer can look up what all the states have lost.
#
# **Exercise 3.** Up to how many pairs (of those in `pairs`) does a state with n = 64 recall at
# least 90 %? Compute it with `recall`.

# %% tags=["exercise"]
capacity = ...  # your turn

# %% tags=["solution"]
capacity = max(m for m in pairs if recall(m, 64) >= 0.9)

# %%
check(
    "Exercise 3",
    (lambda: capacity in pairs, "one of the numbers in `pairs`."),
    (lambda: recall(capacity, 64) >= 0.9, "at this number it recalls less than 90 %."),
    (lambda: all(recall(m, 64) < 0.9 for m in pairs if m > capacity),
     "it still recalls 90 % of more pairs than that."),
)  # fmt: skip

# %% [markdown]
# ## What this lesson claimed

# %%
assert reports["pocket-25"].agreement >= reports["pocket-100"].agreement
assert kl["pocket-25"] < kl["pocket-100"]
print("The hybrid without attention is further from its teacher, and KL sees it everywhere.")

assert agreed > 0.5
print("Even an untrained student parts from its teacher at some tokens, and agrees on most.")

curve = {name: values for name, (_, values) in kept.items()}
assert min(curve["softmax attention, n = 64"]) > 0.99
assert curve["state, n = 16"][-1] < curve["state, n = 64"][-1] < 0.9
print("A state overflows, a larger one later; attention does not.")

# %% [markdown]
# **Go on**: `wb.evaluate(hybrids["pocket-25"], "easy-vqa", limit=64)` is somebody else's
# benchmark. Next: [7 · Bring your own model](7_your_own_model.ipynb).
