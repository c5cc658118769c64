"""LoRA: a trainable low-rank update of the attention layers of a frozen model.

    W x  becomes  W x + B A x,   A (rank, in), B (out, rank), B = 0 at the start

(Hu et al. 2021, arXiv 2106.09685; the scale alpha / rank is 1 here.)
"""

from __future__ import annotations

from torch import Tensor, nn

from iptv2_diffusion.models.presets import count_parameters
from iptv2_diffusion.training.errors import ConfigError

TARGETS = ("qkv", "out_proj")  # layers of FCSA and GGSA, the same in the trainable and in the fused form
ADAPTER = "default"


def add_lora(model: nn.Module, rank: int) -> None:
    """Add an adapter to every attention and freeze all other weights, in place.

    Raises:
        ConfigError: peft is not installed, or the model does not support adapters.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ConfigError("lora_rank needs peft: pip install peft") from error
    if not hasattr(model, "backbone"):
        raise ConfigError(f"lora_rank needs an IPT-V2 model, but this is a {type(model).__name__}; leave it out")
    settings = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(TARGETS), init_lora_weights=True)
    model.requires_grad_(False)
    model.add_adapter(settings, adapter_name=ADAPTER)


def needs_weights(found: object) -> None:
    """Raise a `ConfigError` unless the saved model that an adapter changes was found."""
    if found is None:
        raise ConfigError("lora_rank needs saved weights; set --model to a folder, a pipeline or a Hub name")


def size_of(model: nn.Module) -> str:
    """Describe the number of parameters, and of trainable ones if they are fewer."""
    total, trained = count_parameters(model), sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"{total / 1e6:.3f} M parameters" + (f" ({trained / 1e6:.3f} M trainable)" if trained < total else "")


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the adapter's tensors by peft's names."""
    from peft.utils import get_peft_model_state_dict

    return get_peft_model_state_dict(model, adapter_name=ADAPTER)


def merge_lora(model: nn.Module) -> None:
    """Add the adapter to the weights and remove it, in place."""
    model.fuse_lora()
    model.unload_lora()
