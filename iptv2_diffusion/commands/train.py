"""Train a latent-diffusion denoiser, IPT-V2 or DiT, on any folder of images.

    iptv2-train --config emoji64                                   (one process)
    accelerate launch train/train_ldm.py --config configs/emoji64.yaml   (in a clone, any number of processes)
    accelerate launch -m iptv2_diffusion.commands.train --config emoji64 (anywhere)

A VAE encodes the images to latents, once into a cache or in every step. The denoiser learns to remove noise from these
latents. An interrupted run resumes exactly. The result, output_dir/pipeline, loads with
`IPTV2Pipeline.from_pretrained`.
"""

from __future__ import annotations

from iptv2_diffusion.recipes.latent_diffusion.config import LDMConfig
from iptv2_diffusion.training.errors import run_main
from iptv2_diffusion.training.parsing import parse_config

EXAMPLES = """
examples:
  the demo (10 minutes on two cores)   iptv2-train --config emoji64 (a recipe's name, or the path of a YAML file)
  try every stage in a minute          ... --dry_run
  estimate memory, speed and time      ... --plan
  your own photographs, no labels      ... --data my_photos --heldout_split none --resolution 64 --output_dir runs/mine
  labelled: one sub-folder per class   ... --data my_photos (the folders' names become the classes)
  fine-tune on your own classes        iptv2-train --config finetune --model assets/iptv2-emoji64 --data my_photos
  an adapter of about 100 kB           ... --lora_rank 8
  with the card, to the Hub             ... --license mit --push_to_hub my-name/my-model
  another VAE from the Hub             ... --vae stabilityai/sd-vae-ft-ema --resolution 256 --model iptv2-s
  a DiT with the same recipe           ... --model dit-s-2 --output_dir runs/dit
  larger than the disk                 ... --data imagenet-1k --streaming --heldout_split validation
  latents instead of images            ... --config imagenet256 --data imagenet_feature.tar
  8 GPUs in bfloat16                   accelerate launch --multi_gpu --num_processes 8 --mixed_precision bf16 \\
                                         -m iptv2_diffusion.commands.train ...

The same command resumes: it continues from the newest checkpoint in output_dir, bit for bit.
`accelerate launch --quiet` hides its own traceback when a run ends with an error.
A YAML file sets only what differs from the defaults shown here. The command line overrides it.
"""


def main(argv: list[str] | None = None) -> int:
    """Parse the options, then run."""
    config = parse_config(LDMConfig, argv, description=__doc__, examples=EXAMPLES)
    from iptv2_diffusion.recipes.latent_diffusion.run import run  # late: torch takes seconds to import

    return run(config)


def run() -> None:
    """Run the console script."""
    run_main(main)


if __name__ == "__main__":
    run()
