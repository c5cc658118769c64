"""The restorer: the denoiser's backbone between an image stem and a residual head (model.md §1, §7)."""

from collections.abc import Sequence
from typing import Literal

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from .backbone import IPTV2Backbone, pad_replicate
from .blocks import FGBlockConfig
from .fusion import FusibleModelMixin
from .layers import pixel_shuffle, pixel_unshuffle
from .loading import AlignedLoadingMixin

__all__ = ["IPTV2RestorationModel"]


def scale_sigma(sigma: Tensor) -> Tensor:
    """Scale noise levels for the network: [0, 64] on the 0–255 scale becomes [-1, 1]."""
    return sigma / 32 - 1


class RestorationEmbedding(nn.Module):
    """Conditioning vector of a restorer: an MLP of the noise level plus an embedding of the task [ours]."""

    def __init__(self, dim: int, takes_sigma: bool, num_tasks: int | None):
        super().__init__()
        self.sigma_embedder = None
        if takes_sigma:
            self.sigma_embedder = nn.Sequential(nn.Linear(1, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.task_embedder = nn.Embedding(num_tasks, dim) if num_tasks is not None else None
        if self.task_embedder is not None:
            nn.init.normal_(self.task_embedder.weight, std=0.02)

    def forward(self, sigma: Tensor | None, task: Tensor | None) -> Tensor:
        """Embed sigma (B,), scaled by `scale_sigma`, and task (B,) int64 -> (B, D)."""
        vectors = []
        if self.sigma_embedder is not None:
            assert sigma is not None  # check_conditions has raised
            vectors.append(self.sigma_embedder(sigma[:, None]))
        if self.task_embedder is not None:
            vectors.append(self.task_embedder(task))
        return sum(vectors)


class IPTV2RestorationModel(
    FusibleModelMixin, AlignedLoadingMixin, ModelMixin, ConfigMixin, AttentionMixin, PeftAdapterMixin
):
    """U-shaped image restorer with hierarchical attentions (IPT-V2, arXiv 2404.00633; model.md §1–§5, §7).

        output = image + shuffle(conv3x3(U(conv3x3(unshuffle(4·image - 2)))))

    The head starts at zero, so a new model returns its input.

    Args:
        in_channels: number of image channels: 3 for colour, 1 for gray. The output has as many.
        unshuffle: factor of the pixel-unshuffle before the stem and of the pixel-shuffle after the head: 1, 2 or 4
            [ours]. CPUs are inefficient on maps with few channels at full resolution (1).
        channels: width C of the first level.
        layers_per_stage: number of FG blocks in each encoder stage, the bottleneck and each decoder stage: 2L-1
            numbers for L levels.
        num_attention_heads: number of attention heads, one number or one per stage.
        attention_pattern: attentions of an FG block in order, each "focal" or "grid".
        window_size: window size w of FCSA.
        grid_stride: stride p of GGSA, one number or one per level; None if `grid_size` is given.
        grid_size: grid size G of GGSA; None if `grid_stride` is given. A fixed grid costs the same per pixel for every
            image size.
        ffn_ratio: expansion ratio r of the feed-forward.
        norm_bias: whether the plain norms have a bias: False for denoising, True for deblurring and deraining
            (Restormer).
        sigma_conditioning: how the model receives the noise level: None (blind), "map" (a constant input plane, as in
            FFDNet) or "vector" (adaLN-Zero in every block, like the denoiser's timestep).
        num_tasks: number of tasks that the model serves, selected by a conditioning vector; None for a single task.
        conditioning_dim: width of the conditioning vector, if the model has one.
        temperature_init: initial temperature of FCSA.
        sample_size: size of the training patches, one number or (height, width), to which the windows are fitted; None
            to leave the windows as they are. The model accepts images of any size.
        fused: whether to build the deployed form, which `fuse()` returns and which cannot be trained.

    Raises:
        ValueError: an argument is out of range, or a sequence has the wrong number of entries.
    """

    __module__ = "iptv2_diffusion"  # saved pipelines record this name, so that the file can move
    _supports_gradient_checkpointing = True
    _no_split_modules = ["FGBlock"]
    _repeated_blocks = ["FGBlock"]
    _skip_layerwise_casting_patterns = ["embedder", "norm", "temperature", "logit_scale", "merge_logits"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        unshuffle: int = 1,
        channels: int = 48,
        layers_per_stage: Sequence[int] = (2, 3, 3, 4, 3, 3, 2),
        num_attention_heads: int | Sequence[int] = (1, 2, 4, 8, 4, 2, 2),
        attention_pattern: Sequence[str] = ("focal", "grid"),
        window_size: int = 8,
        grid_stride: int | Sequence[int] | None = None,
        grid_size: int | None = 8,
        ffn_ratio: float = 2.0,
        norm_bias: bool = True,
        sigma_conditioning: Literal["map", "vector"] | None = None,
        num_tasks: int | None = None,
        conditioning_dim: int = 128,
        temperature_init: float = 1.0,
        sample_size: int | tuple[int, int] | None = None,
        fused: bool = False,
    ):
        super().__init__()
        if unshuffle not in (1, 2, 4):
            raise ValueError(f"unshuffle is {unshuffle}; it must be 1, 2 or 4")
        if sigma_conditioning not in (None, "map", "vector"):
            raise ValueError(f"sigma_conditioning is {sigma_conditioning!r}; it must be 'map', 'vector' or None")
        size = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
        conditional = sigma_conditioning == "vector" or num_tasks is not None
        planes = in_channels * unshuffle**2

        self.stem = nn.Conv2d(planes + (sigma_conditioning == "map"), channels, 3, padding=1)
        self.embedder = None
        if conditional:
            self.embedder = RestorationEmbedding(conditioning_dim, sigma_conditioning == "vector", num_tasks)
        self.backbone = IPTV2Backbone(
            channels,
            layers_per_stage,
            num_attention_heads,
            FGBlockConfig(
                attention_pattern=tuple(attention_pattern),
                window_size=window_size,
                temperature_init=temperature_init,
                grid_size=grid_size,
                ffn_ratio=ffn_ratio,
                norm_bias=norm_bias,
                fused=fused,
            ),
            grid_stride=grid_stride,
            conditioning_dim=conditioning_dim if conditional else None,
            sample_size=None if size is None else (-(-size[0] // unshuffle), -(-size[1] // unshuffle)),
        )
        self.head = nn.Conv2d(self.backbone.out_channels, planes, 3, padding=1)
        for parameter in self.head.parameters():
            nn.init.zeros_(parameter)
        self.finish_fused_init()

    @property
    def granularity(self) -> int:
        """Period of the window grid in pixels, unshuffle · 2^(L-1) · window_size.

        If an image is shifted by a multiple of it, the windows of every level shift with it.
        """
        return self.config.unshuffle * 2 ** (self.backbone.levels - 1) * self.config.window_size

    def forward(
        self,
        image: Tensor,
        sigma: Tensor | float | None = None,
        task: Tensor | int | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Restore degraded images.

        Args:
            image: degraded images, (B, in_channels, H, W) in [0, 1], any H and W. Noise may exceed this range.
            sigma: standard deviation of the noise on the 0–255 scale, () or (B,). Models with `sigma_conditioning`
                require it; others reject it.
            task: index of the task in [0, num_tasks), () or (B,). Models with `num_tasks` require it; others reject it.
            return_dict: whether to return a `Transformer2DModelOutput` instead of a tuple.

        Returns:
            `Transformer2DModelOutput` with `sample` (B, in_channels, H, W), not clipped, or a tuple with this tensor.

        Raises:
            ValueError: `sigma` or `task` is missing, not supported or out of range.
        """
        batch, _, height, width = image.shape
        self.check_conditions(sigma, task)
        # `as_tensor` of a tensor would be a constant to `torch.jit.trace`
        if sigma is not None:
            sigma = sigma if isinstance(sigma, Tensor) else torch.as_tensor(sigma)
            sigma = scale_sigma(sigma.to(image.device)).to(image.dtype).expand(batch)
        if task is not None:
            task = task if isinstance(task, Tensor) else torch.as_tensor(task)
            task = task.to(image.device).expand(batch)
        vector = None if self.embedder is None else self.embedder(sigma, task)  # (B, D)

        factor = self.config.unshuffle
        x = 4 * (image - 0.5)  # gives contrasts and noise a standard deviation near 1 [ours, untested]
        x = pixel_unshuffle(pad_replicate(x, factor), factor)  # (B, planes, H/factor, W/factor)
        if self.config.sigma_conditioning == "map":
            assert sigma is not None  # check_conditions has raised
            # (B, planes + 1, H/factor, W/factor)
            x = torch.cat((x, sigma[:, None, None, None].expand(batch, 1, x.shape[2], x.shape[3])), dim=1)
        x = self.stem(x.contiguous(memory_format=torch.channels_last))  # (B, C, H/factor, W/factor)
        x = self.backbone(x, vector)  # (B, 2C, H/factor, W/factor), C if there is a single level
        residual = pixel_shuffle(self.head(x), factor)[..., :height, :width]  # (B, in_channels, H, W)
        sample = image + residual
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def check_conditions(self, sigma: Tensor | float | None, task: Tensor | int | None) -> None:
        """Raise a ValueError if a condition is missing, not supported or out of range."""
        for name, value, expected in (
            ("sigma", sigma, self.config.sigma_conditioning is not None),
            ("task", task, self.config.num_tasks is not None),
        ):
            if (value is not None) != expected:
                raise ValueError(
                    f"this model {'needs' if expected else 'does not take'} {name}: "
                    f"sigma_conditioning is {self.config.sigma_conditioning!r}, num_tasks is {self.config.num_tasks}"
                )
        if isinstance(task, int) and not 0 <= task < self.config.num_tasks:
            raise ValueError(f"task is {task}; this model has tasks 0 to {self.config.num_tasks - 1}")
