"""An exported folder to the Hugging Face Hub."""

from __future__ import annotations

import re
from pathlib import Path

from selfforcing_dfd.journey.checkpoint import JourneyError

REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")


def check_repository(name: str) -> None:
    """JourneyError unless it can be the name of a repository."""
    if not REPOSITORY.fullmatch(name):
        raise JourneyError(f"--push-to-hub is {name!r}; want NAME or OWNER/NAME")


def upload(folder: Path, repository: str, private: bool = False) -> str:
    """Make the repository if it is not there, and send the folder; one line about it.

    The token is the one of `hf auth login`, or HF_TOKEN. Raises JourneyError where the Hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    api = HfApi()
    try:
        made = api.create_repo(repository, repo_type="model", private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=made.repo_id,
            folder_path=folder,
            repo_type="model",
            commit_message="Student, card and evaluation",
        )
    except (HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise JourneyError(
            f"{repository} could not be written: {reason}; log in with `hf auth login`, or set "
            f"HF_TOKEN. The same command goes on here; or: hf upload {repository} {folder}"
        ) from error
    return f"pushed to {done.commit_url}"
