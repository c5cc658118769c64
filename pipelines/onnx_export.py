"""Export of a denoiser, a VAE decoder or a restorer to ONNX, for every batch size, height and width.

The graph comes from PyTorch's tracing exporter (`torch.onnx.export(dynamo=False)`). While a model is traced, it
computes the forms of models/symbolic_sizes.py, which have no branch on a size. Padding and cropping are inside the
graph, so it takes images and latents of any size from 1 × 1. `check_onnx` compares a file with the model by
onnxruntime.
"""

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from iptv2_diffusion.files import atomic
from iptv2_diffusion.latents import LatentCodec
from iptv2_diffusion.models.restoration_iptv2 import IPTV2RestorationModel
from iptv2_diffusion.models.transformer_iptv2 import IPTV2Transformer2DModel

__all__ = ["CHECKED_SIZES", "TOLERANCE", "OnnxGraph", "check_onnx", "export_onnx", "graph_of"]

OPSET = 18
CHECKED_SIZES = ((1, 1, 1), (2, 5, 8), (1, 16, 16), (3, 17, 31), (1, 33, 9), (1, 40, 64), (2, 71, 50))  # B, H, W
EXAMPLE_SIZE = (2, 20, 28)  # B, H, W; the graph does not depend on it
TOLERANCE = 1e-4  # largest difference from the model
LARGEST_FILE = 2**31  # bytes; limit of a protobuf message


@dataclass
class OnnxGraph:
    """A model as a function of named tensors.

    Attributes:
        module: takes the inputs by position and returns one tensor.
        inputs: names of the inputs.
        output: name of the output.
        images: names of the inputs and outputs of shape (B, C, H, W); all others are (B,).
        example: makes inputs of a given batch size, height and width.
    """

    module: nn.Module
    inputs: tuple[str, ...]
    output: str
    images: tuple[str, ...]
    example: Callable[[int, int, int], tuple[Tensor, ...]]


class Sample(nn.Module):
    """A diffusers model that takes tensors by position and returns its sample."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.names: tuple[str, ...] = ()

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.model(**dict(zip(self.names, inputs, strict=True)), return_dict=False)[0]


class Decoder(nn.Module):
    """The decoder of a VAE: latents in model units (B, C, h, w) -> images (B, 3, H, W), about [-1, 1]."""

    def __init__(self, vae: nn.Module):
        super().__init__()
        self.vae = vae
        self.codec = LatentCodec(vae)

    def forward(self, latents: Tensor) -> Tensor:
        return self.codec.decode(latents)


def graph_of(model: nn.Module) -> OnnxGraph:
    """Return the graph of a denoiser, a restorer or a VAE. Denoisers and restorers are fused.

    - denoiser: hidden_states (B, C, H, W), timestep (B,) float32, class_labels (B,) int64 if it has classes -> sample
    - restorer: image (B, C, H, W) in [0, 1], sigma (B,) float32 and task (B,) int64 if it takes them -> sample
    - VAE: latents (B, C, h, w) in model units, as the denoiser has them -> image (B, 3, H, W), about [-1, 1]

    Raises:
        ValueError: `LatentCodec` does not support the VAE.
    """
    model = model.float().cpu().eval().requires_grad_(False)
    if not isinstance(model, (IPTV2Transformer2DModel, IPTV2RestorationModel)):
        channels = LatentCodec(model).latent_channels
        return OnnxGraph(
            Decoder(model).eval(), ("latents",), "image", ("latents", "image"), lambda *s: (random_map(channels, *s),)
        )
    config, module = model.config, Sample(model.fuse()).eval()
    labels = {"class_labels": config.get("num_class_embeds"), "task": config.get("num_tasks")}
    if isinstance(model, IPTV2Transformer2DModel):
        names, image, scale = ["hidden_states", "timestep"], "hidden_states", 1000
    else:
        names, image, scale = ["image", *(["sigma"] if config.sigma_conditioning is not None else [])], "image", 50
    names += [name for name, count in labels.items() if count is not None]
    module.names = tuple(names)

    def example(batch: int, height: int, width: int) -> tuple[Tensor, ...]:
        values = [random_map(config.in_channels, batch, height, width)]
        for name in names[1:]:
            values.append(torch.randint(labels[name], (batch,)) if labels.get(name) else scale * torch.rand(batch))
        return tuple(values)

    return OnnxGraph(module, tuple(names), "sample", (image, "sample"), example)


def random_map(channels: int, batch: int, height: int, width: int) -> Tensor:
    return torch.rand(batch, channels, height, width)


@torch.no_grad()
def export_onnx(graph: OnnxGraph, path: Path) -> None:
    """Write the graph to an ONNX file, completely or not at all.

    Raises:
        ModuleNotFoundError: `onnx` is not installed.
        ValueError: the weights do not fit into one ONNX file.
        OSError: the file cannot be written.
    """
    require("onnx")
    size = sum(tensor.numel() * tensor.element_size() for tensor in graph.module.state_dict().values())
    if size >= LARGEST_FILE:
        raise ValueError(f"the weights take {size / 1e9:.1f} GB; an ONNX file holds at most {LARGEST_FILE / 1e9:.1f}")
    axes = {
        name: {0: "batch"} | ({2: f"{name}_height", 3: f"{name}_width"} if name in graph.images else {})
        for name in (*graph.inputs, graph.output)
    }
    with atomic(path) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer warns about sizes in messages, the exporter about its age
        torch.onnx.export(
            graph.module,
            graph.example(*EXAMPLE_SIZE),
            str(temporary),
            dynamo=False,
            opset_version=OPSET,
            input_names=list(graph.inputs),
            output_names=[graph.output],
            dynamic_axes=axes,
        )


@torch.no_grad()
def check_onnx(graph: OnnxGraph, path: Path, sizes: tuple[tuple[int, int, int], ...] = CHECKED_SIZES) -> list[float]:
    """Return the largest difference between the file in onnxruntime and the model, for each size (B, H, W).

    Raises:
        ModuleNotFoundError: `onnxruntime` is not installed.
    """
    require("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    differences = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for size in sizes:
            inputs = graph.example(*size)
            (found,) = session.run(None, {n: x.numpy() for n, x in zip(graph.inputs, inputs, strict=True)})
            expected = graph.module(*inputs)
            same = found.shape == tuple(expected.shape)
            differences.append((torch.from_numpy(found) - expected).abs().max().item() if same else float("inf"))
    return differences


def require(package: str) -> None:
    """Raise a ModuleNotFoundError that names the remedy if a package of the extra `export` is not installed."""
    if importlib.util.find_spec(package) is None:
        raise ModuleNotFoundError(f"{package} is not installed; run pip install 'iptv2-diffusion[export]'")
