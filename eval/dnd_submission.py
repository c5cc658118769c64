"""Denoise the crops of the Darmstadt Noise Dataset and write the files that its server takes (sRGB).

    pip install h5py                                   # DND's files are HDF5
    python eval/dnd_submission.py --data dnd_2017 --model assets/iptv2-denoise-color --output runs/dnd

Writes 0001_01.mat ... 0050_20.mat, 3 GB in all, and from them bundled/0001.mat ... 0050.mat, as much again: submit the
folder "bundled". The same command goes on after an interruption. There is no PSNR: the server alone has the clean
photographs.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from iptv2_diffusion.data.real_noise import DND
from iptv2_diffusion.evaluation.dnd_files import bundle, crop_path, write_crop
from iptv2_diffusion.training.errors import run_main, user_errors


def main(argv: list[str] | None = None) -> int:
    """Denoise what is missing, then bundle."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data set, dnd_2017")
    parser.add_argument("--model", required=True, help="folder of a restoration pipeline")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/dnd"), help="folder for the denoised crops [runs/dnd]"
    )
    parser.add_argument(
        "--sigma",
        choices=("given", "estimated"),
        default="given",
        help="noise level of each crop, for a model that takes it: from info.mat, or estimated by the pipeline [given]",
    )
    parser.add_argument(
        "--self_ensemble", action="store_true", help="use the mean over 8 flips and rotations; 8 x slower"
    )
    parser.add_argument("--device", default="cpu", help="device to run on: cpu, cuda or mps [cpu]")
    parser.add_argument("--num_threads", type=int, help="CPU threads [the choice of torch]")
    options = parser.parse_args(argv)
    if options.num_threads:
        torch.set_num_threads(options.num_threads)
    with user_errors(OSError, ValueError, ImportError):
        data = DND(options.data)
        options.output.mkdir(parents=True, exist_ok=True)
        denoise(data, missing(data, options.output), options)
        print(f"submit the {len(data)} files of {bundle(data, options.output)}")
    return 0


def missing(data: DND, output: Path) -> dict[int, list[int]]:
    """Photograph -> its crops that are not written yet, both counted from 0."""
    crops = {
        index: [crop for crop in range(len(boxes)) if not crop_path(output, index, crop).is_file()]
        for index, boxes in enumerate(data.boxes)
    }
    return {index: numbers for index, numbers in crops.items() if numbers}


def denoise(data: DND, todo: dict[int, list[int]], options: argparse.Namespace) -> None:
    """Run the model on the crops and write each at once."""
    from iptv2_diffusion import IPTV2RestorationPipeline

    with user_errors(RuntimeError, AssertionError):  # no such device
        pipeline = IPTV2RestorationPipeline.from_pretrained(options.model).to(options.device)
    pipeline.set_progress_bar_config(disable=True)
    takes_sigma = pipeline.model.config.sigma_conditioning is not None
    for index, numbers in todo.items():
        crops = data.crops(index)
        for crop in numbers:
            sigma = float(data.sigmas[index][crop]) if takes_sigma and options.sigma == "given" else None
            result = pipeline(crops[crop], sigma=sigma, self_ensemble=options.self_ensemble, output_type="np")
            write_crop(options.output, index, crop, result.images[0])
        print(f"[{index + 1}/{len(data)}] {len(numbers)} crops", flush=True)


if __name__ == "__main__":
    run_main(main)
