"""Conversion of weights of U-DiT (Tian et al. 2024, arXiv 2405.02730), which is a configuration of our denoiser.

U-DiT has the attentions ("grid", "grid") with stride 2, three levels, and a conditioning vector for each width. Its
weights map one to one, with one exception: a single linear layer computes the adaptive norms of an attention and of its
feed-forward, so its rows are split in halves. A feed-forward has one of three forms:

    branches    dwconv.0, .1, .2 are a 5×5, a 3×3 and a 1×1 kernel        our trainable form
    merged      the same names, but dwconv.0 is K₅ + pad K₃ + pad K₁ + δ  separated again, then our trainable form
    single      one 5×5 `dwconv`, one `project_in`, one `project_out`     our fused form

Weights that U-DiT's code saves after `eval()` have the merged form, whose names are the same as those of the branches.
"""

import re
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .loading import check_loaded, probable_content
from .transformer_iptv2 import IPTV2Transformer2DModel

__all__ = ["KernelForm", "convert_udit", "udit_config"]

KernelForm = Literal["auto", "branches", "merged"]

# U-DiT's modules -> ours
TOP = {
    "x_embedder.proj": "stem",
    "output": "head",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "final_layer.out_proj": "proj_out",
    "down1_2.body.0": "backbone.downsamples.0.conv",
    "down2_3.body.0": "backbone.downsamples.1.conv",
    "up3_2.body.0": "backbone.upsamples.0.conv",
    "up2_1.body.0": "backbone.upsamples.1.conv",
    "reduce_chan_level2": "backbone.skips.0.proj",
    "reduce_chan_level1": "backbone.skips.1.proj",
}
for _level in range(3):
    TOP[f"t_embedder_{_level + 1}.mlp.0"] = f"embedders.{_level}.timestep_embedder.linear_1"
    TOP[f"t_embedder_{_level + 1}.mlp.2"] = f"embedders.{_level}.timestep_embedder.linear_2"
    TOP[f"y_embedder_{_level + 1}.embedding_table"] = f"embedders.{_level}.class_embedder"
STAGES = {
    "encoder_level_1": "backbone.encoder.0",
    "encoder_level_2": "backbone.encoder.1",
    "latent": "backbone.bottleneck",
    "decoder_level_2": "backbone.decoder.0",
    "decoder_level_1": "backbone.decoder.1",
}
LAYERS = {"attn1": 0, "mlp1": 1, "attn2": 2, "mlp2": 3}
NORMS = {"adaLN_modulation1.1": (0, 1), "adaLN_modulation2.1": (2, 3)}
PARTS = {
    "": "",  # the attention's own parameter, logit_scale
    "downsampler.layer": "depthwise.",
    "to_qkv": "qkv.",
    "to_out": "out_proj.",
    "project_in.0": "expand_in.",
    "project_in.1": "expand_out.",
    "dwconv.0": "depthwise_5x5.",
    "dwconv.1": "depthwise_3x3.",
    "dwconv.2": "depthwise_1x1.",
    "project_out.0": "project_in.",
    "project_out.1": "project_out.",
    "project_in": "expand.",  # the single form
    "dwconv": "depthwise.",
    "project_out": "project.",
}


