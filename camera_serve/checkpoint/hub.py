"""MODEL as people type it -> the folder it lies in, and what that model is called.

It is a local folder, or a model on the Hugging Face hub, which huggingface_hub keeps a copy of.
"""

import errno
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from urllib.parse import unquote, urlsplit

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from camera_serve.checkpoint.files import NOT_DOWNLOADED
from camera_serve.errors import CheckpointError, described, first_line

HOSTS = ("huggingface.co", "hf.co")
_ADDRESS = re.compile(rf"https?://|(?:www\.)?(?:{'|'.join(map(re.escape, HOSTS))})/")
_TYPED = re.compile(r"((?:[\w.-]+/)?[\w.-]*\w)(?:@([^\s@]+))?", re.ASCII)
_OTHER_KINDS = ("datasets", "spaces", "kernels", "buckets", "collections", "papers")
_ON_PAGES = ("tree", "commit")
_INSIDE = (*_ON_PAGES, "blob", "resolve", "raw", "commits")
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class ModelName:
    """What a model is called: `ORG/NAME` on the hub, or as its folder is.

    revision: a branch, a tag or a commit of the hub's; None is the newest, and all that a folder
    has.
    """

    name: str
    revision: str | None = None

    def __str__(self) -> str:
        """As people type it: `ORG/NAME@REVISION`."""
        return f"{self.name}@{self.revision}" if self.revision else self.name

    @classmethod
    def parse(cls, typed: str) -> Self:
        """A model on the hub: `ORG/NAME`, `ORG/NAME@REVISION`, or the address of its page.

        Raises `CheckpointError` for what is none of them.
        """
        if _ADDRESS.match(typed):
            return cls._of_page(typed)
        found = _TYPED.fullmatch(typed)
        if not found or typed.startswith((".", "-")) or Path(typed).exists():
            raise CheckpointError(
                f"{typed} is neither a local folder nor ORG/NAME, ORG/NAME@REVISION or the address "
                "of a model on the hub: give a folder with config.json and safetensors files, or "
                "one of these"
            )
        return cls(found[1], found[2])

    @classmethod
    def _of_page(cls, typed: str) -> Self:
        address = urlsplit(typed if "://" in typed else f"https://{typed}")
        host = address.netloc.removeprefix("www.")
        if host not in (*HOSTS, urlsplit(constants.ENDPOINT).netloc):
            raise CheckpointError(
                f"{typed} is not a page of {constants.ENDPOINT}: give ORG/NAME, or download the "
                "model and give its folder"
            )
        # A revision may hold a slash, as `%2F`.
        parts = [unquote(part) for part in address.path.split("/") if part]
        if not parts or parts[0] in _OTHER_KINDS or (len(parts) > 2 and parts[2] not in _INSIDE):
            raise CheckpointError(f"{typed} is not the page of a model: give ORG/NAME")
        name = "/".join(parts[:2])
        if len(parts) > 2 and (len(parts) != 4 or parts[2] not in _ON_PAGES):
            revision = f"@{parts[3]}" if len(parts) > 3 else ""
            raise CheckpointError(f"{typed} is a part of a model: give {name}{revision}")
        return cls(name, parts[3] if len(parts) > 2 else None)


def origin_of(folder: Path) -> ModelName:
    """Which model a folder holds: in the hub's cache the hub's, with its commit; else its own."""
    folder = folder.resolve()
    kind, _, name = folder.parent.parent.name.partition("--")
    if folder.parent.name == "snapshots" and kind == "models":
        return ModelName(name.replace("--", "/"), folder.name)
    return ModelName(folder.name)


def resolve(model: str) -> Path:
    """A local folder as it is, anything else as a hub name, downloaded without pickled weights.

    What is there already is not downloaded again. Raises `CheckpointError` with the remedy.
    """
    path = Path(model)
    if path.is_dir():
        return path
    wanted = ModelName.parse(model)
    try:
        return Path(
            snapshot_download(
                wanted.name, revision=wanted.revision, ignore_patterns=list(NOT_DOWNLOADED)
            )
        )
    # What a connection raises depends on the packages that make it: httpx, httpx2, hf_xet.
    except Exception as error:
        raise CheckpointError(_refusal(wanted, error)) from error


def _refusal(wanted: ModelName, error: Exception) -> str:
    """Why a model was not downloaded, and what to do."""
    cause = error.__cause__ or error if isinstance(error, LocalEntryNotFoundError) else error
    name, hub = wanted.name, constants.ENDPOINT
    if isinstance(cause, HFValidationError):
        return f"{name} is neither a local folder nor a name that the hub has: {first_line(cause)}"
    if isinstance(cause, GatedRepoError):
        return (
            f"{name} is gated: accept its terms at {hub}/{name}, then `hf auth login`, or set "
            "HF_TOKEN to a token of that account"
        )
    if isinstance(cause, RepositoryNotFoundError):
        return (
            f"{name} is neither a local folder nor a model that the hub {hub} shows us: check the "
            "name; for a private model `hf auth login`, or set HF_TOKEN"
        )
    if isinstance(cause, RevisionNotFoundError):
        return (
            f"{name} has no revision {wanted.revision}: its branches, tags and commits are at "
            f"{hub}/{name}/tree/main"
        )
    if isinstance(cause, HfHubHTTPError):
        return _http_refusal(wanted, cause)
    if isinstance(cause, OfflineModeIsEnabled):
        return (
            f"there is no folder {wanted} here, and HF_HUB_OFFLINE=1 keeps a model of that name, "
            "which is not whole on this machine, from being downloaded: correct the path, or unset "
            "it"
        )
    if cause is not error or type(cause).__name__ == "ProxyError":
        return (
            f"there is no folder {wanted} here, and the hub {hub} cannot be reached "
            f"({_reason(cause)}): correct the path, or check network and proxy"
        )
    return _broken_off(name, error)


def _http_refusal(wanted: ModelName, error: HfHubHTTPError) -> str:
    status, name, hub = error.response.status_code, wanted.name, constants.ENDPOINT
    if status == 401:
        return (
            f"the hub {hub} refuses the token (401) that {name} was asked for with: correct or "
            "unset HF_TOKEN, or `hf auth login` again"
        )
    if status == 403:
        return (
            f"the hub {hub} gives {name} to no one with these rights (403): `hf auth login`, or "
            f"set HF_TOKEN to a token that may read it; {hub}/{name} says who may"
        )
    return (
        f"there is no folder {wanted} here, and the hub {hub} answers {status} for it: correct the "
        "path, or try again later"
    )


def _broken_off(name: str, error: Exception) -> str:
    """What is said of an error between the hub's first answer and the last file."""
    cache = constants.HF_HUB_CACHE
    if isinstance(error, OSError) and error.errno in _FULL:
        return (
            f"{name} does not fit into {cache} ({error.strerror}): free some space, or set HF_HOME "
            "to a folder on another disk; then run the same command again, and it goes on"
        )
    if isinstance(error, OSError) and error.filename:
        return (
            f"{name} cannot be kept in {cache}: {error.strerror}: set HF_HOME to a folder that can "
            "be written"
        )
    return (
        f"the download of {name} broke off ({_reason(error)}): run the same command again, and it "
        "goes on"
    )


def _reason(error: BaseException) -> str:
    return described(error).rstrip(".:")
