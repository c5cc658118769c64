"""Any set of images as tensors: one loader for folders, parquet files and Hub names, one Dataset of (3, H, W) tensors.

`load_image_dataset` brings every source to the same two columns: "image" (undecoded) and, if there are labels, "label".
`ImageTensors` decodes: EXIF orientation → composite on white → ADM centre crop → float32 (3, H, W) in [-1, 1].
Nothing here is random: whoever trains chooses the order and the flips, so that a run can be repeated and resumed.
"""

from __future__ import annotations

import glob
import os
import shlex
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image

from iptv2_diffusion.data.archives import (
    FetchError,
    check_end,
    first_line,
    kind_of_tar,
    list_tar,
    load_nested_tar,
    read_bytes,
)
from iptv2_diffusion.data.draws import generator_for
from iptv2_diffusion.data.image_files import DEFAULT_LIMITS, Limits, as_rgb, from_pillow, read_image_file
from iptv2_diffusion.data.image_folders import Listing, is_of_tools, list_folder, split_of, understand
from iptv2_diffusion.files import user_path

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}
IMAGE_COLUMNS = ("image", "img", "images", "picture")
LABEL_COLUMNS = ("label", "labels", "class", "fine_label", "category", "cls")
FILE_BUILDERS = {".parquet": "parquet", ".tar": "webdataset"}  # what `datasets` reads these files with
MOST_CLASSES = 100_000  # above, numbers are no classes
MIN_CROP = 0.8  # share of the side that a random crop keeps at least, as in ADM
STREAM_SHARDS = 64  # into which loose images are cut when they are streamed: the grain of the shuffling


# ---------------------------------------------------------------------------------------------------------------------
# Loading: every source becomes a datasets.Dataset with "image" (decode=False) and perhaps "label" (ClassLabel)


def load_image_dataset(
    source: str | Path,
    *,
    split: str = "train",
    image_column: str | None = None,
    label_column: str | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    streaming: bool = False,
) -> datasets.Dataset | datasets.IterableDataset:
    """Images, and labels when there are any, from wherever they are.

    `source` is one of: a folder of images (flat = unlabelled; one sub-folder per class = labelled; either may lie under
    one folder per split, such as train/ and test/); a parquet file, a glob of them or a folder with them; a WebDataset
    shard (a tar of KEY.jpg and KEY.cls), a glob or folder of them, which `datasets` copies into its cache; a tar of
    class folders, or of one tar per class, as ImageNet's, read in place; a Hub name. With `streaming` nothing is
    copied: an IterableDataset.
    `split` takes whatever `datasets` takes ("train", "train[:100]"); files that are named one by one, or by a glob, are
    the one split "train", a folder of tars may have a folder per split. The columns are found by their usual names when
    `image_column` and `label_column` are not given; `label_column="ignore"` leaves the labels out.

    Returns a Dataset with "image" (undecoded: {"bytes", "path"}) and, when labelled, "label" (ClassLabel).
    Raises FileNotFoundError for a source that is not there, ValueError for one that is empty, or that has no such split
    or column (the message lists those it has).
    """
    path = user_path(source)
    cache = None if cache_dir is None else os.path.expanduser(cache_dir)
    options: dict[str, Any] = {"cache_dir": cache, "streaming": streaming}
    if path.is_dir():
        listing = list_folder(path, IMAGE_SUFFIXES)
        suffixes = listing.suffixes
        if ".parquet" in suffixes:
            if glob.has_magic(str(path)):  # which `datasets` would take for a pattern
                data = _load_split("parquet", split, shown=str(path), data_dir=glob.escape(str(path)), **options)
            else:
                data = _load_split(str(path), split, **options)
        elif listing.files:
            data = _load_listing(listing, split, str(path), label_column)
        elif ".tar" in suffixes:
            shards, part = _split_folder(path, split, {".tar"})
            return load_image_dataset(
                Path(glob.escape(str(shards))) / "**" / "*.tar",
                split=f"train{part}",
                image_column=image_column,
                label_column=label_column,
                cache_dir=cache_dir,
                streaming=streaming,
            )
        else:
            raise ValueError(
                f"{path}: holds neither images ({' '.join(sorted(IMAGE_SUFFIXES))}) nor parquet files nor tar shards"
            )
    elif path.suffix.lower() in FILE_BUILDERS:
        data = _load_files(path, split, label_column, cache, options)
    elif path.is_file():
        raise ValueError(f"{path}: {_remedy(path)}")
    elif path.is_absolute() or str(source).startswith((".", "~")) or str(source).count("/") > 1 or path.exists():
        raise FileNotFoundError(f"{path}: no such folder or parquet file")
    else:
        data = _load_split(str(source), split, revision=revision, **options)
    data = _standard_columns(data, str(source), image_column, label_column)
    if streaming and isinstance(data, datasets.Dataset):  # of loose files, in the order of their classes
        data = data.shuffle(seed=0).to_iterable_dataset(num_shards=min(STREAM_SHARDS, len(data)))
    return data


