"""Every link of a Markdown page, however it is written, and where it leads."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import PurePosixPath
from urllib.parse import unquote, urlsplit

from markdown_it import MarkdownIt

SCHEMES = {"http", "https", "mailto"}
LARGEST_IMAGE = 1_000_000
TARGETS = {"href", "src", "srcset", "poster", "data", "action", "background", "formaction", "xlink:href", "cite"}
PICTURES = {"img", "source", "video", "audio", "picture", "image"}
# Elements that run, load or hide something; nothing that a card says needs them.
ACTIVE = {"script", "iframe", "object", "embed", "form", "input", "button", "style", "link", "meta", "base", "svg"}
SCHEME = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)


@dataclass(frozen=True)
class Link:
    """One link: where to, the words for it (an image's alternative text), and whether it is an image."""

    target: str
    words: str
    image: bool = False


def link_problems(text: str, sizes: Mapping[str, int]) -> Iterator[str]:
    """Links and images whose target is not in the repository, leads out of it or is no web address; active HTML.

    Args:
        text: Markdown without its metadata block.
        sizes: {path in the repository: bytes}.
    """
    links, headings, active = read_page(text)
    yield from (f"holds a <{tag}> element" for tag in active)
    for link in links:
        if link.image and not link.words.strip():
            yield f"the image {link.target} has no alternative text"
        if what := _target_problem(link, sizes, headings):
            yield what


def _target_problem(link: Link, sizes: Mapping[str, int], headings: set[str]) -> str | None:
    target = link.target.strip()
    scheme = SCHEME.match(target)
    if scheme or target.startswith("//"):
        return _outward_problem(link, target)
    path = unquote(urlsplit(target).path)
    if not path:
        missing = urlsplit(target).fragment.lower() not in headings
        return f"links to the heading {target!r}, which is not there" if missing else None
    if "\\" in path or path.startswith("/") or ".." in PurePosixPath(path).parts:
        return f"links to {target}, which leads out of the repository"
    name = PurePosixPath(path).as_posix()
    if name not in sizes and not any(other.startswith(name + "/") for other in sizes):
        return f"links to {target}, which is not there"
    if link.image and sizes.get(name, 0) > LARGEST_IMAGE:
        return f"the image {target} has {sizes[name]:,} bytes; at most {LARGEST_IMAGE:,}"
    return None


def _outward_problem(link: Link, target: str) -> str | None:
    """A web address is fine for a link; a picture must be in the repository, or showing the card tells somebody."""
    if link.image:
        return f"the image {target} is not in the repository"
    name = urlsplit(target).scheme.lower()
    if name not in SCHEMES or (name != "mailto" and not urlsplit(target).hostname):
        return f"links to {target!r}, which is no web address"
    return None


def read_page(text: str) -> tuple[list[Link], set[str], list[str]]:
    """(links, anchors of headings, active elements) of a page."""
    parser = MarkdownIt("commonmark", {"html": True}).enable("table")
    parser.validateLink = lambda url: True  # type: ignore[method-assign]  # what it would drop in silence is to be told
    references: dict = {}
    tokens = parser.parse(text, references)
    links, headings, active = [], set(), []
    for number, token in enumerate(tokens):
        if token.type == "heading_open":
            headings.add(anchor(tokens[number + 1].content))
        for piece in token.children or [token]:
            if piece.type == "link_open":
                links.append(Link(str(piece.attrs["href"]), ""))
            elif piece.type == "image":
                links.append(Link(str(piece.attrs["src"]), piece.content, image=True))
            elif piece.type in ("html_inline", "html_block"):
                page = _Html()
                page.feed(piece.content)
                links += page.links
                active += page.active
    defined = (entry["href"] for entry in references.get("references", {}).values())
    known = {link.target for link in links}
    return links + [Link(target, "") for target in defined if target not in known], headings, active


def anchor(heading: str) -> str:
    """A heading's anchor as the Hub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


class _Html(HTMLParser):
    """Links and active elements of a piece of HTML."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[Link] = []
        self.active: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect what one element refers to."""
        values = {name: value or "" for name, value in attrs}
        if tag in ACTIVE or any(name.startswith("on") for name in values):
            self.active.append(tag)
        for name in TARGETS & set(values):
            targets = values[name].split(",") if name == "srcset" else [values[name]]
            for target in targets:
                is_image = tag in PICTURES
                self.links.append(Link((target.split() or [""])[0], values.get("alt", ""), is_image))
