"""Models and metrics on the hub: what of a repository is fetched, and what is said where it cannot be had."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from lora_ft.errors import SourceError
from lora_ft.foreign.files import PICKLES, WHY_NO_PICKLE

log = logging.getLogger(__name__)

# What a base needs; never a pickle, never code.
PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
# The same weights again, in their authors' own layout or in another precision.
IGNORED = ["*/*.safetensors", "consolidated*.safetensors"]
TIMEOUT_S = 10.0


class UnavailableError(Exception):
    """One source does not have it; the text says why, for the list of what was tried."""


def fetch(name: str, repo: str, revision: str | None, *, weights: bool = True) -> Path:
    """Returns the folder of a commit of a repository, named for the commit, from the local cache where need be.

    Args:
        name: what the user calls it, for the log.
        revision: branch, tag or commit; None for the main branch.
        weights: whether the weights are wanted too, beside configuration and tokenizer.

    Raises:
        UnavailableError: the hub and the cache do not have it. SourceError: it holds no safetensors.
    """
    import httpx2
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    wanted = [pattern for pattern in PATTERNS if weights or not pattern.endswith("safetensors")]
    patterns = {"allow_patterns": wanted, "ignore_patterns": IGNORED}
    try:
        info = HfApi().model_info(repo, revision=revision, timeout=TIMEOUT_S)
        stored = [file.rfilename for file in info.siblings or ()]
        if stored and not any(file.endswith(".safetensors") for file in stored):
            pickles = [file for file in stored if file.endswith(PICKLES)]
            only = f", but {pickles[0]}, {WHY_NO_PICKLE}" if pickles else ""
            raise SourceError(f"{repo} holds no safetensors{only}: choose a repository or a revision that does.")
        # The revision and not its commit, so that the cache also knows the name when the hub is out of reach.
        folder = snapshot_download(repo, revision=revision, **patterns)
    except HFValidationError:
        raise UnavailableError("it is neither a local folder nor a valid hub id") from None
    except GatedRepoError:
        raise UnavailableError("the model is gated and this account has no access to it") from None
    except RepositoryNotFoundError:
        raise UnavailableError("there is no such model, or it is private") from None
    except RevisionNotFoundError:
        raise UnavailableError(f"the model has no revision {revision}") from None
    except (httpx2.HTTPError, OfflineModeIsEnabled, LocalEntryNotFoundError, ValueError) as error:
        # ValueError: what answers in the hub's place, such as a firewall's page, is no JSON.
        try:
            folder = snapshot_download(repo, revision=revision, local_files_only=True, **patterns)
        except (LocalEntryNotFoundError, OSError, ValueError):
            raise UnavailableError(f"no answer ({reason(error)}), and nothing in the local cache") from None
        log.info("%s: the hub did not answer (%s); taking the copy in the local cache", name, reason(error))
    return Path(folder)


def kept(repo: str, revision: str | None = None) -> Path | None:
    """Returns the folder of a commit of a repository in the local cache, None where it is not there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError, OSError):
        return None


def about(repo: str, revision: str | None = None, *, data: bool = False) -> dict[str, Any]:
    """Returns what the card of a repository says in its metadata, such as `license` and `base_model`.

    Args:
        data: whether it is a data set.

    Raises:
        UnavailableError: the hub does not have it, or does not answer.
    """
    import httpx2
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError

    kind = "data set" if data else "model"
    try:
        info = HfApi().repo_info(repo, revision=revision, repo_type="dataset" if data else "model", timeout=TIMEOUT_S)
    except HFValidationError:
        raise UnavailableError("it is no valid hub id") from None
    except RepositoryNotFoundError:
        raise UnavailableError(f"there is no such {kind}, or it is private") from None
    except (httpx2.HTTPError, OfflineModeIsEnabled, ValueError) as error:
        raise UnavailableError(f"no answer ({reason(error)})") from None
    return info.card_data.to_dict() if info.card_data else {}


def metric(name: str) -> Any:
    """Returns the metric module called `name`, such as `meteor` or `ORG/NAME`: its code is fetched, and run.

    Raises:
        UnavailableError: the hub and the cache do not have it, or it needs a package that is not there.
    """
    import evaluate

    if Path(name).exists():
        raise UnavailableError(f"{name} in the current folder would be taken for it: start from another folder")
    try:
        return evaluate.load(name)
    # It is code of others, which raises anything as it is imported.
    except Exception as error:
        if isinstance(error, FileNotFoundError | ConnectionError):
            raise UnavailableError("neither the hub nor the local cache has it") from None
        raise UnavailableError(reason(error)) from None


def reason(error: Exception) -> str:
    """Returns the first line of what an error says, or its name."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
