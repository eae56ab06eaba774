"""The one way to a model repository of the Hugging Face hub: a folder is checked, and uploaded as it is."""

from __future__ import annotations

from pathlib import Path

from tropism.errors import ConfigError, ModelError
from tropism.redaction import find_secret, redact

_READ = ("README.md", "config.json", "generation_config.json", "tropism_export.json")
"""Files that say where a model came from, and are looked through for secrets. (The words of a tokenizer are none.)"""


def check_repository(name: str) -> str:
    """``user/name`` as it was given.

    Raises:
        ConfigError: it is none, in which case nothing should be computed for it.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    if name.count("/") != 1 or not all(name.split("/")):
        raise ConfigError(
            f"{name!r:.100} is no repository of the hub: give USER/NAME, such as ada/warm-films (your user name, or an "
            "organisation that you may write to)"
        )
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(f"{name!r:.100} is no repository of the hub: {str(error).splitlines()[0]}") from error
    return name


def push_folder(
    folder: str | Path,
    repository: str,
    *,
    private: bool = False,
    token: str | None = None,
    message: str = "Model from tropism",
) -> str:
    """Upload everything in a folder to a model repository, which is made where there is none; its address.

    The folder stays as it is, whatever happens.

    Args:
        repository: ``user/name``.
        private: whether a repository that is made for it is private; one that is there stays what it is.
        token: None takes the one in HF_TOKEN, or the one that ``hf auth login`` left.
        message: of the commit.

    Raises:
        ConfigError: ``repository`` is no ``user/name``, or there is no such folder.
        ModelError: a text file in the folder holds a secret, or the hub cannot be reached, knows no such token or
            refuses it; says what to do.
    """
    check_repository(repository)
    folder = Path(folder).expanduser()
    _refuse_secrets(folder)
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        hub = HfApi(token=token)
        hub.create_repo(repository, private=private, exist_ok=True)
        commit = hub.upload_folder(repo_id=repository, folder_path=folder, commit_message=message)
    except (HfHubHTTPError, OSError, ValueError) as error:
        # Tokens that are no tokens are a ValueError of the libraries below, no connection an OSError in some of them.
        raise ModelError(_why(folder, repository, error)) from error
    except Exception as error:
        if type(error).__module__.split(".")[0] not in ("httpx", "httpcore", "httpx2", "requests", "urllib3"):
            raise
        raise ModelError(_why(folder, repository, error)) from error
    return str(commit.repo_url)


def _refuse_secrets(folder: Path) -> None:
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {folder} to upload")
    for path in (folder / name for name in _READ):
        found = find_secret(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else None
        if found is not None:
            raise ModelError(f"{path} holds {found[1]}, so {folder} is not uploaded; take it out first")


def _why(folder: Path, repository: str, error: Exception) -> str:
    """What went wrong with an upload, and what to do about it."""
    from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, LocalTokenNotFoundError) or status == 401:
        what = (
            "the hub does not know you: there is no token, or a wrong one. Log in with `hf auth login`, or set HF_TOKEN"
        )
    elif status in (403, 404):
        what = (
            f"your token may not write to {repository}. Take one with the permission to write, and a name under your "
            "own user or organisation"
        )
    elif isinstance(error, OfflineModeIsEnabled):
        what = "HF_HUB_OFFLINE is set, so the hub is not asked; unset it"
    elif isinstance(status, int):
        what = f"the hub answered with the error {status} ({_first_line(error)}); try again later"
    else:
        what = f"the hub cannot be reached ({_first_line(error)}); try again with network access"
    return f"{folder} was not uploaded to {repository}: {what}"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return redact(lines[0])[:300]
