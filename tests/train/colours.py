"""Features to align with: the pictures themselves, coarse. A `TargetFeatures` for tests."""

import torch.nn.functional as F


class Colours:
    dim = 3

    def __init__(self, codec):
        self.codec = codec

    def __call__(self, latents):
        return F.avg_pool2d(self.codec.decode(latents).float(), 4)
