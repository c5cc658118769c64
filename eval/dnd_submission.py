"""Denoise the sRGB crops of the Darmstadt Noise Dataset (DND) and write submission files for its server.

    pip install h5py                                   # DND's files are HDF5
    python eval/dnd_submission.py --data dnd_2017 --model assets/iptv2-denoise-color --output runs/dnd

The script writes 0001_01.mat to 0050_20.mat (3 GB) and collects them in bundled/0001.mat to bundled/0050.mat (another
3 GB). Submit the folder "bundled". Run the same command to continue after an interruption. The script reports no PSNR,
because only the server has the clean photographs.
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

import torch

from iptv2_diffusion.data.own_folder import OwnFolder
from iptv2_diffusion.data.real_noise import DND
from iptv2_diffusion.evaluation.dnd_files import bundle, crop_path, write_crop
from iptv2_diffusion.files import user_path
from iptv2_diffusion.training.errors import UserError, loading, run_main, user_errors


def main(argv: list[str] | None = None) -> int:
    """Denoise the missing crops and bundle all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=user_path, required=True, help="folder of the data set, dnd_2017")
    parser.add_argument("--model", required=True, type=os.path.expanduser, help="folder of a restoration pipeline")
    parser.add_argument(
        "--output", type=user_path, default=Path("runs/dnd"), help="folder for the denoised crops [runs/dnd]"
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
    if options.num_threads is not None:
        if options.num_threads < 1:
            parser.error(f"--num_threads is {options.num_threads}; it must be at least 1")
        torch.set_num_threads(options.num_threads)
    with user_errors(OSError, ValueError, ImportError):
        data = DND(options.data)
        folder = OwnFolder.claim(options.output, "a submission to DND", earlier=made_before_records)
        denoise(data, missing(data, folder), options, folder)
        print(f"submit the {len(data)} files of {bundle(data, folder)}")
    return 0


def made_before_records(folder: Path) -> list[str] | None:
    """Return the files that a version without records wrote; None if the folder is something else."""
    names = [path.name for path in folder.iterdir() if re.fullmatch(r"\d{4}_\d{2}\.mat", path.name)]
    bundles = [path.name for path in (folder / "bundled").glob("*") if re.fullmatch(r"\d{4}\.mat", path.name)]
    return [*names, *(f"bundled/{name}" for name in bundles)] if names else None


def missing(data: DND, folder: OwnFolder) -> dict[int, list[int]]:
    """Return photograph -> missing crops; both count from 0."""
    crops = {
        index: [crop for crop in range(len(boxes)) if not folder.holds(crop_path(folder.folder, index, crop).name)]
        for index, boxes in enumerate(data.boxes)
    }
    return {index: numbers for index, numbers in crops.items() if numbers}


def denoise(data: DND, todo: dict[int, list[int]], options: argparse.Namespace, folder: OwnFolder) -> None:
    """Denoise the crops and write each as soon as it is ready."""
    from iptv2_diffusion import IPTV2RestorationPipeline

    with loading(options.model):
        pipeline = IPTV2RestorationPipeline.from_pretrained(options.model)
    with user_errors(RuntimeError, AssertionError):  # no such device
        pipeline.to(options.device)
    pipeline.set_progress_bar_config(disable=True)
    takes_sigma = pipeline.model.config.sigma_conditioning is not None
    for index, numbers in todo.items():
        crops = data.crops(index)
        for crop in numbers:
            sigma = float(data.sigmas[index][crop]) if takes_sigma and options.sigma == "given" else None
            result = pipeline(crops[crop], sigma=sigma, self_ensemble=options.self_ensemble, output_type="np")
            path = crop_path(options.output, index, crop)
            if folder.is_foreign(path.name):
                raise UserError(f"{path} was not made here; move it away, or choose another --output")
            write_crop(options.output, index, crop, result.images[0])
            folder.record(path.name, path.stat().st_size)
        print(f"[{index + 1}/{len(data)}] {len(numbers)} crops", flush=True)


if __name__ == "__main__":
    run_main(main)
