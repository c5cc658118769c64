"""The page in a real browser, served by the real command: one server for all tests."""

import json
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from iptv2_diffusion.data.sixteen_bit import is_16_bit

pytest.importorskip("gradio", reason="the page needs Gradio: pip install '.[app]'")
playwright = pytest.importorskip("playwright.sync_api", reason="a browser is driven by Playwright")
ROOT = Path(__file__).parents[2]
SECONDS = 60_000  # timeout in ms; a loaded machine is slow


@pytest.fixture(scope="module")
def server(model_folder):
    """The address of the page, and its process."""
    command = [sys.executable, "-m", "iptv2_diffusion.pipelines.app.app_cli", str(model_folder), "--port", "0"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    watch = threading.Timer(300, process.kill)
    watch.start()
    line = process.stdout.readline()
    assert "http://" in line, process.communicate()
    yield line.split()[4], process
    process.kill()
    process.communicate()
    watch.cancel()


@pytest.fixture(scope="module")
def browser():
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, server):
    """The page, freshly loaded. It must not send requests to another machine."""
    page = browser.new_page()
    page.set_default_timeout(SECONDS)
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(server[0])
    page.get_by_role("button", name="Generate").wait_for()
    yield page
    assert not [url for url in asked if not url.startswith((server[0], "data:", "blob:"))]
    page.close()


def says(page, tab, text):
    page.locator(f"#{tab}-status", has_text=text).wait_for()


def first_image(page, folder):
    """The first image of the gallery, as the page serves it."""
    address = page.locator("#images img").first.get_attribute("src")
    path = folder / "first.png"
    path.write_bytes(page.request.get(address).body())
    return Image.open(path)


def test_generate_and_change_the_seed(page, tmp_path):
    images = []
    for seed in (0, 7):
        page.get_by_label("Seed").first.fill(str(seed))
        page.get_by_role("button", name="Generate", exact=True).click()
        page.locator(f"#images img[src*='01-seed{seed}']").first.wait_for()
        says(page, "generate", "4 images")
        images.append(first_image(page, tmp_path))
        assert json.loads(images[-1].text["parameters"])["seed"] == seed
    assert images[0].tobytes() != images[1].tobytes()


def test_cancel_stops_the_job_and_the_page_still_works(page):
    page.get_by_label("number input for Steps").first.fill("250")
    page.get_by_label("number input for Steps").first.press("Enter")
    page.get_by_role("button", name="Generate", exact=True).click()
    says(page, "generate", "of 250")
    page.get_by_role("button", name="Cancel").first.click()
    says(page, "generate", "Cancelled.")


def test_restore_a_photograph_and_refuse_a_broken_one(page, tmp_path):
    page.get_by_role("tab", name="Restore").click()
    field = page.locator("input[type=file]").first
    (tmp_path / "broken.png").write_bytes(b"no picture")
    field.set_input_files(tmp_path / "broken.png")
    page.get_by_text("broken.png cannot be read as an image").first.wait_for()
    page.get_by_label("Remove this file").or_(page.get_by_label("Clear")).first.click()

    noise = np.random.default_rng(0).integers(0, 256, (40, 48, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    page.locator("input[type=file]").first.set_input_files(tmp_path / "noise.png")
    page.get_by_text("noise.png").first.wait_for()
    page.get_by_label("16 bits").check()
    page.get_by_role("button", name="Restore", exact=True).click()
    says(page, "restore", "48 × 40 pixels")
    before_after = page.locator("#before-after")
    before_after.locator("img").first.wait_for()
    handle = before_after.locator(".outer, [role=slider]").first
    left = handle.bounding_box()
    page.mouse.move(left["x"] + left["width"] / 2, left["y"] + left["height"] / 2)
    page.mouse.down()
    page.mouse.move(left["x"] - 60, left["y"] + 20, steps=4)
    page.mouse.up()
    assert handle.bounding_box()["x"] < left["x"]
    with page.expect_download() as download:
        page.get_by_role("button", name="Download PNG").or_(page.get_by_text("Download PNG")).first.click()
    assert download.value.suggested_filename == "noise-restored.png"
    assert is_16_bit(Path(download.value.path()).rename(tmp_path / "result.png"))


def test_ctrl_c_ends_without_a_traceback(server):
    process = server[1]
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert errors.endswith("stopped\n")
