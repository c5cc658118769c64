"""LatentCodec through every kind of VAE, with real, tiny, randomly initialised ones."""

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny
from kl_vae import make_kl_vae
from torch import nn

from iptv2_diffusion import DiffusionObjective, IPTV2Pipeline, IPTV2Transformer2DModel, LatentCodec, create_model

MEAN, STD = [0.1, -0.2, 0.3, 0.4], [0.5, 1.0, 2.0, 4.0]


def kl(latent_channels: int = 4, **config) -> AutoencoderKL:
    return make_kl_vae(8, 16, norm_num_groups=4, latent_channels=latent_channels, sample_size=16, **config)


def tiny(latent_channels: int = 4) -> AutoencoderTiny:
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
        latent_channels=latent_channels,
    )


def dc() -> AutoencoderDC:
    return AutoencoderDC(
        latent_channels=8,
        attention_head_dim=8,
        encoder_block_out_channels=(8, 8, 16),
        decoder_block_out_channels=(8, 8, 16),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()),
        scaling_factor=0.41407,
    )


# name: (VAE, its latent channels, its compression)
VAES = {
    "kl": (kl, 4, 2),
    "kl16-shift": (lambda: kl(16, shift_factor=0.0609, scaling_factor=1.5305), 16, 2),
    "kl-mean-std": (lambda: kl(latents_mean=MEAN, latents_std=STD, scaling_factor=1.0), 4, 2),
    "tiny": (tiny, 4, 4),
    "tiny16": (lambda: tiny(16), 16, 4),
    "dc": (dc, 8, 4),
}


def make_codec(kind: str) -> LatentCodec:
    torch.manual_seed(0)
    return LatentCodec(VAES[kind][0]().eval())


def make_images(height: int = 24, width: int = 16) -> torch.Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def raw_latents(vae, images: torch.Tensor) -> torch.Tensor:
    """The VAE's own result, from its own field."""
    with torch.no_grad():
        output = vae.encode(images)
    if isinstance(vae, AutoencoderKL):
        return output.latent_dist.mean
    return output.latents if isinstance(vae, AutoencoderTiny) else output.latent


