"""What is not a number is no picture: an error that says which, where and in what precision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

__all__ = ["NonFiniteImageError"]


class NonFiniteImageError(ValueError):
    """A network gave NaN or infinity, which would become a black picture.

    Args:
        which: the picture and the step, in words.
        dtype: what the network ran in.
        indices: the pictures of the call, counted from 0.
        images: all pictures of the call in its output type, the others of which are sound; None: not known.

    Attributes:
        indices, images: see above.
    """

    def __init__(self, which: str, dtype: torch.dtype | str, indices: Sequence[int], images: Any = None) -> None:
        self.indices, self.images = list(indices), images
        precision = str(dtype).removeprefix("torch.")
        if precision == "float32":
            remedy = "weights or inputs are broken, or guidance is too strong: try others, or download the model again"
        else:
            remedy = f"{precision} may overflow: use float32" + (" or bfloat16" if precision == "float16" else "")
        super().__init__(f"{which}: the model gives NaN or infinity in {precision}; {remedy}")
