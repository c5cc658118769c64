"""Compute FID and related metrics of IPT-V2 and DiT pipelines: generate images (or reuse them), score, tabulate, plot.

    iptv2-fid --config benchmark/emoji64                                         (one process)
    accelerate launch eval/fid_benchmark.py --config configs/benchmark/emoji64.yaml     (in a clone)

Every entry of `models` is a pipeline with its own options. The other options are defaults for all entries. The command
writes to output_dir: a folder of images per entry, results.json (all settings that determine the metrics), results.md
and fid.png.
"""

from __future__ import annotations

from iptv2_diffusion.evaluation.fid_options import BenchmarkConfig
from iptv2_diffusion.training.errors import run_main
from iptv2_diffusion.training.parsing import parse_config

EXAMPLES = """
examples:
  the shipped models    accelerate launch eval/fid_benchmark.py --config configs/benchmark/emoji64.yaml
  DiT's protocol        accelerate launch --multi_gpu --num_processes 8 eval/fid_benchmark.py \\
                          --config configs/benchmark/imagenet256.yaml --reference VIRTUAL_imagenet256_labeled.npz
  one pipeline          ... --pipeline facebook/DiT-XL-2-256 --scheduler ddpm --reference my_images --resolution 256
"""


def main(argv: list[str] | None = None) -> int:
    """Parse the options, then run."""
    config = parse_config(BenchmarkConfig, argv, description=__doc__, examples=EXAMPLES)
    from iptv2_diffusion.evaluation.fid_benchmark import run_benchmark  # late: torch takes seconds to import

    return run_benchmark(config)


def run() -> None:
    """Run the console script."""
    run_main(main)


if __name__ == "__main__":
    run()
