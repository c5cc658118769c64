"""Class labels of a pipeline: names and numbers."""

from __future__ import annotations

import difflib
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np
import torch
from torch import Tensor

from iptv2_diffusion.objectives import null_label

__all__ = ["ClassLabelsMixin", "Label"]

Label = int | str


if TYPE_CHECKING:  # a mixin of pipelines; at run time it must not precede DiffusionPipeline
    from diffusers import DiffusionPipeline as _Base
else:
    _Base = object


class ClassLabelsMixin(_Base):
    """Mixin for a pipeline with a `transformer` and with `id2label` in its config."""

    @property
    def num_classes(self) -> int | None:
        """Number of classes, which is also the id of the null label; None for an unconditional transformer."""
        return null_label(self.transformer)

    @property
    def id2label(self) -> dict[int, str]:
        return self.config.get("id2label") or {}

    @property
    def labels(self) -> dict[str, int]:
        """Class ids by name, including synonyms. If two classes share a name, it means the lower id."""
        labels: dict[str, int] = {}
        for key, name in sorted(self.id2label.items()):
            for synonym in (name, *name.split(",")):
                labels.setdefault(synonym.strip(), key)
        return labels

    def get_label_ids(self, labels: Label | Sequence[Label] | Tensor | np.ndarray) -> list[int]:
        """Return the class ids of labels, which are names or ids."""
        if isinstance(labels, (Tensor, np.ndarray)):
            labels = labels.flatten().tolist()
        elif isinstance(labels, str) or not isinstance(labels, Sequence):
            labels = [labels]
        return [self._label_id(label) for label in labels]

    def _label_id(self, label: Label) -> int:
        if isinstance(label, str):
            names = self.labels
            if label in names:
                return names[label]
            if not names:
                raise ValueError(f"class name {label!r}: this pipeline has no class names (id2label); give a class id")
            near = difflib.get_close_matches(label.lower(), names, n=3, cutoff=0.5) or sorted(names)[:5]
            raise ValueError(f"unknown class name {label!r}; the nearest of {len(names)} names: {', '.join(near)}")
        if not isinstance(label, SupportsIndex):
            raise TypeError(f"class label {label!r} is neither a class name nor a whole number")
        index = operator.index(label)
        count = self.num_classes or 0
        if not 0 <= index < count:
            raise ValueError(f"class label {index} is out of range; the model has classes 0 to {count - 1}")
        return index

    def _prepare_labels(
        self, class_labels: Any, num_images_per_label: int, device: torch.device, count: int = 1
    ) -> Tensor | None:
        """Return the labels (B,) int64, null labels if none are given; None for an unconditional model.

        One label is repeated for `count` images.
        """
        if self.num_classes is None:
            if class_labels is not None:
                raise ValueError("this model is unconditional: leave class_labels out and set num_images_per_label")
            return None
        ids = [self.num_classes] if class_labels is None else self.get_label_ids(class_labels)
        if not ids:
            raise ValueError("class_labels is empty; give at least one class, or None for the model's null label")
        if count > 1 and len(ids) not in (1, count):
            raise ValueError(f"{len(ids)} labels for {count} images; give one label, or one per image")
        ids = ids * count if len(ids) == 1 else ids
        return torch.tensor(ids, device=device).repeat_interleave(num_images_per_label)
