"""Secrets in text: what looks like one, where it is, and the text without it.

A secret is the value of an environment variable whose name ends in TOKEN, KEY, SECRET or PASSWORD, or text with the
form of one: tokens of well-known services, credentials in a URL, an Authorization header, ``api_key=...``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

REDACTED = "[redacted]"
"""Stands where a secret was."""

SHORTEST = 8
"""Values of environment variables below this many characters count as words, not as secrets."""

_HEAD = 12
"""So many first characters of a secret of the environment count as the secret: messages cut long values short."""

_VARIABLE = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD)$", re.IGNORECASE)

_VALUE = r"(?=[^\s'\",;}&\])]*\d)[^\s'\",;}&\])(\[]{6,}"
"""What follows ``api_key=``: without a digit it is more likely code or prose."""

_FORMS: dict[str, re.Pattern[str]] = {
    "a Hugging Face token": re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{16,}"),
    "an API key (sk-...)": re.compile(r"\bsk-(?=[A-Za-z_-]*\d)[A-Za-z0-9_-]{16,}"),
    "a Weights & Biases key": re.compile(r"\bwandb_v\d+_[A-Za-z0-9_]{16,}|(?<=wandb login )\w{16,}"),
    "a GitHub token": re.compile(r"\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}"),
    "an AWS key": re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
    "a Google API key": re.compile(r"\bAIza[A-Za-z0-9_-]{30,}"),
    "a Slack token": re.compile(r"\bxox[abeoprs]-[A-Za-z0-9-]{10,}"),
    "a signed token": re.compile(r"\beyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*"),
    "credentials in a URL": re.compile(r"(?<=://)(?:[^\s/@:]*:[^\s/@]+|[^\s/@:]{16,})(?=@)"),
    "a key in a URL": re.compile(
        r"(?P<kept>[?&](?:access_token|token|api_?key|key|sig|signature)=)[^\s&'\"]{6,}", re.I
    ),
    "an authorization header": re.compile(
        r"(?P<kept>\b(?:authorization|x-api-key)['\"]?\s*[:=]\s*['\"]?(?:(?:bearer|basic|token)\s+)?"
        r"|\bbearer\s+(?=[^\s]*\d))"
        # The name of an environment variable is what belongs there, and is no secret.
        r"(?!(?-i:[A-Z][A-Z0-9_]*)(?![A-Za-z0-9._~+/=-]))[A-Za-z0-9._~+/=-]{6,}",
        re.IGNORECASE,
    ),
    "a secret with its name": re.compile(
        r"(?P<kept>(?:api[_-]?key|secret|password|passwd|access[_-]?token|auth[_-]?token|private[_-]?key)"
        rf"['\"]?\s*[:=]\s*['\"]?){_VALUE}",
        re.IGNORECASE,
    ),
    "an environment variable with a secret": re.compile(
        rf"(?P<kept>\b[A-Z][A-Z0-9_]*(?:TOKEN|KEY|SECRET|PASSWORD)=){_VALUE}"
    ),
}

_FIELD = re.compile(
    r"(^|[_-])(api[_-]?key|secret|password|passwd|credentials|(access|auth|hf|hub|api)[_-]token|(access|private)[_-]key)$",
    re.IGNORECASE,
)
"""Names of settings that hold a secret, whatever it looks like."""

_NAME_OR_NOTHING = re.compile(r"([A-Z_][A-Z0-9_]*)?")
"""What such a setting may hold: the name of an environment variable."""


def redact(text: str) -> str:
    """The text with every secret in it replaced.

    A secret of the environment is also found where it was cut short (its first characters suffice) or percent-encoded.
    """
    for secret in _environment().values():
        text = _without(text, secret)
    for form in _FORMS.values():
        text = form.sub(_replacement, text)
    return text


def redact_values(value: Any) -> Any:
    """Plain data (mappings, lists, text, numbers) with every text in it redacted."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {key: redact_values(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [redact_values(entry) for entry in value]
    return value


def find_secret(value: Any, path: str = "") -> tuple[str, str] | None:
    """Where in plain data or configurations a secret stands, and what it looks like; None where there is none.

    Args:
        value: text, mappings, lists and dataclasses, nested; other objects are passed over.
        path: the dotted place of ``value`` in the whole.
    """
    if isinstance(value, str | Path):
        kind = _kind(str(value))
        return None if kind is None else (path, kind)
    if is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in fields(value)}
    if isinstance(value, Mapping):
        for key, entry in value.items():
            place = f"{path}.{key}" if path else str(key)
            if _FIELD.search(str(key)) and isinstance(entry, str) and not _NAME_OR_NOTHING.fullmatch(entry):
                return place, "a secret, by its name"
            found = _kind(str(key)) if isinstance(key, str) else None
            if found is not None:
                return path, found
            inside = find_secret(entry, place)
            if inside is not None:
                return inside
    if isinstance(value, list | tuple):
        for index, entry in enumerate(value):
            inside = find_secret(entry, f"{path}[{index}]")
            if inside is not None:
                return inside
    return None


def _kind(text: str) -> str | None:
    """What the first secret in a text looks like."""
    for name, secret in _environment().items():
        if secret in text:
            return f"the value of the environment variable {name}"
    return next((kind for kind, form in _FORMS.items() if form.search(text)), None)


def _environment() -> dict[str, str]:
    """Variable name -> secret, for the environment as it is now. Paths of files that exist are no secrets."""
    return {
        name: value
        for name, value in os.environ.items()
        if _VARIABLE.search(name) and len(value) >= SHORTEST and not _exists(value)
    }


def _exists(value: str) -> bool:
    try:
        return value.startswith(("/", "~", ".")) and Path(value).expanduser().exists()
    except (OSError, ValueError, RuntimeError):
        return False


def _without(text: str, secret: str) -> str:
    """The text without the secret, without its first characters where it was cut, and without its URL form."""
    for form in {secret, quote(secret, safe="")}:
        head = form[:_HEAD]
        begin = text.find(head)
        while begin >= 0:
            end = begin + len(head)
            while end < len(text) and end - begin < len(form) and text[end] == form[end - begin]:
                end += 1
            text = text[:begin] + REDACTED + text[end:]
            begin = text.find(head, begin + len(REDACTED))
    return text


def _replacement(match: re.Match[str]) -> str:
    kept = match.groupdict().get("kept") or ""
    return f"{kept}{REDACTED}"
