"""Error for images with NaN or infinity, which names the image, the step and the precision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

__all__ = ["NonFiniteImageError"]


class NonFiniteImageError(ValueError):
    """Raised if a network returns NaN or infinity, which would become a black image.

    Args:
        which: description of the image and the step.
        dtype: precision of the network.
        indices: indices of the affected images in the call, counted from 0.
        images: all images of the call in its output type; the unaffected ones are valid. None if they are not known.

    Attributes:
        indices: as above.
        images: as above.
    """

    def __init__(self, which: str, dtype: torch.dtype | str, indices: Sequence[int], images: Any = None) -> None:
        self.indices, self.images = list(indices), images
        precision = str(dtype).removeprefix("torch.")
        if precision == "float32":
            remedy = "weights or inputs are broken, or guidance is too strong: try others, or download the model again"
        else:
            remedy = f"{precision} may overflow: use float32" + (" or bfloat16" if precision == "float16" else "")
        super().__init__(f"{which}: the model returns NaN or infinity in {precision}; {remedy}")
