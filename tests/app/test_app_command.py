"""iptv2-app: its options, a port in use, a missing Gradio."""

import builtins
import socket

import pytest

from iptv2_diffusion.pipelines.app.app_cli import free_port, main, parse
from iptv2_diffusion.pipelines.command_line import CommandError


def test_only_this_machine_reaches_the_page_by_default():
    assert parse([]).host == "127.0.0.1"
    assert [folder.name for folder in parse([]).models] == ["assets"]


@pytest.mark.parametrize("option", ["--port=70000", "--max-pixels=0", "--max-megabytes=0"])
def test_options_out_of_range_are_refused(option, capsys):
    with pytest.raises(SystemExit):
        parse([option])
    assert "it must" in capsys.readouterr().err


def test_a_port_in_use_is_one_line(model_folder):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(CommandError, match=rf"port {port}: Address already in use; choose") as caught:
            main([str(model_folder), "--port", str(port)])
    assert "\n" not in str(caught.value)
    assert free_port("127.0.0.1", port) == port
    assert free_port("127.0.0.1", 0) > 0


def test_a_missing_gradio_names_the_command(model_folder, monkeypatch):
    real = builtins.__import__

    def without_gradio(name, *rest):
        if name == "gradio":
            raise ImportError("No module named 'gradio'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_gradio)
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")  # undoes what main sets
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "")
    with pytest.raises(CommandError, match=r'pip install "iptv2-diffusion\[app\]"'):
        main([str(model_folder), "--port", "0"])
