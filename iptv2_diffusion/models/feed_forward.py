"""Rep-LeFFN, the re-parameterised, locally-enhanced feed-forward of an FG block (model.md §5), and the plain one."""

import copy

import torch
from torch import Tensor, nn

from .layers import DepthwiseConv2d, Linear, add_depthwise, linear_gelu, linear_pair, merge_depthwise, merge_pair

__all__ = ["FeedForward", "RepLeFFN"]


class RepLeFFN(nn.Module):
    """Feed-forward with a depthwise convolution inside, over-parameterised in training [paper; details lineage].

    The parameters of training, with r = `ratio`, no batch norm and no activation inside a pair:

        x → 1×1 (C→rC/2) → 1×1 (rC/2→rC) → GELU → DW5×5 + DW3×3 + DW1×1 + identity → 1×1 (rC→rC/2) → 1×1 (rC/2→C)

    Everything between x and GELU, and after it, is linear, so the same function is

        x → 1×1 (W = W₂W₁, b = W₂b₁ + b₂) → GELU → DW5×5 (K₅ + pad K₃ + pad K₁ + δ) → 1×1 (likewise)

    Training computes this second form too, from weights that it merges at every step: the same function, fewer
    multiplications [ours]. `fuse()` stores the merged weights in a new module for deployment.

    Args:
        channels: C.
        ratio: r.
        fused: build the deployed form, which has only the merged kernels.
        bias: biases everywhere.
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
        """(B, C, H, W) -> (B, C, H, W)."""
        x = x.permute(0, 2, 3, 1)  # (B, H, W, C)
        if self.fused:
            x = linear_gelu(x, self.expand).permute(0, 3, 1, 2)  # (B, rC, H, W)
            x = self.depthwise(x).permute(0, 2, 3, 1)
            x = self.project(x)
        else:
            x = linear_pair(x, self.expand_in, self.expand_out, gelu=True).permute(0, 3, 1, 2)  # (B, rC, H, W)
            x = add_depthwise(x, self.depthwise_5x5, self.depthwise_3x3, self.depthwise_1x1).permute(0, 2, 3, 1)
            x = linear_pair(x, self.project_in, self.project_out)
        return x.permute(0, 3, 1, 2)

    @torch.no_grad()
    def fuse(self) -> "RepLeFFN":
        """A new, deployed module of the same function, merged in float32; this one is left as it is.

        A fused module gives a copy.
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
        for layer, (weight, bias) in zip((deployed.expand, deployed.depthwise, deployed.project), merged, strict=True):
            layer.weight.copy_(weight)
            if bias is not None:
                layer.bias.copy_(bias)
        return deployed.to(parameter.device, parameter.dtype)

    @torch.no_grad()
    def unfuse(self) -> "RepLeFFN":
        """A new, trainable module of the same function as this fused one; one that is not fused gives a copy.

        Not the branches that were merged, which are lost, but a plain start for training on [ours]: of each pair of 1×1
        one is the identity, the 5×5 is the merged kernel less δ, the 3×3 and the 1×1 are zero.

        Raises:
            ValueError: `ratio` is below 2, so that a pair's middle is narrower than C and holds no identity.
        """
        if not self.fused:
            return copy.deepcopy(self)
        trainable = RepLeFFN(self.channels, self.ratio, bias=self.bias)
        if trainable.expand_in.out_features < self.channels:
            raise ValueError(f"a feed-forward of ratio {self.ratio:g} cannot be taken apart; 2 or more is needed")
        for parameter in trainable.parameters():
            parameter.zero_()
        nn.init.eye_(trainable.expand_in.weight)
        nn.init.eye_(trainable.project_out.weight)
        trainable.expand_out.weight[:, : self.channels] = self.expand.weight
        trainable.project_in.weight[: self.channels] = self.project.weight
        trainable.depthwise_5x5.weight.copy_(self.depthwise.weight)
        trainable.depthwise_5x5.weight[:, :, 2, 2] -= 1
        if self.bias:
            trainable.expand_out.bias.copy_(self.expand.bias)
            trainable.depthwise_5x5.bias.copy_(self.depthwise.bias)
            trainable.project_out.bias.copy_(self.project.bias)
        return trainable.to(self.expand.weight.device, self.expand.weight.dtype)


class FeedForward(nn.Module):
    """The plain feed-forward, to see what Rep-LeFFN adds [ours: an ablation]: 1×1 (C→rC) → GELU → 1×1 (rC→C)."""

    def __init__(self, channels: int, ratio: float = 2.0):
        super().__init__()
        self.expand = Linear(channels, int(channels * ratio))
        self.project = Linear(int(channels * ratio), channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return self.project(linear_gelu(x.permute(0, 2, 3, 1), self.expand)).permute(0, 3, 1, 2)
