"""Plain text of prompts and completions, whether they are strings or chat messages."""

from __future__ import annotations

from typing import Any


def plain_text(text: str | list[dict[str, Any]]) -> str:
    """A string as it is; of chat messages the contents, one per line (only the text of contents that have parts)."""
    return text if isinstance(text, str) else "\n".join(_content(message.get("content")) for message in text)


def _content(content: Any) -> str:
    if isinstance(content, str):
        return content
    parts = content or []
    return "".join(str(part.get("text", "")) for part in parts if isinstance(part, dict))
