"""Loader of image data sets: folders, archives, parquet files and names on the Hub.

`load_image_dataset` converts every source to two columns: "image" (undecoded) and, if there are labels, "label".
`ImageTensors` (image_tensors.py) decodes the images.
"""

from __future__ import annotations

import glob
import os
import shlex
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch

from iptv2_diffusion.data.archives import check_end, kind_of_tar, list_tar, load_nested_tar
from iptv2_diffusion.data.draws import generator_for
from iptv2_diffusion.data.image_columns import LABEL_COLUMNS, standard_columns
from iptv2_diffusion.data.image_folders import Listing, is_of_tools, list_folder, split_of, understand
from iptv2_diffusion.data.image_tensors import ImageTensors, decode_image
from iptv2_diffusion.files import user_path
from iptv2_diffusion.messages import first_line

__all__ = [
    "ImageTensors",
    "class_names",
    "decode_image",
    "load_image_dataset",
    "load_train_and_heldout",
    "with_labels_of",
]

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}
FILE_BUILDERS = {".parquet": "parquet", ".tar": "webdataset"}  # the `datasets` builder of each suffix
STREAM_SHARDS = 64  # shards into which loose images are divided for streaming; their order is shuffled


# ---------------------------------------------------------------------------------------------------------------------
# Loading: every source becomes a datasets.Dataset with "image" (decode=False) and, if labelled, "label" (ClassLabel)


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
    """Load images and, if there are any, their labels.

    Args:
        source: one of

            - a folder of images: flat without labels, or with one sub-folder per class, optionally inside one folder
              per split, such as train/ and test/;
            - a parquet file, or a glob or folder of parquet files;
            - a WebDataset shard (a tar of KEY.jpg and KEY.cls), or a glob or folder of shards, which `datasets` copies
              into its cache;
            - a tar of class folders, or of one tar per class as ImageNet's, which is read without unpacking;
            - a name on the Hub.
        split: a split as in `datasets` ("train", "train[:100]"). Single files and globs form one split, "train". A
            folder of tars can have one folder per split.
        image_column: name of the image column; by default the first usual name.
        label_column: name of the label column; by default the first usual name, if any. "ignore" leaves out the labels.
        streaming: whether to return an IterableDataset, which copies nothing.

    Returns:
        Dataset with "image" (undecoded: {"bytes", "path"}) and, if labelled, "label" (ClassLabel).

    Raises:
        FileNotFoundError: the source does not exist.
        ValueError: the source is empty, or has no such split or column. The message lists those that exist.
    """
    path = user_path(source)
    cache = None if cache_dir is None else os.path.expanduser(cache_dir)
    options: dict[str, Any] = {"cache_dir": cache, "streaming": streaming}
    if path.is_dir():
        listing = list_folder(path, IMAGE_SUFFIXES)
        suffixes = listing.suffixes
        if ".parquet" in suffixes:
            if glob.has_magic(str(path)):  # `datasets` would read it as a pattern
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
    data = standard_columns(data, str(source), image_column, label_column)
    if streaming and isinstance(data, datasets.Dataset):  # loose files are in the order of their classes
        data = data.shuffle(seed=0).to_iterable_dataset(num_shards=min(STREAM_SHARDS, len(data)))
    return data


def _remedy(path: Path) -> str:
    """Return the advice for a file that is not a data set."""
    suffixes, quoted = "".join(path.suffixes[-2:]).lower(), shlex.quote(str(path))
    if suffixes.endswith(".zip"):
        return f"a zip is not read in place; unpack it by `unzip -d FOLDER {quoted}` and name the folder"
    if suffixes.endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")):
        return f"a compressed tar is not read in place; unpack it by `tar -xf {quoted} -C FOLDER` and name the folder"
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return "a single image is not a data set; give its folder"
    return "not a folder, parquet file or tar"


def _load_files(
    path: Path, split: str, label_column: str | None, cache: str | None, options: Mapping[str, Any]
) -> datasets.Dataset | datasets.IterableDataset:
    """Return the parquet files or tars of a file name or a glob. The name of an existing file is never a glob."""
    suffix = path.suffix.lower()
    files = [str(path)] if path.is_file() else sorted(glob.glob(str(path), recursive=True))
    files = [file for file in files if Path(file).is_file()]  # a pipe would be read forever
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
    patterns = [glob.escape(file) for file in files]  # `datasets` would read brackets in a name as a pattern
    return _load_split(FILE_BUILDERS[suffix], split, data_files={"train": patterns}, shown=str(path), **options)


def _no_other_split(path: Path, name: str) -> ValueError:
    return ValueError(
        f'{path}: no split "{name}"; single files form one split, "train"; set heldout_split to none to hold out '
        "a fraction of them, or give a folder with one folder per split"
    )


def class_names(dataset: datasets.Dataset | datasets.IterableDataset) -> list[str] | None:
    """Return the names of the classes in the order of their ids; None if the data set has no labels."""
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
    """Load the images to train on and the held-out images: another split, or a random fraction of `train_split`.

    The seed determines the fraction. Each side keeps at least one image. Without `heldout_split` and fraction, or with
    a single image, nothing is held out. The labels of both sides are the classes of `train_split`. See
    `load_image_dataset` for `columns` and for the errors.
    """
    train = load_image_dataset(source, split=train_split, **columns)
    if heldout_split is not None:
        heldout = load_image_dataset(source, split=heldout_split, **columns)
        return train, with_labels_of(heldout, train, f'{source}, split "{heldout_split}"')
    shares = heldout_shares(len(train), heldout_fraction, seed)
    return (train, None) if shares is None else (train.select(shares[0]), train.select(shares[1]))