def _remedy(path: Path) -> str:
    """What to do with a file that is no data set."""
    suffixes, quoted = "".join(path.suffixes[-2:]).lower(), shlex.quote(str(path))
    if suffixes.endswith(".zip"):
        return f"a zip is not read in place; unpack it by `unzip -d FOLDER {quoted}` and name the folder"
    if suffixes.endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")):
        return f"a compressed tar is not read in place; unpack it by `tar -xf {quoted} -C FOLDER` and name the folder"
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return "a single image is no data set; name its folder"
    return "not a folder, parquet file or tar"


def _load_files(
    path: Path, split: str, label_column: str | None, cache: str | None, options: Mapping[str, Any]
) -> datasets.Dataset | datasets.IterableDataset:
    """Parquet files or tars, named one by one or by a glob; a file that exists is no glob, whatever its name."""
    suffix = path.suffix.lower()
    files = [str(path)] if path.is_file() else sorted(glob.glob(str(path), recursive=True))
    if not files:
        raise FileNotFoundError(f"{path}: no such {suffix[1:]} file; give a file, a glob or a folder")
    name, part = _name_and_part(split)
    if name != "train" and suffix == ".parquet":
        raise _no_other_split(path, name)
    if suffix == ".tar":
        for file in files:
            check_end(Path(file))
        kind = kind_of_tar(Path(files[0]), IMAGE_SUFFIXES)
        if kind == "folders":
            listing = Listing()
            for file in files:
                list_tar(Path(file), listing, IMAGE_SUFFIXES)
            return _load_listing(listing, split, str(path), label_column)
        if name != "train":
            raise _no_other_split(path, name)
        if kind == "tars":
            return _cut(_load_nested(files, cache), part)
    patterns = [glob.escape(file) for file in files]  # `datasets` would take brackets in a name for a pattern
    return _load_split(FILE_BUILDERS[suffix], split, data_files={"train": patterns}, shown=str(path), **options)


def _no_other_split(path: Path, name: str) -> ValueError:
    return ValueError(
        f'{path}: no split "{name}"; files named one by one are the one split "train": give heldout_split none '
        "for a share of them, or a folder with a split each"
    )


def class_names(dataset: datasets.Dataset | datasets.IterableDataset) -> list[str] | None:
    """Names of the classes in the order of their ids; None when the data set is unlabelled."""
    feature = dataset.features.get("label")
    return list(feature.names) if isinstance(feature, datasets.ClassLabel) else None


def load_train_and_heldout(
    source: str | Path,
    *,
    train_split: str = "train",
    heldout_split: str | None = None,
    heldout_fraction: float = 0.0,
    seed: int = 0,
    **columns: Any,
) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """What to train on and what to hold out: a split of its own, or a share of `train_split` drawn from the seed.

    A share keeps at least one image on either side; without `heldout_split` and share (or with one image only) nothing
    is held out. Labels of both mean the same classes, those of `train_split`. `columns`: see `load_image_dataset`,
    which also says what is raised.
    """
    train = load_image_dataset(source, split=train_split, **columns)
    if heldout_split is not None:
        heldout = load_image_dataset(source, split=heldout_split, **columns)
        return train, with_labels_of(heldout, train, f'{source}, split "{heldout_split}"')
    if heldout_fraction == 0 or len(train) < 2:
        return train, None
    order = torch.randperm(len(train), generator=generator_for(seed, "heldout")).tolist()
    count = min(max(1, round(heldout_fraction * len(train))), len(train) - 1)
    return train.select(sorted(order[count:])), train.select(sorted(order[:count]))


