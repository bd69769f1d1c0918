"""A request as the routes see it, what they answer, and who may do what."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from email.message import Message
from typing import TYPE_CHECKING, Any

from .hub_store import Commit, Repo, Store

if TYPE_CHECKING:
    from .hub_server import HubServer


@dataclass
class Answer:
    """What goes back; a body that is not bytes goes as JSON."""

    body: Any = b""
    status: int = 200
    headers: dict[str, Any] = field(default_factory=dict)


class Problem(Exception):
    """An answer with an error status; `fields` stand beside the message in its JSON."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        headers: dict[str, Any] | None = None,
        **fields: Any,
    ) -> None:
        super().__init__(message)
        line = " ".join(message.split()).encode("ascii", "replace").decode()  # all that a header holds
        named = {"X-Error-Message": line, **({"X-Error-Code": code} if code else {}), **(headers or {})}
        self.answer = Answer({"error": message, **fields}, status, named)


Reply = Answer | dict[str, Any] | list[Any]
Route = Callable[..., Reply]


class Routes(list[tuple[str, re.Pattern[str], Route]]):
    """Functions by method and path; the first that fits is taken."""

    def add(self, method: str, pattern: str) -> Callable[[Route], Route]:
        """Register a function for a path, whose groups are arguments: `{id}` a namespace/name, `{rev}` one segment."""
        expression = pattern.replace("{id}", r"(?P<repo>[^/]+/[^/]+?)").replace("{rev}", r"(?P<rev>[^/]+)")

        def register(function: Route) -> Route:
            self.append((method, re.compile(expression + r"/?"), function))
            return function

        return register


@dataclass
class Request:
    """A request whose body has arrived, from a user whose token is good, or from somebody without one."""

    server: "HubServer"
    method: str
    url: str
    query: dict[str, str]
    headers: Message
    body: bytes
    user: dict[str, Any] | None

    @property
    def store(self) -> Store:
        """What the Hub keeps."""
        return self.server.store

    def json(self) -> dict[str, Any]:
        """The body. Raises `Problem` for one that is no JSON object."""
        data = json.loads(self.body or b"{}")
        if not isinstance(data, dict):
            raise Problem(400, "The body must be a JSON object")
        return data

    def account(self) -> dict[str, Any]:
        """Who asks. Raises `Problem` for somebody without a token."""
        if self.user is None:
            raise Problem(401, "Invalid username or password.")
        return self.user

    def readable(self, repo_id: str) -> Repo:
        """The repository, if this user may see it. Raises `Problem`: missing and hidden ones look the same."""
        repo = next((repo for key, repo in self.store.repos.items() if key.lower() == repo_id.lower()), None)
        if repo is None or not self.store.can_read(repo, self.user):
            status, message = (404, "Repository not found") if self.user else (401, "Invalid username or password.")
            raise Problem(status, message, "RepoNotFound")
        return repo

    def may_write(self, namespace: str) -> None:
        """Raises `Problem` for somebody who may not write there."""
        user = self.account()
        if user["role"] != "write" or not self.store.owns(user, namespace):
            raise Problem(403, "Forbidden: you must use a write token to upload to a repository.")

    def writable(self, repo_id: str, rev: str = "") -> Repo:
        """The repository, if this user may write to it; to propose something, reading it is enough."""
        repo = self.readable(repo_id)
        proposed = "create_pr" in self.query or rev.startswith("refs/pr/")
        self.may_write(self.user["name"] if proposed and self.user else repo.id.split("/")[0])
        return repo

    def commit_of(self, repo: Repo, rev: str) -> Commit:
        """The commit that a revision names. Raises `Problem` for one that is none."""
        commit = repo.resolve(rev)
        if commit is None:
            raise Problem(404, f"Invalid rev id: {rev}", "RevisionNotFound")
        return commit

    def link(self, path: str) -> str:
        """Address of a path on this Hub."""
        return f"{self.server.endpoint}/{path}"
