"""The denoiser: IPT-V2 with timestep and class conditioning and the interface of diffusers' `DiTTransformer2DModel`."""

from collections.abc import Sequence

import torch
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
from .layers import pixel_shuffle, pixel_unshuffle
from .loading import AlignedLoadingMixin

__all__ = ["IPTV2Transformer2DModel"]


class TimestepClassEmbedding(nn.Module):
    """Embedding of the timestep (256 sinusoids → MLP) plus embedding of the class (model.md §6).

    The class embedding has one extra row for the null label. This module never drops labels: the training loop drops
    them, once per sample.
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
        """Embed timestep (B,) in [0, 1000] and class_labels (B,) or None -> (B, D) in `dtype`."""
        vector = self.timestep_proj(timestep).to(self.timestep_embedder.linear_1.weight.dtype)  # (B, 256)
        vector = self.timestep_embedder(vector).to(dtype)  # (B, D)
        if self.class_embedder is not None:
            vector = vector + self.class_embedder(class_labels).to(dtype)
        return vector


class IPTV2Transformer2DModel(
    FusibleModelMixin, AlignedLoadingMixin, ModelMixin, ConfigMixin, AttentionMixin, PeftAdapterMixin
):
    """U-shaped latent denoiser with hierarchical attentions (IPT-V2, arXiv 2404.00633; model.md §1–§7).

        latent → 3×3 → U(timestep, class) → 3×3 → adaLN → 3×3 → noise, velocity or flow

    The last convolution starts at zero, so a new model predicts 0.

    Args:
        sample_size: latent size, one number or (height, width). The model accepts latents of any size.
        in_channels: number of latent channels.
        out_channels: number of output channels. None means `in_channels`; a learned-range variance needs
            `2 * in_channels`.
        num_class_embeds: number of classes; None for an unconditional model. Label `num_class_embeds` is the null
            label of classifier-free guidance.
        patch_size: factor of the pixel-unshuffle before the stem; 1 keeps every latent position.
        channels: width C of the first level.
        layers_per_stage: number of FG blocks in each encoder stage, the bottleneck and each decoder stage: 2L-1
            numbers for L levels.
        num_attention_heads: number of attention heads, one number or one per stage.
        attention_pattern: attentions of an FG block in order, each "focal" or "grid".
        window_size: window size w of FCSA.
        grid_stride: stride p of GGSA, one number or one per level; None if `grid_size` is given.
        grid_size: grid size G of GGSA; None if `grid_stride` is given.
        feed_forward: "rep-leffn", or "plain" for a feed-forward without depthwise convolutions (an ablation).
        ffn_ratio: expansion ratio r of the feed-forward.
        conditioning_dim: width of the conditioning vector that all levels share [ours]; None for a separate vector
            of each level's width [lineage].
        temperature_init: initial temperature of FCSA.
        fused: whether to build the deployed form, which `fuse()` returns and which cannot be trained.
        window_fit_size: latent size, one number or (height, width), to which the windows are fitted; None for
            `sample_size`. A model that is fine-tuned at another size keeps its windows this way.

    Raises:
        ValueError: an argument is out of range, or a sequence has the wrong number of entries.
    """

    __module__ = "iptv2_diffusion"  # saved pipelines record this name, so that the file can move
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
        window_fit_size: int | tuple[int, int] | None = None,
    ):
        super().__init__()
        if patch_size < 1:
            raise ValueError(f"patch_size is {patch_size}; it must be at least 1")
        levels = len(layers_per_stage) // 2 + 1
        fit_size = sample_size if window_fit_size is None else window_fit_size
        height, width = (fit_size, fit_size) if isinstance(fit_size, int) else fit_size
        self.out_channels = in_channels if out_channels is None else out_channels
        conditioning_dims = [conditioning_dim] if conditioning_dim else [channels * 2**level for level in range(levels)]

        self.stem = nn.Conv2d(in_channels * patch_size**2, channels, 3, padding=1)
        self.embedders = nn.ModuleList(TimestepClassEmbedding(dim, num_class_embeds) for dim in conditioning_dims)
        self.backbone = IPTV2Backbone(
            channels,
            layers_per_stage,
            num_attention_heads,
            FGBlockConfig(
                attention_pattern=tuple(attention_pattern),
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
        # The output is 2C wide, the width of level 1: with one vector per level, its norm takes that level's vector.
        self.output_vector = min(len(conditioning_dims), 2) - 1
        self.norm_out = AdaLayerNormZero2d(
            self.backbone.out_channels, conditioning_dims[self.output_vector], gate=False
        )
        self.proj_out = nn.Conv2d(self.backbone.out_channels, self.out_channels * patch_size**2, 3, padding=1)
        for parameter in self.proj_out.parameters():
            nn.init.zeros_(parameter)
        self.finish_fused_init()

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | int | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict the training target (noise, velocity or flow) from noisy latents.

        Args:
            hidden_states: noisy latents, (B, in_channels, H, W), any H and W.
            timestep: timestep in [0, 1000], int or float, () or (B,).
            class_labels: class labels in [0, num_class_embeds], (B,) int64. None means the null label for all samples.
            return_dict: whether to return a `Transformer2DModelOutput` instead of a tuple.

        Returns:
            `Transformer2DModelOutput` with `sample` (B, out_channels, H, W), or a tuple with this tensor.
        """
        batch, _, height, width = hidden_states.shape
        if not isinstance(timestep, Tensor):  # `as_tensor` of a tensor would be a constant to `torch.jit.trace`
            timestep = torch.as_tensor(timestep)
        timestep = timestep.to(hidden_states.device).expand(batch)
        if class_labels is None and self.config.num_class_embeds is not None:
            class_labels = torch.full_like(timestep, self.config.num_class_embeds, dtype=torch.long)
        vectors = [embedder(timestep, class_labels, hidden_states.dtype) for embedder in self.embedders]  # (B, D) each

        patch = self.config.patch_size
        x = pixel_unshuffle(pad_replicate(hidden_states, patch), patch)  # (B, in_channels·patch², H/patch, W/patch)
        x = self.stem(x.contiguous(memory_format=torch.channels_last))  # (B, C, H/patch, W/patch)
        x = self.backbone(x, vectors if len(vectors) > 1 else vectors[0])  # (B, 2C, H/patch, W/patch)
        x, _ = self.norm_out(self.head(x), vectors[self.output_vector])  # (B, 2C, H/patch, W/patch)
        x = pixel_shuffle(self.proj_out(x), patch)  # (B, out_channels, H, W), padded to multiples of patch
        sample = x[..., :height, :width].contiguous()
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)
