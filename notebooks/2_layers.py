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
# # 2 · Choosing layers
#
# **The idea:** which layers become Mamba-2 is a decision, not a detail. Some layers can be
# replaced and nobody notices; others carry the answer. You will measure each layer, draw up plans
# by hand in the layer picker, and see how far a sum of single scores can be trusted.
#
# In MaTVLM's ablation at 25 %, layers spread evenly reached 62.3 points on average, all at the
# beginning 60.4, all in the middle 58.9; all at the end did not learn to answer at all ([arXiv
# 2503.13440](https://arxiv.org/abs/2503.13440), table on position). Reading time: 40 minutes.

# %%
import workbench as wb  # before torch, whose threads then sleep while they wait
import torch

from workbench.data.conversations import IGNORE
from workbench.models.families import decoder_layers
from workbench.steps.efficiency.budget import budget
from workbench.steps.quality.together import mean_kl
from workbench.steps.training.batches import collate
from workbench.views.charts import bars_figure
from workbench.views.lessons import check, versions
from workbench.views.widgets import layer_picker

print(versions())

# %% [markdown]
# ## A plan is data
#
# `choose_layers` gives a plan; nothing is converted yet. `print` draws the stack, the first layer
# at the bottom, where the text comes in.

# %%
teacher = wb.load_teacher("pocket")
plan = wb.choose_layers(teacher, ratio=0.25)
print(plan)

# %% [markdown]
# ## What it will cost, before it exists
#
# What the layer picker below marks *computed* comes from sizes alone: with $b$ bytes a number, an
# attention layer keeps $2\,d\,b$ bytes for every token, a Mamba-2 layer $h\,p\,n \cdot 4$ bytes
# and three positions for its convolution, once.

# %%
for length in (256, 2048):
    before, after = budget(teacher, length=length), budget(teacher, plan, length=length)
    print(f"{length:>5} tokens: cache {before.cache_bytes / 1024:6,.0f} KiB -> "
          f"{after.cache_bytes / 1024:6,.0f} KiB, weights {before.weight_bytes / 2**20:.1f} -> "
          f"{after.weight_bytes / 2**20:.1f} MiB")  # fmt: skip

# %% [markdown]
# **Exercise 1.** Which share of the cache is saved at 2,048 tokens? Compute it from `before` and
# `after`, which still hold the figures for 2,048. Why is it not 25 %?

# %% tags=["exercise"]
saved = ...  # your turn, between 0 and 1

# %% tags=["solution"]
saved = 1 - after.cache_bytes / before.cache_bytes  # the states have to be paid for

# %%
check(
    "Exercise 1",
    (lambda: 0 < saved < 1, "give a share between 0 and 1: what is saved, over what there was."),
    (lambda: abs(saved - after.cache_bytes / before.cache_bytes) > 0.1,
     "this is what is left; what is saved is 1 minus that."),
    (lambda: abs(saved - (1 - after.cache_bytes / before.cache_bytes)) < 1e-6,
     "use cache_bytes, in which the states count too, not kv_bytes."),
)  # fmt: skip

# %% [markdown]
# ## How much does each layer matter?
#
# The simplest question: what if a layer's attention said nothing? We put a zero in its place, and
# look at what happens to the teacher's own expectations, token by token:
# $\mathrm{KL}(p_\mathrm{teacher} \,\Vert\, p_\mathrm{without})$ in nats, 0 if nothing changes.
# Long answers make the clearest judges: two descriptions, about a hundred tokens together. (In one
# line: `wb.score_layers(teacher, method="skip-one")`. Here you see what it does.)

# %%
pictures = wb.load_data("pocket", split="test", limit=32)
judges = [s for s in pictures if s.family == "describe"][:2]


def expectations(model):
    """Log-probabilities of the next token wherever the judges' answers are predicted."""
    with torch.no_grad():
        return model(**inputs).logits[:, :-1][wanted].log_softmax(-1)


batch = collate(teacher, judges)
wanted = batch.pop("labels")[:, 1:] != IGNORE
inputs = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
p_teacher = expectations(teacher.model)