def with_labels_of(
    data: datasets.Dataset, train: datasets.Dataset | datasets.IterableDataset, what: str
) -> datasets.Dataset:
    """`data` with the class numbers of `train`: a split that lacks a class numbers the others differently.

    Labels without names, as a stream may have them, are class numbers already. `what` names `data` in messages. Raises
    ValueError for labels that are missing, negative, or of classes that `train` lacks.
    """
    if "label" not in train.column_names:
        return data.remove_columns("label") if "label" in data.column_names else data
    if "label" not in data.column_names:
        raise ValueError(f'{what}: has no labels, but the training images have; label_column "ignore" trains without')
    labels = list(data["label"])
    if min(labels, default=0) < 0:
        raise ValueError(f"{what}: has the label {min(labels)}; labels start at 0: choose another split")
    names, wanted = class_names(data), class_names(train)
    if names is None or wanted is None or names == wanted:
        return data
    unknown = sorted({names[label] for label in labels} - set(wanted))
    if unknown:
        raise ValueError(f"{what}: has {len(unknown)} classes that the training images lack ({', '.join(unknown[:5])})")
    numbers = [wanted.index(names[label]) for label in labels]
    return data.remove_columns("label").add_column("label", numbers).cast_column("label", train.features["label"])


def _load_split(name: str, split: str, shown: str | None = None, **options: Any) -> datasets.Dataset:
    """`datasets.load_dataset`, with its failures told in one line that names `shown`."""
    told = shown or name
    try:
        return datasets.load_dataset(name, split=split, **options)
    except (FileNotFoundError, ConnectionError) as error:
        if Path(told).exists():
            raise ValueError(f"{told}: {_cause(error)}") from None
        raise FileNotFoundError(
            f"{told}: no such folder or file here, and no such data set on the Hub ({first_line(error)})"
        ) from None
    except OSError as error:  # such as a full disk, which is told elsewhere
        if error.errno is not None:
            raise
        raise ValueError(f"{told}: {_cause(error)}") from error
    except Exception as error:  # an unknown split, whose text lists the known ones; damage, of datasets and pyarrow
        raise ValueError(f"{told}: {_cause(error)}") from error


def _cause(error: BaseException) -> str:
    """The first line of what is behind an error of `datasets`, which hides it behind words of its own."""
    while error.__cause__ is not None and type(error).__module__.startswith("datasets"):
        error = error.__cause__
    return f"{first_line(error)} ({type(error).__name__})" if not isinstance(error, ValueError) else first_line(error)


def _load_nested(files: list[str], cache: str | None) -> datasets.Dataset:
    if len(files) > 1:
        raise ValueError(f"{files[0]}: holds a tar per class; give this one file, not {len(files)}")
    return load_nested_tar(Path(files[0]), IMAGE_SUFFIXES, cache)


def _load_listing(listing: Listing, split: str, where: str, label_column: str | None) -> datasets.Dataset:
    """A folder or an archive of images as a Dataset, read as `image_folders.py` says; nothing is kept decoded."""
    name, part = _name_and_part(split)
    wanted = () if label_column == "ignore" else LABEL_COLUMNS if label_column is None else (label_column,)
    meaning = understand(listing, name, where, wanted, _is_readable)
    if meaning.problem and label_column != "ignore":
        warnings.warn(f"{where}: {meaning.problem}", stacklevel=4)
    if told := listing.told():
        warnings.warn(f"{where}: {told}", stacklevel=4)
    columns: dict[str, list] = {"image": [{"bytes": None, "path": path} for path in meaning.files]}
    features: dict[str, Any] = {"image": datasets.Image(decode=False)}
    info = datasets.DatasetInfo(description=meaning.text)
    if meaning.labels is not None and label_column != "ignore":
        column = "label" if label_column is None else label_column
        if "from sub-folders" in meaning.text:
            column, names = "label", sorted(set(meaning.labels))
            numbers = {label: number for number, label in enumerate(names)}
            columns[column] = [numbers[label] for label in meaning.labels]
            features[column] = datasets.ClassLabel(names=names)
        else:
            columns[column] = meaning.labels
            whole = all(isinstance(label, int) and not isinstance(label, bool) for label in meaning.labels)
            columns[column] = meaning.labels if whole else [str(label) for label in meaning.labels]
            features[column] = datasets.Value("int64" if whole else "string")
    info.features = datasets.Features(features)
    return _cut(datasets.Dataset.from_dict(columns, features=info.features, info=info), part)


