"""Model cards of a denoiser's pipeline and of its adapter."""

from __future__ import annotations

from pathlib import Path

from iptv2_diffusion import IPTV2Pipeline
from iptv2_diffusion.recipes.latent_diffusion.config import LDMConfig
from iptv2_diffusion.training.model_card import CardContents, last_metrics, of_adapter

SHOWN_CLASSES = 10


def denoiser_card(config: LDMConfig, folder: Path, pipeline: IPTV2Pipeline, repository: str | None) -> CardContents:
    """Return the contents of the pipeline's card.

    Args:
        config: configuration of the run.
        folder: folder of the pipeline in the run's folder, which has samples.png.
        pipeline: the saved pipeline.
        repository: name on the Hub; None for the folder.
    """
    names = list(pipeline.labels)
    shown = ", ".join(names[:SHOWN_CLASSES]) + (", …" if len(names) > SHOWN_CLASSES else "")
    what = f"images of {pipeline.num_classes} classes" if pipeline.num_classes else "images"
    height, width = config.size
    return CardContents(
        repository=repository,
        summary=f"A latent-diffusion pipeline that draws {what} at {height}×{width} pixels with an "
        f"`{type(pipeline.transformer).__name__}`. Training target: {config.objective}."
        + (f" Classes: {shown}." if names else ""),
        task="unconditional-image-generation",
        tags=("latent-diffusion", *(["class-conditional-image-generation"] if pipeline.num_classes else [])),
        usage=usage(config, pipeline, str(repository or folder)),
        metrics=last_metrics(folder.parent, "heldout_loss|kid"),
        picture=folder.parent / "samples.png",
        caption=f"Samples{', one row per class' if pipeline.num_classes else ''}. Guidance scale "
        f"{config.guidance_scale:g}, {config.sample_steps} steps. The samples are not cherry-picked.",
        base_model=config.model,
    )


def adapter_card(config: LDMConfig, folder: Path, pipeline: IPTV2Pipeline, repository: str | None) -> CardContents:
    """Return the contents of the adapter's card. The arguments are those of `denoiser_card`."""
    card = denoiser_card(config, folder, pipeline, repository)
    code = usage(config, pipeline, config.model, adapter=str(repository or folder))
    return of_adapter(card, config.lora_rank or 0, config.model, code)


def usage(config: LDMConfig, pipeline: IPTV2Pipeline, name: str, adapter: str | None = None) -> str:
    """Return Python code that draws an image with the pipeline `name` and, if given, an adapter."""
    label = f"{next(iter(pipeline.labels))!r}, " if pipeline.labels else ""
    load = [f"pipe.load_lora_weights({adapter!r})"] if adapter else []
    lines = [
        "import torch",
        "from iptv2_diffusion import IPTV2Pipeline",
        "",
        f"pipe = IPTV2Pipeline.from_pretrained({name!r})",
        *load,
        "generator = torch.Generator().manual_seed(0)",
        f"image = pipe({label}guidance_scale={config.guidance_scale:g}, generator=generator).images[0]",
    ]
    return "\n".join(lines)
