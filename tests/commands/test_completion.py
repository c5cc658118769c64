"""The tab key: options, choices and names of recipes, as a shell asks for them."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("argcomplete")


@pytest.mark.parametrize(
    ("module", "line", "expected"),
    [
        ("iptv2_diffusion.pipelines.restore_cli", "iptv2-restore --str", {"--strength"}),
        ("iptv2_diffusion.pipelines.restore_cli", "iptv2-restore --bits ", {"8", "16"}),
        ("iptv2_diffusion.pipelines.app.app_cli", "iptv2-app --max-p", {"--max-pixels"}),
        ("iptv2_diffusion.pipelines.convert_cli", "iptv2-convert u", {"udit"}),
        ("iptv2_diffusion.pipelines.export_cli", "iptv2-export --format o", {"onnx"}),
        ("iptv2_diffusion.commands.generate", "iptv2-generate --list", {"--list-classes"}),
        ("iptv2_diffusion.commands.train", "iptv2-train --config emoji", {"emoji64", "emoji64-long"}),
        ("iptv2_diffusion.commands.fid", "iptv2-fid --num_inf", {"--num_inference_steps"}),
    ],
)
def test_a_shell_gets_completions_without_importing_torch(module, line, expected, tmp_path):
    found = tmp_path / "found"
    request = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9"}
    request |= {"_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_STDOUT_FILENAME": str(found), "_ARGCOMPLETE_SHELL": "zsh"}
    program = (
        f"import sys; sys.modules['torch'] = None; sys.argv = [{line.split()[0]!r}]; from {module} import run; run()"
    )
    subprocess.run([sys.executable, "-c", program], env={**os.environ, **request}, check=True, timeout=60)
    assert {word.split(":")[0].strip() for word in found.read_text(encoding="utf-8").splitlines()} == expected
