"""Feed-forwards of an FG block: Rep-LeFFN, re-parameterised and locally enhanced (model.md §5), and a plain one."""

import copy

import torch
from torch import Tensor, nn

from .layers import DepthwiseConv2d, Linear, add_depthwise, linear_gelu, linear_pair, merge_depthwise, merge_pair

__all__ = ["FeedForward", "RepLeFFN"]


class RepLeFFN(nn.Module):
    """Feed-forward with a depthwise convolution, over-parameterised in training [paper; details lineage].

    The trainable form, with r = `ratio` and neither batch norm nor an activation inside a pair of 1×1 convolutions:

        x → 1×1 (C→rC/2) → 1×1 (rC/2→rC) → GELU → DW5×5 + DW3×3 + DW1×1 + identity → 1×1 (rC→rC/2) → 1×1 (rC/2→C)

    All steps before GELU are linear, and so are all steps after it. The same function is therefore

        x → 1×1 (W = W₂W₁, b = W₂b₁ + b₂) → GELU → DW5×5 (K₅ + pad K₃ + pad K₁ + δ) → 1×1 (merged in the same way)

    Training also computes this second form, with weights that it merges at every step. This needs fewer multiplications
    [ours]. `fuse()` stores the merged weights in a new module for deployment.

    Args:
        channels: C.
        ratio: r.
        fused: whether to build the deployed form, which has only the merged weights.
        bias: whether all layers have biases.
    """

    def __init__(self, channels: int, ratio: float = 2.0, fused: bool = False, bias: bool = True):
        super().__init__()
        middle = int(channels * ratio / 2)
        hidden = 2 * middle
        self.channels, self.ratio, self.fused, self.bias = channels, ratio, fused, bias

        if fused:
            self.expand = Linear(channels, hidden, bias=bias)
            self.depthwise = DepthwiseConv2d(hidden, 5, bias=bias)
            self.project = Linear(hidden, channels, bias=bias)
        else:
            self.expand_in = Linear(channels, middle, bias=bias)
            self.expand_out = Linear(middle, hidden, bias=bias)
            self.depthwise_5x5 = DepthwiseConv2d(hidden, 5, bias=bias)
            self.depthwise_3x3 = DepthwiseConv2d(hidden, 3, bias=bias)
            self.depthwise_1x1 = DepthwiseConv2d(hidden, 1, bias=bias)
            self.project_in = Linear(hidden, middle, bias=bias)
            self.project_out = Linear(middle, channels, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the feed-forward: (B, C, H, W) -> (B, C, H, W)."""
        x = x.permute(0, 2, 3, 1)  # (B, H, W, C)
        if self.fused:
            x = linear_gelu(x, self.expand).permute(0, 3, 1, 2)  # GELU(W x + b): (B, rC, H, W)
            x = self.depthwise(x).permute(0, 2, 3, 1)  # (B, H, W, rC)
            x = self.project(x)  # (B, H, W, C)
        else:
            # GELU(W₂(W₁x + b₁) + b₂): (B, rC, H, W)
            x = linear_pair(x, self.expand_in, self.expand_out, gelu=True).permute(0, 3, 1, 2)
            # x + DW5×5(x) + DW3×3(x) + DW1×1(x): (B, H, W, rC)
            x = add_depthwise(x, self.depthwise_5x5, self.depthwise_3x3, self.depthwise_1x1).permute(0, 2, 3, 1)
            x = linear_pair(x, self.project_in, self.project_out)  # (B, H, W, C)
        return x.permute(0, 3, 1, 2)  # (B, C, H, W)

    def extra_repr(self) -> str:
        return f"channels={self.channels}, ratio={self.ratio}, fused={self.fused}"

    @torch.no_grad()
    def fuse(self) -> "RepLeFFN":
        """Return a new module in the deployed form that computes the same function. This module does not change.

        The weights are merged in float32. A fused module returns a copy of itself.
        """
        source = copy.deepcopy(self)
        if self.fused:
            return source
        source.float()
        merged = (
            merge_pair(source.expand_in, source.expand_out),
            merge_depthwise(source.depthwise_5x5, source.depthwise_3x3, source.depthwise_1x1),
            merge_pair(source.project_in, source.project_out),
        )
        parameter = next(self.parameters())
        deployed = RepLeFFN(self.channels, self.ratio, fused=True, bias=self.bias)
        layers: list[nn.Linear | nn.Conv2d] = [deployed.expand, deployed.depthwise, deployed.project]
        for layer, (weight, bias) in zip(layers, merged, strict=True):
            layer.weight.copy_(weight)
            if layer.bias is not None and bias is not None:
                layer.bias.copy_(bias)
        return deployed.to(parameter.device, parameter.dtype)

    @torch.no_grad()
    def unfuse(self) -> "RepLeFFN":
        """Return a new module in the trainable form that computes the same function, to continue training [ours].

        The merge cannot be inverted, so the branches are not those that were fused. One 1×1 of each pair is the
        identity, the 5×5 is the merged kernel minus δ, and the 3×3 and the 1×1 are zero. A module that is not fused
        returns a copy of itself.

        Raises:
            ValueError: `ratio` is below 2. The middle of a pair is then narrower than C and cannot be the identity.
        """
        if not self.fused:
            return copy.deepcopy(self)
        trainable = RepLeFFN(self.channels, self.ratio, bias=self.bias)
        if trainable.expand_in.out_features < self.channels:
            raise ValueError(f"a feed-forward of ratio {self.ratio:g} cannot be unfused; the ratio must be at least 2")
        for parameter in trainable.parameters():
            parameter.zero_()
        nn.init.eye_(trainable.expand_in.weight)
        nn.init.eye_(trainable.project_out.weight)
        trainable.expand_out.weight[:, : self.channels] = self.expand.weight
        trainable.project_in.weight[: self.channels] = self.project.weight
        trainable.depthwise_5x5.weight.copy_(self.depthwise.weight)
        trainable.depthwise_5x5.weight[:, :, 2, 2] -= 1
        last: list[nn.Linear | nn.Conv2d] = [trainable.expand_out, trainable.depthwise_5x5, trainable.project_out]
        merged: list[nn.Linear | nn.Conv2d] = [self.expand, self.depthwise, self.project]
        for layer, source in zip(last, merged, strict=True):
            if layer.bias is not None and source.bias is not None:
                layer.bias.copy_(source.bias)
        return trainable.to(self.expand.weight.device, self.expand.weight.dtype)


class FeedForward(nn.Module):
    """Plain feed-forward without depthwise convolutions: 1×1 (C→rC) → GELU → 1×1 (rC→C) [ours, for ablations]."""

    def __init__(self, channels: int, ratio: float = 2.0):
        super().__init__()
        self.expand = Linear(channels, int(channels * ratio))
        self.project = Linear(int(channels * ratio), channels)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the feed-forward: (B, C, H, W) -> (B, C, H, W)."""
        x = linear_gelu(x.permute(0, 2, 3, 1), self.expand)  # (B, H, W, rC)
        return self.project(x).permute(0, 3, 1, 2)  # (B, C, H, W)
