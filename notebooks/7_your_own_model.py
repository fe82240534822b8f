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
# # 7 · Bring your own model
#
# **The idea:** nothing in the workbench knows a model by name. A row in one table says where a
# family keeps its projections (`workbench/models/families.py`); everything else is read from the
# model. So what you did with `pocket` works on yours. Here it is a language model of 60,000
# weights that this notebook makes itself: no download, no network, and small enough to see every
# number. Reading time: 30 minutes.

# %%
import math
import tempfile
from pathlib import Path

import workbench as wb  # before torch, whose threads then sleep while they wait
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from workbench.models.families import decoder_layers
from workbench.models.hybrid import mixers
from workbench.steps.conversion.initialization import LICENCES
from workbench.steps.efficiency.budget import budget
from workbench.views.charts import curves_figure
from workbench.views.lessons import check, versions

torch.manual_seed(0)
transformers.utils.logging.disable_progress_bar()
print(versions())

# %% [markdown]
# ## A model in a folder
#
# Any Hugging Face folder will do: `config.json`, `model.safetensors`, a tokenizer. We write one.
# It is a Llama with **grouped queries**: four heads of queries share two heads of keys and values
# ([arXiv 2305.13245](https://arxiv.org/abs/2305.13245)), as in most models of today.

# %%
home = Path(tempfile.mkdtemp())
corpus = [path.read_text() for path in sorted(LICENCES.glob("*.txt"))]