def kl_from_teacher(model):
    """Mean KL over those tokens, in nats; `mean_kl(teacher, student, judges)` says the same."""
    return float((p_teacher.exp() * (p_teacher - expectations(model))).sum(-1).mean())


print(f"{int(wanted.sum())} tokens of {len(judges)} answers")


# %%
def silence(module, args, output):
    """What a hook puts in place of an attention's output."""
    return (torch.zeros_like(output[0]), *output[1:])


skip_scores = []
for layer in decoder_layers(teacher.model):
    hook = layer.self_attn.register_forward_hook(silence)
    skip_scores.append(kl_from_teacher(teacher.model))
    hook.remove()
bars_figure(
    {f"layer {i}": s for i, s in enumerate(skip_scores)},
    x="KL without this layer's attention, nats a token", height=420,
)  # fmt: skip

# %% [markdown]
# Nobody will leave a layer silent. So ask the other way round: what if this one layer were
# **replaced** by a mixer? Here by one that nobody has trained, as the paper starts it (lesson 3).

# %%
replace_scores = []
for layer in range(plan.n_layers):
    student = wb.convert(teacher, wb.Plan(plan.n_layers, (layer,)), init="matvlm")
    replace_scores.append(kl_from_teacher(student.model))
bars_figure(
    {f"layer {i}": s for i, s in enumerate(replace_scores)},
    x="KL with this layer replaced, nats a token", height=420,
)  # fmt: skip

# %% [markdown]
# **Exercise 2.** Write `cheapest(scores, n)`: the `n` layers that hurt least, in ascending order
# of their number. Then look where they stand in the stack.

# %% tags=["exercise"]
def cheapest(scores, n):
    return ...  # your turn


# %% tags=["solution"]
def cheapest(scores, n):
    return sorted(sorted(range(len(scores)), key=lambda i: scores[i])[:n])


# %%
check(
    "Exercise 2",
    (lambda: len(cheapest([3, 1, 2], 2)) == 2, "return n layers."),
    (lambda: set(cheapest([3, 1, 2], 2)) == {1, 2},
     "return the numbers of the layers, not their scores, and those with the lowest scores."),
    (lambda: list(cheapest([3, 1, 2, 0], 3)) == [1, 2, 3], "sort the layers you found by number."),
)  # fmt: skip

# %% [markdown]
# ## The layer picker
#
# Click layers, or slide the ratio; with *by score*, the slider takes the layers that hurt least.
# Dotted and outlined is **computed**. *Measure* converts by this plan and fills the last column
# with what was **measured** (KL on the two judges).

# %%
picker = layer_picker(
    teacher, ratio=0.25, length=2048, scores=replace_scores, init="matvlm", samples=judges
)
picker

# %% [markdown]
# Where there is no mouse: what the buttons do, code does too, and everything can be read back.

# %%
picker.choose([6, 9, 11, 14])
picker.measure()
print(f"layers {picker.plan.mamba_layers}: "
      f"sum of scores {picker.value['estimated_kl_nats']:.5f}, "
      f"measured {picker.value['measured']['kl_nats']:.5f} nats a token")  # fmt: skip

# %% [markdown]
# ## Do scores add up?
#
# A sum of single scores is an estimate: each was measured with all other layers untouched. We
# measure five plans of four layers. The last column is the same plan with mixers that **have** been
# trained: `pocket-100` has one for every layer, and `convert(init=...)` copies those of a plan.

# %%
by_score = sorted(range(plan.n_layers), key=replace_scores.__getitem__)
plans = {
    "even (the paper's)": plan.mamba_layers,
    "the four cheapest": by_score[:4],
    "the four dearest": by_score[-4:],
    "the first four": range(4),
    "layers 3 to 6": range(3, 7),
}
donor = wb.load("pocket-100")
measured, trained = {}, {}
for name, layers in plans.items():
    drawn = wb.Plan(plan.n_layers, tuple(layers), name)
    measured[name] = kl_from_teacher(wb.convert(teacher, drawn, init="matvlm").model)
    trained[name] = kl_from_teacher(wb.convert(teacher, drawn, init=donor).model)
    estimate = sum(replace_scores[i] for i in layers)
    print(f"{name:<20} {sorted(layers)!s:<18} sum {estimate:8.5f}, measured {measured[name]:8.5f}, "
          f"trained {trained[name]:8.5f}")  # fmt: skip