def _is_readable(path: str) -> bool:
    try:
        decode_image({"bytes": None, "path": path}, path)
    except (OSError, ValueError):
        return False
    return True


def _split_folder(path: Path, split: str, suffixes: set[str]) -> tuple[Path, str]:
    """The folder with the files of a split, and the part of it that is meant: `path` itself if it has no split folders.

    Raises ValueError as `image_folders.split_of`.
    """
    name, part = _name_and_part(split)
    folders = {
        f.name: any(p.suffix.lower() in suffixes for p in f.rglob("*"))
        for f in path.iterdir()
        if f.is_dir() and not is_of_tools(f.name)
    }
    folder = split_of(folders, name, str(path))
    return (path if folder is None else path / folder), part


def _name_and_part(split: str) -> tuple[str, str]:
    """Name and part of a split: "train" and "[:100]" of "train[:100]"; an empty part means all of it."""
    name, bracket, rest = split.partition("[")
    return name, bracket + rest


def _cut(data: datasets.Dataset, part: str) -> datasets.Dataset:
    """The part of all images that a split such as "train[:100]" names, see `_name_and_part`."""
    if not part:
        return data
    try:
        parts = datasets.ReadInstruction.from_spec(f"train{part}").to_absolute({"train": len(data)})
    except Exception as error:  # AssertionError, ValueError ... of `datasets`
        raise ValueError(f"split {part!r} of {len(data)} images: {first_line(error)}") from error
    ranges = [range(p.from_ or 0, len(data) if p.to is None else p.to) for p in parts]
    chosen = [data.select(numbers) for numbers in ranges if len(numbers)]
    if not chosen:
        raise ValueError(f"split {part!r} holds none of the {len(data)} images; choose another part")
    return datasets.concatenate_datasets(chosen)


def _standard_columns(
    data: datasets.Dataset | datasets.IterableDataset, source: str, image_column: str | None, label_column: str | None
) -> datasets.Dataset | datasets.IterableDataset:
    """Keep the image and the label column only, under those names and with those feature types."""
    if isinstance(data, datasets.Dataset) and len(data) == 0:
        raise ValueError(f"{source}: the split is empty")
    image = _find_column(data, source, image_column, IMAGE_COLUMNS, "image")
    if image is None:
        kinds = [name for name, feature in data.features.items() if isinstance(feature, datasets.Image)]
        if not kinds:
            raise ValueError(f"{source}: no image column among {', '.join(data.column_names)}; name it by image_column")
        image = kinds[0]
    label = None if label_column == "ignore" else _find_column(data, source, label_column, LABEL_COLUMNS, "label")
    _require_images(data.features[image], source, image)
    # First of all, since a stream decodes what it renames, and would die of a corrupt image there.
    if data.features[image] != datasets.Image(decode=False):
        data = data.cast_column(image, datasets.Image(decode=False))
    data = data.select_columns([image] if label is None else [image, label])
    data = data.rename_columns(
        {old: new for old, new in ((image, "image"), (label, "label")) if old not in (None, new)}
    )
    if label is not None and not isinstance(data.features["label"], datasets.ClassLabel):
        if isinstance(data, datasets.IterableDataset):  # whose labels cannot be gone through beforehand
            _require_numbers(data, source, label)
        else:
            data = _number_labels(data, source, label)
    return data


def _require_images(feature: Any, source: str, column: str) -> None:
    """A column of one image a row: Image, the bytes of a file or its path."""
    plain = getattr(feature, "dtype", None)
    record = isinstance(feature, dict) and {"bytes", "path"} >= set(feature)
    if not (isinstance(feature, datasets.Image) or record or plain in ("binary", "large_binary", "string")):
        kind = plain or type(feature).__name__
        raise ValueError(
            f'{source}: column "{column}" holds {kind}, not one image a row; name another column by image_column'
        )


