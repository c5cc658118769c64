"""LatentCodec: images to latents and back, through any diffusers VAE, whose scaling and compression nobody else knows.

A denoiser sees latents in *model units*, roughly zero mean and unit variance:

    model = (raw - mean_c) / std_c * scaling_factor    where the VAE's config has latents_mean, latents_std, by channel
    model = (raw - shift_factor) * scaling_factor      otherwise; shift_factor is None in most KL configs and means 0

===================  ====================  ============================================================================
VAE                  ``encode`` field      note
===================  ====================  ============================================================================
AutoencoderKL        ``.latent_dist``      4 channels (SD, SDXL) or 16 (SD3, FLUX); a posterior, mean and deviation
AutoencoderTiny      ``.latents``          deterministic; its latents are in model units already (scaling_factor 1);
                                           ``scale_latents`` only stores them as bytes and is not used here
AutoencoderDC        ``.latent``           deterministic; 32 or 64 times smaller, 32 or more channels
===================  ====================  ============================================================================

Images are (B, 3, H, W) in [-1, 1], latents (B, C, H/f, W/f) with f the VAE's compression factor. Results are float32
whatever the VAE's weights are in.
"""

import hashlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

# Where the different VAE classes list their resolution levels: each level after the first halves the image.
_LEVEL_FIELDS = ("block_out_channels", "encoder_block_out_channels", "down_block_out_channels")


