"""The denoiser: IPT-V2 with timestep and class conditioning, called as diffusers' `DiTTransformer2DModel` is."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from .backbone import IPTV2Backbone, pad_replicate
from .blocks import AdaLayerNormZero2d, FGBlockConfig
from .fusion import FusibleModelMixin
from .loading import AlignedLoadingMixin

__all__ = ["IPTV2Transformer2DModel"]


class TimestepClassEmbedding(nn.Module):
    """Sinusoid of 256 → MLP of the timestep, plus a class embedding with one more row, the null label (model.md §6).

    Labels are not dropped here: the training loop drops them, once per sample.
    """

    def __init__(self, dim: int, num_classes: int | None):
        super().__init__()
        self.timestep_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.timestep_embedder = TimestepEmbedding(256, dim)
        self.class_embedder = nn.Embedding(num_classes + 1, dim) if num_classes is not None else None
        for linear in (self.timestep_embedder.linear_1, self.timestep_embedder.linear_2):
            nn.init.normal_(linear.weight, std=0.02)
        if self.class_embedder is not None:
            nn.init.normal_(self.class_embedder.weight, std=0.02)

    def forward(self, timestep: Tensor, class_labels: Tensor | None, dtype: torch.dtype) -> Tensor:
        """timestep (B,) in [0, 1000], class_labels (B,) or None -> (B, D) of `dtype`; the sinusoid is float32."""
        vector = self.timestep_proj(timestep).to(self.timestep_embedder.linear_1.weight.dtype)  # (B, 256)
        vector = self.timestep_embedder(vector).to(dtype)
        if self.class_embedder is not None:
            vector = vector + self.class_embedder(class_labels).to(dtype)
        return vector


class IPTV2Transformer2DModel(
    FusibleModelMixin, AlignedLoadingMixin, ModelMixin, ConfigMixin, AttentionMixin, PeftAdapterMixin
):
    """U-shaped latent denoiser with hierarchical attentions (IPT-V2, arXiv 2404.00633; model.md §1–§7).

    Args:
        sample_size: latent size, one number or (height, width), that the windows are fitted to. Any size runs.
        in_channels: channels of the latent.
        out_channels: None for `in_channels`; `2 * in_channels` for a learned-range variance.
        num_class_embeds: number of classes; None for an unconditional model. Label `num_class_embeds` is the null
            label of classifier-free guidance.
        patch_size: pixel-unshuffle before the stem; 1 keeps every latent position.
        channels: C, the width of the first level.
        layers_per_stage: FG blocks of encoder levels, bottleneck, decoder levels: 2L-1 numbers.
        num_attention_heads: one number, or one per stage.
        attention_pattern: attentions of an FG block, in order.
        window_size: w of FCSA.
        grid_stride: p of GGSA, one number or one per level; None if `grid_size` is given.
        grid_size: G of GGSA.
        feed_forward: "rep-leffn", or "plain" to see what the depthwise convolutions add.
        ffn_ratio: r of the feed-forward.
        conditioning_dim: width of the one conditioning vector [ours]; None for embedders of each level's width
            [lineage].
        temperature_init: FCSA's temperature at initialisation.
        fused: deployed form; made by `fuse()`, cannot be trained.
    """

    __module__ = "iptv2_diffusion"  # what saved pipelines record, wherever this file lives
    _supports_gradient_checkpointing = True
    _no_split_modules = ["FGBlock"]
    _repeated_blocks = ["FGBlock"]
    _skip_layerwise_casting_patterns = ["embedder", "norm", "temperature", "logit_scale", "merge_logits"]
    _keep_in_fp32_modules = ["timestep_embedder"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 32,
        in_channels: int = 4,
        out_channels: int | None = None,
        num_class_embeds: int | None = 1000,
        patch_size: int = 1,
        channels: int = 96,
        layers_per_stage: Sequence[int] = (2, 5, 8, 5, 2),
        num_attention_heads: int | Sequence[int] = 4,
        attention_pattern: Sequence[str] = ("focal", "grid"),
        window_size: int = 8,
        grid_stride: int | Sequence[int] | None = (4, 2, 1),
        grid_size: int | None = None,
        feed_forward: str = "rep-leffn",
        ffn_ratio: float = 2.0,
        conditioning_dim: int | None = 256,
        temperature_init: float = 1.0,
        fused: bool = False,
    ):
        super().__init__()
        if patch_size < 1:
            raise ValueError(f"patch_size is {patch_size}; it must be at least 1")
        levels = len(layers_per_stage) // 2 + 1
        height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
        self.out_channels = in_channels if out_channels is None else out_channels
        conditioning_dims = [conditioning_dim] if conditioning_dim else [channels * 2**level for level in range(levels)]

        self.stem = nn.Conv2d(in_channels * patch_size**2, channels, 3, padding=1)
        self.embedders = nn.ModuleList(TimestepClassEmbedding(dim, num_class_embeds) for dim in conditioning_dims)
        self.backbone = IPTV2Backbone(
            channels,
            layers_per_stage,
            num_attention_heads,
            FGBlockConfig(
                attention_pattern=attention_pattern,
                window_size=window_size,
                temperature_init=temperature_init,
                grid_size=grid_size,
                feed_forward=feed_forward,
                ffn_ratio=ffn_ratio,
                fused=fused,
            ),
            grid_stride=grid_stride,
            conditioning_dim=conditioning_dim or conditioning_dims,
            sample_size=(-(-height // patch_size), -(-width // patch_size)),
        )
        self.head = nn.Conv2d(self.backbone.out_channels, self.backbone.out_channels, 3, padding=1)
        self.norm_out = AdaLayerNormZero2d(
            self.backbone.out_channels, conditioning_dims[min(len(conditioning_dims), 2) - 1], gate=False
        )
        self.proj_out = nn.Conv2d(self.backbone.out_channels, self.out_channels * patch_size**2, 3, padding=1)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)
        self.finish_fused_init()

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | int | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict noise, velocity or flow (whatever the training's target was) from a noisy latent.

        Args:
            hidden_states: (B, in_channels, H, W), any H and W.
            timestep: () or (B,), int or float, in [0, 1000].
            class_labels: (B,) int64 in [0, num_class_embeds]; None is the null label for all.
            return_dict: return a `Transformer2DModelOutput` instead of a tuple.

        Returns:
            `.sample` (B, out_channels, H, W).
        """
        batch, _, height, width = hidden_states.shape
        timestep = torch.as_tensor(timestep, device=hidden_states.device).expand(batch)
        if class_labels is None and self.config.num_class_embeds is not None:
            class_labels = torch.full_like(timestep, self.config.num_class_embeds, dtype=torch.long)
        vectors = [embedder(timestep, class_labels, hidden_states.dtype) for embedder in self.embedders]

        x = F.pixel_unshuffle(pad_replicate(hidden_states, self.config.patch_size), self.config.patch_size)
        x = self.stem(x.contiguous(memory_format=torch.channels_last))  # (B, C, H/patch, W/patch)
        x = self.backbone(x, vectors if len(vectors) > 1 else vectors[0])  # (B, 2C, H/patch, W/patch)
        x, _ = self.norm_out(self.head(x), vectors[min(len(vectors), 2) - 1])
        x = F.pixel_shuffle(self.proj_out(x), self.config.patch_size)
        sample = x[..., :height, :width].contiguous()
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)
