"""Read and write a mixer in the layout that mamba_ssm and transformers share.

There, one matrix `in_proj` holds the rows [z, x, B, C, dt], and grouped-query attention does not
exist: what heads share is repeated for each of them, `(kv p) -> (kv r p)`, head by head.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from workbench.errors import WorkbenchError
from workbench.mamba.config import Mamba2Config
from workbench.mamba.mixer import Mamba2Mixer


def pack(mixer: Mamba2Mixer) -> dict[str, Tensor]:
    """Write a mixer in the layout of mamba_ssm and transformers, one group for each head.

    Returns:
        in_proj (rows [z, x, B, C, dt]), conv1d, dt_bias, A_log, D, norm.weight and out_proj; the
        biases of in_proj and out_proj are there if the mixer has any.

    Raises:
        WorkbenchError: the mixer has an option that this layout has no place for.
    """
    _check_packable(mixer)
    config = mixer.config
    channels = _channel_index(config)
    out = getattr(mixer, mixer.names.out)
    xBC = torch.cat(_attention_rows(mixer, "weight"))[channels]
    packed = {
        "in_proj.weight": torch.cat([mixer.z_proj.weight, xBC, mixer.dt_weight]),
        "conv1d.weight": mixer.conv1d.weight[channels],
        "conv1d.bias": mixer.conv1d.bias[channels],
        "dt_bias": mixer.dt_bias,
        "A_log": mixer.A_log,
        "D": mixer.D,
        "norm.weight": mixer.norm.weight,
        "out_proj.weight": out.weight,
    }
    if config.bias:
        xBC = torch.cat(_attention_rows(mixer, "bias"))[channels]
        no_dt = xBC.new_zeros(config.n_heads)  # dt_bias is that bias
        packed["in_proj.bias"] = torch.cat([mixer.z_proj.bias, xBC, no_dt])
        packed["out_proj.bias"] = (
            out.weight.new_zeros(config.d_model) if out.bias is None else out.bias
        )
    return {name: tensor.detach().clone() for name, tensor in packed.items()}


def unpack(state_dict: Mapping[str, Tensor], mixer: Mamba2Mixer) -> None:
    """Read a state dict written by `pack`, or by mamba_ssm for the same sizes, into a mixer.

    Raises:
        WorkbenchError: a tensor is missing or has another shape, or the mixer has no place for what
            it holds: different rows for heads that share them here, or a bias.
    """
    expected = pack(mixer)
    wrong = [
        n for n, t in expected.items() if n not in state_dict or state_dict[n].shape != t.shape
    ]
    if wrong or len(state_dict) != len(expected):
        raise WorkbenchError(
            f"This state dict does not fit a mixer of {mixer.config}: wrong or missing {wrong}, "
            f"unexpected {sorted(set(state_dict) - set(expected))}."
        )
    config, channels = mixer.config, _channel_index(mixer.config)
    out = getattr(mixer, mixer.names.out)
    for kind in ("weight", "bias") if config.bias else ("weight",):
        rows = state_dict[f"in_proj.{kind}"]
        z, xBC, dt = rows.split([config.d_inner, len(channels), config.n_heads])
        _assign([getattr(mixer.z_proj, kind)], z)
        _assign(_attention_rows(mixer, kind), xBC, channels)
        if kind == "weight":
            _assign([mixer.dt_weight], dt)
        if getattr(out, kind) is not None:
            _assign([getattr(out, kind)], state_dict[f"out_proj.{kind}"])
    for kind in ("weight", "bias"):
        _assign([getattr(mixer.conv1d, kind)], state_dict[f"conv1d.{kind}"], channels)
    for name in ("dt_bias", "A_log", "D", "norm.weight"):
        _assign([mixer.get_parameter(name)], state_dict[name])
    for name, tensor in pack(mixer).items():
        if not torch.equal(tensor, state_dict[name].to(tensor)):
            raise WorkbenchError(
                f"This mixer cannot hold {name}: its heads share x and B where the state dict has "
                "different rows for them, or it has no place for a bias."
            )


def _check_packable(mixer: Mamba2Mixer) -> None:
    config, names = mixer.config, mixer.names
    foreign = {
        "norms on queries and keys": names.C_norm or names.B_norm,
        "rope=True": config.rope,
        "gate=False": not config.gate,
        "norm=False": not config.norm,
        "conv_activation=None": config.conv_activation is None,
        "a scale on C": config.scale not in (None, 1),
    }
    found = [option for option, is_there in foreign.items() if is_there]
    if found:
        raise WorkbenchError(
            f"The layout of mamba_ssm has no place for {' and '.join(found)}, which this mixer has."
        )


def _channel_index(config: Mamba2Config) -> Tensor:
    """For each channel of [x, B, C] with one group for each head, its channel as projected here."""
    index, start = [], 0
    heads = (config.n_kv_heads, config.n_kv_heads, config.n_heads)
    for width, n_heads in zip(config.widths, heads, strict=True):
        rows = torch.arange(start, start + width).unflatten(0, (n_heads, -1))
        index.append(rows.repeat_interleave(config.n_heads // n_heads, dim=0).flatten())
        start += width
    return torch.cat(index)


def _attention_rows(mixer: Mamba2Mixer, kind: str) -> list[Tensor]:
    """Give the rows of x, B and C, from one fused matrix or three; zeros where there is no bias."""
    names, widths = mixer.names, mixer.config.widths
    if names.fused:
        C, B, x = getattr(getattr(mixer, names.fused), kind).split(widths[::-1])
        return [x, B, C]
    rows = [getattr(getattr(mixer, n), kind) for n in (names.x, names.B, names.C)]
    zeros = mixer.z_proj.weight.new_zeros
    return [zeros(w) if row is None else row for row, w in zip(rows, widths, strict=True)]


def _assign(targets: list[Tensor], rows: Tensor, channels: Tensor | None = None) -> None:
    """Write rows into targets, one after the other; channels says where copies came from."""
    if channels is not None:
        merged = rows.new_empty(sum(len(t) for t in targets), *rows.shape[1:])
        merged[channels.to(rows.device)] = rows
        rows = merged
    with torch.no_grad():
        for target, value in zip(targets, rows.split([len(t) for t in targets]), strict=True):
            target.copy_(value)
