"""LatentCodec: encoding of images to latents and decoding back, with any diffusers VAE.

This module is the only one that knows a VAE's scaling and compression. A denoiser sees latents in *model units*, with
roughly zero mean and unit variance:

    model = (raw - mean_c) / std_c * scaling_factor    if the VAE's config has latents_mean and latents_std per channel
    model = (raw - shift_factor) * scaling_factor      otherwise; None, as in most KL configs, means a shift of 0

===================  ====================  ============================================================================
VAE                  ``encode`` field      note
===================  ====================  ============================================================================
AutoencoderKL        ``.latent_dist``      4 channels (SD, SDXL) or 16 (SD3, FLUX); a posterior with mean and standard
                                           deviation
AutoencoderTiny      ``.latents``          deterministic; the latents are already in model units (scaling_factor 1);
                                           ``scale_latents`` only converts them to bytes and is not used here
AutoencoderDC        ``.latent``           deterministic; compression factor 32 or 64, 32 or more channels
===================  ====================  ============================================================================

Images are (B, 3, H, W) in [-1, 1]. Latents are (B, C, H/f, W/f) with the VAE's compression factor f. Results are
float32 for every dtype of the VAE's weights.
"""

import hashlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from diffusers import ModelMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

# Config fields in which VAE classes list their resolution levels. Each level after the first halves the image.
_LEVEL_FIELDS = ("block_out_channels", "encoder_block_out_channels", "down_block_out_channels")


