"""Uploading a folder: what the hub is given, and what is said where it cannot be had."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

from tiny_models import tiny_model, tiny_tokenizer
from tropism.errors import ConfigError, ModelError
from tropism.export_hub import check_repository, push_folder
from tropism.generation import TextPolicy


class Hub:
    """A hub that writes down what it is given, and fails where it is told to."""

    calls: list[tuple[str, Any]]
    failure: Exception | None = None

    def __init__(self, token: str | None = None) -> None:
        type(self).calls = [("token", token)]

    def create_repo(self, repository: str, *, private: bool, exist_ok: bool) -> None:
        self.calls.append(("create", (repository, private, exist_ok)))
        if self.failure is not None:
            raise self.failure

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> Any:
        content = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        self.calls.append(("upload", (repo_id, content, commit_message)))
        return SimpleNamespace(repo_url=f"https://hub/{repo_id}")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    fresh = type("FreshHub", (Hub,), {})
    monkeypatch.setattr("huggingface_hub.HfApi", fresh)
    return fresh


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "warm"
    place.mkdir()
    (place / "README.md").write_text("# warm")
    (place / "model.safetensors").write_bytes(b"weights")
    return place


def answered(status: int) -> HfHubHTTPError:
    """What huggingface_hub raises after an answer of the hub."""
    response: Any = SimpleNamespace(status_code=status, headers={}, request=SimpleNamespace(url="https://hub"))
    return HfHubHTTPError(f"{status} for url: https://hub", response=response)


def test_the_hub_is_given_the_folder_as_it_is(hub: type[Hub], folder: Path) -> None:
    assert push_folder(folder, "ada/warm", private=True, token="given") == "https://hub/ada/warm"
    assert hub.calls == [
        ("token", "given"),
        ("create", ("ada/warm", True, True)),
        ("upload", ("ada/warm", {"README.md": b"# warm", "model.safetensors": b"weights"}, "Model from tropism")),
    ]


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (answered(401), r"does not know you: there is no token, or a wrong one.*hf auth login.*HF_TOKEN"),
        (answered(403), r"your token may not write to ada/warm"),
        (answered(404), r"your token may not write to ada/warm"),
        (answered(500), r"answered with the error 500 .*try again later"),
        (LocalTokenNotFoundError("no token"), r"does not know you"),
        (OfflineModeIsEnabled("offline"), r"HF_HUB_OFFLINE is set, so the hub is not asked; unset it"),
        (ConnectionError("name or service not known"), r"cannot be reached \(name or service not known\)"),
        (OSError("no route with hf_abcdefghijklmnopqrstuvwx"), r"cannot be reached \(no route with \[redacted\]\)"),
    ],
)
def test_a_hub_that_cannot_be_had_is_one_clear_error(
    failure: Exception, message: str, hub: type[Hub], folder: Path
) -> None:
    hub.failure = failure
    with pytest.raises(ModelError, match=rf"^{folder} was not uploaded to ada/warm: .*{message}") as caught:
        push_folder(folder, "ada/warm")
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "model.safetensors"]


def test_errors_of_the_libraries_below_are_the_same_to_users(hub: type[Hub], folder: Path) -> None:
    hub.failure = type("ConnectTimeout", (Exception,), {"__module__": "httpx"})("timed out")
    with pytest.raises(ModelError, match=r"cannot be reached \(timed out\)"):
        push_folder(folder, "ada/warm")
    hub.failure = KeyError("a mistake of the program")
    with pytest.raises(KeyError):
        push_folder(folder, "ada/warm")


@pytest.mark.parametrize("name", ["warm", "ada/", "/warm", "ada/warm/1", "ada/..", "ada/wa rm", "ada/warm.git", ""])
def test_what_is_no_repository(name: str, hub: type[Hub], folder: Path) -> None:
    hub.calls = []
    with pytest.raises(ConfigError, match=r"is no repository of the hub: "):
        push_folder(folder, name)
    assert hub.calls == [], "the hub is not asked"


def test_what_is_one() -> None:
    assert check_repository("ada/warm-films_1.0") == "ada/warm-films_1.0"


def test_secrets_are_not_uploaded(hub: type[Hub], folder: Path) -> None:
    hub.calls = []
    (folder / "README.md").write_text("trained with hf_abcdefghijklmnopqrstuvwxyz")
    with pytest.raises(ModelError, match=r"README.md holds a Hugging Face token, so .* is not uploaded"):
        push_folder(folder, "ada/warm")
    assert hub.calls == []


def test_policies_in_memory_go_the_same_way(hub: type[Hub]) -> None:
    policy = TextPolicy.load((tiny_model("llama"), tiny_tokenizer()))
    assert policy.push_to_hub("ada/warm", token="given") == "https://hub/ada/warm"
    assert [name for name, _ in hub.calls] == ["token", "create", "upload"]
    hub.failure = answered(401)
    with pytest.raises(ModelError, match="does not know you"):
        policy.push_to_hub("ada/warm")
    with pytest.raises(ConfigError, match="is no repository"):
        policy.push_to_hub("warm")


def test_a_folder_that_is_not_there(hub: type[Hub], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no folder .*gone to upload"):
        push_folder(tmp_path / "gone", "ada/warm")