def _require_numbers(data: datasets.IterableDataset, source: str, column: str) -> None:
    dtype = data.features["label"].dtype
    if "int" not in dtype:
        raise ValueError(
            f'{source}: column "{column}" holds {dtype}; a stream needs class numbers (or a ClassLabel); label_column '
            '"ignore" leaves it out'
        )


def _find_column(
    data: datasets.Dataset, source: str, wanted: str | None, usual: tuple[str, ...], what: str
) -> str | None:
    if wanted is not None:
        if wanted not in data.column_names:
            raise ValueError(f'{source}: no {what} column "{wanted}"; there are: {", ".join(data.column_names)}')
        return wanted
    return next((name for name in usual if name in data.column_names), None)


def _number_labels(data: datasets.Dataset, source: str, column: str) -> datasets.Dataset:
    """Plain integers or strings as ClassLabel: strings in sorted order, integers as they are (0 … max)."""
    leave = 'label_column "ignore" leaves it out'
    feature = data.features["label"]
    if not isinstance(feature, datasets.Value) or "float" in feature.dtype or feature.dtype in ("binary", "bool"):
        kind = getattr(feature, "dtype", type(feature).__name__)
        raise ValueError(f'{source}: column "{column}" holds {kind}, neither class numbers nor names; {leave}')
    values = data.unique("label")
    if any(value is None for value in values):
        raise ValueError(f'{source}: column "{column}" has rows without a label; {leave}')
    if all(isinstance(v, int) for v in values):
        if min(values) < 0:
            raise ValueError(f'{source}: column "{column}" has the label {min(values)}; labels start at 0')
        if max(values) >= MOST_CLASSES:
            raise ValueError(
                f'{source}: column "{column}" goes up to {max(values)} with {len(values)} values: are these numbers of '
                f"images? Number the classes from 0, or {leave}"
            )
        return data.cast_column("label", datasets.ClassLabel(names=[str(i) for i in range(max(values) + 1)]))
    if all(isinstance(v, str) for v in values):
        return data.cast_column("label", datasets.ClassLabel(names=sorted(values)))
    raise ValueError(f'{source}: column "{column}" holds neither class numbers nor names; {leave}')


# ---------------------------------------------------------------------------------------------------------------------
# Decoding


def to_rgb(image: Image.Image) -> Image.Image:
    """Upright RGB of 8 bits; transparent pictures are composited on white (an emoji's hidden pixels are arbitrary)."""
    return as_rgb(from_pillow(image).pixels)


