"""KID in training, against samples drawn one by one and a kernel written as a loop."""

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import FlowMatchEulerDiscreteScheduler
from kl_vae import make_kl_vae
from PIL import Image

from iptv2_diffusion import IPTV2Pipeline, create_model
from iptv2_diffusion.data.draws import DataOrder, derive_seed
from iptv2_diffusion.data.images import ImageTensors
from iptv2_diffusion.evaluation.feature_extractors import efficientnet_lite0
from iptv2_diffusion.evaluation.kernel_distance import KernelDistance


def pictures(count):
    random = np.random.default_rng(0)
    images = [Image.fromarray(random.integers(0, 256, (16, 16, 3), np.uint8)) for _ in range(count)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    data = datasets.Dataset.from_dict({"image": images, "label": [i % 3 == 0 for i in range(count)]}, features=features)
    return ImageTensors(data.cast_column("image", datasets.Image(decode=False)), size=16)


def kernel_distance(x, y):
    def kernel(a, b):
        return (float(a.double() @ b.double()) / len(a) + 1) ** 3

    def within(z):
        return np.mean([kernel(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j])

    return within(x) + within(y) - 2 * np.mean([kernel(a, b) for a in x for b in y])


@pytest.mark.parametrize("num_classes", [2, None])
def test_kid_is_that_of_samples_drawn_one_by_one_with_the_classes_of_heldout_images(num_classes):
    torch.manual_seed(0)
    model = create_model("tiny", sample_size=8, num_class_embeds=num_classes)
    torch.nn.init.normal_(model.proj_out.weight, std=0.1)
    pipeline = IPTV2Pipeline(model, make_kl_vae(4, 4), FlowMatchEulerDiscreteScheduler())
    extractor, images = efficientnet_lite0(32), pictures(9)
    labelled = num_classes is not None
    distance = KernelDistance(images, extractor, Accelerator(cpu=True), count=35, seed=4, labelled=labelled)
    figures = distance(pipeline, num_inference_steps=2, guidance_scale=2.0 if labelled else 1.0)

    features = []
    for number, item in enumerate(DataOrder(9, 4).items(0, 35).tolist()):
        image = pipeline(
            images.labels[item] if labelled else None,
            generator=torch.Generator().manual_seed(derive_seed(4, "kid", number)),
            num_inference_steps=2,
            guidance_scale=2.0 if labelled else 1.0,
        ).images[0]
        features.append(extractor(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None])[0])
    expected = kernel_distance(features, list(extractor(images.pixels(range(9)))))
    assert figures["kid"] == pytest.approx(expected, rel=1e-3)
    assert 0 < figures["kid_error"] < figures["kid"]
    assert distance(pipeline, num_inference_steps=2, guidance_scale=2.0 if labelled else 1.0) == figures
