"""The end of a command: its exit code and its output."""

import signal

import pytest

from iptv2_diffusion.training.errors import ConfigError, run_main


@pytest.fixture(autouse=True)
def _own_signal_handler():
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def raising(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("main", "code", "printed"),
    [
        (lambda: None, 0, ""),
        (lambda: 3, 3, ""),
        (raising(ConfigError("steps is 0; use 1")), 1, "error: steps is 0; use 1\n"),
        (raising(KeyboardInterrupt("12 of 20 images are whole")), 130, "12 of 20 images are whole\n"),
    ],
)
def test_exit_code_and_one_line(main, code, printed, capsys):
    with pytest.raises(SystemExit) as end:
        run_main(main)
    assert end.value.code == code
    assert capsys.readouterr().err == printed


def test_ctrl_c_without_a_message_says_how_to_continue(capsys):
    with pytest.raises(SystemExit):
        run_main(raising(KeyboardInterrupt()))
    assert capsys.readouterr().err.startswith("stopped: ")
