"""Pipelines small enough to draw hundreds of images in a test: random weights, 8×8 latents, 16×16 images, 3 classes."""

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
)
from kl_vae import make_kl_vae

from iptv2_diffusion import IPTV2Pipeline, create_model

KINDS = ("iptv2", "unconditional", "dit", "diffusers-dit")


def save_pipeline(folder, kind="iptv2"):
    """Save a pipeline of one of KINDS; returns the folder as text."""
    torch.manual_seed(0)
    vae = make_kl_vae(4, 4)
    if kind in ("iptv2", "unconditional"):
        classes = {"num_class_embeds": 3 if kind == "iptv2" else None}
        model = create_model("tiny", sample_size=8, in_channels=4, out_channels=4, **classes)
        pipeline = IPTV2Pipeline(randomise(model), vae, FlowMatchEulerDiscreteScheduler())
    else:
        dit = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "sample_size": 8, "in_channels": 4}
        if kind == "dit":  # as configs/imagenet256.yaml trains a DiT: learned variance, sampled by DDPM
            model = DiTTransformer2DModel(**dit, out_channels=8, num_embeds_ada_norm=3)
            scheduler = DDPMScheduler(variance_type="learned_range", clip_sample=False)
            pipeline = IPTV2Pipeline(randomise(model), vae, scheduler, id2label={0: "a", 1: "b", 2: "c"})
        else:  # diffusers' own pipeline uses 1000 as the null label of every model
            model = DiTTransformer2DModel(**dit, out_channels=8, num_embeds_ada_norm=1000)
            pipeline = DiTPipeline(randomise(model), vae, DDIMScheduler(clip_sample=False))
    pipeline.save_pretrained(folder)
    return str(folder)


def randomise(model):
    """Make the output depend on latent, time and label; new models return zeros."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()
