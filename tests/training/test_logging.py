"""metrics.jsonl, the loss curve and the one-line errors."""

import errno
import math
import resource
import signal
import sys

import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file

from iptv2_diffusion.training.errors import ConfigError, UserError, run_main, user_errors
from iptv2_diffusion.training.logging import MetricLog, ProgressBar, available_trackers, plot_curves, read_metrics


def write(path, steps, **options):
    log = MetricLog(path, **options)
    for step in steps:
        log.write(step, {"loss": 1.0 / step})


def test_a_resumed_log_equals_an_uninterrupted_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 6))
    path.write_text(path.read_text() + '{"step": 6, "lo')  # killed while writing
    write(path, range(4, 8), resumed_step=3)
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4, 5, 6, 7]


def test_a_new_run_starts_a_new_log(tmp_path):
    write(tmp_path / "m", [1, 2])
    write(tmp_path / "m", [1])
    assert [row["step"] for row in read_metrics(tmp_path / "m")] == [1]


def test_nan_is_written_as_null(tmp_path):
    MetricLog(tmp_path / "m").write(1, {"loss": math.nan})
    assert read_metrics(tmp_path / "m")[0]["loss"] is None


def test_other_processes_write_nothing(tmp_path):
    write(tmp_path / "m", [1], enabled=False)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("count", [1, 5, 200])
def test_the_curve_is_a_picture(tmp_path, count):
    write(tmp_path / "m", range(1, count + 1))
    assert plot_curves(tmp_path / "m", tmp_path / "curve.png", curves=("loss", "none"), title="run")
    assert Image.open(tmp_path / "curve.png").width > 400


def test_no_curve_without_values(tmp_path):
    assert not plot_curves(tmp_path / "missing", tmp_path / "curve.png")


def test_trackers():
    assert available_trackers("tensorboard") == (["tensorboard"], [])
    assert available_trackers("none") == ([], [])
    with pytest.raises(ConfigError, match="report_to is 'mlflow'; choose"):
        available_trackers("mlflow")


def test_the_bar_estimates_the_end_from_the_time_spent(capsys):
    bar = ProgressBar(10**6, initial=0, batch_size=4)
    for step in range(1, 11):
        bar.update(step, {"loss": 0.5}, fraction=step / 40)
    assert bar._bar.total == 40
    assert bar.images_per_second > 0
    bar.close()
    assert "loss=0.5" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------------------
# Errors


def leave(main):
    with pytest.raises(SystemExit) as caught:
        run_main(main)
    return caught.value.code


def raiser(error):
    def main():
        raise error

    return main


def test_user_errors_are_one_line_and_exit_code_1(capsys):
    assert leave(raiser(UserError("batch 3 of 2: use 1"))) == 1
    assert capsys.readouterr().err == "error: batch 3 of 2: use 1\n"
    assert leave(lambda: 0) == 0


def test_a_full_disk_anywhere_is_one_line(capsys):
    assert leave(raiser(OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl"))) == 1
    assert "No space left on device at metrics.jsonl: make room" in capsys.readouterr().err


def test_a_full_disk_is_known_behind_safetensors_too(tmp_path):
    """The operating system's limit on file sizes acts like a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(SafetensorError) as caught:
            save_file({"a": torch.zeros(10_000)}, tmp_path / "a.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert leave(raiser(caught.value)) == 1
    with pytest.raises(UserError, match=r"File too large.*: make room"), user_errors(SafetensorError):
        raise caught.value


@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken"), KeyError("bug")])
def test_our_own_bugs_keep_their_traceback(error):
    with pytest.raises(type(error)):
        run_main(raiser(error))


def test_errors_of_libraries_become_one_line():
    with pytest.raises(UserError, match=r"^no such file$"), user_errors():
        raise ValueError("no such\n   file")
    with pytest.raises(KeyError), user_errors(ValueError):
        raise KeyError("bug")


def test_help_imports_nothing_heavy_of_ours():
    """`--help` of the train scripts must answer at once."""
    import subprocess

    ours = "iptv2_diffusion.training.options"
    code = f"import sys; sys.modules['accelerate'] = sys.modules['datasets'] = None; import {ours}"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
