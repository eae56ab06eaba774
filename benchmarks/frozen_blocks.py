"""What it is worth that frozen blocks are computed once per step: CPU seconds of a step, and without.

    python -m benchmarks.frozen_blocks

A GPT-2 of 12 blocks of width 256; the reference and four epochs of log-probs and gradients over 32 rows of 64 tokens,
on one thread. Both ways take turns three times; the best of each counts, since other work can only add to it.
"""

from __future__ import annotations

import time

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from tropism.models.freezing import train_last_layers
from tropism.models.modules import disable_dropout
from tropism.models.policy import Policy
from tropism.models.reference import Reference
from tropism.models.trunk import FrozenTrunk
from tropism.types import Tokens

BLOCKS, ROWS, PROMPT, COMPLETION, VOCABULARY = 12, 32, 16, 48, 2000
EPOCHS, TURNS = 4, 3


def rows() -> Tokens:
    """Random prompts and completions, all different."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (ROWS, PROMPT + COMPLETION), generator=generator)
    return Tokens(
        prompt_ids=ids[:, :PROMPT],
        prompt_lengths=torch.full((ROWS,), PROMPT),
        completion_ids=ids[:, PROMPT:],
        completion_lengths=torch.full((ROWS,), COMPLETION),
    )


def measure(layers: int, tokens: Tokens) -> tuple[float, float]:
    """CPU seconds of a step with frozen blocks computed once, and in every pass."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=256, n_layer=BLOCKS, n_head=8, n_positions=128))
    disable_dropout(model)
    policy = Policy(model)
    train_last_layers(model, layers)
    FrozenTrunk.attach(policy, layers)
    trunk, reference = policy.trunk, Reference(policy)
    assert trunk is not None
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(TURNS):
        for once in (True, False):
            began = time.process_time()
            trunk.drop()
            if once:
                trunk.keep(tokens, [torch.arange(ROWS)])
            with reference.active() as frozen, torch.no_grad():
                frozen(**tokens.inputs)
            for _ in range(EPOCHS):
                policy(**tokens.inputs).need("logprobs").sum().backward()
                policy.zero_grad()
            seconds[once].append(time.process_time() - began)
    return min(seconds[True]), min(seconds[False])


def main() -> None:
    torch.set_num_threads(1)
    tokens = rows()
    for layers in (0, 1, 2):
        once, always = measure(layers, tokens)
        print(f"train_layers {layers} of {BLOCKS}: {once:.2f} s once, {always:.2f} s every time, {always / once:.1f}x")


if __name__ == "__main__":
    main()
