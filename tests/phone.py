"""Does an HTML page fit a phone? Read from its text, and measured in a browser where there is one."""

import html
import re
import shutil
import subprocess
from pathlib import Path

NARROW = 400  # CSS pixels, a phone held upright
BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
# Browsers have a smallest window, frames have none.
FRAME = """<!doctype html><iframe id="phone" style="width:{width}px;height:800px;border:0" srcdoc="{page}"></iframe><script>
onload = () => {{ const page = document.getElementById("phone").contentDocument;
  const beside = [...page.body.querySelectorAll("*")].filter(e => !e.closest(".wide, pre") && e.getBoundingClientRect().right > {width} + 1);
  document.title = page.documentElement.scrollWidth + "|" + beside.map(e => e.tagName + " " + e.textContent.slice(0, 40)).join("; "); }};
</script>"""


def assert_fits_a_phone(page: Path, tmp_path: Path) -> None:
    """The page says that it is made for phones, wide things scroll in boxes of their own, nothing stands out at the side."""
    text = page.read_text(encoding="utf-8")
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    assert re.search(r"\.wide\b[^{}]*\{[^}]*overflow-x: auto", text)
    assert text.count("<table") == text.count('<div class="wide"><table') > 0
    if BROWSER is not None:
        width, beside = measured(text, tmp_path)
        assert width <= NARROW, f"{width} pixels wide: {beside}"
        assert not beside


def measured(text: str, tmp_path: Path, width: int = NARROW) -> tuple[int, str]:
    """Width of a page in a frame of `width` pixels, and what stands out of it."""
    tmp_path.mkdir(exist_ok=True)
    framed = tmp_path / "framed.html"
    framed.write_text(FRAME.format(width=width, page=html.escape(text)), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'browser'}", "--dump-dom"]
    done = subprocess.run([BROWSER, *options, framed.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    found, _, beside = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)[1].partition("|")
    return int(found), html.unescape(beside)