class LatentCodec:
    """Encoder of images to latents in model units, and decoder of latents to images.

    A codec is cheap to create. Its only state is the tiling, and it never changes the VAE's weights, mode or device.
    Inputs must be on the VAE's device; they are cast to its dtype.

    Args:
        vae: a diffusers VAE, such as `AutoencoderKL`, `AutoencoderTiny` or `AutoencoderDC`.

    Attributes:
        latent_channels: number of latent channels C.
        compression: spatial compression factor f.

    Raises:
        TypeError: `vae` is not a diffusers VAE, or its config does not give the compression factor.
        ValueError: the config's `latents_mean` or `latents_std` does not have one value per latent channel.
    """

    __module__ = "iptv2_diffusion"  # the public name, so that the file can move

    def __init__(self, vae: ModelMixin):
        config = getattr(vae, "config", None)
        if config is None or "latent_channels" not in config or not hasattr(vae, "decode"):
            raise TypeError(
                "LatentCodec takes a diffusers VAE (AutoencoderKL, AutoencoderTiny, AutoencoderDC), "
                f"not {type(vae).__name__}"
            )
        self.vae = vae
        self.latent_channels: int = config["latent_channels"]
        self.compression: int = _spatial_compression(vae)
        self._tile: int | None = None  # latent positions
        self._overlap: int = 0

        scaling = config.get("scaling_factor")
        self._scale = torch.full((1, 1, 1, 1), 1.0 if scaling is None else float(scaling))
        self._shift = torch.full((1, 1, 1, 1), float(config.get("shift_factor") or 0.0))
        if config.get("latents_mean") is not None:
            self._shift = self._per_channel("latents_mean")
        if config.get("latents_std") is not None:
            self._scale = self._scale / self._per_channel("latents_std")

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({type(self.vae).__name__}, latent_channels={self.latent_channels}, "
            f"compression={self.compression}, tile={self._tile and self._tile * self.compression})"
        )

    def _per_channel(self, field: str) -> Tensor:
        values = torch.as_tensor(self.vae.config[field], dtype=torch.float32).flatten()
        if values.numel() != self.latent_channels:
            raise ValueError(
                f"the VAE's {field} has {values.numel()} values for {self.latent_channels} latent channels; "
                "fix its config"
            )
        return values.view(1, -1, 1, 1)

    # --- sizes -------------------------------------------------------------------------------------------------------

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the (height, width) of the latents of an image of height x width pixels.

        Raises:
            ValueError: a side is not a multiple of the compression factor. The message names the nearest valid sizes.
        """
        for name, pixels in (("height", height), ("width", width)):
            if pixels < 1 or pixels % self.compression:
                below = pixels // self.compression * self.compression
                near = f"{below} or {below + self.compression}" if below > 0 else f"{self.compression}"
                raise ValueError(f"{name} {pixels} is not a multiple of the VAE's {self.compression}; use {near}")
        return height // self.compression, width // self.compression

    def image_size(self, latent_height: int, latent_width: int) -> tuple[int, int]:
        """Return the (height, width) in pixels of the image that latents of this size decode to."""
        return latent_height * self.compression, latent_width * self.compression

    # --- images to latents -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the posterior's mean and standard deviation, each (B, C, h, w) float32 in model units.

        The standard deviation is 0 for a deterministic VAE. A cache of both moments lets every epoch draw new latents.

        Args:
            images: (B, 3, H, W) in [-1, 1].

        Raises:
            ValueError: H or W is not a multiple of the compression factor.
        """
        self.latent_size(*images.shape[-2:])
        with self._safe_precision() as dtype:
            moments = self._in_tiles(self._raw_moments, images.to(dtype), in_unit=self.compression, out_unit=1)
        mean, std = moments.chunk(2, dim=1)
        shift, scale = self._shift.to(mean.device), self._scale.to(mean.device)
        return (mean - shift) * scale, std * scale

    @torch.no_grad()
    def encode(
        self,
        images: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        sample_posterior: bool = True,
    ) -> Tensor:
        """Encode images to latents (B, C, h, w) float32 in model units.

        Args:
            images: (B, 3, H, W) in [-1, 1].
            generator: source of the posterior's noise, one generator or one per image.
            sample_posterior: whether to draw from the posterior instead of returning its mean.

        Raises:
            ValueError: H or W is not a multiple of the compression factor.
        """
        mean, std = self.encode_moments(images)
        if not sample_posterior:
            return mean
        return mean + std * randn_tensor(tuple(mean.shape), generator=generator, device=mean.device, dtype=mean.dtype)

    def _raw_moments(self, images: Tensor) -> Tensor:
        """Return the VAE's own mean and standard deviation, concatenated: (B, 2C, h, w) float32."""
        output = self.vae.encode(images)
        if "latent_dist" in output:
            return torch.cat([output.latent_dist.mean, output.latent_dist.std], dim=1).float()
        for field in ("latents", "latent"):
            if field in output:
                latents = output[field].float()
                return torch.cat([latents, torch.zeros_like(latents)], dim=1)
        raise TypeError(
            f"{type(self.vae).__name__}.encode returns {', '.join(output)}; "
            "a LatentCodec needs latent_dist, latents or latent"
        )

    # --- latents to images -------------------------------------------------------------------------------------------

    def decode(self, latents: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Decode latents to images (B, 3, H, W) float32, about [-1, 1] but not clamped. The function is differentiable.

        Args:
            latents: (B, C, h, w) in model units.
            generator: source of noise for a VAE whose decoder draws noise (ConsistencyDecoderVAE).

        Raises:
            ValueError: the latents do not have C channels.
        """
        if latents.shape[1] != self.latent_channels:
            raise ValueError(f"latents have {latents.shape[1]} channels, but the VAE takes {self.latent_channels}")
        raw = latents.float() / self._scale.to(latents.device) + self._shift.to(latents.device)
        takes_generator = "generator" in inspect.signature(self.vae.decode).parameters
        options = {"generator": generator} if generator is not None and takes_generator else {}

        def run(tile: Tensor) -> Tensor:
            return self.vae.decode(tile, **options).sample.float()

        with self._safe_precision() as dtype:
            return self._in_tiles(run, raw.to(dtype), in_unit=1, out_unit=self.compression)

    @contextmanager
    def _safe_precision(self) -> Iterator[torch.dtype]:
        """Yield the dtype for the VAE's inputs.

        A float16 VAE with ``force_upcast`` would overflow, so it runs in float32 inside this context.
        """
        upcast = self.vae.dtype == torch.float16 and bool(self.vae.config.get("force_upcast"))
        if upcast:
            nn.Module.to(self.vae, torch.float32)  # ModelMixin.to would warn about the cast
        try:
            yield self.vae.dtype
        finally:
            if upcast:
                nn.Module.to(self.vae, torch.float16)  # exact: the values came from float16

    # --- tiling ------------------------------------------------------------------------------------------------------

    def enable_tiling(self, tile_size: int = 512, overlap: float = 0.25) -> None:
        """Encode and decode in overlapping square tiles, to bound the memory for large images.

        Neighbouring tiles are blended linearly over their overlap, so that no seam is visible. Images of at most one
        tile are not cut. Tiling works with every VAE and does not use the VAE's own ``enable_tiling``. A VAE with
        global attention or group normalisation sees less context in a tile, so colours may differ slightly from those
        of the whole image.

        Args:
            tile_size: side of a tile in pixels, a multiple of the compression factor.
            overlap: fraction of a tile that neighbours share, in [0, 0.5].

        Raises:
            ValueError: an argument is out of range.
        """
        if tile_size < 2 * self.compression or tile_size % self.compression:
            raise ValueError(
                f"tile_size {tile_size} must be a multiple of the VAE's {self.compression}, "
                f"at least {2 * self.compression}"
            )
        if not 0.0 <= overlap <= 0.5:
            raise ValueError(f"overlap {overlap} is a fraction of a tile between 0 and 0.5")
        self._tile = tile_size // self.compression
        self._overlap = int(self._tile * overlap)

    def disable_tiling(self) -> None:
        """Encode and decode whole images."""
        self._tile = None

    def _in_tiles(self, run: Callable[[Tensor], Tensor], x: Tensor, in_unit: int, out_unit: int) -> Tensor:
        """Return ``run(x)``, computed tile by tile if tiling is enabled.

        For latents of h x w positions, x is (B, K, h*in_unit, w*in_unit) and the result (B, K', h*out_unit,
        w*out_unit).
        """
        height, width = x.shape[-2] // in_unit, x.shape[-1] // in_unit
        if self._tile is None or max(height, width) <= self._tile:
            return run(x)
        tile_h, tile_w = min(self._tile, height), min(self._tile, width)
        weight = _fade(tile_h, self._overlap, out_unit, x.device)[:, None] * _fade(
            tile_w, self._overlap, out_unit, x.device
        )
        total: Tensor | None = None
        for top in _tile_starts(height, tile_h, self._overlap):
            for left in _tile_starts(width, tile_w, self._overlap):
                rows = slice(top * in_unit, (top + tile_h) * in_unit)
                columns = slice(left * in_unit, (left + tile_w) * in_unit)
                tile = run(x[..., rows, columns])
                if total is None:
                    total = tile.new_zeros(*tile.shape[:2], height * out_unit, width * out_unit)
                    norm = tile.new_zeros(height * out_unit, width * out_unit)
                rows = slice(top * out_unit, (top + tile_h) * out_unit)
                columns = slice(left * out_unit, (left + tile_w) * out_unit)
                total[..., rows, columns] += weight * tile
                norm[rows, columns] += weight
        assert total is not None  # there is at least one tile
        return total / norm

    # --- identity ----------------------------------------------------------------------------------------------------

    def fingerprint(self) -> str:
        """Return 16 hex digits that identify the VAE: SHA-256 of its class name, normalisation and weights.

        A latent cache stores the fingerprint, so that it is never used with another VAE.
        """
        digest = hashlib.sha256(type(self.vae).__name__.encode())
        for constant in (self._shift, self._scale):
            digest.update(repr(constant.flatten().tolist()).encode())
        for name, tensor in sorted(self.vae.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()[:16]


def _spatial_compression(vae: ModelMixin) -> int:
    """Return the number of pixels per latent position in each direction."""
    ratio = getattr(vae, "spatial_compression_ratio", None)
    if ratio is not None:
        return int(ratio)
    for field in _LEVEL_FIELDS:
        if vae.config.get(field) is not None:
            return 2 ** (len(vae.config[field]) - 1)
    raise TypeError(
        f"the config of {type(vae).__name__} does not give its compression factor; it needs one of "
        f"{', '.join(_LEVEL_FIELDS)}"
    )


def _tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """Return the starts of tiles that cover ``length`` and share ``overlap`` or more; the last ends at the edge."""
    starts = list(range(0, length - tile, tile - overlap))
    return [*starts, length - tile]


def _fade(tile: int, overlap: int, unit: int, device: torch.device) -> Tensor:
    """Return positive blending weights (tile*unit,) that rise linearly over ``overlap`` positions from each end."""
    position = torch.arange(tile * unit, device=device, dtype=torch.float32)
    to_edge = torch.minimum(position, position.flip(0)) + 0.5
    return (to_edge / max(overlap * unit, 1)).clamp(max=1.0)
