"""iptv2-convert: convert U-DiT's public weights to a pipeline folder.

    iptv2-convert udit U-DiT-L-400k.pt udit-l --vae stabilityai/sd-vae-ft-ema

OUT becomes a folder that `IPTV2Pipeline.from_pretrained` loads. It contains the denoiser, the VAE, DDPM with DiT's
noise schedule, and the names of ImageNet's classes. Reading the checkpoint runs no code from it. Besides the weights,
the only pickled object allowed is an `argparse.Namespace`.
"""

from __future__ import annotations

import argparse
import os
import pickle
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iptv2_diffusion.completion import complete
from iptv2_diffusion.files import printable, user_path
from iptv2_diffusion.messages import one_line

from .command_line import CommandError, run_command

if TYPE_CHECKING:
    from torch import Tensor

    from .pipeline_iptv2 import IPTV2Pipeline

IMAGE_SIZE = 256  # image size of the published checkpoints in pixels, if the file does not state it


def run() -> None:
    """The console script."""
    run_command(main, "stopped; nothing was written")


def main(argv: Sequence[str]) -> int:
    """Convert a checkpoint; returns 0."""
    arguments = parse(argv)
    out, shown = arguments.output, printable(arguments.output)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CommandError(f"{shown} exists and is not an empty folder; choose another OUT")
    weights, image_size = read_checkpoint(arguments.checkpoint)
    pipeline = convert(arguments, weights, arguments.resolution or image_size or IMAGE_SIZE)
    write(pipeline, out)
    transformer = pipeline.transformer
    print(
        f"{shown}: {sum(p.numel() for p in transformer.parameters()):,} parameters, "
        f"{'fused' if transformer.config.fused else 'trainable'} form, {pipeline.num_classes} classes, latents "
        f"{transformer.config.in_channels}x{transformer.config.sample_size}x{transformer.config.sample_size}"
    )
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("iptv2-convert", description=__doc__, formatter_class=form)
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    udit = kinds.add_parser("udit", help="U-DiT (arXiv 2405.02730), a .pt file of its code", formatter_class=form)
    udit.add_argument(
        "checkpoint", type=user_path, metavar="CHECKPOINT", help="the .pt file; its `ema` weights are used"
    )
    udit.add_argument("output", type=user_path, metavar="OUT", help="new or empty folder for the pipeline")
    udit.add_argument(
        "--vae",
        required=True,
        type=os.path.expanduser,
        help="folder or Hub name of the VAE that it was trained with, such as stabilityai/sd-vae-ft-ema",
    )
    udit.add_argument("--vae-subfolder", help="subfolder of the VAE, such as `vae` in a pipeline")
    udit.add_argument(
        "--resolution", type=int, help=f"image size in pixels [the size that the file states, or {IMAGE_SIZE}]"
    )
    udit.add_argument(
        "--kernels",
        choices=("auto", "branches", "merged"),
        default="auto",
        help="contents of the 5x5 kernels, which U-DiT's eval() merges in place; auto: decide by their values [auto]",
    )
    udit.add_argument(
        "--fuse", action="store_true", help="write the deployed form, which is smaller and cannot be trained"
    )
    complete(parser)
    arguments = parser.parse_args(argv)
    if arguments.resolution is not None and arguments.resolution < 1:
        parser.error(f"--resolution is {arguments.resolution}; it must be at least 1")
    return arguments


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], int | None]:
    """Return the EMA weights of a .pt file, and its image size in pixels if it states one.

    A file that contains only weights, without `ema`, is used as it is.
    """
    import torch  # late: it takes seconds to import

    shown = printable(path)
    if not path.is_file():
        raise CommandError(f"{shown} is not a file; give the .pt file of a checkpoint")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        reason = one_line(error)
        if "GLOBAL" in reason or "nsupported" in reason:
            name = reason.partition("GLOBAL ")[2].split(" ")[0] or "code"
            raise CommandError(
                f"{shown} contains {name} in addition to the weights; for safety, it is not loaded"
            ) from error
        raise CommandError(f"{shown} is not a checkpoint of torch: {reason[:200]}") from error
    except (RuntimeError, ValueError, OSError, EOFError, KeyError) as error:  # from torch, for a bad file
        reason = one_line(error, 200)
        raise CommandError(f"{shown} is not a complete checkpoint of torch ({reason}); download it again") from error
    if not isinstance(content, dict):
        raise CommandError(f"{shown} holds {type(content).__name__}, not a dictionary of weights")
    weights = content.get("ema", content)
    named = isinstance(weights, dict) and all(
        isinstance(key, str) and isinstance(value, torch.Tensor) and value.layout == torch.strided
        for key, value in weights.items()
    )
    if not named:
        raise CommandError(
            f"{shown} has no `ema`, but {', '.join(sorted(map(str, content))[:5])}; give a checkpoint of U-DiT's "
            "training"
        )
    size = getattr(content.get("args"), "image_size", None)
    return weights, size if isinstance(size, int) and not isinstance(size, bool) else None


def convert(arguments: argparse.Namespace, weights: dict[str, Tensor], resolution: int) -> IPTV2Pipeline:
    """Make the pipeline of a U-DiT, its VAE, DiT's noise schedule and ImageNet's classes."""
    from iptv2_diffusion.imagenet_classes import imagenet_id2label  # late: torch and diffusers take seconds
    from iptv2_diffusion.latents import LatentCodec
    from iptv2_diffusion.models.loading import load_vae
    from iptv2_diffusion.models.udit_weights import convert_udit
    from iptv2_diffusion.objectives import DiffusionObjective

    from .pipeline_iptv2 import IPTV2Pipeline

    try:
        vae = load_vae(arguments.vae, arguments.vae_subfolder)
    except Exception as error:  # from diffusers and its libraries, for any content of the folder
        local = "" if Path(arguments.vae).exists() else "no such folder, and from the Hub: "
        raise CommandError(f"cannot load the VAE {arguments.vae}: {local}{one_line(error, 500)}") from error
    try:
        sample_size, _ = LatentCodec(vae).latent_size(resolution, resolution)
        model = convert_udit(
            weights, printable(arguments.checkpoint), sample_size=sample_size, kernels=arguments.kernels
        )
        model = model.fuse() if arguments.fuse else model
        channels, out_channels = model.config.in_channels, model.config.out_channels
        scheduler = DiffusionObjective.make_scheduler("epsilon", learned_variance=out_channels == 2 * channels)
        names = imagenet_id2label()
        id2label = names if model.config.num_class_embeds == len(names) else None
        return IPTV2Pipeline(model, vae, scheduler, id2label=id2label)
    except ValueError as error:
        raise CommandError(one_line(error).replace("choose kernels:", "choose --kernels")) from error


def write(pipeline: IPTV2Pipeline, out: Path) -> None:
    """Write the folder completely or not at all."""
    scratch = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".tmp-", dir=out.parent))
        pipeline.save_pretrained(scratch / "pipeline")
        (scratch / "pipeline").replace(out)
    except OSError as error:
        raise CommandError(f"cannot write to {printable(out)}: {error.strerror or error}") from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
