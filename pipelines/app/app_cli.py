"""iptv2-app: a web page on this machine that generates images, restores photographs and compares models.

    iptv2-app                                   (the pipelines under assets/, at http://127.0.0.1:7860)
    iptv2-app runs/emoji64/pipeline assets/iptv2-denoise-color --port 8000

The page offers only the pipelines of the folders given here. Only this machine can open it, unless --host is given. It
sends nothing to the network. Ctrl-C stops it and deletes uploads and results.
"""

from __future__ import annotations

import argparse
import os
import socket
import tempfile
import threading
from collections.abc import Sequence

from iptv2_diffusion.completion import complete
from iptv2_diffusion.files import printable, shipped

from ..command_line import CommandError, run_command
from ..devices import find_device

__all__ = ["main", "run"]


def run() -> None:
    """The console script."""
    run_command(main, "stopped")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        "iptv2-app", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "models",
        nargs="*",
        type=shipped,
        metavar="FOLDER",
        help="pipeline folders, and folders that contain pipeline folders [assets]",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: all addresses [127.0.0.1]")
    parser.add_argument("--port", type=int, default=7860, help="port to listen on; 0: a free port [7860]")
    parser.add_argument(
        "--device", default="auto", help="device to run on: cpu, cuda, mps, or auto for the GPU if there is one [auto]"
    )
    parser.add_argument(
        "--max-pixels", type=int, default=16_000_000, help="largest number of pixels of a photograph [16000000]"
    )
    parser.add_argument("--max-megabytes", type=int, default=100, help="largest file to upload, in MB [100]")
    complete(parser)
    arguments = parser.parse_args(argv)
    for option in ("max_pixels", "max_megabytes"):
        if getattr(arguments, option) < 1:
            parser.error(f"--{option.replace('_', '-')} is {getattr(arguments, option)}; it must be at least 1")
    if not 0 <= arguments.port <= 65535:
        parser.error(f"--port is {arguments.port}; it must be in [0, 65535]")
    arguments.models = arguments.models or [shipped("assets")]
    return arguments


def main(argv: Sequence[str]) -> int:
    """Serve the page until Ctrl-C."""
    arguments = parse(argv)
    from .model_list import find_models

    models = find_models(arguments.models)
    port = free_port(arguments.host, arguments.port)
    with tempfile.TemporaryDirectory(prefix="iptv2-app-", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # uploads and results, deleted when the page stops
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        try:
            import gradio  # noqa: F401
        except ImportError as error:
            raise CommandError(f'the page needs Gradio ({error}); run pip install "iptv2-diffusion[app]"') from error
        from .page import build, serve

        models.device = find_device(arguments.device)
        if models.device == "cpu":
            from iptv2_diffusion.memory import keep_freed_memory

            keep_freed_memory()
        page = build(models, folder, arguments.max_pixels)
        try:
            serve(page, arguments.host, port, arguments.max_megabytes)
            shown = "127.0.0.1" if arguments.host in ("0.0.0.0", "::") else arguments.host
            print(f"the page is at http://{shown}:{port} (Ctrl-C stops it)", flush=True)
            threading.Event().wait()
        finally:
            page.close(verbose=False)
    return 0


def free_port(host: str, port: int) -> int:
    """Return the port, or a free one for 0. Raises a CommandError if the port cannot be used."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # allows a port that was just released
            listener.bind(address)
            listener.listen()
            return listener.getsockname()[1]
    except OSError as error:
        reason = f"{error.strerror or error}; choose another --port (0: a free port) or --host"
        raise CommandError(f"cannot listen on {printable(host)}, port {port}: {reason}") from error


if __name__ == "__main__":
    run()
