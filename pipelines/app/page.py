"""The page: three tabs in Gradio that call `actions.py`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from iptv2_diffusion.messages import one_line

from ..command_line import CommandError
from ..restore_cli import DEFAULT_MODEL
from .actions import (
    AS_SAVED,
    GenerateSettings,
    RestoreSettings,
    compare,
    generate,
    noise_level,
    read_upload,
    restore,
    save_images,
    scheduler_names,
)
from .jobs import Cancelled, Jobs
from .model_list import ModelList

__all__ = ["build", "serve"]

FONTS = ["system-ui", "sans-serif"]  # fonts of the machine; the theme's own come from the network
ERRORS = (ValueError, RuntimeError, MemoryError, OSError, CommandError)
PICTURES = [".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm"]
MODEL_QUEUE = {"concurrency_limit": 4, "concurrency_id": "models", "show_progress": "hidden"}
QUEUE_SIZE = 16


def short_errors(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a handler so that the page shows its errors in one line."""

    @functools.wraps(function)
    def plain(*values: Any) -> Any:
        try:
            return function(*values)
        except ERRORS as error:
            raise shown_error(error) from error

    return plain


def short_errors_of_steps(function: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """Do the same for a handler that yields."""

    @functools.wraps(function)
    def steps(*values: Any) -> Iterator[Any]:
        try:
            yield from function(*values)
        except ERRORS as error:
            raise shown_error(error) from error

    return steps


def shown_error(error: Exception) -> gr.Error:
    """Return the error as the page shows it."""
    text = one_line(error, 300, "out of memory; choose fewer or smaller images")
    return gr.Error(text, title="This did not work", print_exception=False)


def whole(value: float | None, name: str) -> int:
    """Return the whole number of a form field."""
    if value is None or value != int(value):
        raise ValueError(f"{name} is {'empty' if value is None else value}; give a whole number")
    return int(value)


class Page:
    """Handlers of the page and their shared state.

    Args:
        models: pipelines that the page offers.
        folder: folder for results.
        max_pixels: largest number of pixels of a photograph.
    """

    def __init__(self, models: ModelList, folder: str, max_pixels: int):
        self.models, self.folder, self.max_pixels = models, folder, max_pixels
        self.jobs = Jobs()

    def cancel(self, tab: str) -> Callable[[gr.Request], None]:
        """Return the handler of a tab's Cancel button."""

        def handler(request: gr.Request) -> None:
            self.jobs.cancel(f"{request.session_hash}/{tab}")

        return handler

    # --- Generate ----------------------------------------------------------------------------------------------------

    def labels_of(self, name: str | None) -> dict[str, Any]:
        """Return the field of class names for a model; hidden for an unconditional model."""
        pipeline = self.models(name)
        named = pipeline.id2label
        choices = [(named.get(index, f"class {index}"), index) for index in range(pipeline.num_classes or 0)]
        return gr.update(choices=choices, value=[choices[0][1]] if choices else [], visible=bool(choices))

    @property
    def choose_generator(self) -> Callable[..., Any]:
        """Return the handler that shows class names and schedulers of the chosen model."""
        return short_errors(
            lambda name: (self.labels_of(name), gr.update(choices=scheduler_names(self.models(name)), value=AS_SAVED))
        )

    @staticmethod
    def generate_settings(
        labels: list[int] | None, number: float, seed: float | None, steps: float, scale: float, *rest: Any
    ) -> GenerateSettings:
        """Return the settings of the form."""
        start, stop, scheduler = rest or (0.0, 1.0, AS_SAVED)
        if not start <= stop:
            raise ValueError(f"guidance begins at {start:g} and ends at {stop:g}; it must end later")
        number, seed, steps = whole(number, "number"), whole(seed, "seed"), whole(steps, "steps")
        return GenerateSettings(tuple(labels or ()), number, seed, steps, float(scale), (start, stop), scheduler)

    def generate(self, name: str | None, *values: Any) -> Iterator[tuple[Any, str]]:
        """Yield (gallery, status): previews during denoising, then the files."""
        *form, request = values
        settings, pipeline = self.generate_settings(*form), self.models(name)
        yield gr.skip(), "waiting …"
        try:
            for item in self.jobs.run(
                f"{request.session_hash}/generate", lambda report: generate(pipeline, settings, report)
            ):
                if isinstance(item, tuple):
                    step, steps, previews = item
                    yield gr.skip() if previews is None else previews, f"step {step} of {steps}"
        except Cancelled:
            yield gr.skip(), "Cancelled."
            return
        yield save_images(item, str(name), settings, self.folder), f"{len(item)} images. Each PNG has its settings."

    # --- Restore -----------------------------------------------------------------------------------------------------

    def choose_restorer(self, name: str | None, path: str | None) -> tuple[Any, Any]:
        """Return the fields of noise level and task for a model, with the noise level of the photograph."""
        config = self.models(name).model.config
        tasks = [(f"task {task}", task) for task in range(config.num_tasks or 0)]
        takes = config.sigma_conditioning is not None
        level = noise_level(path, self.max_pixels)[1] if takes and path else 0.0
        return (
            gr.update(visible=takes, value=round(min(level, 100.0), 1)),
            gr.update(choices=tasks, value=0 if tasks else None, visible=bool(tasks)),
        )

    def restore(
        self, name: str | None, path: str | None, sigma: float, task: int | None, strength: float, bits: int, *rest: Any
    ) -> Iterator[tuple[Any, Any, str]]:
        """Yield (before and after, file, status)."""
        (request,) = rest
        if not path:
            read_upload(path, self.max_pixels)  # raises
        settings, pipeline = RestoreSettings(sigma, task, strength, bits), self.models(name)
        yield gr.skip(), gr.skip(), "waiting …"
        try:
            for item in self.jobs.run(
                f"{request.session_hash}/restore",
                lambda report: restore(pipeline, path, settings, self.max_pixels, self.folder, report),
            ):
                if len(item) == 2:
                    yield gr.skip(), gr.skip(), f"tile {item[0]} of {item[1]}"
        except Cancelled:
            yield gr.skip(), gr.skip(), "Cancelled."
            return
        before, after, file, line = item
        yield (before, after), gr.update(value=file, interactive=True), line

    # --- Compare -----------------------------------------------------------------------------------------------------

    def compare(self, first: str, second: str, path: str | None, sigma: float, *values: Any) -> Iterator[tuple]:
        """Yield (image of the first model, image of the second, table, status)."""
        *form, request = values
        names = (first, second)
        if all(name in self.models.restorers for name in names):
            inputs: Any = (read_upload(path, self.max_pixels), RestoreSettings(sigma))
        elif all(name in self.models.generators for name in names):
            inputs = self.generate_settings(*form)
        else:
            raise ValueError("choose two generators or two restorers")
        pipelines = [self.models(name) for name in names]
        results: list[Any] = []
        try:
            for name, pipeline in zip(names, pipelines, strict=True):
                yield gr.skip(), gr.skip(), gr.skip(), f"{name} …"
                work = functools.partial(compare, pipeline, inputs)
                for item in self.jobs.run(f"{request.session_hash}/compare", work):
                    if isinstance(item, tuple):
                        yield gr.skip(), gr.skip(), gr.skip(), f"{name}: {item[0]} of {item[1]}"
                results.append(item)
        except Cancelled:
            yield gr.skip(), gr.skip(), gr.skip(), "Cancelled."
            return
        rows = [
            [name, f"{r.parameters / 1e6:.2f} M", f"{r.macs / 1e9:.3g} G", f"{r.seconds:.2f}"]
            for name, r in zip(names, results, strict=True)
        ]
        yield results[0].image, results[1].image, rows, "Done. MACs are of one forward pass for one image."

    def refresh_compare(self, first: str | None) -> tuple[Any, Any, Any]:
        """Return the fields for a comparison with this model: class names, or a photograph and its noise level."""
        generates = first in self.models.generators
        labels = self.labels_of(first) if generates else gr.update(visible=False)
        return labels, gr.update(visible=generates), gr.update(visible=not generates)


def build(models: ModelList, folder: str, max_pixels: int) -> gr.Blocks:
    """Build the page without serving it."""
    page = Page(models, folder, max_pixels)
    with gr.Blocks(title="IPT-V2 Diffusion", analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
        gr.Markdown("# IPT-V2 Diffusion\nGenerate images, restore photographs and compare models on this machine.")
        if models.generators:
            with gr.Tab("Generate"):
                generate_tab(page, blocks)
        if models.restorers:
            with gr.Tab("Restore"):
                restore_tab(page, blocks)
        with gr.Tab("Compare"):
            compare_tab(page, blocks)
    return blocks.queue(max_size=QUEUE_SIZE)


def sampling_fields() -> list[Any]:
    """Create the fields of class names, number, seed, steps and guidance."""
    labels = gr.Dropdown(label="Classes", info="Type to search.", multiselect=True, filterable=True)
    with gr.Row():
        number = gr.Slider(1, 16, 4, step=1, label="Images of each class", min_width=240)
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=240)
    with gr.Row():
        steps = gr.Slider(1, 250, 25, step=1, label="Steps", min_width=240)
        scale = gr.Slider(1, 10, 3, step=0.1, label="Guidance scale", min_width=240)
    return [labels, number, seed, steps, scale]


def buttons(verb: str) -> tuple[gr.Button, gr.Button]:
    """Create the start and cancel buttons."""
    with gr.Row():
        return gr.Button(verb, variant="primary", min_width=120), gr.Button("Cancel", min_width=120)


def generate_tab(page: Page, blocks: gr.Blocks) -> None:
    """Create the tab that generates images from class labels."""
    names = list(page.models.generators)
    with gr.Row():
        with gr.Column(min_width=300):
            name = gr.Dropdown(names, value=names[0], label="Model")
            fields = sampling_fields()
            with gr.Accordion("More", open=False):
                start = gr.Slider(0, 1, 0, step=0.05, label="Guidance begins at", info="fraction of the steps")
                stop = gr.Slider(0, 1, 1, step=0.05, label="Guidance ends at", info="fraction of the steps")
                scheduler = gr.Dropdown([AS_SAVED], value=AS_SAVED, label="Scheduler")
            run, cancel = buttons("Generate")
        with gr.Column(scale=2, min_width=300):
            gallery = gr.Gallery(
                label="Images", columns=4, height=520, object_fit="contain", format="png", interactive=False,
                buttons=["download", "fullscreen"], elem_id="images",
            )  # fmt: skip
            status = gr.Markdown(elem_id="generate-status")
    chosen = {"fn": page.choose_generator, "inputs": name, "outputs": [fields[0], scheduler], "show_progress": "hidden"}
    blocks.load(**chosen)
    name.change(**chosen)
    run.click(
        with_request(page.generate),
        [name, *fields, start, stop, scheduler],
        [gallery, status],
        api_name="generate",
        **MODEL_QUEUE,
    )
    cancel.click(page.cancel("generate"), queue=False, api_visibility="private")


def restore_tab(page: Page, blocks: gr.Blocks) -> None:
    """Create the tab that restores a photograph."""
    names = list(page.models.restorers)
    shipped = Path(DEFAULT_MODEL).name
    with gr.Row():
        with gr.Column(min_width=300):
            photograph = gr.File(label="Photograph", file_types=PICTURES, type="filepath", height=120)
            name = gr.Dropdown(names, value=shipped if shipped in names else names[0], label="Model")
            task = gr.Dropdown(label="Task", visible=False)
            sigma = gr.Slider(0, 100, 0, step=0.1, label="Noise level σ", info="Estimated; on the 0–255 scale.")
            strength = gr.Slider(0, 1, 1, step=0.05, label="Strength", info="0: the photograph, 1: fully restored.")
            bits = gr.Radio([("8 bits", 8), ("16 bits", 16)], value=8, label="Bits per channel of the download")
            run, cancel = buttons("Restore")
        with gr.Column(scale=2, min_width=300):
            slider = gr.ImageSlider(
                label="Before and after (scroll to zoom)", type="pil", format="png", interactive=False, max_height=560,
                buttons=["fullscreen"], elem_id="before-after",
            )  # fmt: skip
            status = gr.Markdown(elem_id="restore-status")
            download = gr.DownloadButton("Download PNG", interactive=False)
    chosen = {"fn": short_errors(page.choose_restorer), "inputs": [name, photograph], "outputs": [sigma, task]}
    for event in (blocks.load, name.change, photograph.upload):
        event(**chosen, show_progress="hidden", api_visibility="private")
    run.click(
        with_request(page.restore),
        [name, photograph, sigma, task, strength, bits],
        [slider, download, status],
        api_name="restore",
        **MODEL_QUEUE,
    )
    cancel.click(page.cancel("restore"), queue=False, api_visibility="private")


def compare_tab(page: Page, blocks: gr.Blocks) -> None:
    """Create the tab that runs two models on the same inputs."""
    names = [*page.models.generators, *page.models.restorers]
    generates = bool(page.models.generators)
    with gr.Row():
        first = gr.Dropdown(names, value=names[0], label="First model")
        alike = list(page.models.generators or page.models.restorers)
        second = gr.Dropdown(names, value=alike[-1], label="Second model")
    with gr.Column(visible=generates) as of_generators:
        fields = sampling_fields()
    with gr.Column(visible=not generates) as of_restorers:
        photograph = gr.File(label="Photograph", file_types=PICTURES, type="filepath", height=120)
        sigma = gr.Slider(0, 100, 0, step=0.1, label="Noise level σ", info="On the 0–255 scale, for both models.")
    run, cancel = buttons("Compare")
    status = gr.Markdown(elem_id="compare-status")
    with gr.Row():
        options = {"interactive": False, "format": "png", "buttons": ["download", "fullscreen"], "min_width": 260}
        images = [gr.Image(label=f"{which} model", height=360, **options) for which in ("First", "Second")]
    table = gr.Dataframe(headers=["model", "parameters", "MACs", "seconds"], interactive=False, buttons=[])
    chosen = {"inputs": first, "outputs": [fields[0], of_generators, of_restorers], "show_progress": "hidden"}
    for event in (blocks.load, first.change):
        event(short_errors(page.refresh_compare), **chosen, api_visibility="private")
    photograph.upload(
        short_errors(lambda path: round(min(noise_level(path, page.max_pixels)[1], 100.0), 1)), photograph, sigma
    )
    run.click(
        with_request(page.compare),
        [first, second, photograph, sigma, *fields],
        [*images, table, status],
        api_name="compare",
        **MODEL_QUEUE,
    )
    cancel.click(page.cancel("compare"), queue=False, api_visibility="private")


def with_request(function: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """Wrap a handler that yields: it receives Gradio's request after the fields, and its errors are one line."""
    steps = short_errors_of_steps(function)

    def handler(request: gr.Request, *values: Any) -> Iterator[Any]:
        yield from steps(*values, request)

    return handler


def serve(blocks: gr.Blocks, host: str, port: int, max_megabytes: int) -> None:
    """Serve the page in separate threads."""
    blocks.launch(
        server_name=host,
        server_port=port,
        theme=gr.themes.Default(font=FONTS, font_mono=["ui-monospace", "monospace"]),
        css="footer {display: none !important}",
        max_file_size=f"{max_megabytes}mb",
        prevent_thread_lock=True,
        share=False,
        quiet=True,
        inbrowser=False,
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        pwa=False,
    )