bars_figure(measured, x="KL to the teacher, nats a token", chosen=["the four cheapest"], height=220)

# %% [markdown]
# **Exercise 3.** Each of the layers 3 to 6 alone costs nearly nothing. Replaced together, how
# many times their sum do they cost? `replace_scores` and `measured` hold what you need.

# %% tags=["exercise"]
factor = ...  # your turn

# %% tags=["solution"]
factor = measured["layers 3 to 6"] / sum(replace_scores[3:7])

# %%
check(
    "Exercise 3",
    (lambda: factor > 1, "it is more than their sum: divide the measured KL by the sum."),
    (lambda: abs(factor * sum(replace_scores[3:7]) / measured["layers 3 to 6"] - 1) < 1e-6,
     "measured['layers 3 to 6'] divided by sum(replace_scores[3:7])."),
)  # fmt: skip

# %% [markdown]
# Single scores find the layers that **must not** be touched lightly. They do not see that the next
# layer can make up for one small error, and not for four in a row. So search with plans, not with
# sums, once the dear layers are out.
#
# And look at the stack again: here the first three layers carry nearly everything, and the last
# ones could go. The paper found the opposite of its teacher: with all Mamba-2 layers at the end,
# the student did not learn. No contradiction, but two warnings: `pocket` has sixteen layers for
# questions that need few, and the judges are two descriptions; nobody asked about a flag.
#
# Does training level such differences? In the last column much of them is gone. But measured at
# length, on a GPU and with half of the layers replaced, they come back: after the same thousand
# steps the even plan was at 0.0096 nats an answer token, and one that was **searched** at 0.0008.
# In SmolLM2, a language model, it was 0.43 and 0.24 after ten million tokens (README, *Where to
# put Mamba-2*). The search takes mixers that were aligned first, replaces one layer at a time,
# always the one that hurts least together with those before, and takes some minutes without a GPU:
#
# ```python
# aligned = wb.align(teacher, wb.load_data("pocket", split="train"), steps=300)
# plan = wb.choose_layers(teacher, ratio=0.5, method="greedy", donor=aligned)
# student = wb.convert(teacher, plan, init=aligned)
# ```
#
# Search with **your** teacher and **your** questions; where you cannot, the even plan is the
# cautious choice, and the default of this workbench.
#
# ## What this lesson claimed

# %%
again = mean_kl(teacher, wb.convert(teacher, plan, init="matvlm"), judges)
assert abs(again - measured["even (the paper's)"]) < 1e-3 * again
print("Our own KL is that of the library.")

assert max(replace_scores) > 10 * sorted(replace_scores)[len(replace_scores) // 2]
print("Layers are not alike: the dearest costs more than ten times what the middle one costs.")

assert measured["the four cheapest"] < measured["even (the paper's)"] < measured["the four dearest"]
print("Scores tell cheap layers from dear ones.")

assert measured["layers 3 to 6"] > 10 * sum(replace_scores[3:7])
print("But they do not add up: four cheap layers in a row cost more than ten times their sum.")

assert trained["the four dearest"] < measured["the four dearest"] / 5
print("And training can win back what a bad start has lost.")

before, after = budget(teacher, length=2048), budget(teacher, plan, length=2048)
assert 0.2 < 1 - after.cache_bytes / before.cache_bytes < 0.25
print("A quarter of the layers saves a little less than a quarter of the cache.")

assert picker.value["measured"]["kl_nats"] > 0
print("The picker's plan was measured, and can be read as data.")

# %% [markdown]
# **Go on**: let other judges speak, such as `s.family == "flag"`. Do the same layers matter?
# Next: [3 · Attention to Mamba-2](3_initialisation.ipynb).
