"""LoRA adapters on our pipelines, by diffusers' interface: load, set, fuse and unload."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from diffusers.loaders.lora_base import LoraBaseMixin, _fetch_state_dict
from torch import Tensor

Adapter = str | os.PathLike | dict[str, Tensor]


class IPTV2LoraLoaderMixin(LoraBaseMixin):
    """Mixin that loads LoRA adapters into one component of a pipeline. diffusers documents the other methods.

    Attributes:
        lora_component: name of the component, with which the tensors of an adapter begin.
    """

    lora_component = "transformer"
    _lora_loadable_modules = ["transformer"]

    @classmethod
    def lora_state_dict(cls, adapter: Adapter, **kwargs: Any) -> dict[str, Tensor]:
        """Read the tensors of an adapter from a safetensors file, a folder, a name on the Hub or a state dict.

        Args:
            adapter: the adapter.
            **kwargs: arguments of the download: weight_name, subfolder, revision, cache_dir, token, local_files_only ….

        Raises:
            OSError: the file does not exist.
        """
        where = dict.fromkeys(("weight_name", "local_files_only", "cache_dir", "force_download", "proxies", "token"))
        where |= {"revision": None, "subfolder": None, **kwargs}
        state, _ = _fetch_state_dict(adapter, use_safetensors=True, user_agent={}, allow_pickle=False, **where)
        return state

    def load_lora_weights(self, adapter: Adapter, adapter_name: str | None = None, **kwargs: Any) -> None:
        """Load an adapter into the component and activate it.

        Args:
            adapter: safetensors file, folder, name on the Hub, or state dict, as `save_lora_weights` writes them.
            adapter_name: name for `set_adapters`; by default "default_0", "default_1" …
            **kwargs: see `lora_state_dict`.

        Raises:
            OSError: the file does not exist.
            ValueError: the adapter is not one of this model.
        """
        state, model, prefix = self.lora_state_dict(adapter, **kwargs), self._lora_model, self.lora_component
        before = set(getattr(model, "peft_config", {}))
        layers = {name: module for name, module in model.named_modules() if hasattr(module, "weight")}
        named = {key.removeprefix(f"{prefix}.").split(".lora_")[0] for key in state}
        unknown = sorted(name for name in named if name not in layers)
        if not state or unknown or not all("lora" in key for key in state):
            shown = f"it names the layers {', '.join(unknown[:3])}" if unknown else "it has other weights"
            raise ValueError(
                f"this is not an adapter of a {type(model).__name__}: {shown}; use one that was trained on this "
                "pipeline"
            )
        model.load_lora_adapter(state, prefix=prefix, adapter_name=adapter_name, _pipeline=self)
        if set(model.peft_config) == before:
            raise ValueError(f"the adapter's names do not begin with '{prefix}.'; save it by save_lora_weights")

    @property
    def _lora_model(self) -> Any:
        return getattr(self, self.lora_component)

    @classmethod
    def save_lora_weights(
        cls, save_directory: str | os.PathLike, lora_layers: dict[str, Tensor] | None = None, **kwargs: Any
    ) -> None:
        """Write an adapter, from peft's `get_peft_model_state_dict`, as `pytorch_lora_weights.safetensors`.

        Other pipelines of diffusers name the layers `transformer_lora_layers`. This name works too.
        """
        lora_layers = kwargs.pop(f"{cls.lora_component}_lora_layers", lora_layers)
        options: dict[str, Any] = {"is_main_process": True, "weight_name": None, "save_function": None, **kwargs}
        layers, metadata = {cls.lora_component: lora_layers}, options.pop("metadata", None)
        cls._save_lora_weights(
            save_directory=save_directory,
            lora_layers=layers,
            lora_metadata={cls.lora_component: metadata},
            safe_serialization=True,
            **options,
        )

    def fuse_lora(self, components: Sequence[str] | None = None, **kwargs: Any) -> None:
        """Add the active adapters to the component's weights, times `lora_scale`."""
        super().fuse_lora(components=list(components or self._lora_loadable_modules), **kwargs)

    def unfuse_lora(self, components: Sequence[str] | None = None, **kwargs: Any) -> None:
        """Subtract what `fuse_lora` added."""
        super().unfuse_lora(components=list(components or self._lora_loadable_modules), **kwargs)
