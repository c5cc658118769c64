"""The files of the Space: its settings, and its page on loopback."""

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import yaml

from iptv2_diffusion.pipelines.app.app_cli import free_port

ROOT = Path(__file__).parents[2]
SPACE = ROOT / "space"


def test_the_settings_name_the_app_and_the_version_of_the_wheel():
    settings = yaml.safe_load((SPACE / "README.md").read_text(encoding="utf-8").split("---")[1])
    assert settings["sdk"] == "gradio"
    assert (SPACE / settings["app_file"]).is_file()
    version = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"]
    assert f"iptv2_diffusion-{version}-" in (SPACE / "requirements.txt").read_text(encoding="utf-8")


def test_the_space_serves_the_page(model_folder):
    pytest.importorskip("gradio")
    port = free_port("127.0.0.1", 0)
    settings = {"GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(port), "IPTV2_MODELS": str(model_folder)}
    environment = {**os.environ, **settings, "PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1"}
    with subprocess.Popen([sys.executable, str(SPACE / "app.py")], env=environment) as process:
        try:
            assert "IPT-V2" in page_at(f"http://127.0.0.1:{port}", process)
        finally:
            process.send_signal(signal.SIGTERM)


def page_at(address, process):
    """The page's HTML, once it is served."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for _ in range(600):
        assert process.poll() is None, "the Space ended"
        try:
            return opener.open(address, timeout=10).read().decode()
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.5)
    raise AssertionError("no page after 5 minutes")
