"""A repository on the hub that an adapter is published to: what is in it, one commit that changes it, and tags.

Whatever stops a call, the repository is as it was or as it was to be: all that is seen of it changes in one commit,
which is refused where the repository has moved since it was looked at.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_ft.errors import LoraFtError
from lora_ft.foreign.files import bytes_of
from lora_ft.hub import reason

# A hub that says nothing for so long will say nothing. Uploads and downloads are counted by the piece, not as a whole.
TIMEOUT_S = 120.0
AGAIN = "Call the same command again: it goes on where it stopped."
TOKEN = "set HF_TOKEN, or log in with `hf auth login`"


class PublishError(LoraFtError):
    """The hub did not take it; the message says why, and what to do."""

    lost = False
    """Whether it may have done so all the same, and only the answer was lost."""


@dataclass(frozen=True)
class State:
    """What is in a repository."""

    head: str
    """Its newest commit, 40 hex digits."""
    private: bool
    files: dict[str, str]
    """Of each file its digest: sha256 where it is stored as a large one, else what git knows it by."""

    def lacks(self, files: Mapping[str, Path]) -> list[str]:
        """Returns the names of the files that it has not, or not with these bytes."""
        return [name for name, path in files.items() if self.files.get(name) not in _digests(path)]


class Remote:
    """A model repository on the hub. Its methods raise PublishError, and change one thing each."""

    def __init__(self, repo: str) -> None:
        from huggingface_hub import HfApi, get_token, is_offline_mode

        self.repo, self.api = repo, HfApi()
        if is_offline_mode():
            raise PublishError(f"{repo}: HF_HUB_OFFLINE is set, so nothing can be published: take it away.")
        if get_token() is None:
            raise PublishError(f"{repo}: publishing needs a token that may write: {TOKEN}.")

    def state(self, revision: str | None = None) -> State | None:
        """Returns what is in the repository, None where there is none that the token can see.

        Args:
            revision: a branch or a pull request; None for the main branch.
        """
        from huggingface_hub import RepoFile
        from huggingface_hub.errors import RepositoryNotFoundError

        with self._told("reading"):
            try:
                info = self.api.model_info(self.repo, revision=revision)
            except RepositoryNotFoundError:
                return None
            entries = list(self.api.list_repo_tree(self.repo, recursive=True, revision=info.sha))
        files = {e.path: e.lfs.sha256 if e.lfs else e.blob_id for e in entries if isinstance(e, RepoFile)}
        return State(str(info.sha), bool(info.private), files)

    def bytes_of(self, name: str, commit: str, most_bytes: int) -> bytes:
        """Returns what a file held at a commit."""
        from huggingface_hub import hf_hub_download

        with self._told(f"reading {name}"):
            file = hf_hub_download(self.repo, name, revision=commit, endpoint=self.api.endpoint)
        return bytes_of(Path(file), most_bytes, PublishError)

    def create(self, *, public: bool) -> None:
        """Makes the repository, unless there is one of that name."""
        with self._told("making the repository"):
            self.api.create_repo(self.repo, private=not public, exist_ok=True)

    def commit(
        self, files: Mapping[str, Path], gone: Sequence[str], message: str, parent: str, *, request: bool = False
    ) -> str:
        """Returns the commit, or with `request` the pull request, that has `files` and not `gone`.

        Args:
            parent: the commit that the repository was looked at.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        changes: list[Any] = [CommitOperationAdd(name, str(path)) for name, path in sorted(files.items())]
        changes += [CommitOperationDelete(name) for name in sorted(gone)]
        try:
            with self._told("writing"):
                done = self.api.create_commit(
                    self.repo, changes, commit_message=message, parent_commit=parent, create_pr=request
                )
        except PublishError as error:
            if not error.lost:
                raise
            # What was asked may be done, with only the answer lost.
            found = self._found(message, request)
            if found is None or found[1].lacks(files) or found[1].files.keys() & set(gone):
                raise
            return found[0]
        return str(done.pr_revision if request else done.oid)

    def _found(self, message: str, request: bool) -> tuple[str, State] | None:
        """Returns the commit or request that may have been made, and what is in it."""
        try:
            name = self.request(message) if request else None
            state = self.state(name) if name or not request else None
        except PublishError:
            return None
        return None if state is None else (name or state.head, state)

    def request(self, title: str) -> str | None:
        """Returns the open pull request of that title, such as `refs/pr/3`."""
        with self._told("reading the pull requests"):
            found = self.api.get_repo_discussions(
                self.repo, discussion_type="pull_request", discussion_status="open"
            )  # fmt: skip
            return next((f"refs/pr/{one.num}" for one in found if one.title == title), None)

    def tag(self, commit: str) -> str:
        """Returns the tag of a commit: the one it has, or else the next of v1, v2, ... Tags never move."""
        with self._told("tagging"):
            tags = {tag.name: tag.target_commit for tag in self.api.list_repo_refs(self.repo).tags}
            for name, target in tags.items():
                if target == commit:
                    return name
            numbers = [int(found[1]) for name in tags if (found := re.fullmatch(r"v([0-9]{1,9})", name))]
            name = f"v{max(numbers, default=0) + 1}"
            self.api.create_tag(self.repo, tag=name, revision=commit)
            return name

    def make_public(self) -> None:
        """Lets everybody read the repository."""
        with self._told("making the repository public"):
            self.api.update_repo_settings(self.repo, private=False)

    @contextmanager
    def _told(self, doing: str) -> Iterator[None]:
        """Turns what stops a call of the hub into an error that says what to do."""
        import httpx2
        from huggingface_hub import get_session

        # Of most of its calls the client says that they may take for ever.
        asking = get_session().event_hooks["request"]
        asking.append(_limited)
        try:
            yield
        except LoraFtError:
            raise
        # What answers in the hub's place has no such keys; and the uploader, a library of its own, raises many kinds.
        except (httpx2.HTTPError, OSError, RuntimeError, ValueError, KeyError) as error:
            raise _error_of(error, f"{self.repo}: {doing}") from None
        finally:
            asking.remove(_limited)


