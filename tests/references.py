"""Slow, loop-written references of the layers, from the equations of model.md §3-§6 and nothing else, in float64.

They use only the *parameters* of the module under test and share no code with it: no window partition, no reshapes of a
feature map, one position and one head at a time. They therefore check exactly what vectorised code can get wrong: the
order of axes, offsets, padding, masks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def randomize_(module: nn.Module, scale: float = 0.2, seed: int = 0) -> nn.Module:
    """Add noise to every parameter, zero-initialised gates and merge logits too; the same noise for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter))
    return module


def random_map(*shape: int, seed: int = 0) -> Tensor:
    """A standard-normal tensor, (B, C, H, W) in channels-last memory when it is a feature map."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return x.to(memory_format=torch.channels_last) if x.dim() == 4 else x


def _double(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.detach().double()


def pointwise(x: Tensor, layer: nn.Module) -> Tensor:
    """A 1×1 convolution: y(o, p) = Σ_c W(o, c) x(c, p) + b(o). (B, C, H, W) → (B, O, H, W)."""
    weight = _double(layer.weight).reshape(layer.weight.shape[0], -1)
    bias = _double(layer.bias)
    batch, _, height, width = x.shape
    out = x.new_zeros(batch, weight.shape[0], height, width)
    for i in range(height):
        for j in range(width):
            out[:, :, i, j] = x[:, :, i, j] @ weight.T
            if bias is not None:
                out[:, :, i, j] += bias
    return out


def depthwise(x: Tensor, layer: nn.Module) -> Tensor:
    """A k×k depthwise convolution with zeros outside the map. (B, C, H, W) → (B, C, H, W)."""
    weight = _double(layer.weight)  # (C, 1, k, k)
    size = weight.shape[-1]
    _, _, height, width = x.shape
    out = torch.zeros_like(x)
    for i in range(height):
        for j in range(width):
            for di in range(size):
                for dj in range(size):
                    row, column = i + di - size // 2, j + dj - size // 2
                    if 0 <= row < height and 0 <= column < width:
                        out[:, :, i, j] += weight[:, 0, di, dj] * x[:, :, row, column]
    if layer.bias is not None:
        out += _double(layer.bias)[None, :, None, None]
    return out


# ---------------------------------------------------------------------------------------------------------------------
# model.md §3: focal context self-attention


def _window_attention(q, k, v, temperature, affine, rows, columns) -> dict[tuple[int, int], Tensor]:
    """Channel attention of one head in one window. q, k, v: (d, H, W); returns position → (d,) output.

    Positions outside the map do not exist here, which is what "padding contributes nothing" means.
    """
    d, height, width = q.shape
    window = len(columns)
    inside = [
        (row, column, a * window + b)
        for a, row in enumerate(rows)
        for b, column in enumerate(columns)
        if row < height and column < width
    ]
    unit = {}
    for name, source in (("q", q), ("k", k)):
        vectors = torch.stack([source[:, row, column] * affine[n] for row, column, n in inside], dim=1)  # (d, n)
        unit[name] = torch.stack([vector / max(vector.norm().item(), 1e-12) for vector in vectors])
    attention = torch.zeros(d, d, dtype=torch.float64)
    for i in range(d):
        scores = torch.stack([temperature * (unit["q"][i] * unit["k"][j]).sum() for j in range(d)])
        attention[i] = scores.softmax(0)
    return {(row, column): attention @ v[:, row, column] for row, column, _ in inside}


def focal_context_attention(module: nn.Module, x: Tensor) -> Tensor:
    """FCSA (model.md §3), x (B, C, H, W) → (B, C, H, W) in float64."""
    x = x.double()
    batch, channels, height, width = x.shape
    heads, window = module.num_heads, module.window_size
    d = channels // heads
    qkv = depthwise(pointwise(x, module.qkv), module.qkv_depthwise)
    temperature, affine = _double(module.temperature), _double(module.spatial_affine)
    strength = _double(module.merge_logits).exp() if module.shifted else torch.ones_like(affine)
    num_rows, num_columns = math.ceil(height / window), math.ceil(width / window)
    shifted = module.shifted and num_rows > 1 and num_columns > 1
    half = window // 2

    merged = torch.zeros_like(x)
    for b in range(batch):
        for head in range(heads):
            own = slice(head * d, (head + 1) * d)
            q, k, v = (qkv[b, part * channels :][own] for part in range(3))
            branches = []  # (position → output, position → index in its window) for the base and the shifted windows
            for branch in range(2 if shifted else 1):
                offset, fewer = (half, 1) if branch else (0, 0)
                outputs, indices = {}, {}
                for m in range(num_rows - fewer):
                    for n in range(num_columns - fewer):
                        rows = range(offset + m * window, offset + (m + 1) * window)
                        columns = range(offset + n * window, offset + (n + 1) * window)
                        arguments = (temperature[branch, head], affine[branch, head], rows, columns)
                        outputs.update(_window_attention(q, k, v, *arguments))
                        for i, row in enumerate(rows):
                            for j, column in enumerate(columns):
                                indices[row, column] = i * window + j
                branches.append((outputs, indices))
            for i in range(height):
                for j in range(width):
                    numerator, denominator = 0.0, 0.0
                    for branch, (outputs, indices) in enumerate(branches):
                        if (i, j) in outputs:  # the border of the shifted branch has s2 = 0
                            s = strength[branch, head, indices[i, j]]
                            numerator, denominator = numerator + s * outputs[i, j], denominator + s
                    merged[b, own, i, j] = numerator / denominator
    return pointwise(merged, module.out_proj)


# ---------------------------------------------------------------------------------------------------------------------
# model.md §4: global grid self-attention


def rotate(vector: Tensor, row: int, column: int) -> Tensor:
    """RoPE of one (d,) vector at integer (row, column): pair 2i turns by column·10000^(−4i/d), pair 2i+1 by row·…"""
    d = vector.shape[0]
    out = torch.empty_like(vector)
    for pair in range(d // 2):
        angle = (row if pair % 2 else column) * 10000.0 ** (-4 * (pair // 2) / d)
        a, b = vector[2 * pair], vector[2 * pair + 1]
        out[2 * pair] = a * math.cos(angle) - b * math.sin(angle)
        out[2 * pair + 1] = a * math.sin(angle) + b * math.cos(angle)
    return out


def grid_strides(height: int, width: int, stride: int | None, grid_size: int | None) -> tuple[int, int]:
    """The effective stride per direction, for either form of the grid."""
    if grid_size is not None:
        return math.ceil(height / grid_size), math.ceil(width / grid_size)
    return min(stride, height), min(stride, width)


def global_grid_attention(module: nn.Module, x: Tensor, stride: int | None, grid_size: int | None = None) -> Tensor:
    """GGSA (model.md §4), x (B, C, H, W) → (B, C, H, W) in float64."""
    x = x.double()
    batch, channels, height, width = x.shape
    heads = module.num_heads
    d = channels // heads
    step_y, step_x = grid_strides(height, width, stride, grid_size)
    qkv = pointwise(x + depthwise(x, module.depthwise), module.qkv)
    scale = [min(math.exp(s), 100.0) for s in _double(module.logit_scale).flatten().tolist()]

    out = torch.zeros_like(x)
    for b in range(batch):
        for head in range(heads):
            q, k, v = (qkv[b, part * channels + head * d : part * channels + (head + 1) * d] for part in range(3))
            unit_q, unit_k = {}, {}
            for i in range(height):
                for j in range(width):
                    for unit, source in ((unit_q, q), (unit_k, k)):
                        vector = source[:, i, j]
                        vector = vector / max(vector.norm().item(), 1e-12)
                        unit[i, j] = rotate(vector, i // step_y, j // step_x)
            for i in range(height):
                for j in range(width):
                    # the group of (i, j): the positions at the same offset inside every cell
                    rows, columns = range(i % step_y, height, step_y), range(j % step_x, width, step_x)
                    group = [(row, column) for row in rows for column in columns]
                    scores = torch.stack([scale[head] * (unit_q[i, j] * unit_k[p]).sum() for p in group]).softmax(0)
                    values = torch.stack([v[:, row, column] for row, column in group])
                    out[b, head * d : (head + 1) * d, i, j] = scores @ values
    return pointwise(out, module.out_proj)


# ---------------------------------------------------------------------------------------------------------------------
# model.md §5: Rep-LeFFN, and model.md §2: the normalisations


def gelu(x: Tensor) -> Tensor:
    """The exact GELU, x·Φ(x)."""
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def rep_leffn(module: nn.Module, x: Tensor) -> Tensor:
    """Rep-LeFFN in its training form (model.md §5), every branch on its own. (B, C, H, W) → (B, C, H, W) in float64."""
    hidden = gelu(pointwise(pointwise(x.double(), module.expand_in), module.expand_out))
    branches = (module.depthwise_5x5, module.depthwise_3x3, module.depthwise_1x1)
    hidden = hidden + sum(depthwise(hidden, branch) for branch in branches)
    return pointwise(pointwise(hidden, module.project_in), module.project_out)


def layer_norm(x: Tensor, eps: float) -> Tensor:
    """Normalisation over the channels at each position, without an affine map. (B, C, H, W) → the same, in float64."""
    x = x.double()
    mean = x.mean(1, keepdim=True)
    variance = ((x - mean) ** 2).mean(1, keepdim=True)
    return (x - mean) / (variance + eps).sqrt()


# ---------------------------------------------------------------------------------------------------------------------
# model.md §1, §2: the FG block and the U


def sub_layer(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply `layer`: FCSA, GGSA, the plain feed-forward or Rep-LeFFN."""
    if hasattr(layer, "spatial_affine"):
        return focal_context_attention(layer, x)
    if hasattr(layer, "logit_scale"):
        return global_grid_attention(layer, x, layer.stride, layer.grid_size)
    if hasattr(layer, "expand"):
        return pointwise(gelu(pointwise(x, layer.expand)), layer.project)
    return rep_leffn(layer, x)


