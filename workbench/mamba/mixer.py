"""A Mamba-2 mixer that takes over the projections of an attention module.

Attention's query, key, value and output projections stay where they are, under their own names, and
play C, B, x and the output: attention without softmax *is* a state space model. Only the gate z,
the step dt, the short convolution, the decay A, the skip D and the norm are new.

Sources: arXiv 2405.21060, section 7 (the mixer); arXiv 2503.13440, section 3 (who plays what).
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.errors import WorkbenchError
from workbench.mamba import fused, kernels
from workbench.mamba.config import Mamba2Config, ProjectionNames
from workbench.mamba.parts import (
    CausalConv1d,
    GatedRMSNorm,
    Projected,
    gated,
    newest,
    normed,
    rotate,
)


class MixerState(NamedTuple):
    """All that the past leaves behind, of a size that does not grow."""

    conv: Tensor  # (batch, channels of x + B + C, d_conv - 1), inputs of the convolution
    ssm: Tensor  # (batch, n_heads, headdim, d_state), float32


class Mamba2Mixer(nn.Module):
    """Mamba-2 whose C, B, x and output projections are those of an attention module.

    Args:
        config: sizes and options.
        modules: the attention's own modules by name, moved in without a copy; None makes new ones.
        names: which of them plays what.
        seed: of the initialisation of the new parameters.
    """

    # Small, and each rounding error is repeated at every position: never below float32.
    float32_parameters = ("A_log", "dt_bias", "D")

    def __init__(
        self,
        config: Mamba2Config,
        modules: Mapping[str, nn.Module] | None = None,
        names: ProjectionNames | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.config, self.names = config, names or ProjectionNames()
        modules = _new_projections(config) if modules is None else modules
        for name in self.names.all():
            self.add_module(name, modules[name])
            if not config.bias and isinstance(modules[name], nn.Linear):
                modules[name].bias = None
        like = getattr(self, self.names.out).weight
        options = {
            "device": like.device,
            "dtype": like.dtype if like.is_floating_point() else torch.get_default_dtype(),
        }
        # The dt projection has n_heads rows only, too few for a quantised nn.Linear: a bare
        # parameter.
        self.dt_weight = nn.Parameter(torch.empty(config.n_heads, config.d_model, **options))
        if config.gate:
            self.z_proj = nn.Linear(config.d_model, config.d_inner, bias=config.bias, **options)
        conv1d = CausalConv1d(sum(config.widths), config.d_conv, config.conv_activation)
        self.conv1d = conv1d.to(**options)
        if config.norm:
            norm = GatedRMSNorm(config.d_inner, config.group_size, config.norm_eps)
            self.norm = norm.to(**options)
        for name in self.float32_parameters:
            empty = torch.empty(config.n_heads, device=like.device, dtype=torch.float32)
            self.register_parameter(name, nn.Parameter(empty))
        self.reset_new_parameters(seed)

    def reset_new_parameters(self, seed: int = 0) -> None:
        """Draw the parameters that attention did not have, as MaTVLM does, the same on any device.

        z_proj, dt_weight: U(-1, 1) / sqrt(d_model)       conv1d: U(-1, 1) / sqrt(d_conv)
        A_log: log U(1, 16)                               D, norm: 1
        dt_bias: softplus(dt_bias) is log-uniform in (1e-3, 0.1)
        """
        if self.A_log.is_meta:
            return
        generator = torch.Generator("cpu").manual_seed(seed)

        def draw(like: Tensor, low: float, high: float) -> Tensor:
            unit = torch.rand(like.shape, generator=generator, device="cpu", dtype=torch.float32)
            return unit * (high - low) + low

        linear, conv = self.config.d_model**-0.5, self.config.d_conv**-0.5
        dt = draw(self.dt_bias, math.log(1e-3), math.log(0.1)).exp()
        values = {}
        if self.config.gate:
            values["z_proj.weight"] = draw(self.z_proj.weight, -linear, linear)
        values |= {
            "dt_weight": draw(self.dt_weight, -linear, linear),
            "conv1d.weight": draw(self.conv1d.weight, -conv, conv),
            "conv1d.bias": draw(self.conv1d.bias, -conv, conv),
            "A_log": draw(self.A_log, 1, 16).log(),
            "dt_bias": dt + torch.log(-torch.expm1(-dt)),  # the inverse of softplus
            "D": torch.tensor(1.0, device="cpu"),
        }
        if self.config.norm:
            values["norm.weight"] = torch.tensor(1.0, device="cpu")
        if self.config.gate and self.config.bias:
            values["z_proj.bias"] = draw(self.z_proj.bias, -linear, linear)
        with torch.no_grad():
            for name, value in values.items():
                self.get_parameter(name).copy_(value)

    def reset_to_linear_attention(self) -> None:
        """Make this attention without softmax: y_i = sum over j <= i of scale (C_i . B_j) x_j.

        The decay is 1 (to 1e-13), dt is 1, D is 0, the convolution passes its newest input through,
        and a gate, if there is one, is 1. With bias=True, scale that of the attention and rope as
        it has it, the layer then computes what the attention would without its softmax.

        Raises:
            WorkbenchError: an option stands in the way.
        """
        config = self.config
        in_the_way = {
            "norm=False": config.norm,
            "conv_activation=None": config.conv_activation is not None,
            "gate=False (or bias=True)": config.gate and not config.bias,
        }
        needed = [option for option, missing in in_the_way.items() if missing]
        if needed:
            raise WorkbenchError(
                f"This mixer cannot become linear attention: build it with {' and '.join(needed)}."
            )
        self.reset_to_pass_through()

    def reset_to_pass_through(self) -> None:
        """Let nothing that is new change what attention's projections say.

        The decay is 1 (to 1e-13), dt is 1, D is 0, the convolution passes its newest input on, a
        gate that has a bias is 1, and a norm only normalises.
        """
        with torch.no_grad():
            self.A_log.fill_(-30.0)
            self.dt_weight.zero_()
            self.dt_bias.fill_(math.log(math.expm1(1.0)))  # softplus of it is 1
            self.D.zero_()
            self.conv1d.weight.zero_()
            self.conv1d.weight[..., -1] = 1
            self.conv1d.bias.zero_()
            if self.config.gate and self.config.bias:
                self.z_proj.weight.zero_()
                self.z_proj.bias.fill_(1.2784645427610738)  # silu of it is 1
            if self.config.norm:
                self.norm.weight.fill_(1)

    def forward(
        self,
        hidden_states: Tensor,
        *,
        mask: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        state: MixerState | None = None,
    ) -> tuple[Tensor, MixerState]:
        """Mix a sequence, or continue one.

        Args:
            hidden_states: (batch, seqlen, d_model).
            mask: (batch, seqlen) bool, False where a position is padding; None: all are real.
            rotary: cos and sin, each (batch or 1, seqlen, rotated width); read if config.rope.
            state: what the sequence left so far, or None at its start.

        Returns:
            (batch, seqlen, d_model) and the state after the last position.
        """
        said = self._project(hidden_states)
        y, *after = self.mix(said, mask=mask, rotary=rotary, state=state)
        return getattr(self, self.names.out)(y), MixerState(*after)

    def mix(
        self,
        said: Projected,
        *,
        mask: Tensor | None = None,
        end: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        state: MixerState | None = None,
        into: MixerState | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Do what stands between the projections; the result is that of `mix_in_parts`.

        Args:
            said: what they say of the sequence.
            mask: as in `forward`.
            end: (1,), where all sequences end, from 1 to seqlen; what is behind it is mixed, but
                leaves no trace in the state. None: none ends early.
            rotary: as in `forward`.
            state: as in `forward`.
            into: other tensors than those of `state`, in which kernels may leave the new one.
        """
        options = {"mask": mask, "end": end, "rotary": rotary, "state": state}
        if fused.suits(self, said):
            return fused.mix(self, said, into=into, **options)
        return self.mix_in_parts(said, **options)

    def mix_in_parts(
        self,
        said: Projected,
        *,
        mask: Tensor | None,
        end: Tensor | None,
        rotary: tuple[Tensor, Tensor] | None,
        state: MixerState | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Do what stands between the projections, one operation after the other.

        Returns:
            y (batch, seqlen, d_inner), and both parts of the state after it.
        """
        config, (x, B, C, z, dt) = self.config, said
        xBC = torch.cat([x, B, C], dim=-1)
        dt = F.softplus(dt.to(self.dt_bias.dtype) + self.dt_bias)
        if end is not None:
            within = (torch.arange(x.shape[1], device=x.device) < end)[None]
            mask = within if mask is None else mask & within
        if mask is not None:
            # Before the convolution, so that padding reaches no real position, and after the
            # projection, so that its bias is gone too; dt = 0 then carries the state across.
            xBC = xBC.masked_fill(~mask[..., None], 0)
            dt = dt.masked_fill(~mask[..., None], 0)
        past = None if state is None else state.conv
        read = xBC
        xBC, conv_state = self.conv1d(read, past)
        if end is not None:
            conv_state = newest(read, past, end, config.d_conv - 1)
        x, B, C = (
            t.unflatten(-1, (-1, width))
            for t, width in zip(
                xBC.split(config.widths, dim=-1),
                (config.headdim, config.d_state, config.d_state),
                strict=True,
            )
        )
        if config.rope:
            B, C = (rotate(t, rotary, config.rope_interleaved) for t in (B, C))
        if config.scale is not None:
            C = C * config.scale
        # Grouped-query attention shares each key and value head: (kv p) -> (kv r p), head by head.
        repeats = config.n_heads // config.n_kv_heads
        if repeats > 1:
            x, B = (t.repeat_interleave(repeats, dim=2) for t in (x, B))
        y, ssm_state = self._scan(x, dt, B, C, state)
        y = (y + x * self.D[:, None]).flatten(2)
        y = self.norm(y, z) if config.norm else gated(y, z)
        return y.to(x.dtype), conv_state, ssm_state

    def _project(self, hidden_states: Tensor) -> Projected:
        names, config = self.names, self.config
        if names.fused:
            widths = config.widths[::-1]
            C, B, x = getattr(self, names.fused)(hidden_states).split(widths, dim=-1)
        else:
            C, B, x = (getattr(self, n)(hidden_states) for n in (names.C, names.B, names.x))
        if names.C_norm:
            C = normed(getattr(self, names.C_norm), C, config.d_state)
        if names.B_norm:
            B = normed(getattr(self, names.B_norm), B, config.d_state)
        z = self.z_proj(hidden_states) if config.gate else None
        return Projected(x, B, C, z, F.linear(hidden_states, self.dt_weight))

    def _scan(
        self, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, state: MixerState | None
    ) -> tuple[Tensor, Tensor]:
        A = -torch.exp(self.A_log)
        if state is not None and x.shape[1] == 1:
            x, dt, B, C = (t.squeeze(1) for t in (x, dt, B, C))
            y, ssm_state = kernels.ssd_step(x, dt, A, B, C, state=state.ssm)
            return y.unsqueeze(1), ssm_state
        initial = None if state is None else state.ssm
        return kernels.ssd(x, dt, A, B, C, chunk_size=self.config.chunk_size, initial_state=initial)

    def _apply(self, fn, recurse=True):  # torch's hook behind .to()
        kept = {name: getattr(self, name).data for name in self.float32_parameters}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            parameter = getattr(self, name)
            if parameter.dtype.itemsize < torch.float32.itemsize:
                gradient, parameter.grad = parameter.grad, None
                parameter.data = before.to(parameter.device)
                parameter.grad = None if gradient is None else gradient.to(before.dtype)
        return self


def _new_projections(config: Mamba2Config) -> dict[str, nn.Module]:
    x, B, C = config.widths
    widths = {"q_proj": C, "k_proj": B, "v_proj": x}
    modules = {n: nn.Linear(config.d_model, w, bias=config.bias) for n, w in widths.items()}
    return modules | {"o_proj": nn.Linear(config.d_inner, config.d_model, bias=config.bias)}