@pytest.mark.parametrize("kind", VAES)
class TestEveryVAE:
    def test_shapes_and_sizes(self, kind):
        codec, (_, channels, factor) = make_codec(kind), VAES[kind]
        assert (codec.latent_channels, codec.compression) == (channels, factor)
        assert codec.latent_size(24, 16) == (24 // factor, 16 // factor)
        assert codec.image_size(*codec.latent_size(24, 16)) == (24, 16)
        latents = codec.encode(make_images())
        assert latents.shape == (2, channels, 24 // factor, 16 // factor)
        assert codec.decode(latents).shape == (2, 3, 24, 16)
        assert latents.dtype == codec.decode(latents).dtype == torch.float32

    def test_model_units_follow_the_config(self, kind):
        codec, images = make_codec(kind), make_images()
        config = codec.vae.config
        raw = raw_latents(codec.vae, images)
        mean, std = codec.encode_moments(images)
        for channel in range(codec.latent_channels):
            shift, scale = config.get("shift_factor") or 0.0, config.scaling_factor
            if kind == "kl-mean-std":
                shift, scale = MEAN[channel], config.scaling_factor / STD[channel]
            torch.testing.assert_close(mean[:, channel], (raw[:, channel] - shift) * scale)
        if kind.startswith("kl"):
            own = codec.vae.encode(images).latent_dist.std
            torch.testing.assert_close(std / own, (std / own).mean(dim=(0, 2, 3), keepdim=True).expand_as(std))
        else:
            assert std.eq(0).all()

    @torch.no_grad()
    def test_decode_undoes_the_units(self, kind):
        codec, images = make_codec(kind), make_images()
        own = codec.vae.decode(raw_latents(codec.vae, images)).sample
        torch.testing.assert_close(codec.decode(codec.encode_moments(images)[0]), own, rtol=1e-4, atol=1e-4)

    def test_posterior_is_sampled_from_the_generator_or_not_at_all(self, kind):
        codec, images = make_codec(kind), make_images()
        mean, std = codec.encode_moments(images)
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(5))
        sampled = codec.encode(images, generator=torch.Generator().manual_seed(5))
        torch.testing.assert_close(sampled, mean + std * noise)
        assert codec.encode(images, sample_posterior=False).equal(mean)

    @torch.no_grad()
    def test_half_precision_vae_gives_nearly_the_same(self, kind):
        codec, images = make_codec(kind), make_images()
        latents = codec.encode_moments(images)[0]
        decoded = codec.decode(latents)
        nn.Module.to(codec.vae, torch.float16)
        half = LatentCodec(codec.vae)
        weights = half.vae.state_dict()
        torch.testing.assert_close(half.encode_moments(images)[0], latents, rtol=0.05, atol=0.02)
        torch.testing.assert_close(half.decode(latents), decoded, rtol=0.05, atol=0.02)
        assert half.vae.dtype == torch.float16
        assert all(value.equal(weights[name]) for name, value in half.vae.state_dict().items())

    def test_fingerprint_is_of_weights_and_constants(self, kind):
        codec = make_codec(kind)
        first = codec.fingerprint()
        assert len(first) == 16
        assert int(first, 16) >= 0
        assert make_codec(kind).fingerprint() == first
        with torch.no_grad():
            next(codec.vae.parameters()).view(-1)[0] += 1e-3
        assert codec.fingerprint() != first

    def test_tiling_leaves_images_of_one_tile_alone(self, kind):
        codec, images = make_codec(kind), make_images()
        latents = codec.encode_moments(images)[0]
        tiled = make_codec(kind)
        tiled.enable_tiling(24)
        assert tiled.encode_moments(images)[0].equal(latents)
        assert tiled.decode(latents).equal(codec.decode(latents))

    @torch.no_grad()
    def test_tiles_cover_any_size(self, kind):
        codec = make_codec(kind)
        codec.enable_tiling(16)
        images = make_images(52, 36)
        latents, _ = codec.encode_moments(images)
        assert latents.shape[-2:] == codec.latent_size(52, 36)
        assert codec.decode(latents).shape == images.shape
        codec.disable_tiling()
        assert codec.encode_moments(images)[0].isfinite().all()

    def test_pipeline_samples_through_it(self, kind):
        vae, (_, channels, factor) = make_codec(kind).vae, VAES[kind]
        transformer = create_model("tiny", in_channels=channels, sample_size=4)
        pipe = IPTV2Pipeline(transformer.eval(), vae, DiffusionObjective.make_scheduler("v_prediction"))
        pipe.set_progress_bar_config(disable=True)
        assert pipe(1, num_inference_steps=1).images[0].size == (4 * factor, 4 * factor)

    def test_sizes_that_do_not_fit_are_named(self, kind):
        codec, factor = make_codec(kind), VAES[kind][2]
        with pytest.raises(
            ValueError, match=f"height 25 is not a multiple of the VAE's {factor}; use 24 or {24 + factor}"
        ):
            codec.encode(make_images(25, 16))
        with pytest.raises(ValueError, match=f"width 1 is not a multiple of the VAE's {factor}; use {factor}"):
            codec.latent_size(24, 1)
        with pytest.raises(ValueError, match="latents have 3 channels"):
            codec.decode(torch.zeros(1, 3, 4, 4))


class TestTiling:
    @torch.no_grad()
    def test_a_local_vae_decodes_the_same_in_tiles(self):
        """Where every tile sees enough around a pixel, tiling must change nothing: no seam, no shift, no dimming."""
        codec = make_codec("tiny")
        torch.manual_seed(0)
        latents = torch.randn(1, 4, 64, 40)
        whole = codec.decode(latents)
        codec.enable_tiling(96, overlap=0.5)
        difference = (codec.decode(latents) - whole).abs()
        # only the rim of a tile sees less context, and there the cross-fade gives it little weight
        assert difference.mean() < 0.005 * whole.std()
        assert difference.max() < 0.2 * whole.std()

    def test_no_tile_is_larger_than_requested(self):
        codec = make_codec("tiny")
        seen = []
        hook = codec.vae.decoder.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[-2:])))
        codec.enable_tiling(32)
        with torch.no_grad():
            codec.decode(torch.zeros(1, 4, 20, 5))
        hook.remove()
        assert set(seen) == {(8, 5)}
        assert len(seen) == 3

    def test_sizes_of_tiles_are_checked(self):
        codec = make_codec("tiny")
        with pytest.raises(ValueError, match="tile_size 30"):
            codec.enable_tiling(30)
        with pytest.raises(ValueError, match=r"overlap 0\.9"):
            codec.enable_tiling(32, overlap=0.9)


class TestErrors:
    def test_not_a_vae(self):
        with pytest.raises(TypeError, match="not Linear"):
            LatentCodec(nn.Linear(1, 1))

    def test_statistics_of_another_channel_count(self):
        with pytest.raises(ValueError, match="latents_mean has 3 values for 4"):
            LatentCodec(kl(latents_mean=[0.0, 0.0, 0.0], latents_std=STD))


def test_decoding_is_differentiable():
    codec = make_codec("kl")
    latents = torch.randn(1, 4, 4, 4, requires_grad=True)
    codec.decode(latents).square().sum().backward()
    assert latents.grad.abs().sum() > 0


@pytest.mark.slow
def test_stable_diffusion_vae_from_caching_to_pipeline():
    """The full SD architecture (84 M parameters): moments as a cache keeps them, two training steps, one image."""
    torch.manual_seed(0)
    vae = make_kl_vae(128, 256, 512, 512, norm_num_groups=32, layers_per_block=2, sample_size=256)
    codec = LatentCodec(vae)
    assert (codec.compression, codec.latent_size(256, 256)) == (8, (32, 32))
    mean, std = codec.encode_moments(make_images(256, 256))
    model = IPTV2Transformer2DModel(
        sample_size=32, num_class_embeds=3, channels=16, layers_per_stage=(1, 1, 1), grid_stride=(4, 2)
    )
    scheduler = DiffusionObjective.make_scheduler("v_prediction")
    objective = DiffusionObjective(scheduler)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(2, *mean.shape, generator=generator)
        timesteps = objective.sample_timesteps(torch.rand(2, generator=generator))
        loss = objective.loss(model, mean + std * noise[0], noise[1], timesteps, torch.tensor([0, 1])).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    pipe = IPTV2Pipeline(model.eval(), vae, scheduler)
    assert pipe(1, num_inference_steps=2).images[0].size == (256, 256)
