"""The restorer: the same U as the denoiser's, between an image stem and a residual head (model.md §1, §7)."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from .backbone import IPTV2Backbone, pad_replicate
from .blocks import FGBlockConfig
from .fusion import FusibleModelMixin
from .loading import AlignedLoadingMixin

__all__ = ["IPTV2RestorationModel"]


def scale_sigma(sigma: Tensor) -> Tensor:
    """The noise level for the network: 0 to 64 on the 0–255 scale becomes -1 to 1."""
    return sigma / 32 - 1


class RestorationEmbedding(nn.Module):
    """Conditioning vector of a restorer: an MLP of the noise level plus a row per task [ours]."""

    def __init__(self, dim: int, takes_sigma: bool, num_tasks: int | None):
        super().__init__()
        self.sigma_embedder = None
        if takes_sigma:
            self.sigma_embedder = nn.Sequential(nn.Linear(1, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.task_embedder = nn.Embedding(num_tasks, dim) if num_tasks is not None else None
        if self.task_embedder is not None:
            nn.init.normal_(self.task_embedder.weight, std=0.02)

    def forward(self, sigma: Tensor | None, task: Tensor | None) -> Tensor:
        """sigma (B,) as `scale_sigma` gives it, task (B,) int64 -> (B, D)."""
        vectors = []
        if self.sigma_embedder is not None:
            vectors.append(self.sigma_embedder(sigma[:, None]))
        if self.task_embedder is not None:
            vectors.append(self.task_embedder(task))
        return sum(vectors)


class IPTV2RestorationModel(
    FusibleModelMixin, AlignedLoadingMixin, ModelMixin, ConfigMixin, AttentionMixin, PeftAdapterMixin
):
    """U-shaped image restorer with hierarchical attentions (IPT-V2, arXiv 2404.00633; model.md §1–§5, §7).

        output = image + shuffle(conv3x3(U(conv3x3(unshuffle(4·image - 2)))))

    The head starts at zero, so a fresh model returns its input.

    Args:
        in_channels: 3 for colour, 1 for gray; as many come out.
        unshuffle: pixel-unshuffle before the stem and pixel-shuffle after the head: 1 (full resolution), 2 or 4
            [ours]. On CPUs narrow full-resolution maps run far below the machine's rate.
        channels, layers_per_stage, num_attention_heads, attention_pattern, window_size, ffn_ratio, temperature_init:
            of the U, see `IPTV2Backbone`.
        grid_stride, grid_size: of GGSA, exactly one; a fixed grid costs the same per pixel at any image size.
        norm_bias: bias of the plain norms: False for denoising, True for deblurring and deraining (Restormer).
        sigma_conditioning: how the noise level enters: None (blind), "map" (a further constant input plane, as in
            FFDNet) or "vector" (adaLN-Zero in every block, as the timestep of the denoiser).
        num_tasks: number of tasks that one model serves, told apart by a conditioning vector; None for a single one.
        conditioning_dim: width of the conditioning vector, where there is one.
        sample_size: (height, width) of training patches that the windows are fitted to; None: any. Any size runs.
        fused: deployed form; made by `fuse()`, cannot be trained.
    """

    __module__ = "iptv2_diffusion"  # what saved pipelines record, wherever this file lives
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
                attention_pattern=attention_pattern,
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
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.finish_fused_init()

    @property
    def granularity(self) -> int:
        """Pixels by which an image may be shifted with all windows shifting alike: unshuffle · 2^(L-1) · window."""
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
            image: (B, in_channels, H, W) on [0, 1] (noise may go beyond), any H and W.
            sigma: () or (B,), standard deviation of the noise on the 0–255 scale; only, and always, for models with
                `sigma_conditioning`.
            task: () or (B,), int in [0, num_tasks); only, and always, for models with `num_tasks`.
            return_dict: return a `Transformer2DModelOutput` instead of a tuple.

        Returns:
            `.sample` (B, in_channels, H, W), not clipped.
        """
        batch, _, height, width = image.shape
        self.check_conditions(sigma, task)
        if sigma is not None:
            sigma = scale_sigma(torch.as_tensor(sigma, device=image.device)).to(image.dtype).expand(batch)
        if task is not None:
            task = torch.as_tensor(task, device=image.device).expand(batch)
        vector = None if self.embedder is None else self.embedder(sigma, task)

        factor = self.config.unshuffle
        x = 4 * (image - 0.5)  # brings contrasts and noise near unit scale [ours, untested]
        x = F.pixel_unshuffle(pad_replicate(x, factor), factor)  # (B, planes, H/factor, W/factor)
        if self.config.sigma_conditioning == "map":
            x = torch.cat((x, sigma[:, None, None, None].expand(-1, 1, *x.shape[-2:])), dim=1)
        x = self.stem(x.contiguous(memory_format=torch.channels_last))  # (B, C, H/factor, W/factor)
        x = self.backbone(x, vector)  # (B, 2C, H/factor, W/factor), C if there is a single level
        residual = F.pixel_shuffle(self.head(x), factor)[..., :height, :width]
        sample = image + residual
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def check_conditions(self, sigma: Tensor | float | None, task: Tensor | int | None) -> None:
        """Raise a ValueError for a condition that is missing, or that the model was not made for."""
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
