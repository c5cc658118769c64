"""A reproducible folder of generated images, which an interrupted run leaves usable.

Images are written atomically: an interrupted run leaves only complete images, and the same command samples the rest.
"""

from __future__ import annotations

import json
import os
import re
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from iptv2_diffusion.data.own_folder import OwnFolder
from iptv2_diffusion.training.checkpoint import differing_fields
from iptv2_diffusion.training.errors import ConfigError, UserError, user_errors
from iptv2_diffusion.training.logging import read_metrics

RECIPE = "generation.json"
IMAGES = "images"
KIND = "generated images"
_TEMPORARY = re.compile(r"\.tmp-(\d{6}|([0-9a-f]{8}-)?\d+-[0-9a-f]{8})\.png")  # of this version and of earlier ones
_PNG_END = b"IEND\xaeB`\x82"  # last chunk of a complete PNG file


class SampleFolder:
    """Folder with images/000000.png …, generation.json (the recipe) and seconds-*.jsonl (the sampling times).

    The folder has a record of its images (`own_folder.py`). Files that are not in the record are neither counted nor
    deleted.

    Args:
        folder: path of the folder.
        process: index of this process.
        size: (height, width) that the images must have; None to accept any size.
    """

    def __init__(self, folder: str | Path, process: int = 0, size: tuple[int, int] | None = None) -> None:
        self.folder, self.process, self.size = Path(folder), process, size
        self.refresh()

    def refresh(self) -> None:
        """Read the records of all processes again."""
        self.own = OwnFolder(self.folder, KIND, self.process)

    @staticmethod
    def name(index: int) -> str:
        """Return the relative name of image `index`."""
        return f"{IMAGES}/{index:06d}.png"

    def path(self, index: int) -> Path:
        """Return the path of image `index`."""
        return self.folder / self.name(index)

    def has(self, index: int) -> bool:
        """Return whether image `index` is recorded and its file is complete (a machine crash can truncate it)."""
        if not self.own.holds(self.name(index)):
            return False
        try:
            with self.path(index).open("rb") as file:
                width, height, depth, colours = struct.unpack(">16xIIBB", file.read(26))
                file.seek(-len(_PNG_END), os.SEEK_END)
                whole = file.read() == _PNG_END and (depth, colours) == (8, 2)  # RGB of 8 bits
        except (OSError, struct.error):
            return False
        return whole and self.size in (None, (height, width))

    def about(self) -> dict[str, Any]:
        """Read generation.json: pipeline, versions and recipe; empty if the file does not exist.

        Raises:
            UserError: the file is not JSON, or not ours.
        """
        try:
            about = json.loads((self.folder / RECIPE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise UserError(f"{self.folder / RECIPE} is not JSON: delete it, or use --overwrite") from error
        if not isinstance(about, dict) or not isinstance(about.get("recipe"), dict):
            raise UserError(f"{self.folder / RECIPE} is not from this script: delete it, or choose another folder")
        return about

    def check(self, recipe: dict[str, Any]) -> None:
        """Raise a `ConfigError` if the folder has images of another recipe."""
        saved = self.about()
        changed = differing_fields(saved["recipe"], recipe) if saved else []
        if changed:
            changes = "; ".join(changed)
            raise ConfigError(
                f"{self.folder} has images of another recipe: {changes}; use another folder, or --overwrite"
            )

    def prepare(self, about: dict[str, Any], overwrite: bool) -> None:
        """Create the folder, remove temporary files of an interrupted run, and write generation.json.

        Raises:
            ForeignFolderError: a ValueError; the folder has files of something else.
        """
        self.own = OwnFolder.claim(self.folder, KIND, process=self.process, earlier=_made_before_records)
        (self.folder / IMAGES).mkdir(parents=True, exist_ok=True)
        for path in (self.folder / IMAGES).iterdir():
            if _TEMPORARY.fullmatch(path.name):
                path.unlink()
        if overwrite:
            self.own.delete(lambda name: name != RECIPE)
        with self.own.writing(RECIPE) as temporary:
            temporary.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")

    def write(self, index: int, image: np.ndarray) -> None:
        """Write an image (H, W, 3) uint8 atomically."""
        with self.own.writing(self.name(index), durable=False) as temporary:  # `has` detects truncated files
            Image.fromarray(image).save(temporary, format="PNG")

    def note_seconds(self, process: int, images: int, seconds: float) -> None:
        """Append the sampling time of a group of images."""
        self.own.record(f"seconds-{process}.jsonl", None)
        with (self.folder / f"seconds-{process}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"images": images, "seconds": round(seconds, 4)}) + "\n")

    def seconds_per_image(self) -> float | None:
        """Return the mean seconds per image of one process over all groups so far; None before the first group."""
        rows = [row for path in self.folder.glob("seconds-*.jsonl") for row in read_metrics(path)]
        images = sum(row["images"] for row in rows)
        return sum(row["seconds"] for row in rows) / images if images else None

    def batches(self, count: int, batch_size: int = 64) -> Iterator[Tensor]:
        """Iterate over the first `count` images in batches (N, 3, H, W) uint8."""
        for start in range(0, count, batch_size):
            with user_errors(OSError):
                images = [np.asarray(Image.open(self.path(i))) for i in range(start, min(start + batch_size, count))]
            yield torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)

    def write_npz(self, labels: list[int] | None, count: int) -> Path:
        """Write ADM's .npz file: arr_0 (N, H, W, 3) uint8 and arr_1 (N,) int64 labels.

        Images are written one by one, so that memory does not grow with N.
        """
        height, width = np.asarray(Image.open(self.path(0))).shape[:2]
        path = self.folder / f"samples_{count}x{height}x{width}x3.npz"
        with (
            user_errors(OSError, ValueError),
            self.own.writing(path.name) as temporary,
            zipfile.ZipFile(temporary, "w", allowZip64=True) as archive,
        ):
            with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                header = {"descr": "|u1", "fortran_order": False, "shape": (count, height, width, 3)}
                np.lib.format.write_array_header_1_0(file, header)
                for index in range(count):
                    pixels = np.asarray(Image.open(self.path(index)))
                    if pixels.shape != (height, width, 3) or pixels.dtype != np.uint8:
                        raise ValueError(f"{self.path(index)} is {pixels.shape}, not {height}x{width} pixels of RGB")
                    file.write(pixels.tobytes())
            if labels is not None:
                with archive.open("arr_1.npy", "w") as file:
                    np.lib.format.write_array(file, np.asarray(labels, dtype=np.int64))
        return path


def _made_before_records(folder: Path) -> list[str] | None:
    """Return the files of a folder that a version without records made; None if the folder is something else."""
    try:
        about = json.loads((folder / RECIPE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(about, dict) or not {"recipe", "pipeline", "versions"} <= set(about):
        return None
    images = [f"{IMAGES}/{path.name}" for path in folder.glob(f"{IMAGES}/*.png") if re.fullmatch(r"\d{6,}", path.stem)]
    others = [p.name for p in folder.iterdir() if re.fullmatch(r"seconds-\d+\.jsonl|samples_[\dx]+\.npz", p.name)]
    return [RECIPE, *images, *others]
