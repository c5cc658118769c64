"""Transfer of a trained denoiser to other classes and another size. Known classes keep their embedding rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from iptv2_diffusion.models.presets import disable_label_dropout, translate_overrides

__all__ = ["adapt_denoiser", "match_classes"]

_TABLES = (
    "class_embedder.weight",
    "class_embedder.embedding_table.weight",
)  # (classes + 1, D), with the null label last


def match_classes(names: Sequence[str], id2label: Mapping[int, str], classes: int | None) -> dict[int, int]:
    """Find the old class whose embedding row each new class keeps: new class -> old class.

    Classes match by name. An old name can list synonyms, separated by commas. Without names on either side, classes
    match by number if their number is the same.

    Args:
        names: names of the new classes.
        id2label: names of the old classes.
        classes: number of the old classes; None for an unconditional model.
    """
    if not classes:
        return {}
    if not id2label or list(names) == [str(number) for number in range(len(names))]:
        return {number: number for number in range(classes)} if classes == len(names) else {}
    rows: dict[str, int] = {}
    for number, name in sorted(id2label.items()):
        for synonym in (name, *name.split(",")):
            rows.setdefault(synonym.strip(), number)
    return {new: rows[name] for new, name in enumerate(names) if name in rows}


@torch.no_grad()
def adapt_denoiser(
    model: ModelMixin, *, sample_size: int | tuple[int, int], num_classes: int | None, kept: Mapping[int, int]
) -> ModelMixin:
    """Make a denoiser with the weights of another, for other classes and latents of another size.

    A new class starts from the row of the null label, for which the model draws an image of any class. Without classes,
    the null label's row is added to the timestep's embedding, so that the new model computes the same as the old one
    without a label.

    Args:
        model: `IPTV2Transformer2DModel`, not fused, or `DiTTransformer2DModel`.
        sample_size: latent size of the new model.
        num_classes: number of its classes; None for an unconditional model (a single class for DiT).
        kept: new class -> old class whose row it keeps.

    Raises:
        ValueError: the model is a DiT and the latent is not square.
    """
    overrides: dict[str, Any] = {"sample_size": sample_size, "num_class_embeds": num_classes}
    if "window_size" in model.config:  # keeps the windows, and therefore the weights
        overrides["window_fit_size"] = model.config.window_fit_size or model.config.sample_size
    new = type(model).from_config(model.config, **translate_overrides(type(model), overrides))
    state, wanted = model.state_dict(), new.state_dict()
    for name in {*state, *wanted}:
        if not name.endswith(_TABLES):
            continue
        if name not in state:  # unconditional before: every row adds zero
            state[name] = torch.zeros_like(wanted[name])
            continue
        table = state.pop(name)
        if name in wanted:
            state[name] = _new_table(table, len(wanted[name]), kept)
        else:
            bias = name.replace("class_embedder.weight", "timestep_embedder.linear_2.bias")
            state[bias] = state[bias] + table[-1].to(state[bias].dtype)
    new.load_state_dict(state)
    if isinstance(new, DiTTransformer2DModel):
        disable_label_dropout(new)
    return new


def _new_table(table: Tensor, rows: int, kept: Mapping[int, int]) -> Tensor:
    """Return the rows of the new classes and, last, of the null label."""
    sources = [kept.get(row, -1) for row in range(rows - 1)] + [-1]
    return table[sources].clone()
