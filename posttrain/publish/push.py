"""Uploads a published folder to the Hub: private unless asked otherwise, the token never shown."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import httpx
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

SOURCE_FILE = "posttrain/source.json"


def files_of(folder: Path) -> list[tuple[str, int]]:
    """(path, bytes) of everything that would be uploaded, by path."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(path.relative_to(folder).as_posix(), path.stat().st_size) for path in paths]


def check_whole(folder: Path, source: str, *, adapter: bool = False) -> None:
    """Every file as its checksum says, no other file, and made of this source.

    Raises:
        ValueError: the folder was not written by `publish` of this source, or was changed since.
    """
    listing = folder / "checksums.sha256"
    if not listing.exists():
        raise ValueError(f"{folder}: no checksums.sha256; it was not written by posttrain publish")
    lines = (line.split("  ", 1) for line in listing.read_text().split("\n") if line)
    digests = {name: digest for digest, name in lines}
    there = {name for name, _ in files_of(folder)} - {listing.name}
    for name in sorted(there ^ digests.keys()):
        what = "missing" if name in digests else "not written by posttrain publish; remove it"
        raise ValueError(f"{folder / name}: {what}")
    for name, digest in digests.items():
        with (folder / name).open("rb") as content:
            if hashlib.file_digest(content, "sha256").hexdigest() != digest:
                raise ValueError(f"{folder / name}: changed since it was published; publish again")
    if json.loads((folder / SOURCE_FILE).read_text()) != source_record(source, adapter=adapter):
        raise ValueError(
            f"{folder}: not published from {source}{' --adapter' if adapter else ''}; give another "
            "--out"
        )


def source_record(source: str, *, adapter: bool) -> dict[str, object]:
    """What a folder was made of, by a digest: paths of a machine are nobody else's business."""
    digest = hashlib.sha256(str(Path(source).absolute()).encode()).hexdigest()
    return {"source_sha256": digest, "adapter": adapter}


def push(
    folder: Path, repository: str, *, public: bool = False, endpoint: str | None = None
) -> str:
    """Creates the repository where it is missing and uploads in one commit; returns its address.

    What the repository holds besides is removed in the same commit: old shards beside new ones
    would be loaded.

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
        if not public and not api.model_info(repository).private:
            raise ValueError(
                f"--push {repository}: that repository is public; add --public, or make it private"
            )
        api.upload_folder(
            repo_id=repository, folder_path=folder, repo_type="model", delete_patterns="*",
            commit_message="Published with posttrain",
        )  # fmt: skip
    except LocalTokenNotFoundError as error:
        raise ValueError(f"--push {repository}: no token; set HF_TOKEN") from error
    except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
        reason = str(error).split("\n")[0]
        raise RuntimeError(
            f"--push {repository}: the Hub refused or could not be reached ({reason}); the folder "
            f"{folder} is complete: push it again with the same command"
        ) from error
    return str(url)
