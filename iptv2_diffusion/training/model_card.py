"""Model cards: README.md with YAML metadata for the Hub, next to the weights of every training."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from diffusers.utils.hub_utils import populate_model_card
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from iptv2_diffusion.data.own_folder import OwnFolder
from iptv2_diffusion.files import shipped
from iptv2_diffusion.training.errors import user_errors
from iptv2_diffusion.training.logging import read_metrics
from iptv2_diffusion.training.options import TrainingConfig
from iptv2_diffusion.training.run_folder import run_command

__all__ = ["CardContents", "last_metrics", "of_adapter", "write_card"]

CARD = "README.md"
KINDS = ("loss", "psnr", "kid")  # types of metrics; a metric's name contains its type
LOCAL_DATA = "imagefolder"  # type of a data set that is not on the Hub, as the Hub's own trainers write it
TEMPLATE = """---
{{ card_data }}
---

# {{ title }}

{{ summary }}
{% if picture %}
![{{ caption }}]({{ picture }})

*{{ caption }}*
{% endif %}
## How to use it

```python
{{ usage }}
```

The code needs the package `iptv2-diffusion`.{% if is_pipeline %} `DiffusionPipeline.from_pretrained` and
`AutoModel.from_pretrained` of diffusers also load the weights, after `import iptv2_diffusion`. Without this import,
diffusers reports that it has no class of this name.{% endif %}

## Training

- Data: {{ data }}. Licence of the data: {{ data_license }}.
- {{ steps }} steps of {{ batch_size }} samples in {{ minutes }} minutes, seed {{ seed }}.
- The saved weights are {{ average }}.
- Command:

```bash
{{ command }}
```
{% if results %}
## Results

| metric | value |
|---|---|
{% for name, value in results.items() -%}
| {{ name }} | {{ "%.4g" | format(value) }} |
{% endfor %}
The metrics are those of the last evaluation of the run, on data that it did not train on.
{% endif %}
## Licence

Licence of the weights: {{ license }}.
"""


@dataclass(frozen=True, kw_only=True)
class CardContents:
    """A recipe's description of its result.

    Attributes:
        summary: one or two sentences about the model.
        task: the Hub's `pipeline_tag`.
        usage: Python code that loads the folder or the repository.
        repository: name on the Hub; None for a folder.
        tags: further tags for the Hub.
        metrics: values of the last evaluation by name; see `last_metrics`.
        picture: image file that is copied next to the card.
        caption: sentence about the image.
        base_model: name or folder of the model that the training started from, or a preset.
        is_pipeline: whether the folder is that of a pipeline, rather than of a VAE or an adapter.
    """

    summary: str
    task: str
    usage: str
    repository: str | None = None
    tags: tuple[str, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    picture: Path | None = None
    caption: str = ""
    base_model: str | None = None
    is_pipeline: bool = True


def of_adapter(card: CardContents, rank: int, base: str, usage: str) -> CardContents:
    """Return the contents of an adapter's card, from those of the pipeline with the adapter merged.

    Args:
        card: contents for the pipeline.
        rank: rank of the adapter.
        base: name or folder of the model that the adapter changes.
        usage: Python code that loads both.
    """
    summary = f"A LoRA adapter of rank {rank} for the attention layers of `{base}`."
    return replace(card, summary=summary, tags=(*card.tags, "lora"), usage=usage, is_pipeline=False)


def write_card(folder: Path, config: TrainingConfig, contents: CardContents, *, step: int, seconds: float) -> Path:
    """Write README.md, and the picture, into a folder of a run.

    Args:
        folder: folder of the saved model, directly in `config.output_dir`.
        config: configuration of the run.
        contents: contents of the card.
        step: number of optimiser steps done.
        seconds: duration of the training.

    Returns:
        Path of the card. A README.md that is not ours stays as it is.

    Raises:
        UserError: a file cannot be written.
    """
    named = contents.repository or str(Path(config.output_dir).resolve())
    title = named.replace("\\", "/").split("/")[-1]
    picture = contents.picture
    card = ModelCard.from_template(
        card_data=card_data(title, config, contents),
        template_str=TEMPLATE,
        title=title,
        summary=contents.summary,
        picture=picture.name if picture is not None else None,
        caption=contents.caption,
        usage=contents.usage,
        is_pipeline=contents.is_pipeline,
        data=f"`{config.data}`",
        data_license=config.data_license or "unknown",
        steps=f"{step:,}",
        batch_size=config.batch_size,
        minutes=f"{seconds / 60:.1f}",
        seed=config.seed,
        average="the exponential moving average (EMA) of the weights" if config.averages else "those of the last step",
        command=run_command(),
        results=contents.metrics,
        license=config.license or "not stated",
    )
    text = str(populate_model_card(card, tags=["ipt-v2", *contents.tags])).strip() + "\n"
    record = OwnFolder(folder.parent, "")
    files = {CARD: text.encode(), **({picture.name: picture.read_bytes()} if picture is not None else {})}
    with user_errors(OSError, ValueError):
        for file, content in files.items():
            if not record.is_foreign(f"{folder.name}/{file}"):
                with record.writing(f"{folder.name}/{file}") as temporary:
                    temporary.write_bytes(content)
    return folder / CARD


def card_data(title: str, config: TrainingConfig, contents: CardContents) -> ModelCardData:
    """Return the card's metadata."""
    local = shipped(config.data).exists()
    data = Path(config.data).name if local else config.data
    where = {"dataset_type": LOCAL_DATA if local else config.data, "dataset_name": data}
    results = [
        EvalResult(
            task_type=contents.task, **where, metric_type=kind_of(metric), metric_name=metric, metric_value=value
        )
        for metric, value in contents.metrics.items()
    ]
    return ModelCardData(
        license=config.license,
        library_name="diffusers",
        pipeline_tag=contents.task,
        datasets=None if local else [config.data],
        base_model=contents.base_model if is_hub_name(contents.base_model) else None,
        model_name=title if results else None,
        eval_results=results or None,
    )


def kind_of(metric: str) -> str:
    """Return the type of a metric for the Hub."""
    return next((kind for kind in KINDS if kind in metric), metric)


def is_hub_name(name: str | None) -> bool:
    """Return whether this is a name on the Hub, rather than a file, a folder or a preset."""
    return name is not None and re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not shipped(name).exists()


def last_metrics(output_dir: Path, pattern: str) -> dict[str, float]:
    """Return the last value of each metric in metrics.jsonl whose whole name matches a regular expression."""
    found: dict[str, float] = {}
    for row in read_metrics(output_dir / "metrics.jsonl"):
        found |= {name: value for name, value in row.items() if re.fullmatch(pattern, name) and value is not None}
    return found
