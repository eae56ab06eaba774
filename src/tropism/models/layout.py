"""Where the tokens of prompts and completions lie in the rows that a model reads."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Padding = Literal["right", "left", "both"]


def join(
    prompt_ids: Tensor, prompt_lengths: Tensor, completion_ids: Tensor, completion_lengths: Tensor, *, padding: Padding
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Prompts and completions as one row each.

    A prompt is padded on its left and a completion on its right, so the real tokens of a row already lie side by side
    once the two are concatenated; only the row's offset is chosen here. Results must not depend on it (a test says so).

    Args:
        padding: where the pads of the joined rows go; "both" keeps them where they are.

    Returns:
        ids, attention mask (bool) and positions, each [B, L], and the column of each row's first completion token [B].
        Positions count real tokens from 0; pads have position 0.
    """
    wide, total = prompt_ids.shape[1], prompt_lengths + completion_lengths
    ids = torch.cat([prompt_ids, completion_ids], dim=1)
    width = ids.shape[1] if padding == "both" else int(total.max())
    first_real = {"right": torch.zeros_like(total), "left": width - total, "both": wide - prompt_lengths}[padding]
    columns = torch.arange(width, device=ids.device)[None, :]
    source = columns - first_real[:, None] + (wide - prompt_lengths)[:, None]
    mask = (columns >= first_real[:, None]) & (columns < (first_real + total)[:, None])
    ids = ids.gather(1, source.clamp(0, ids.shape[1] - 1))
    positions = (columns - first_real[:, None]).clamp(min=0) * mask
    return ids, mask, positions, first_real + prompt_lengths
