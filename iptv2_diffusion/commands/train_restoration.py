"""Train an image restorer on any folder of photographs, or on pairs of degraded and clean images.

    accelerate launch train/train_restoration.py --config configs/restoration/denoise-color-nano.yaml

Patches are degraded during training (noise, blur, rain, JPEG) or come in pairs from a data set's folders. An
interrupted run resumes exactly. The result, output_dir/pipeline, loads with `IPTV2RestorationPipeline.from_pretrained`.
"""

from __future__ import annotations

from iptv2_diffusion.recipes.restoration.config import RestorationConfig
from iptv2_diffusion.training.errors import run_main
from iptv2_diffusion.training.parsing import parse_config

EXAMPLES = """
examples, where ... is accelerate launch train/train_restoration.py, and * needs python data/photographs/fetch.py first:
  a small denoiser, 24 minutes * ... --config configs/restoration/denoise-color-nano.yaml
  the shipped denoiser, a GPU *  ... --config configs/restoration/denoise-color-xs.yaml
  your photographs, blurred      ... --data my_photos --degradations motion_blur,noise --noise 0,5
  your pairs                     ... --layout folders --data my_pairs --model_overrides '{"sigma_conditioning": null}'
                                 (my_pairs/input/*, my_pairs/target/*)
  GoPro                          ... --config configs/restoration/pairs-b.yaml --data GoPro
  start from shipped weights *   ... --model assets/iptv2-denoise-color --output_dir runs/more
  an adapter for shipped weights ... --model assets/iptv2-denoise-color --data my_photos --lora_rank 4
  start from a generator *       ... --config configs/restoration/denoise-color-emoji64.yaml
  held-out PSNR of your data     ... --data my_photos --heldout my_heldout_photos
  upload the result to the Hub   any of these with --license mit --push_to_hub my-name/my-restorer
  try every stage in seconds     any of these with --dry_run

The same command resumes: it continues from the newest checkpoint in output_dir, bit for bit.
"""


def main(argv: list[str] | None = None) -> int:
    """Parse the options, then run."""
    config = parse_config(RestorationConfig, argv, description=__doc__, examples=EXAMPLES)
    from iptv2_diffusion.recipes.restoration.run import run  # late: torch takes seconds to import

    return run(config)


def run() -> None:
    """Run the console script."""
    run_main(main)


if __name__ == "__main__":
    run()