def heldout_shares(count: int, fraction: float, seed: int) -> tuple[list[int], list[int]] | None:
    """Return the items to train on and those to hold out, in order, at least one of each; None to hold out nothing."""
    if fraction == 0 or count < 2:
        return None
    order = torch.randperm(count, generator=generator_for(seed, "heldout")).tolist()
    heldout = min(max(1, round(fraction * count)), count - 1)
    return sorted(order[heldout:]), sorted(order[:heldout])


def with_labels_of(
    data: datasets.Dataset, train: datasets.Dataset | datasets.IterableDataset, what: str
) -> datasets.Dataset:
    """Renumber the classes of `data` as in `train`. A split that lacks a class numbers the others differently.

    Labels without names, as a stream can have them, are class numbers already. `what` is the name of `data` in
    messages.

    Raises:
        ValueError: labels are missing, negative, or of classes that `train` lacks.
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
        raise ValueError(
            f"{what}: has {len(unknown)} classes that the training images do not have ({', '.join(unknown[:5])})"
        )
    numbers = [wanted.index(names[label]) for label in labels]
    return data.remove_columns("label").add_column("label", numbers).cast_column("label", train.features["label"])


def _load_split(name: str, split: str, shown: str | None = None, **options: Any) -> datasets.Dataset:
    """Call `datasets.load_dataset`. An error is one line that names `shown`."""
    shown = shown or name
    try:
        return datasets.load_dataset(name, split=split, **options)
    except (FileNotFoundError, ConnectionError) as error:
        if Path(shown).exists():
            raise ValueError(f"{shown}: {_cause(error)}") from None
        raise FileNotFoundError(
            f"{shown}: no such folder or file here, and no such data set on the Hub ({first_line(error)})"
        ) from None
    except OSError as error:  # such as a full disk, which `errors.py` reports
        if error.errno is not None:
            raise
        raise ValueError(f"{shown}: {_cause(error)}") from error
    except Exception as error:  # an unknown split (the message lists the known ones), or damaged files
        raise ValueError(f"{shown}: {_cause(error)}") from error


def _cause(error: BaseException) -> str:
    """Return the first line of the cause of an error of `datasets`, whose own message hides the cause."""
    while error.__cause__ is not None and type(error).__module__.startswith("datasets"):
        error = error.__cause__
    return f"{first_line(error)} ({type(error).__name__})" if not isinstance(error, ValueError) else first_line(error)


def _load_nested(files: list[str], cache: str | None) -> datasets.Dataset:
    if len(files) > 1:
        raise ValueError(f"{files[0]}: holds a tar per class; give this one file, not {len(files)}")
    return load_nested_tar(Path(files[0]), IMAGE_SUFFIXES, cache)


def _load_listing(listing: Listing, split: str, where: str, label_column: str | None) -> datasets.Dataset:
    """Load a folder or an archive of images as a Dataset by the rules of `image_folders.py`. No image stays decoded."""
    name, part = _name_and_part(split)
    wanted = () if label_column == "ignore" else LABEL_COLUMNS if label_column is None else (label_column,)
    meaning = understand(listing, name, where, wanted, _is_readable)
    if meaning.problem and label_column != "ignore":
        warnings.warn(f"{where}: {meaning.problem}", stacklevel=4)
    if summary := listing.summary():
        warnings.warn(f"{where}: {summary}", stacklevel=4)
    columns: dict[str, list] = {"image": [{"bytes": None, "path": path} for path in meaning.files]}
    features: dict[str, Any] = {"image": datasets.Image(decode=False)}
    info = datasets.DatasetInfo(description=meaning.text)
    if meaning.labels is not None and label_column != "ignore":
        column = "label" if label_column is None or meaning.from_folders else label_column
        columns[column], features[column] = _label_column(meaning.labels, meaning.from_folders)
    info.features = datasets.Features(features)
    return _cut(datasets.Dataset.from_dict(columns, features=info.features, info=info), part)


def _label_column(labels: Sequence[str | int], from_folders: bool) -> tuple[list[Any], Any]:
    """Return the values and the feature of the labels: folder names in sorted order, integers, or strings."""
    if from_folders:
        names = sorted(map(str, set(labels)))
        numbers = {label: number for number, label in enumerate(names)}
        return [numbers[str(label)] for label in labels], datasets.ClassLabel(names=names)
    if all(isinstance(label, int) and not isinstance(label, bool) for label in labels):
        return list(labels), datasets.Value("int64")
    return [str(label) for label in labels], datasets.Value("string")


def _is_readable(path: str) -> bool:
    try:
        decode_image({"bytes": None, "path": path}, path)
    except (OSError, ValueError):
        return False
    return True


def _split_folder(path: Path, split: str, suffixes: set[str]) -> tuple[Path, str]:
    """Return the folder of a split (`path` itself if it has no split folders) and the part of the split.

    Raises a ValueError as `image_folders.split_of` does.
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
    """Split "train[:100]" into the name "train" and the part "[:100]". An empty part means the whole split."""
    name, bracket, rest = split.partition("[")
    return name, bracket + rest


def _cut(data: datasets.Dataset, part: str) -> datasets.Dataset:
    """Return the part of the images that a split such as "train[:100]" selects (see `_name_and_part`)."""
    if not part:
        return data
    try:
        parts = datasets.ReadInstruction.from_spec(f"train{part}").to_absolute({"train": len(data)})
    except Exception as error:  # `datasets` raises AssertionError, ValueError ...
        raise ValueError(f"split {part!r} of {len(data)} images: {first_line(error)}") from error
    ranges = [range(p.from_ or 0, len(data) if p.to is None else p.to) for p in parts]
    chosen = [data.select(numbers) for numbers in ranges if len(numbers)]
    if not chosen:
        raise ValueError(f"split {part!r} holds none of the {len(data)} images; choose another part")
    return datasets.concatenate_datasets(chosen)
