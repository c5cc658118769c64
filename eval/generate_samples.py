"""Generate thousands of images with an IPT-V2 or DiT pipeline on any number of processes.

    accelerate launch eval/generate_samples.py --pipeline assets/iptv2-emoji64 --num_samples 1000 \\
        --num_inference_steps 25 --guidance_scale 1.5 --output_dir runs/samples

The output folder has images/000000.png …, generation.json (all settings that determine the images) and
samples_NxHxWx3.npz for ADM's evaluator. Run the same command to continue after an interruption.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from iptv2_diffusion.evaluation.generation_options import GenerationConfig
from iptv2_diffusion.training.errors import UserError, run_main
from iptv2_diffusion.training.options import option
from iptv2_diffusion.training.parsing import parse_config

EXAMPLES = """
examples:
  DiT's protocol on 8 GPUs    accelerate launch --multi_gpu --num_processes 8 eval/generate_samples.py \\
                                --pipeline facebook/DiT-XL-2-256 --scheduler ddpm --batch_size 128
  2 processes on a CPU        ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 ...
  some classes                ... --labels flags,food_drink
  without labels              ... --labels none

`accelerate launch --cpu --num_processes 2` starts a single process without a warning; use the command above instead.
--num_samples may be larger when you continue.
"""


@dataclass(frozen=True, kw_only=True)
class SamplesConfig(GenerationConfig):
    """Options of the images and their folder."""

    output_dir: str = option("runs/samples", "folder for the images and their description", group="results", free=True)
    npz: bool = option(True, "also write samples_NxHxWx3.npz for ADM's evaluator", group="results", free=True)


def main(argv: list[str] | None = None) -> int:
    """Generate the missing images, check that the folder is complete, write the .npz file."""
    config = parse_config(SamplesConfig, argv, description=__doc__, examples=EXAMPLES)
    from iptv2_diffusion.evaluation.sampling import generate, label_of, start_accelerator  # late: torch takes seconds

    accelerator = start_accelerator(config.num_threads)
    folder = generate(config, accelerator, config.output_dir)
    if accelerator.is_main_process:
        absent = [index for index in range(config.num_samples) if not folder.has(index)]
        if absent:
            raise UserError(
                f"{len(absent)} images are missing, the first is {folder.path(absent[0])}; run the same command again"
            )
        seconds = folder.seconds_per_image()
        print(f"{config.num_samples} images in {folder.folder}/images, {seconds:.3f} s each on one process")
        if config.npz:
            recipe = folder.about()["recipe"]
            drawn = replace(config, labels=recipe["labels"])  # class numbers where names were given
            labels = [label_of(drawn, index, recipe["num_classes"]) for index in range(config.num_samples)]
            print(f"wrote {folder.write_npz(None if labels[0] is None else labels, config.num_samples)}")
    accelerator.end_training()
    return 0


if __name__ == "__main__":
    run_main(main)
