"""Benchmarks of real noise in MATLAB files: DND, whose server scores submissions, and SIDD's validation blocks.

DND (Plötz & Roth 2017) does not publish the clean photographs. Its server scores 20 crops of 512×512 pixels of each of
50 photographs (`evaluation/dnd_files.py` writes them).

    ROOT/info.mat                `info`, per photograph: `boundingboxes` (20, 4), `sigma_srgb` (20,)   HDF5 ("v7.3")
    ROOT/images_srgb/0001.mat    `InoisySRGB` (H, W, 3) of single in [0, 1]                             HDF5

A box is [top, left, bottom, right], counted from 1, with the last row and column included. MATLAB stores columns first,
so readers of HDF5 see every array transposed. The numbers of photographs and crops are those of info.mat.

SIDD (Abdelhamed et al. 2018), "SIDD Validation Data" and "Ground Truth", sRGB: Validation{Noisy,Gt}BlocksSrgb.mat
("v5"), 32 blocks of 256×256 of each of 40 photographs, uint8 (40, 32, 256, 256, 3) under the file's own name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from iptv2_diffusion.data.matlab_files import read_mat
from iptv2_diffusion.messages import one_line

__all__ = ["DND", "sidd_validation_blocks"]


class DND:
    """The noisy crops of DND.

    Args:
        root: the folder dnd_2017.

    Attributes:
        boxes: per photograph (crops, 4) int: top, left, bottom, right, counted from 0, with the end excluded.
        sigmas: per photograph (crops,), standard deviation of each crop's noise on the 0–255 scale, from info.mat.

    Raises:
        ValueError: the folder has another layout. The message names the file.
        ImportError: the package h5py is missing.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).expanduser()
        path = self.root / "info.mat"

        def read(file) -> tuple[list[np.ndarray], list[np.ndarray]]:
            boxes, sigmas = (
                [np.array(file[reference]) for reference in np.array(file["info"][name]).reshape(-1)]
                for name in ("boundingboxes", "sigma_srgb")
            )
            return [box.T.round().astype(int) - [1, 1, 0, 0] for box in boxes], [s.reshape(-1) * 255 for s in sigmas]

        self.boxes, self.sigmas = read_hdf5(path, read)
        for number, (boxes, sigmas) in enumerate(zip(self.boxes, self.sigmas, strict=True), start=1):
            if boxes.shape != (len(sigmas), 4):
                raise ValueError(f"{path}, photograph {number}: boxes {boxes.shape} and {len(sigmas)} noise levels")

    def __len__(self) -> int:
        """Number of photographs."""
        return len(self.boxes)

    def crops(self, index: int) -> list[np.ndarray]:
        """Return the noisy crops of a photograph, each (H, W, 3) float32 in [0, 1]. `index` counts from 0."""
        path = self.root / "images_srgb" / f"{index + 1:04d}.mat"
        image = read_hdf5(path, lambda file: np.array(file["InoisySRGB"], dtype=np.float32).T)
        for top, left, bottom, right in self.boxes[index]:
            if not (0 <= top < bottom <= image.shape[0] and 0 <= left < right <= image.shape[1]):
                size, box = f"{image.shape[0]}x{image.shape[1]}", (int(top), int(left), int(bottom), int(right))
                raise ValueError(f"{path} is {size} pixels; its box {box} in info.mat is outside the image")
        return [np.ascontiguousarray(image[t:b, left:right]) for t, left, b, right in self.boxes[index]]


def read_hdf5(path: Path, read: Callable):
    """Return `read(file)` of an HDF5 file. Raises a ValueError if it is missing, damaged or has other contents."""
    try:
        import h5py
    except ImportError as error:
        raise ImportError(f"{path} is HDF5; pip install h5py") from error
    if not path.is_file():
        raise ValueError(f"{path} does not exist; it belongs to the layout of DND")
    try:
        with h5py.File(path, "r") as file:
            return read(file)
    except Exception as error:  # h5py raises many types for a damaged file, such as RuntimeError and AttributeError
        reason = one_line(error, 160)
        raise ValueError(f"{path} is not in DND's format: {reason}") from error


def sidd_validation_blocks(root: str | Path) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yield (name, noisy, clean) of each validation block of SIDD. The name "0001_01" is photograph 1, block 1.

    Raises:
        ValueError: a file is missing, damaged, or differs in shape from its counterpart. The message names it.
    """
    blocks = []
    for name in ("ValidationNoisyBlocksSrgb", "ValidationGtBlocksSrgb"):
        path = Path(root).expanduser() / f"{name}.mat"
        if not path.is_file():
            raise ValueError(f"{path} does not exist; it belongs to the layout of SIDD's validation data")
        try:
            blocks.append(read_mat(path, name))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is not in SIDD's format: {one_line(error, 160)}") from error
    noisy, clean = blocks
    if noisy.shape != clean.shape or noisy.ndim != 5 or {noisy.dtype, clean.dtype} != {np.dtype(np.uint8)}:
        raise ValueError(
            f"{root}: noisy blocks {noisy.shape} of {noisy.dtype}, clean ones {clean.shape} of {clean.dtype}; "
            "(photographs, blocks, H, W, 3) of uint8 are expected of both"
        )
    for photograph, block in np.ndindex(noisy.shape[:2]):
        yield f"{photograph + 1:04d}_{block + 1:02d}", noisy[photograph, block], clean[photograph, block]