bpe = Tokenizer(models.BPE())
bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
bpe.decoder = decoders.ByteLevel()
letters = pre_tokenizers.ByteLevel.alphabet()
bpe.train_from_iterator(corpus, trainers.BpeTrainer(
    vocab_size=512, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=letters,
    show_progress=False,
))  # fmt: skip
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
)
config = LlamaConfig(
    vocab_size=512, hidden_size=48, intermediate_size=96, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
llama = LlamaForCausalLM(config)

# %% [markdown]
# A random model has nothing to teach. So it reads the licence texts that come with the workbench
# for a minute or less, in plain PyTorch: predict the next token.

# %%
ids = torch.tensor([i for text in corpus for i in tokenizer(text)["input_ids"]])
optimizer = torch.optim.AdamW(llama.parameters(), lr=3e-3)
losses = []
for _ in range(150):
    starts = torch.randint(len(ids) - 65, (8,))
    batch = torch.stack([ids[s : s + 64] for s in starts])
    loss = llama(input_ids=batch, labels=batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
llama.save_pretrained(home / "my-llama")
tokenizer.save_pretrained(home / "my-llama")
print(f"{len(ids):,} tokens; loss {losses[0]:.2f} -> {sum(losses[-10:]) / 10:.2f} nats a token "
      f"(guessing: {math.log(512):.2f})")  # fmt: skip

# %% [markdown]
# ## Load it
#
# From here on there is no Llama in any line. Put the path of your own folder, or a Hugging Face
# id, in place of ours; larger models take a `device` and a `dtype`.

# %%
teacher = wb.load_teacher(home / "my-llama")
print(teacher)
plan = wb.choose_layers(teacher, ratio=0.5)
print(plan)
print(budget(teacher, length=512))
print(budget(teacher, plan, length=512))

# %% [markdown]
# **Exercise 1.** In a mixer that takes over this attention, how many heads has B as it is
# projected (the keys' heads), and how many channels are convolved altogether (x, B and C)? The
# head width is 48 / 4 = 12.

# %% tags=["exercise"]
B_heads = ...  # your turn
convolved_channels = ...  # your turn

# %% tags=["solution"]
B_heads = 2
convolved_channels = 2 * 12 + 2 * 12 + 4 * 12  # x, B, C

# %%
student = wb.convert(teacher, plan, init="matvlm")
mixer = mixers(student.model)[plan.mamba_layers[0]]
check(
    "Exercise 1",
    (lambda: B_heads == mixer.config.n_kv_heads, "keys and values have num_key_value_heads heads."),
    (lambda: convolved_channels != 3 * 48,
     "x and B are convolved before they are repeated for the heads that share them."),
    (lambda: convolved_channels == mixer.conv1d.in_channels,
     "x and B have 2 heads of 12 channels each, C has 4."),
)  # fmt: skip

# %% [markdown]
# Two heads that share keys must get **the same** B: heads 0 and 1 the first one, heads 2 and 3 the
# second, `(kv d) -> (kv r d)`. Three public code bases repeat rows instead of heads, and nothing
# crashes. So we test it: with `init="linear"` a mixer is attention without its softmax, which can
# be worked out by hand.

# %%
exact = wb.convert(teacher, plan, init="linear", options={"rope": False, "gate": False})
layer = plan.mamba_layers[0]
mixer, attention = mixers(exact.model)[layer], decoder_layers(teacher.model)[layer].self_attn
with torch.no_grad():
    hidden = torch.randn(1, 20, 48)
    C, B, x = (p(hidden)[0].unflatten(-1, (-1, 12)).transpose(0, 1)
               for p in (attention.q_proj, attention.k_proj, attention.v_proj))  # fmt: skip
    heads = [(C[h] @ B[h // 2].T).tril() @ x[h // 2] * attention.scaling for h in range(4)]
    by_hand = attention.o_proj(torch.cat(heads, dim=-1))
    by_mixer = mixer(hidden)[0][0]
gqa_error = float((by_hand - by_mixer).abs().max())
print(f"largest difference {gqa_error:.1e}")

# %% [markdown]
# ## Teach it, on your own text
#
# `load_data` takes a folder of `.txt` files. How many tokens a model hesitates between, on average,
# is its **perplexity**: $e^{\text{nats a token}}$ (`wb.perplexity` measures it on other texts).

# %%
texts = wb.load_data(LICENCES)
run = wb.distill(student, teacher, texts, steps=40, batch_size=4, max_length=64, log_every=4)
print(run)

# %%
by_stage = {}
for row in run.rows:
    value = row.kl_nats if row.kl_nats is not None else row.layer_loss
    name = "KL, nats a token" if row.kl_nats is not None else "layer loss"
    by_stage.setdefault(name, ([], []))
    by_stage[name][0].append(row.step)
    by_stage[name][1].append(value)
curves_figure(by_stage, x="step", y="loss")

# %% [markdown]
# **Exercise 2.** The teacher's loss at the end of its training was printed above. Turn the mean
# of its last ten losses into a perplexity.

# %% tags=["exercise"]
teacher_perplexity = ...  # your turn; `losses` and `math.exp` are there

# %% tags=["solution"]
teacher_perplexity = math.exp(sum(losses[-10:]) / 10)

# %%
check(
    "Exercise 2",
    (lambda: teacher_perplexity > 1, "a perplexity is at least 1: e to the power of the loss."),
    (lambda: teacher_perplexity < 512, "there are 512 tokens: it cannot hesitate between more."),
    (lambda: abs(math.log(teacher_perplexity) - sum(losses[-10:]) / 10) < 1e-6,
     "the mean of losses[-10:] first, then e to the power of it."),
)  # fmt: skip

# %% [markdown]
# ## What it refuses
#
# A model that cannot be converted is refused with a reason, before anything is changed. GPT-2
# keeps query, key and value where no row of the table looks.

# %%
gpt2 = GPT2LMHeadModel(GPT2Config(
    vocab_size=512, n_embd=48, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
))
gpt2.save_pretrained(home / "my-gpt2")
tokenizer.save_pretrained(home / "my-gpt2")
refused = ""
try:
    wb.choose_layers(wb.load_teacher(home / "my-gpt2"))
except wb.WorkbenchError as error:
    refused = str(error)
print(refused)

# %% [markdown]
# ## Save it, load it
#
# The hybrid is an ordinary Hugging Face model; its config carries the plan.

# %%
wb.save(student, home / "my-hybrid")
again = wb.load(home / "my-hybrid")
prompt = torch.tensor([tokenizer("This License")["input_ids"]])
with torch.no_grad():
    before, after = (v.model(input_ids=prompt).logits for v in (student, again))
print(again)

# %% [markdown]
# ## What this lesson claimed

# %%
assert gqa_error < 1e-4
print("Grouped queries are expanded head by head: a mixer computes what was worked out by hand.")

kl = [row.kl_nats for row in run.rows if row.kl_nats is not None]
assert kl[-1] < kl[0]
print("A model that the workbench has never seen learns from its teacher.")

assert torch.equal(before, after)
assert again.plan == student.plan
print("Saved and loaded, it is the same to the last bit, plan included.")

assert "gpt2" in refused
print("What cannot be converted is refused with a reason.")

# %% [markdown]
# **Go on**: give it a vision-language model; the README's table lists the families. A family that
# is missing is one row in `families.py`, and `python -m benchmarks.families` tests it.
