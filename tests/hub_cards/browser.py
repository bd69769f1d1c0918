"""A real browser, driven by script: headless Chromium over its DevTools protocol."""

import base64
import json
import shutil
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

from fusedvlm.tests.phone import BROWSER


class Browser:
    """One page. `connection` is a websocket to it."""

    def __init__(self, connection):
        self.connection, self.number = connection, 0

    def call(self, method, **params):
        """A DevTools command and its result."""
        self.number += 1
        self.connection.send(json.dumps({"id": self.number, "method": method, "params": params}))
        while True:
            message = json.loads(self.connection.recv(timeout=60))
            if message.get("id") == self.number:
                assert "error" not in message, message
                return message["result"]

    def js(self, expression):
        """The value of an expression in the page."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def until(self, expression, seconds=60):
        """Wait for an expression to be true, and give its value."""
        until = time.monotonic() + seconds
        while not (value := self.js(expression)):
            assert time.monotonic() < until, (expression, self.js("document.body.innerText")[:1500])
            time.sleep(0.2)
        return value

    def size(self, width, height=900):
        """The window's size; below 500 pixels as a phone."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )

    def upload(self, selector, path: Path):
        """Choose a file."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def fill(self, selector, text):
        """Put text into a field as typing does."""
        self.js(f"""(() => {{ const e = document.querySelector({selector!r});
            const kind = e.tagName === "TEXTAREA" ? HTMLTextAreaElement : HTMLInputElement;
            Object.getOwnPropertyDescriptor(kind.prototype, "value").set.call(e, {json.dumps(str(text))});
            for (const name of ["input", "change", "blur"]) e.dispatchEvent(new Event(name, {{bubbles: true}})); }})()""")

    def click(self, selector):
        """Click what a selector finds."""
        self.js(f"document.querySelector({selector!r}).click()")

    def picture(self, path: Path):
        """Save what is seen."""
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))


@contextmanager
def browsing(address: str, folder: Path):
    """A `Browser` on a page."""
    from websockets.sync.client import connect

    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", "--no-first-run"]
    process = subprocess.Popen(
        [BROWSER, *options, f"--user-data-dir={folder}", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        until = time.monotonic() + 60
        while not (folder / "DevToolsActivePort").exists():
            assert time.monotonic() < until, "the browser did not start"
            time.sleep(0.1)
        port = (folder / "DevToolsActivePort").read_text().split()[0]
        import httpx

        pages = httpx.get(f"http://127.0.0.1:{port}/json", timeout=30).json()
        page = next(page for page in pages if page["type"] == "page")
        with connect(page["webSocketDebuggerUrl"], max_size=None) as connection:
            browser = Browser(connection)
            browser.call("Page.enable")
            browser.size(1400)
            browser.call("Page.navigate", url=address)
            yield browser
    finally:
        process.terminate()
        process.wait(30)
        shutil.rmtree(folder, ignore_errors=True)
