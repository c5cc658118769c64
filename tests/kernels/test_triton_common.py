"""Devices where the Triton kernels may run, and a kernel that does not compile."""

import warnings

import pytest
import torch

from iptv2_diffusion.kernels import triton_common


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    """Forget earlier attempts."""
    monkeypatch.setattr(triton_common, "_problems", {})
    monkeypatch.setattr(triton_common, "_warned", set())


@pytest.fixture
def _suitable(monkeypatch):
    monkeypatch.setattr(triton_common, "unsuitable", lambda *device: None)


@pytest.mark.usefixtures("_suitable")
class TestAttempts:
    def test_one_that_runs_is_tried_once_for_each_key(self):
        tried = []
        for key in (1, 1, 2):
            assert triton_common.is_usable("a kernel", "cuda", 0, lambda: tried.append(None), key)
        assert len(tried) == 2

    def test_one_that_fails_warns_once_and_is_not_tried_again(self):
        tried = []

        def fail():
            tried.append(None)
            raise RuntimeError("out of registers\nand more")

        with pytest.warns(RuntimeWarning, match="a kernel does not run for .*plain formula is used: out of registers$"):
            assert not triton_common.is_usable("a kernel", "cuda", 0, fail, 1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not triton_common.is_usable("a kernel", "cuda", 0, fail, 1)
        assert len(tried) == 1
        assert triton_common.is_usable("another", "cuda", 0, lambda: None, 1)


class TestDevices:
    def test_a_cpu_is_not_a_reason_to_warn(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not triton_common.is_usable("a kernel", "cpu", None, pytest.fail)

    @pytest.mark.parametrize(
        ("capability", "version", "message"),
        [
            ((7, 5), "3.8.0", "compute capability 7.5; 8.0 or later"),
            ((9, 0), "2.3.1", "Triton is 2.3.1; 3.2 or later"),
            ((9, 0), None, "Triton is not installed"),
        ],
    )
    def test_what_is_too_old_warns_once(self, monkeypatch, capability, version, message):
        triton = pytest.importorskip("triton")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(triton_common, "triton", triton if version else None)
        if version:
            monkeypatch.setattr(triton, "__version__", version)
        with pytest.warns(RuntimeWarning, match=message):
            assert not triton_common.is_usable("a kernel", "cuda", 0, pytest.fail)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not triton_common.is_usable("a kernel", "cuda", 0, pytest.fail)


def test_without_triton_the_modules_still_import():
    """Without Triton, as in torch's CPU builds, the kernels are plain functions that nothing calls."""
    import subprocess
    import sys

    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from iptv2_diffusion.kernels import triton_fcsa\n"
        "print(triton_fcsa.supports(torch.empty(1, 4, 4, 24), 1, 2))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split() == ["False"], done.stderr


@pytest.mark.parametrize(("size", "block"), [(1, 16), (16, 16), (25, 32), (34, 64), (64, 64), (65, 128)])
def test_blocks_are_powers_of_two(size, block):
    assert triton_common.block_of(size) == block
