"""U-DiT (arXiv 2405.02730) by its published names: random weights, and a plain forward written from docs/model.md."""

import math

import torch
import torch.nn.functional as F

WIDTHS = {"encoder_level_1": 1, "encoder_level_2": 2, "latent": 4, "decoder_level_2": 2, "decoder_level_1": 2}
DEPTHS = (2, 5, 8, 5, 2)
TINY = {"channels": 16, "heads": 2, "depths": (1, 2, 1, 1, 1), "classes": 5}


def shapes(channels, heads, depths=DEPTHS, classes=1000, in_channels=4, out_channels=8, single=False):
    """The shape of every weight."""
    found = {}

    def layer(name, *shape):
        found[f"{name}.weight"], found[f"{name}.bias"] = shape, shape[:1]

    layer("x_embedder.proj", channels, in_channels, 3, 3)
    for level in range(3):
        width = channels * 2**level
        layer(f"t_embedder_{level + 1}.mlp.0", width, 256)
        layer(f"t_embedder_{level + 1}.mlp.2", width, width)
        found[f"y_embedder_{level + 1}.embedding_table.weight"] = (classes + 1, width)
    for name, width in (("down1_2", 1), ("down2_3", 2)):
        found[f"{name}.body.0.weight"] = (width * channels // 2, width * channels, 3, 3)
    for name, width in (("up3_2", 4), ("up2_1", 2)):
        found[f"{name}.body.0.weight"] = (2 * width * channels, width * channels, 3, 3)
    layer("reduce_chan_level2", 2 * channels, 4 * channels, 1, 1)
    layer("reduce_chan_level1", 2 * channels, 2 * channels, 1, 1)
    layer("output", 2 * channels, 2 * channels, 3, 3)
    layer("final_layer.out_proj", out_channels, 2 * channels, 3, 3)
    layer("final_layer.adaLN_modulation.1", 4 * channels, 2 * channels)
    for (stage, factor), depth in zip(WIDTHS.items(), depths, strict=True):
        width = factor * channels
        for number in range(depth):
            for half in (1, 2):
                block = f"{stage}.{number}"
                layer(f"{block}.adaLN_modulation{half}.1", 6 * width, width)
                attention, feed_forward = f"{block}.attn{half}", f"{block}.mlp{half}"
                found[f"{attention}.logit_scale"] = (heads, 1, 1)
                layer(f"{attention}.downsampler.layer", width, 1, 5, 5)
                layer(f"{attention}.to_qkv", 3 * width, width)
                layer(f"{attention}.to_out", width, width, 1, 1)
                if single:
                    layer(f"{feed_forward}.project_in", 2 * width, width, 1, 1)
                    layer(f"{feed_forward}.dwconv", 2 * width, 1, 5, 5)
                    layer(f"{feed_forward}.project_out", width, 2 * width, 1, 1)
                else:
                    layer(f"{feed_forward}.project_in.0", width, width, 1, 1)
                    layer(f"{feed_forward}.project_in.1", 2 * width, width, 1, 1)
                    for branch, size in enumerate((5, 3, 1)):
                        layer(f"{feed_forward}.dwconv.{branch}", 2 * width, 1, size, size)
                    layer(f"{feed_forward}.project_out.0", width, 2 * width, 1, 1)
                    layer(f"{feed_forward}.project_out.1", width, width, 1, 1)
    return found


def weights(seed=0, dtype=torch.float32, **size):
    """Random weights: maps keep their variance, and the logit scales are about log 10."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in shapes(**{**TINY, **size}).items():
        value = torch.randn(shape, generator=generator, dtype=torch.float64)
        scale = 1 / math.sqrt(max(1, math.prod(shape[1:]))) if len(shape) > 1 else 0.1
        value = value * 0.3 + math.log(10) if name.endswith("logit_scale") else value * scale
        found[name] = value.to(dtype)
    return found


def merge_in_place(state):
    """Weights after that code's `eval()`: the 5×5 kernel includes all branches and the identity, under its name."""
    merged = dict(state)
    for name in state:
        if name.endswith(".dwconv.0.weight"):
            kernel = state[name].clone()
            kernel[:, :, 1:4, 1:4] += state[name.replace("dwconv.0", "dwconv.1")]
            kernel[:, :, 2:3, 2:3] += state[name.replace("dwconv.0", "dwconv.2")] + 1
            merged[name] = kernel
    return merged


def forward(state, x, timestep, labels, heads=TINY["heads"]):
    """The network on square maps: x (B, 4, H, W), timestep and labels (B,) -> (B, out_channels, H, W)."""

    def linear(name, value):
        return F.linear(value, state[f"{name}.weight"].flatten(1), state[f"{name}.bias"])

    def conv(name, value, groups=1):
        weight = state[f"{name}.weight"]
        bias = state.get(f"{name}.bias")
        return F.conv2d(value, weight, bias, padding=weight.shape[-1] // 2, groups=groups)

    def norm(value):
        return (value - value.mean(1, keepdim=True)) / (value.var(1, keepdim=True, unbiased=False) + 1e-6).sqrt()

    def attention(name, value):
        value = value + conv(f"{name}.downsampler.layer", value, groups=value.shape[1])
        out = torch.zeros_like(value)
        scale = state[f"{name}.logit_scale"].clamp(max=4.6052).exp()
        for top in range(2):
            for left in range(2):
                tokens = value[:, :, top::2, left::2]
                rows, columns = tokens.shape[2:]
                qkv = linear(f"{name}.to_qkv", tokens.flatten(2).transpose(1, 2))
                q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in qkv.chunk(3, dim=-1))
                q, k = (rotate(F.normalize(t, dim=-1), rows, columns) for t in (q, k))
                mixed = (scale * q @ k.transpose(-2, -1)).softmax(-1) @ v
                mixed = mixed.transpose(1, 2).flatten(2).transpose(1, 2)
                out[:, :, top::2, left::2] = mixed.unflatten(-1, (rows, columns))
        return conv(f"{name}.to_out", out)

    def rotate(value, rows, columns):
        """Pair 2i turns by column · 10000^(-4i/d), pair 2i+1 by row · 10000^(-4i/d)."""
        frequency = 10000.0 ** (-torch.arange(0, value.shape[-1], 4, dtype=torch.float64) / value.shape[-1])
        position = torch.arange(rows * columns)
        angles = [frequency[None] * p[:, None] for p in (position % columns, position // columns)]
        turn = torch.polar(torch.ones(1, dtype=torch.float64), torch.stack(angles, -1).flatten(1))
        turned = torch.view_as_complex(value.double().unflatten(-1, (-1, 2)).contiguous()) * turn
        return torch.view_as_real(turned).flatten(-2).to(value.dtype)

    def feed_forward(name, value):
        single = f"{name}.dwconv.weight" in state
        for part in ("project_in",) if single else ("project_in.0", "project_in.1"):
            value = conv(f"{name}.{part}", value)
        value = F.gelu(value)
        if single:
            value = conv(f"{name}.dwconv", value, groups=value.shape[1])
        else:
            value = value + sum(conv(f"{name}.dwconv.{n}", value, groups=value.shape[1]) for n in range(3))
        for part in ("project_out",) if single else ("project_out.0", "project_out.1"):
            value = conv(f"{name}.{part}", value)
        return value

    def stage(name, value, condition):
        for number in range(len({key.split(".")[1] for key in state if key.startswith(f"{name}.")})):
            block = f"{name}.{number}"
            for half in (1, 2):
                six = linear(f"{block}.adaLN_modulation{half}.1", F.silu(condition))[:, :, None, None].chunk(6, dim=1)
                for layer, kind, (shift, scale, gate) in (
                    (attention, "attn", six[:3]),
                    (feed_forward, "mlp", six[3:]),
                ):
                    value = value + gate * layer(f"{block}.{kind}{half}", norm(value) * (1 + scale) + shift)
        return value

    conditions = []
    angles = timestep.double()[:, None] * 10000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
    sinusoids = torch.cat((angles.cos(), angles.sin()), dim=1).to(x.dtype)
    for level in (1, 2, 3):
        hidden = F.silu(linear(f"t_embedder_{level}.mlp.0", sinusoids))
        table = state[f"y_embedder_{level}.embedding_table.weight"]
        conditions.append(linear(f"t_embedder_{level}.mlp.2", hidden) + table[labels])

    first = stage("encoder_level_1", conv("x_embedder.proj", x), conditions[0])
    second = stage("encoder_level_2", F.pixel_unshuffle(conv("down1_2.body.0", first), 2), conditions[1])
    third = stage("latent", F.pixel_unshuffle(conv("down2_3.body.0", second), 2), conditions[2])
    up = torch.cat((F.pixel_shuffle(conv("up3_2.body.0", third), 2), second), dim=1)
    second = stage("decoder_level_2", conv("reduce_chan_level2", up), conditions[1])
    up = torch.cat((F.pixel_shuffle(conv("up2_1.body.0", second), 2), first), dim=1)
    value = conv("output", stage("decoder_level_1", conv("reduce_chan_level1", up), conditions[1]))
    modulation = linear("final_layer.adaLN_modulation.1", F.silu(conditions[1]))[:, :, None, None]
    shift, scale = modulation.chunk(2, dim=1)
    return conv("final_layer.out_proj", norm(value) * (1 + scale) + shift)