def convert_udit(
    state: Mapping[str, Tensor], name: str, *, sample_size: int = 32, kernels: KernelForm = "auto"
) -> IPTV2Transformer2DModel:
    """Build our denoiser from U-DiT's weights, in float32.

    Up to rounding, both compute the same function, with two exceptions. U-DiT caps the logit scale at exp(4.6052) =
    100.003, here the cap is 100. U-DiT's rotary embedding has wrong rows on maps that are not square.

    Args:
        state: weights by U-DiT's names, of any width, depth and number of heads and classes.
        name: name of the file, for error messages.
        sample_size: side of the latents.
        kernels: contents of the 5×5 kernels of feed-forwards with branches: "branches", "merged", or "auto" to decide
            by `merged_share`.

    Raises:
        ValueError: the weights are not those of a U-DiT, are incomplete, or have NaN or infinity; or `kernels` is
            "auto" and the weights are ambiguous.
    """
    config = udit_config(state, name)
    for key, value in state.items():
        if not value.is_floating_point():
            raise ValueError(f"{name}: the weight {key} is {value.dtype}, not of floats; convert it to float32")
        if not value.isfinite().all():
            raise ValueError(f"{name}: the weight {key} is NaN or infinite; download the file again")
    state = {key: value.float() for key, value in state.items()}
    with torch.device("meta"):
        model = IPTV2Transformer2DModel(**config, sample_size=sample_size)
    ours, unexpected = rename(state)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    check_loaded(
        model,
        name,
        {
            "missing_keys": shapes.keys() - ours.keys(),
            "unexpected_keys": [*unexpected, *(ours.keys() - shapes.keys())],
            "mismatched_keys": [
                (key, tuple(value.shape), shapes[key])
                for key, value in ours.items()
                if key in shapes and tuple(value.shape) != shapes[key]
            ],
        },
    )
    if not config["fused"] and holds_merged_kernels(state, name, kernels):
        ours, _ = rename(separate_branches(state))
    model.load_state_dict(ours, assign=True)
    return model.requires_grad_(not config["fused"]).eval()


def udit_config(state: Mapping[str, Tensor], name: str) -> dict[str, Any]:
    """Return the arguments of our denoiser, except `sample_size`, that these weights need.

    Width, depth, heads, classes and ratio follow from names and shapes. The stride is 2, as in all published sizes.

    Raises:
        ValueError: the weights are not those of a U-DiT with Rep-LeFFN and cosine attention.
    """
    needed = ["x_embedder.proj.weight", "final_layer.out_proj.weight", "y_embedder_1.embedding_table.weight"]
    needed += [f"{stage}.0.attn1.logit_scale" for stage in STAGES]
    first = "encoder_level_1.0.mlp1.dwconv"
    fused = f"{first}.weight" in state
    needed.append(f"{first}.weight" if fused else f"{first}.0.weight")
    missing = [key for key in needed if key not in state]
    if missing:
        content = probable_content(state)
        raise ValueError(
            f"{name} does not hold the weights of a U-DiT: it has no {missing[0]}"
            + (f"; the file seems to be {content}" if content else "")
        )
    dims = {key: 2 if key.endswith("table.weight") else 3 for key in needed}
    flat = next((key for key in needed if state[key].ndim < dims[key] or 0 in state[key].shape), None)
    if flat is not None:
        raise ValueError(
            f"{name} does not hold the weights of a U-DiT: {flat} has the shape {tuple(state[flat].shape)}"
        )
    channels, in_channels = state[needed[0]].shape[:2]
    return {
        "in_channels": in_channels,
        "out_channels": state[needed[1]].shape[0],  # 2 · in_channels with a learned variance
        "num_class_embeds": state[needed[2]].shape[0] - 1,  # the last row is the null label's
        "channels": channels,
        "layers_per_stage": tuple(_count_blocks(state, stage) for stage in STAGES),
        "num_attention_heads": tuple(len(state[f"{stage}.0.attn1.logit_scale"]) for stage in STAGES),
        "attention_pattern": ("grid", "grid"),
        "grid_stride": 2,
        "ffn_ratio": state[needed[-1]].shape[0] / channels,
        "conditioning_dim": None,
        "fused": fused,
    }


def _count_blocks(state: Mapping[str, Tensor], stage: str) -> int:
    return len({key.split(".")[1] for key in state if key.startswith(f"{stage}.")})


