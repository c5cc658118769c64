"""Submission files for the server of the Darmstadt Noise Dataset (DND), in MATLAB's format "v5".

    OUT/0001_01.mat              `Idenoised_crop`, (512, 512, 3) single in [0, 1]
    OUT/bundled/0001.mat         `Idenoised`, a cell of 20 crops, with `israw` and `eval_version`; submit these files

`data/real_noise.py` reads the noisy crops.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from scipy.io import savemat

from iptv2_diffusion.data.matlab_files import read_mat
from iptv2_diffusion.data.own_folder import OwnFolder
from iptv2_diffusion.data.real_noise import DND
from iptv2_diffusion.files import atomic

__all__ = ["bundle", "crop_path", "write_crop"]


def crop_path(output: Path, index: int, crop: int) -> Path:
    """Return the path of a denoised crop. Both numbers count from 0."""
    return output / f"{index + 1:04d}_{crop + 1:02d}.mat"


def write_crop(output: Path, index: int, crop: int, denoised: np.ndarray) -> None:
    """Write a denoised crop (H, W, 3), clipped to [0, 1]."""
    save_mat(crop_path(output, index, crop), {"Idenoised_crop": denoised.clip(0, 1).astype(np.float32)})


def bundle(data: DND, output: OwnFolder) -> Path:
    """Collect the crops of each photograph in one file under output/bundled, the folder to submit.

    Returns:
        The folder.

    Raises:
        OSError: a crop is missing.
        ValueError: the file of a crop is damaged or of another kind, or a file of a bundle was not made here.
    """
    for index, boxes in enumerate(data.boxes):
        cell = np.empty(len(boxes), dtype=object)
        for crop, (top, left, bottom, right) in enumerate(boxes):
            path = crop_path(output.folder, index, crop)
            try:
                cell[crop] = read_mat(path, "Idenoised_crop")
            except ValueError as error:
                raise ValueError(f"{path} is damaged ({error}); delete it and run the same command again") from error
            shape = (bottom - top, right - left, 3)
            if cell[crop].shape != shape or cell[crop].dtype != np.float32:
                raise ValueError(
                    f"{path} holds {cell[crop].shape} of {cell[crop].dtype}, not {tuple(map(int, shape))} of float32; "
                    "delete it and run the same command again"
                )
        contents = {"Idenoised": cell, "israw": False, "eval_version": "1.0"}
        with output.writing(f"bundled/{index + 1:04d}.mat") as temporary:
            savemat(temporary, contents, appendmat=False)
    return output.folder / "bundled"


def save_mat(path: Path, contents: dict) -> None:
    """Write a MATLAB file atomically: to a temporary file first, then renamed."""
    with atomic(path) as temporary:
        savemat(temporary, contents, appendmat=False)