def center_crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """ADM's centre crop, for any (height, width).

    Halve by box filter while the picture is at least twice the target, then bicubic to cover the target, then crop the
    centre. For square sizes this is the protocol that ImageNet FIDs of ADM, DiT and SiT are reported on.
    """
    height, width = size
    image = _cover(image, size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def random_crop(image: Image.Image, size: tuple[int, int], generator: torch.Generator) -> Image.Image:
    """ADM's random crop, for any (height, width): at least 80 % of the side that the centre crop would keep."""
    height, width = size
    enlarged, down, right = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
    factor = 1 + enlarged * (1 / MIN_CROP - 1)
    image = _cover(image, (round(height * factor), round(width * factor)))
    left, top = int(right * (image.width - width + 1)), int(down * (image.height - height + 1))
    return image.crop((left, top, left + width, top + height))


def _cover(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The picture made as small as covers (height, width): halved by box filter, then bicubic."""
    height, width = size
    while min(image.width / width, image.height / height) >= 2:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    if scale == 1:
        return image
    covering = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    return image.resize(covering, Image.Resampling.BICUBIC)


def to_tensor(image: Image.Image) -> torch.Tensor:
    """RGB picture → float32 (3, H, W) in [-1, 1]."""
    array = np.asarray(image, dtype=np.float32) / 127.5 - 1.0
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()


def path_of(record: Mapping[str, Any] | None) -> str | None:
    """Where an undecoded {"bytes", "path"} came from, if its row has an image and tells."""
    return None if record is None else record["path"]


def decode_image(record: Mapping[str, Any] | None, name: str, limits: Limits = DEFAULT_LIMITS) -> Image.Image:
    """RGB picture of 8 bits, at its own size, of an undecoded {"bytes", "path"}.

    ValueError with `name` if it cannot be read. FetchError, an OSError, if it could not be fetched: it may be sound.
    """
    if not isinstance(record, Mapping) or (record.get("bytes") is None and record.get("path") is None):
        raise ValueError(f"{name}: the row has no image")
    try:
        return as_rgb(read_image_file(record["bytes"] or read_bytes(record["path"], limits.bytes), limits).pixels)
    except FetchError:
        raise
    except (OSError, ValueError, ImportError, zipfile.BadZipFile) as error:
        raise ValueError(f"{name}: cannot be read as an image ({first_line(error)})") from error


def view_of(image: Image.Image, size: tuple[int, int], index: int, flip: bool = False, crop: int = 0) -> torch.Tensor:
    """Float32 (3, H, W) in [-1, 1], mirrored left to right if `flip`; crop 0 is the centre, the others random.

    A crop is a function of (index, crop) alone: the same in every process.
    """
    if crop == 0:
        image = center_crop(image, size)
    else:
        image = random_crop(image, size, generator_for(0, "crop", index, crop))
    pixels = to_tensor(image)
    return pixels.flip(-1).contiguous() if flip else pixels


class ImageTensors(torch.utils.data.Dataset):
    """The images of `load_image_dataset` as tensors.

    `dataset[i]` is {"pixel_values": float32 (3, H, W) in [-1, 1], "class_labels": int (0 when unlabelled), "index": i};
    `get` gives its mirror image and other crops.

    A corrupt image raises ValueError with its name. With `strict=False` call `valid_indices()` first: it finds the
    corrupt ones, warns once with their number and names, and returns the others. `limits`: how large one may be.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        *,
        size: int | tuple[int, int],
        strict: bool = False,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        self.size = (size, size) if isinstance(size, int) else tuple(size)
        if len(self.size) != 2 or min(self.size) < 1:
            raise ValueError(f"size is {size}; use one positive number or (height, width)")
        self.dataset, self.strict, self.limits = dataset, strict, limits
        self._valid: list[int] | None = None
        # Labels are read once: a row access would fetch the picture's bytes too.
        self.labels: list[int] = list(dataset["label"]) if "label" in dataset.column_names else [0] * len(dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} images")
        return self.get(index % len(self))

    def get(self, index: int, flip: bool = False, crop: int = 0) -> dict[str, Any]:
        """Item `index` of the data set in one of its forms, see `view_of`; the same in every epoch."""
        pixels = view_of(self._decode(index), self.size, index, flip, crop)
        return {"pixel_values": pixels, "class_labels": self.labels[index], "index": index}

    def pixels(self, indices: Sequence[int]) -> torch.Tensor:
        """These items as 8-bit RGB: (N, 3, H, W) uint8."""
        return (torch.stack([self[i]["pixel_values"] for i in indices]) * 127.5 + 127.5).round().byte()

    def name(self, index: int) -> str:
        """What to call an image in a message: its file, else its row."""
        return path_of(self.dataset[index]["image"]) or f"image {index}"

    def valid_indices(self) -> list[int]:
        """Indices (into the data set) of the images that decode, in order; the first call decodes each image once."""
        if self._valid is None:
            self._valid, reasons = [], []
            for index in range(len(self.dataset)):
                try:
                    self._decode(index)
                    self._valid.append(index)
                except ValueError as error:
                    if self.strict:
                        raise
                    reasons.append(str(error))
            if not self._valid:
                raise ValueError(f"none of the {len(self.dataset)} images can be read; the first: {reasons[0]}")
            if reasons:
                shown = "; ".join(reasons[:5]) + (" …" if len(reasons) > 5 else "")
                warnings.warn(f"skipping {len(reasons)} of {len(self.dataset)} images: {shown}", stacklevel=2)
        return self._valid

    def _decode(self, index: int) -> Image.Image:
        return decode_image(self.dataset[index]["image"], self.name(index), self.limits)
