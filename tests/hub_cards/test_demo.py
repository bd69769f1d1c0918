"""The chat page in a real browser: upload, slide, ask, ask again, mistakes, a phone."""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fusedvlm.hub_cards.release.demo_page import demo_settings
from fusedvlm.tests import tiny
from fusedvlm.tests.hub_cards.browser import browsing
from fusedvlm.tests.phone import BROWSER

needs_gradio = pytest.mark.skipif(
    importlib.util.find_spec("gradio") is None, reason="gradio is not installed (pip install 'fusedvlm[space]')"
)
needs_browser = pytest.mark.skipif(
    BROWSER is None or importlib.util.find_spec("websockets") is None, reason="needs chromium and websockets (gradio's)"
)


@pytest.fixture
def page(tiny_family, tmp_path):
    """Address of `fusedvlm demo`, which a signal ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "NO_PROXY": "*",
    }  # fmt: skip
    # The real interpreter: a stand-in passes no signals on.
    command = [str(Path(sys.prefix) / "bin" / "python"), "-c", "from fusedvlm.cli import main; main()", "demo"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, str(tiny_family / "tiny-m7"), "--port", str(port)], env=environment, stdout=log, stderr=log
        )
    try:
        until = time.monotonic() + 180
        while True:
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
            assert time.monotonic() < until
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)


@needs_gradio
@needs_browser
def test_the_page_is_used_in_a_browser(page, tmp_path):
    tiny.picture(4, 90, 60).save(tmp_path / "scene.png")
    shots = Path(os.environ.get("FUSEDVLM_SCREENSHOTS", tmp_path))
    answers = "document.querySelector('#{}').innerText.split('confidence').length - 1"
    with browsing(page, tmp_path / "browser") as browser:
        browser.until("document.querySelector('#ask') !== null")
        browser.click("#ask")
        browser.until("document.body.innerText.includes('Choose an image first.')")
        browser.upload("input[type=file]", tmp_path / "scene.png")
        browser.until("document.querySelector('.image-frame img, .image-container img') !== null")
        first, second = "input[type=number][aria-label*='for m']", "input[type=number][aria-label*='beside']"
        browser.fill(first, 12)
        browser.fill(second, 3)
        browser.fill("#words textarea", "what is it?")
        browser.click("#ask")
        browser.until(f"{answers.format('other')} === 1")
        browser.until("document.querySelector('#words textarea').value === ''")
        assert "12 visual tokens" in browser.js("document.querySelector('#chat').innerText")
        assert "3 visual tokens" in browser.js("document.querySelector('#other').innerText")
        browser.picture(shots / "demo_wide.png")
        browser.fill("#words textarea", "which colour?")
        browser.click("#ask")
        browser.until(f"{answers.format('chat')} === 2 && {answers.format('other')} === 2")
        browser.until("document.querySelector('#words textarea').value === ''")
        assert "15 visual tokens" in browser.js("document.querySelector('#chat').innerText")  # 12 and m' = 3
        time.sleep(1)  # the button takes one click at a time
        browser.fill("#words textarea", " ")
        browser.click("#ask")
        browser.until("document.body.innerText.includes('Ask something about the image.')")
        assert browser.js(answers.format("chat")) == 2  # what was said is still there to see
        browser.size(400, 800)
        time.sleep(0.5)
        assert browser.js("document.documentElement.scrollWidth") <= 400
        browser.picture(shots / "demo_phone.png")
        browser.click("#anew")
        browser.until(f"{answers.format('chat')} === 0")


def test_what_is_offered(tiny_family, tmp_path):
    tiny.picture(1).save(tmp_path / "a.png")
    settings = demo_settings(str(tiny_family / "tiny-m7"), None, [tmp_path / "a.png"])
    assert settings["pictures"] == [str(tmp_path / "a.png")]
    assert Path(settings["model"]).is_absolute()
    assert demo_settings("ada/tiny", "v1", [])["revision"] == "v1"
    with pytest.raises(ValueError, match="no such picture"):
        demo_settings("ada/tiny", None, [tmp_path / "b.png"])
    with pytest.raises(ValueError, match="is a folder"):
        demo_settings(str(tiny_family / "tiny-m7"), "v1", [])
