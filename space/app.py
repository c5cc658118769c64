"""A Hugging Face Space that serves the web page of iptv2-app. See README.md beside this file."""

import os
import sys

from iptv2_diffusion.pipelines.app.app_cli import main

LIMITS = ["--max-pixels", "4000000", "--max-megabytes", "20"]  # of a photograph; a Space's CPU has two cores

if __name__ == "__main__":
    models = os.environ.get("IPTV2_MODELS", "assets").split()
    host = os.environ.get("GRADIO_SERVER_NAME", "0.0.0.0")  # a Space is reached from outside
    port = os.environ.get("GRADIO_SERVER_PORT", "7860")
    sys.exit(main([*models, "--host", host, "--port", port, *LIMITS]))