def rename(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Return the weights under our names and in our shapes, and the names that U-DiT does not have."""
    ours: dict[str, Tensor] = {}
    unexpected = []
    for key, value in state.items():
        names = our_names(key)
        if not names:
            unexpected.append(key)
        elif len(names) == 2 and value.ndim and len(value) % 2 == 0:
            # (6C, D): shift, scale and gate of the attention's norm, then of the feed-forward's
            ours.update(zip(names, (half.clone() for half in value.chunk(2)), strict=True))
        else:  # includes a norm of another shape, which loading then rejects
            ours |= {each: _reshape(each, value) for each in names}
    return ours, unexpected


def our_names(key: str) -> list[str]:
    """Return our name of a weight of U-DiT (two names for an adaptive norm), or none for an unknown weight."""
    module, _, leaf = key.rpartition(".")
    if module in TOP:
        return [f"{TOP[module]}.{leaf}"]
    block = re.fullmatch(r"(\w+)\.(\d+)\.(\w+)(?:\.(.+))?", module)
    if block is None or block[1] not in STAGES:
        return []
    ours, rest = f"{STAGES[block[1]]}.{int(block[2])}", f"{block[3]}.{block[4]}"
    if rest in NORMS:
        return [f"{ours}.norms.{number}.linear.{leaf}" for number in NORMS[rest]]
    part = PARTS.get(block[4] or "")
    return [] if block[3] not in LAYERS or part is None else [f"{ours}.layers.{LAYERS[block[3]]}.{part}{leaf}"]


def _reshape(name: str, value: Tensor) -> Tensor:
    """Reshape a 1×1 kernel (out, in, 1, 1), a linear layer here, to (out, in), a logit scale (h, 1, 1) to (h,)."""
    if name.endswith(".logit_scale"):
        return value.flatten()
    is_linear = re.search(r"\.(out_proj|expand\w*|project\w*|proj)\.weight$", name) is not None
    return value[:, :, 0, 0] if is_linear and value.ndim == 4 and value.shape[2:] == (1, 1) else value


# ---------------------------------------------------------------------------------------------------------------------
# Merged kernels


def holds_merged_kernels(state: Mapping[str, Tensor], name: str, kernels: KernelForm) -> bool:
    """Return whether the 5×5 kernels are the sum of all branches, from `kernels` or by `merged_share`."""
    if kernels != "auto":
        return kernels == "merged"
    share = merged_share(state)
    if 0.25 < share < 0.75:
        raise ValueError(
            f"{name}: the 5×5 kernels may be branches or merged (share {share:.2f}; 0 is branches, 1 is merged); "
            "choose kernels: branches or merged"
        )
    return share > 0.5


def merged_share(state: Mapping[str, Tensor]) -> float:
    """Return the mean over all feed-forwards of the centres of K₅ - K₃ - K₁: about 0 for branches, 1 if merged.

    A merged K₅ contains K₃, K₁ and the 1 of the identity. Training moves the centres of all three branches by the same
    Δ. The share is then -Δ for branches and 1 + Δ if merged. The two differ unless Δ is about -1/2.
    """
    shares = []
    for kernels in _branches(state).values():
        five, three, one = (kernel[..., kernel.shape[-2] // 2, kernel.shape[-1] // 2] for kernel in kernels)
        shares.append((five - three - one).mean())
    return float(torch.stack(shares).mean()) if shares else 0.0


def separate_branches(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights whose 5×5 kernels are branches again: K₅ = K - pad K₃ - pad K₁ - δ."""
    separated = {
        key: five - F.pad(three, (1,) * 4) - F.pad(one + 1, (2,) * 4)
        for key, (five, three, one) in _branches(state).items()
    }
    return {**state, **separated}


def _branches(state: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
    """Return the 5×5, 3×3 and 1×1 kernels of each feed-forward, (C, 1, k, k), by the name of the first.

    Feed-forwards with a missing or misshapen kernel are left out; loading the weights then fails.
    """
    found = {}
    for key in state:
        if key.endswith(".dwconv.0.weight"):
            names = [key.replace(".dwconv.0.", f".dwconv.{branch}.") for branch in range(3)]
            kernels = [state[name] for name in names if name in state]
            if [tuple(kernel.shape[2:]) for kernel in kernels] == [(5, 5), (3, 3), (1, 1)]:
                found[key] = kernels
    return found
