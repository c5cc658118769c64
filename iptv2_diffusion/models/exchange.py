"""Transfer of backbone weights from a trained denoiser to a restorer, or from a restorer to a denoiser."""

from dataclasses import dataclass

import torch
from diffusers.models.modeling_utils import ModelMixin

__all__ = ["BackboneReport", "load_backbone"]


@dataclass(frozen=True)
class BackboneReport:
    """Result of `load_backbone`.

    Attributes:
        matched: names of the tensors that were copied.
        missing: names that only the target has. These tensors keep their values.
        unexpected: names that only the source has.
        mismatched: name -> (shape in the source, shape in the target) of tensors whose shapes differ.
        parameters: number of values copied, and number of values in the target's backbone.
    """

    matched: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    parameters: tuple[int, int]

    @property
    def complete(self) -> bool:
        """Whether every tensor of both backbones was matched."""
        return not (self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        copied, total = self.parameters
        lines = [f"backbone: {len(self.matched)} tensors matched, {copied} of {total} values ({copied / total:.1%})"]
        for title, names in (("only in the target", self.missing), ("only in the source", self.unexpected)):
            if names:
                lines.append(f"  {title} ({len(names)}): {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}")
        for name, (theirs, ours) in list(self.mismatched.items())[:3]:
            lines.append(f"  {name}: {theirs} in the source, {ours} in the target")
        if len(self.mismatched) > 3:
            lines.append(f"  ... {len(self.mismatched)} shapes differ in total")
        return "\n".join(lines)


@torch.no_grad()
def load_backbone(target: ModelMixin, source: ModelMixin, strict: bool = False) -> BackboneReport:
    """Copy the weights of `source.backbone` into `target.backbone` where names and shapes agree.

    Args:
        target: model to copy into, an `IPTV2Transformer2DModel` or `IPTV2RestorationModel`.
        source: model to copy from, of either class. If only one of the two models is fused, `fuse()` or `unfuse()`
            first converts the source to the target's form.
        strict: whether to raise, and copy nothing, unless every tensor matches.

    Returns:
        Report of the tensors that were and were not copied.

    Raises:
        ValueError: no tensor matches, the backbones differ and `strict` is set, or a fused source cannot be unfused.
    """
    if source.config.fused != target.config.fused:
        source = source.fuse() if target.config.fused else source.unfuse()
    theirs, ours = source.backbone.state_dict(), target.backbone.state_dict()
    common = [name for name in ours if name in theirs]
    matched = [name for name in common if ours[name].shape == theirs[name].shape]
    report = BackboneReport(
        matched=tuple(matched),
        missing=tuple(name for name in ours if name not in theirs),
        unexpected=tuple(name for name in theirs if name not in ours),
        mismatched={n: (tuple(theirs[n].shape), tuple(ours[n].shape)) for n in common if n not in set(matched)},
        parameters=(sum(ours[name].numel() for name in matched), sum(tensor.numel() for tensor in ours.values())),
    )
    if not matched or (strict and not report.complete):
        raise ValueError(f"the backbones do not fit: {' '.join(str(report).split())}")
    for name in matched:
        ours[name].copy_(theirs[name])
    return report