def _limited(request: Any) -> None:
    """Gives a request of the hub's client a limit of time wherever it has none."""
    limits = request.extensions.get("timeout") or {}
    request.extensions["timeout"] = {
        what: TIMEOUT_S if limits.get(what) is None else limits[what] for what in ("connect", "read", "write", "pool")
    }


def _error_of(error: Exception, doing: str) -> PublishError:
    """Returns what to say of an error that the hub's client raised."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # Of the upload of a file the client raises one that names the file, for the one that says why.
    while error.__cause__ is not None and not isinstance(error, HfHubHTTPError | ValueError):
        error = error.__cause__  # type: ignore[assignment]
    if isinstance(error, HFValidationError):
        return PublishError(f"{doing}: {reason(error)}.")
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        return _refusal(error, doing)
    if "Invalid metadata in README.md" in str(error):
        said = " ".join(str(error).split())
        return PublishError(f"{doing}: the hub does not take the card: {said.removeprefix('Invalid metadata in ')}")
    unanswered = PublishError(f"{doing}: the hub did not answer ({reason(error).rstrip('.')}). {AGAIN}")
    unanswered.lost = True
    return unanswered


def _refusal(error: Any, doing: str) -> PublishError:
    """Returns what to say of an answer that is a refusal."""
    status, said = error.response.status_code, error.server_message or ""
    said = f" ({' '.join(said.split())})" if said else ""
    if status == 401 and _is_refused_token(error.response):
        return PublishError(
            f"{doing}: the hub does not know this token{said}: it may have ended; {TOKEN} with another."
        )
    if status in (401, 403, 404):
        return PublishError(
            f"{doing}: this token may not{said}: give it the right to write there, which a fine-grained token has for "
            "each namespace or repository apart, or choose another namespace."
        )
    if status in (409, 412):
        return PublishError(
            f"{doing}: somebody else has changed the repository in the meantime{said}. Look at what came, then call "
            "the same command again: it begins from what is there now."
        )
    if status == 413:
        return PublishError(f"{doing}: the hub takes no more{said}: make room in the namespace, or choose another.")
    if status == 429:
        wait = error.response.headers.get("Retry-After")
        after = f"in {wait} seconds" if wait else "in some minutes"
        return PublishError(f"{doing}: too many requests of this account{said}. Call the same command again {after}.")
    told = PublishError(f"{doing}: the hub answered with {status}{said}. {AGAIN}")
    # Whoever stands between may say so, when the hub has done it.
    told.lost = status >= 500
    return told


def _is_refused_token(response: Any) -> bool:
    """Returns whether it is the token that was refused: of a repository that it may not see the hub says 401, too."""
    return bool(
        response.status_code == 401
        and "Invalid credentials" in response.headers.get("X-Error-Message", "")
    )  # fmt: skip


def _digests(path: Path) -> tuple[str, str]:
    """Returns what the hub may know a file's bytes by: their sha256, and the sha1 of git."""
    large, small = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            large.update(chunk)
            small.update(chunk)
    return large.hexdigest(), small.hexdigest()
