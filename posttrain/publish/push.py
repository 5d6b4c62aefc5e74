"""Uploads a published folder to the Hub: private unless asked otherwise, the token never shown."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError


def files_of(folder: Path) -> list[tuple[str, int]]:
    """(path, bytes) of everything that would be uploaded, by path."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(path.relative_to(folder).as_posix(), path.stat().st_size) for path in paths]


def check_whole(folder: Path) -> None:
    """Every file as its checksum says.

    Raises:
        ValueError: the folder was not written by `publish`, or was changed since.
    """
    listing = folder / "checksums.sha256"
    if not listing.exists():
        raise ValueError(f"{folder}: no checksums.sha256; it was not written by posttrain publish")
    for line in listing.read_text().splitlines():
        digest, name = line.split("  ", 1)
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path}: missing; publish again into another folder")
        with path.open("rb") as content:
            if hashlib.file_digest(content, "sha256").hexdigest() != digest:
                raise ValueError(f"{path}: changed since it was published; publish again")


def push(
    folder: Path, repository: str, *, public: bool = False, endpoint: str | None = None
) -> str:
    """Creates the repository where it is missing and uploads in one commit; returns its address.

    The token comes from HF_TOKEN, or from `hf auth login`.

    Args:
        repository: ORG/NAME.
        endpoint: of the Hub; None: HF_ENDPOINT, or the public one.

    Raises:
        ValueError: not such a name, or no token.
        RuntimeError: what the Hub answered.
    """
    if repository.count("/") != 1:
        raise ValueError(f"--push {repository}: give ORG/NAME")
    api = HfApi(endpoint=endpoint, token=os.environ.get("HF_TOKEN") or None)
    try:
        url = api.create_repo(repository, private=not public, exist_ok=True, repo_type="model")
        api.upload_folder(
            repo_id=repository, folder_path=folder, repo_type="model",
            commit_message="Published with posttrain",
        )  # fmt: skip
    except LocalTokenNotFoundError as error:
        raise ValueError(f"--push {repository}: no token; set HF_TOKEN") from error
    except HfHubHTTPError as error:
        raise RuntimeError(
            f"--push {repository}: the Hub refused ({str(error).splitlines()[0]}); the folder "
            f"{folder} is complete: push it again with the same command"
        ) from error
    return str(url)