def fg_block(block: nn.Module, x: Tensor, conditioning: Tensor | None = None) -> Tensor:
    """FG block (model.md §2): pre-norm residual layers, adaLN-Zero if there is a conditioning vector (B, D)."""
    x = x.double()
    for norm, layer in zip(block.norms, block.layers, strict=True):
        if conditioning is None:
            normed = layer_norm(x, norm.eps) * _double(norm.weight)[:, None, None]
            if norm.bias is not None:
                normed = normed + _double(norm.bias)[:, None, None]
            x = x + sub_layer(layer, normed)
        else:
            vector = conditioning.double()
            modulation = (vector * torch.sigmoid(vector)) @ _double(norm.linear.weight).T + _double(norm.linear.bias)
            shift, scale, gate = modulation[:, :, None, None].split(x.shape[1], dim=1)
            x = x + gate * sub_layer(layer, layer_norm(x, 1e-6) * (1 + scale) + shift)
    return x


def convolution(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """A k×k convolution with zeros outside the map, in float64."""
    return torch.nn.functional.conv2d(
        x, _double(layer.weight), _double(layer.bias), padding=layer.weight.shape[-1] // 2
    )


def unshuffle(x: Tensor) -> Tensor:
    """Pixel-unshuffle by 2: channel 4c + 2i + j of the result is offset (i, j) of channel c."""
    channels = [x[:, c, i::2, j::2] for c in range(x.shape[1]) for i in range(2) for j in range(2)]
    return torch.stack(channels, dim=1)


def shuffle(x: Tensor) -> Tensor:
    """Pixel-shuffle by 2, the inverse of `unshuffle`."""
    batch, channels, height, width = x.shape
    out = x.new_zeros(batch, channels // 4, 2 * height, 2 * width)
    for c in range(channels):
        out[:, c // 4, (c % 4) // 2 :: 2, c % 2 :: 2] = x[:, c]
    return out


def backbone(module: nn.Module, x: Tensor, conditioning: Tensor | None = None) -> Tensor:
    """The U (model.md §1) on a map whose sides are multiples of 2^(L-1). (B, C, H, W) → (B, 2C, H, W) in float64."""
    x = x.double()
    skips = []
    for blocks, downsample in zip(module.encoder, module.downsamples, strict=True):
        for block in blocks:
            x = fg_block(block, x, conditioning)
        skips.append(x)
        x = unshuffle(convolution(x, downsample.conv))
    for block in module.bottleneck:
        x = fg_block(block, x, conditioning)
    for upsample, skip, blocks in zip(module.upsamples, module.skips, module.decoder, strict=True):
        x = torch.cat((shuffle(convolution(x, upsample.conv)), skips.pop()), dim=1)
        x = pointwise(x, skip.proj)
        for block in blocks:
            x = fg_block(block, x, conditioning)
    return x


# ---------------------------------------------------------------------------------------------------------------------
# model.md §6: the conditioning vector; model.md §1: stem and head of the latent denoiser


def timestep_sinusoid(timestep: float) -> Tensor:
    """256 numbers: cosines, then sines, of timestep · 10000^(−i/128)."""
    angles = [timestep * 10000.0 ** (-i / 128) for i in range(128)]
    return torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles], dtype=torch.float64)


def conditioning_vector(embedder: nn.Module, timesteps: list[float], labels: list[int] | None) -> Tensor:
    """Sinusoid → Linear → SiLU → Linear of each timestep, plus the class's row if there are classes. (B, D)"""
    mlp, rows = embedder.timestep_embedder, []
    for n, timestep in enumerate(timesteps):
        hidden = _double(mlp.linear_1.weight) @ timestep_sinusoid(timestep) + _double(mlp.linear_1.bias)
        row = _double(mlp.linear_2.weight) @ (hidden * torch.sigmoid(hidden)) + _double(mlp.linear_2.bias)
        rows.append(row if labels is None else row + _double(embedder.class_embedder.weight)[labels[n]])
    return torch.stack(rows)


def denoiser(model: nn.Module, x: Tensor, timesteps: list[float], labels: list[int] | None) -> Tensor:
    """The denoiser with patch_size 1 and one conditioning vector, on sides that the U divides, in float64."""
    (embedder,) = model.embedders
    vector = conditioning_vector(embedder, timesteps, labels)
    x = convolution(backbone(model.backbone, convolution(x.double(), model.stem), vector), model.head)
    linear = model.norm_out.linear
    modulation = (vector * torch.sigmoid(vector)) @ _double(linear.weight).T + _double(linear.bias)
    shift, scale = modulation[:, :, None, None].split(x.shape[1], dim=1)
    return convolution(layer_norm(x, 1e-6) * (1 + scale) + shift, model.proj_out)