class LatentCodec:
    """Encodes images to, and decodes them from, latents in model units.

    The codec holds no state of its own but the tiling: it never changes the VAE's weights, mode or device, and is
    cheap to make. Inputs must be on the VAE's device; they are cast to its dtype.

    Attributes:
        latent_channels: C.
        compression: the spatial factor f.
    """

    __module__ = "iptv2_diffusion"  # the public name, wherever this file lives

    def __init__(self, vae: nn.Module):
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
                "mend its config"
            )
        return values.view(1, -1, 1, 1)

    # --- sizes -------------------------------------------------------------------------------------------------------

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of the latents of an image of that many pixels; an error names the nearest usable sizes."""
        for name, pixels in (("height", height), ("width", width)):
            if pixels < 1 or pixels % self.compression:
                below = pixels // self.compression * self.compression
                near = f"{below} or {below + self.compression}" if below > 0 else f"{self.compression}"
                raise ValueError(f"{name} {pixels} is not a multiple of the VAE's {self.compression}; use {near}")
        return height // self.compression, width // self.compression

    def image_size(self, latent_height: int, latent_width: int) -> tuple[int, int]:
        """(height, width) in pixels of the image that latents of that size decode to."""
        return latent_height * self.compression, latent_width * self.compression

    # --- images to latents -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the posterior, each (B, C, h, w) float32 in model units.

        A deterministic VAE gives a deviation of 0. Caching the two lets every epoch draw its own latents.
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
        """Latents (B, C, h, w) float32 in model units: drawn from the posterior, or its mean."""
        mean, std = self.encode_moments(images)
        if not sample_posterior:
            return mean
        return mean + std * randn_tensor(tuple(mean.shape), generator=generator, device=mean.device, dtype=mean.dtype)

    def _raw_moments(self, images: Tensor) -> Tensor:
        """Mean and deviation as the VAE gives them, stacked: (B, 2C, h, w) float32."""
        output = self.vae.encode(images)
        if "latent_dist" in output:
            return torch.cat([output.latent_dist.mean, output.latent_dist.std], dim=1).float()
        for field in ("latents", "latent"):
            if field in output:
                latents = output[field].float()
                return torch.cat([latents, torch.zeros_like(latents)], dim=1)
        raise TypeError(
            f"{type(self.vae).__name__}.encode gives {', '.join(output)}; "
            "a LatentCodec reads latent_dist, latents or latent"
        )

    # --- latents to images -------------------------------------------------------------------------------------------

    def decode(self, latents: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Images (B, 3, H, W) float32, about [-1, 1] but not clamped, of latents in model units. Differentiable.

        ``generator`` only matters to a VAE whose decoder draws noise (ConsistencyDecoderVAE).
        """
        if latents.shape[1] != self.latent_channels:
            raise ValueError(f"latents have {latents.shape[1]} channels, the VAE takes {self.latent_channels}")
        raw = latents.float() / self._scale.to(latents.device) + self._shift.to(latents.device)
        takes_generator = "generator" in inspect.signature(self.vae.decode).parameters
        options = {"generator": generator} if generator is not None and takes_generator else {}

        def run(tile: Tensor) -> Tensor:
            return self.vae.decode(tile, **options).sample.float()

        with self._safe_precision() as dtype:
            return self._in_tiles(run, raw.to(dtype), in_unit=1, out_unit=self.compression)

    @contextmanager
    def _safe_precision(self) -> Iterator[torch.dtype]:
        """Yields the dtype to feed; a float16 VAE with ``force_upcast`` (it overflows) works in float32 meanwhile."""
        upcast = self.vae.dtype == torch.float16 and bool(self.vae.config.get("force_upcast"))
        if upcast:
            nn.Module.to(self.vae, torch.float32)  # not ModelMixin.to, which warns of every cast
        try:
            yield self.vae.dtype
        finally:
            if upcast:
                nn.Module.to(self.vae, torch.float16)  # exact: the values came from float16

    # --- tiling ------------------------------------------------------------------------------------------------------

    def enable_tiling(self, tile_size: int = 512, overlap: float = 0.25) -> None:
        """Work in square tiles of ``tile_size`` pixels, which bounds the memory that a large image takes.

        Neighbours share ``overlap`` of a tile and are cross-faded over it, so that no seam shows. Images of one tile
        or less are not cut. This works for every VAE alike; the VAE's own ``enable_tiling`` is left alone. A VAE with
        global attention or group normalisation sees less context in a tile: colours may differ slightly from the uncut
        result.
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
        """Work on whole images again."""
        self._tile = None

    def _in_tiles(self, run: Callable[[Tensor], Tensor], x: Tensor, in_unit: int, out_unit: int) -> Tensor:
        """``run(x)``, tile by tile where tiling is on.

        x: (B, K, h*in_unit, w*in_unit); the result is (B, K', h*out_unit, w*out_unit) for latents of h x w positions.
        """
        height, width = x.shape[-2] // in_unit, x.shape[-1] // in_unit
        if self._tile is None or max(height, width) <= self._tile:
            return run(x)
        tile_h, tile_w = min(self._tile, height), min(self._tile, width)
        weight = _fade(tile_h, self._overlap, out_unit, x.device)[:, None] * _fade(
            tile_w, self._overlap, out_unit, x.device
        )
        total = norm = None
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
        return total / norm

    # --- identity ----------------------------------------------------------------------------------------------------

    def fingerprint(self) -> str:
        """16 hex digits of SHA-256 over the class name, the normalisation and the weights (names, dtypes, shapes,
        bytes).

        Latent caches carry it, so that they are never used with another VAE.
        """
        digest = hashlib.sha256(type(self.vae).__name__.encode())
        for constant in (self._shift, self._scale):
            digest.update(repr(constant.flatten().tolist()).encode())
        for name, tensor in sorted(self.vae.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()[:16]


def _spatial_compression(vae: nn.Module) -> int:
    """Pixels per latent position in each direction."""
    ratio = getattr(vae, "spatial_compression_ratio", None)
    if ratio is not None:
        return int(ratio)
    for field in _LEVEL_FIELDS:
        if vae.config.get(field) is not None:
            return 2 ** (len(vae.config[field]) - 1)
    raise TypeError(f"{type(vae).__name__} says nowhere how much smaller its latents are ({', '.join(_LEVEL_FIELDS)})")


def _tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """Starts of tiles that cover ``length`` and share at least ``overlap``; the last one ends at the edge."""
    starts = list(range(0, length - tile, tile - overlap))
    return [*starts, length - tile]


def _fade(tile: int, overlap: int, unit: int, device: torch.device) -> Tensor:
    """Weights (tile*unit,) that rise linearly over ``overlap`` positions from each end; all above 0."""
    position = torch.arange(tile * unit, device=device, dtype=torch.float32)
    to_edge = torch.minimum(position, position.flip(0)) + 0.5
    return (to_edge / max(overlap * unit, 1)).clamp(max=1.0)
