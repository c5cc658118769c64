"""Reconstruct an exponential moving average of any length after training, from the snapshots of `--ema power`.

    python eval/reconstruct_ema.py --run runs/mine --sigma_rel 0.075

The method is that of Karras et al. 2024 (arXiv 2312.02696, §3.2); see `iptv2_diffusion/training/power_ema.py`. The
script copies the run's pipeline and replaces the weights of its denoiser or restorer. To find the best length, try
several values of --sigma_rel.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from iptv2_diffusion.training.errors import UserError, run_main, user_errors
from iptv2_diffusion.training.options import Config, option
from iptv2_diffusion.training.parsing import parse_config

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ReconstructConfig(Config):
    """Options of the average and its run."""

    run: str = option("runs/run", "folder of a finished run that was trained with --ema power")
    sigma_rel: float = option(0.075, "relative width of the average; 0.05 to 0.15 is usual", above=0, below=0.28)
    steps: int | None = option(
        None, "training step at which the average ends; none: the step of the last snapshot", at_least=1
    )
    output_dir: str | None = option(None, "folder of the new pipeline; none: RUN/pipeline-SIGMA_REL")


def replace_weights(source: Path, target: Path, tensors: dict[str, Tensor]) -> None:
    """Copy a pipeline folder and replace the weights named in `tensors`. The weights keep the dtype of the source."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    from iptv2_diffusion.evaluation.results import replaced

    for path in source.glob("*/*.safetensors"):
        with safe_open(path, framework="pt") as file:
            if set(file.keys()) >= tensors.keys():
                break
    else:
        raise UserError(
            f"no model in {source} has the {len(tensors)} weights of the snapshots; give the folder of the same run"
        )
    weights = load_file(path)
    weights |= {name: tensor.to(weights[name].dtype) for name, tensor in tensors.items()}
    with replaced(target) as temporary:
        shutil.copytree(source, temporary)
        save_file(weights, temporary / path.relative_to(source), metadata={"format": "pt"})


def main(argv: list[str] | None = None) -> int:
    """Reconstruct the weights and write the pipeline."""
    config = parse_config(ReconstructConfig, argv, description=__doc__)
    from iptv2_diffusion.training.power_ema import find_snapshots, reconstruct

    run = Path(config.run)
    target = Path(config.output_dir or run / f"pipeline-{config.sigma_rel:g}")
    if not (run / "pipeline" / "model_index.json").is_file():
        raise UserError(f"{run / 'pipeline'} has no pipeline; give the folder of a finished run")
    with user_errors(OSError, ValueError):
        snapshots = find_snapshots(run / "ema")
        tensors, error = reconstruct(snapshots, config.sigma_rel, config.steps)
        replace_weights(run / "pipeline", target, tensors)
    result = {
        "pipeline": str(target),
        "sigma_rel": config.sigma_rel,
        "snapshots": len(snapshots),
        "profile_error": round(error, 5),
    }
    print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    run_main(main)
