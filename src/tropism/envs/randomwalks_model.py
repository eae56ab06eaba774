"""What a language model needs to walk: a tokenizer of letters, a small GPT-2, data files, and its exact optimality."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from tropism.envs.randomwalks import Graph, RandomWalksConfig, draw, letter
from tropism.errors import ConfigError
from tropism.models.policy import Policy
from tropism.models.saving import replacing, save_plain

EOS, UNKNOWN = "<eos>", "<unk>"
EVALUATIONS = 25
"""How often each start stands in evaluation.jsonl."""

HELD_OUT = 200
"""Further walks of held_out.jsonl, drawn after the others."""

NextLogprobs = Callable[[Tensor], Tensor]
"""[N, L] ids of nodes -> [N, L, V] log-probs of what comes next."""


def walk_tokenizer(n_nodes: int) -> PreTrainedTokenizerFast:
    """One token per node, whose id is the node's number, then the end, and what stands for every other character."""
    vocabulary = {token: number for number, token in enumerate([*map(letter, range(n_nodes)), EOS, UNKNOWN])}
    core = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    core.pre_tokenizer = Split("", "isolated")
    core.decoder = decoders.Fuse()
    core.add_special_tokens([EOS, UNKNOWN])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=EOS, unk_token=UNKNOWN, clean_up_tokenization_spaces=False
    )


def walk_model(config: RandomWalksConfig, *, n_layer: int = 6, n_embd: int = 144, n_head: int = 12) -> GPT2LMHeadModel:
    """A GPT-2 with random weights, the same on every machine, whatever the global random state.

    The weights have GPT-2's deviations (0.02, and less for what enters the residual stream), but are uniform: those
    numbers come out of numpy's RandomState bit for bit, which normal ones do not on every machine.

    Raises:
        ConfigError: ``n_head`` does not divide ``n_embd``, or a size below 1.
    """
    if min(n_layer, n_embd, n_head) < 1 or n_embd % n_head:
        raise ConfigError(
            f"n_layer={n_layer}, n_embd={n_embd}, n_head={n_head}: each must be at least 1, and n_head divide n_embd"
        )
    settings = GPT2Config(
        vocab_size=config.n_nodes + 2,
        n_positions=max(32, config.max_length + 2),
        n_layer=n_layer,
        n_embd=n_embd,
        n_head=n_head,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=config.n_nodes,
    )
    with torch.random.fork_rng(devices=[]):  # its own weights, which are drawn and dropped
        model = GPT2LMHeadModel(settings)
    state = np.random.RandomState(config.seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2:
                continue  # biases of 0, norms of 1
            deviation = 0.02 / math.sqrt(2 * n_layer) if name.endswith("c_proj.weight") else 0.02
            drawn = (2 * state.random_sample(tuple(parameter.shape)) - 1) * math.sqrt(3) * deviation
            parameter.copy_(torch.from_numpy(drawn))
    model.eval()
    return model


def write_randomwalks(
    folder: str | Path, config: RandomWalksConfig, *, n_layer: int = 6, n_embd: int = 144, n_head: int = 12
) -> tuple[Graph, list[str]]:
    """Write everything that the recipes read: model, walks, prompts, allowed steps and the graph.

    Args:
        folder: one that is not there, or is empty; it appears once it is complete.

    Raises:
        ConfigError: something is in the folder, or no graph was found.
        StorageError: it cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConfigError(f"{folder} is there already and not an empty folder; name another one, or delete it first")
    graph, drawn = draw(replace(config, n_walks=config.n_walks + HELD_OUT))
    walks, held_out = drawn[: config.n_walks], drawn[config.n_walks :]
    model = walk_model(config, n_layer=n_layer, n_embd=n_embd, n_head=n_head)
    starts = [{"prompt": letter(start)} for start in graph.starts]
    texts = {
        "graph.json": graph.to_json(),
        "allowed.json": json.dumps(allowed_tokens(graph), indent=1) + "\n",
        "walks.jsonl": _walk_lines(graph, walks),
        "held_out.jsonl": _walk_lines(graph, held_out),
        "prompts.jsonl": _lines(starts),
        "evaluation.jsonl": _lines(starts * EVALUATIONS),
    }
    with replacing(folder) as temporary:
        for name, text in texts.items():
            (temporary / name).write_text(text, encoding="utf-8")
        save_plain(model, walk_tokenizer(config.n_nodes), temporary / "model")
    return graph, walks


def allowed_tokens(graph: Graph) -> dict[str, list[str]]:
    """For each token those that may follow it: the nodes that an edge leads to, and the end after the goal."""
    steps = {letter(node): [letter(target) for target in graph.successors[node]] for node in graph.starts}
    return {letter(0): [EOS], **steps}


def _walk_lines(graph: Graph, walks: Sequence[str]) -> str:
    """A walk is its start as prompt, the rest as completion, and its optimality as reward."""
    return _lines({"prompt": walk[0], "completion": walk[1:], "reward": graph.optimality(walk)} for walk in walks)


def _lines(records: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def expected_optimality(graph: Graph, next_logprobs: NextLogprobs) -> dict[str, float]:
    """The mean optimality of a walker's walks from each start, exactly: no sampling.

        sum over all paths to the goal of P(path | start) * optimality(path)

    What follows the goal does not count, and every other walk has optimality 0, so paths to the goal are all there is.

    Args:
        next_logprobs: the walker: ``sampled``, ``greedy`` or ``guided`` of a model, or any function of ids.
    """
    expected = {}
    for start in graph.starts:
        paths = list(graph.paths(start))
        rows = torch.zeros(len(paths), max(map(len, paths)), dtype=torch.long)
        for row, path in zip(rows, paths, strict=True):
            row[: len(path)] = torch.tensor(path)
        with torch.no_grad():
            logprobs = next_logprobs(rows[:, :-1])
        steps = logprobs.double().gather(-1, rows[:, 1:, None])[..., 0]
        total = 0.0
        for path, row in zip(paths, steps, strict=True):
            total += math.exp(float(row[: len(path) - 1].sum())) * graph.optimality("".join(map(letter, path)))
        expected[letter(start)] = total
    return expected


def sampled(model: Any) -> NextLogprobs:
    """The walker that samples a plain model's own distribution, over the whole vocabulary."""
    return lambda ids: model(input_ids=ids).logits.log_softmax(-1)


def greedy(model: Any) -> NextLogprobs:
    """The walker that always takes a plain model's most likely token."""

    def certain(ids: Tensor) -> Tensor:
        logits = model(input_ids=ids).logits
        return torch.full_like(logits, -math.inf).scatter(-1, logits.argmax(-1, keepdim=True), 0.0)

    return certain


def guided(policy: Policy, beta: float) -> NextLogprobs:
    """The walker that samples with ``sampling.beta``: by a policy whose Q heads say what each token is worth (ilql).

    Raises:
        ConfigError: the policy has no Q heads.
    """
    heads = policy.q_heads
    model: Any = policy.model
    if heads is None:
        raise ConfigError("the policy has no Q heads, which guidance needs; train it with ilql, or take `sampled`")

    def next_logprobs(ids: Tensor) -> Tensor:
        hidden = model.base_model(input_ids=ids).last_hidden_state
        logits = model.get_output_embeddings()(hidden) + beta * heads.advantages(hidden)
        return torch.log_softmax(logits, -1)

    return next_logprobs
