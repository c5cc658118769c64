"""Small copies of DND and of SIDD's validation data in their own layouts, made from photographs."""

import h5py
import numpy as np
from photographs import noisy, photograph
from scipy.io import savemat

SIDE = 32
BOXES = np.array([[1, 1], [9, 17], [17, 25]])  # top and left of each photograph's crops, counted from 1 as MATLAB does


def write_dnd(root, photographs=2):
    """A file as MATLAB's `save -v7.3` writes it: a header of 512 bytes, columns first, structs of references."""
    (root / "images_srgb").mkdir(parents=True)
    images = [np.float32(noisy(photograph(i, 48, 56), 12, i) / 255) for i in range(photographs)]
    for number, image in enumerate(images, start=1):
        with h5py.File(root / f"images_srgb/{number:04d}.mat", "w", userblock_size=512) as file:
            file["InoisySRGB"] = image.T
    with h5py.File(root / "info.mat", "w", userblock_size=512) as file:
        for name in ("boundingboxes", "sigma_srgb"):
            file.create_dataset(f"info/{name}", (1, photographs), dtype=h5py.ref_dtype)
        for index in range(photographs):
            file[f"#refs#/b{index}"] = np.hstack([BOXES, BOXES + SIDE - 1]).astype(np.float64).T
            file[f"#refs#/s{index}"] = np.array([[0.04, 0.05, 0.06]]) + 0.01 * index
            file["info/boundingboxes"][0, index] = file[f"#refs#/b{index}"].ref
            file["info/sigma_srgb"][0, index] = file[f"#refs#/s{index}"].ref
    return images


def write_sidd_validation(root, photographs=2, blocks=3):
    """Returns the noisy and the clean blocks, (photographs, blocks, 32, 32, 3) of uint8."""
    clean = np.stack([photograph(i, SIDE, SIDE) for i in range(photographs * blocks)])
    clean = clean.reshape(photographs, blocks, SIDE, SIDE, 3)
    pair = noisy(clean), clean
    root.mkdir(parents=True, exist_ok=True)
    for name, values in zip(("ValidationNoisyBlocksSrgb", "ValidationGtBlocksSrgb"), pair, strict=True):
        savemat(root / f"{name}.mat", {name: values}, do_compression=True)
    return pair
