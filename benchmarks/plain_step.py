"""The paper's training step, written down plainly: what `training_step.py` measures ours against.

As MaTVLM's train_hybrid.py does it (arXiv 2503.13440, section 3.3; repository hustvl/MaTVLM), for a
language model without padding:

- every layer of the student runs on the teacher's hidden states, though only the Mamba layers'
  results are used;
- logits of every position of both models, over the whole vocabulary, stand in memory at once;
- the KL is summed over all positions, each layer's loss is one norm of the whole tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import workbench as wb
from workbench.models.families import decoder_layers
from workbench.models.hybrid import mixers


class PlainStep:
    """One optimiser step after another, with the same AdamW, clipping and bfloat16 as `distill`."""

    def __init__(self, student: wb.VLM, teacher: wb.VLM, *, lr: float = 1e-3, compiled: bool):
        self.student, self.teacher = student.model, teacher.model
        self.mamba_layers = set(student.plan.mamba_layers)
        self.student.requires_grad_(False)
        self.trained = [p for m in mixers(self.student).values() for p in m.parameters()]
        for p in self.trained:
            p.requires_grad_(True)
        self.optimizer = torch.optim.AdamW(self.trained, lr=lr, betas=(0.9, 0.95))
        for model in (self.student, self.teacher) if compiled else ():
            for layer in decoder_layers(model):
                layer.forward = torch.compile(layer.forward, dynamic=False)

    def __call__(self, ids: Tensor) -> None:
        """Read (batch, seqlen) token ids and take a step."""
        device = ids.device
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = self.loss(ids)
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def loss(self, ids: Tensor) -> Tensor:
        """Both losses of the paper with its weights, 1 and 1, and its temperature, 1."""
        with torch.no_grad():
            theirs = self.teacher(input_ids=ids, output_hidden_states=True, use_cache=False)
        places = torch.arange(ids.shape[1], device=ids.device)[None]
        rotary = self.student.model.rotary_emb(theirs.hidden_states[0], places)
        layer_loss = torch.zeros((), device=ids.device)
        for i, layer in enumerate(decoder_layers(self.student)):
            got = layer(theirs.hidden_states[i], attention_mask=None, position_embeddings=rotary)
            if i in self.mamba_layers:
                wanted = theirs.hidden_states[i + 1]
                layer_loss = layer_loss + torch.linalg.vector_norm(got - wanted)
        logits = self.student(input_ids=ids, use_cache=False).logits
        kl = F.kl_div(
            F.log_softmax(logits, -1), F.softmax(theirs.logits, -1), reduction="batchmean"
        )
        return layer_loss + kl
