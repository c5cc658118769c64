"""Reference images for FID and other distances: any data set, or ADM's .npz file with its stored statistics."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from iptv2_diffusion.data.images import ImageTensors, load_image_dataset
from iptv2_diffusion.evaluation.generation_metrics import Statistics
from iptv2_diffusion.files import file_sha256, user_path

__all__ = ["ReferenceImages"]

_ADM_STATISTICS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


class ReferenceImages:
    """Real images and, if the file stores them, Inception's statistics of a larger set.

    ADM's `VIRTUAL_imagenet256_labeled.npz` contains 10,000 images and the statistics of the whole training set. FID and
    sFID then use the stored statistics; precision, recall and KID use the images.

    Args:
        source: source of `load_image_dataset`, or an .npz file with arr_0 (N, H, W, 3) uint8.
        split: split of a data set.
        size: size of ADM's centre crop, which a data set's images receive.

    Attributes:
        count: number N of images.
        stored: statistics by output of `inception_v3` ("pool", "spatial"); empty for a data set.
        preparation: description of the preprocessing.

    Raises:
        FileNotFoundError, ValueError: the source does not exist or contains no images.
    """

    def __init__(self, source: str, *, split: str = "train", size: int = 256) -> None:
        self.source, self.stored = source, {}
        self._array: np.ndarray | None = None
        if source.endswith(".npz"):
            self._open_npz(user_path(source))
            self.count, self.preparation = len(self._array), "as stored"
        else:
            self._images = ImageTensors(load_image_dataset(source, split=split), size=size)
            self._indices = self._images.valid_indices()
            self.count, self.preparation = len(self._indices), f"ADM centre crop to {size}"

    def _open_npz(self, path: Path) -> None:
        if path.is_file() and not zipfile.is_zipfile(path):
            raise ValueError(f"{path} is damaged or is not an .npz file; download it again")
        try:
            with np.load(path, allow_pickle=False) as archive:
                held = list(archive)
                for head, names in _ADM_STATISTICS.items():
                    if all(name in held for name in names):
                        parts = (torch.from_numpy(archive[n].astype(np.float64)) for n in names)
                        self.stored[head] = Statistics(*parts)
                self._array = archive["arr_0"] if "arr_0" in held else None
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise ValueError(f"{path} is damaged: {error}; download it again") from error
        if self._array is None:
            raise ValueError(f"{path} holds {', '.join(held)}, but no images (arr_0)")
        if self._array.dtype != np.uint8 or self._array.ndim != 4 or self._array.shape[3] != 3:
            raise ValueError(f"{path}: arr_0 is {self._array.dtype} {self._array.shape}, not uint8 (N, H, W, 3)")

    def batches(self, size: int = 64) -> Iterator[Tensor]:
        """Iterate over all images in batches of (size, 3, H, W) uint8; the last batch may be smaller."""
        for start in range(0, self.count, size):
            stop = min(start + size, self.count)
            if self._array is not None:
                yield torch.from_numpy(self._array[start:stop]).permute(0, 3, 1, 2)
            else:
                yield self._images.pixels(self._indices[start:stop])

    def sha256(self) -> str:
        """SHA-256 of the .npz file, or of the cropped pixels of a data set."""
        if self._array is not None:
            return file_sha256(user_path(self.source))
        digest = hashlib.sha256()
        for batch in self.batches():
            digest.update(batch.numpy().tobytes())
        return digest.hexdigest()
