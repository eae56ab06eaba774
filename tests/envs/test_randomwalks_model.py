"""The tiny model and its files are the same everywhere, and the exact optimality is that of every possible text."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from tropism.envs.randomwalks import Graph, RandomWalksConfig, draw, read_graph
from tropism.envs.randomwalks_model import (
    expected_optimality,
    greedy,
    guided,
    sampled,
    walk_model,
    walk_tokenizer,
    write_randomwalks,
)
from tropism.errors import ConfigError
from tropism.models.policy import Policy
from tropism.models.q_heads import QHeads
from tropism.rollouts.allowed_tokens import read_allowed_tokens

SMALL = Graph(max_length=5, successors=((), (2, 3), (0,), (1,)))
"""b -> c, d; c -> a; d -> b."""
TINY = RandomWalksConfig(n_nodes=4, max_length=5, n_walks=20, p_edge=0.5, seed=7)


def test_every_node_is_a_token_and_its_id_is_its_number() -> None:
    tokenizer = walk_tokenizer(21)
    assert len(tokenizer) == 23
    assert tokenizer("akub")["input_ids"] == [0, 10, 20, 1]
    assert tokenizer.decode([10, 0, 21], skip_special_tokens=True) == "ka"
    assert tokenizer.eos_token_id == 21
    assert tokenizer("a z")["input_ids"] == [0, tokenizer.unk_token_id, tokenizer.unk_token_id]


def test_the_weights_follow_from_the_seed_alone() -> None:
    """The digest holds on every machine: uniform numbers, no transcendental functions."""
    torch.manual_seed(1)
    before = torch.get_rng_state()
    model = walk_model(TINY, n_layer=2, n_embd=8, n_head=2)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again = walk_model(TINY, n_layer=2, n_embd=8, n_head=2)
    weights = b"".join(p.detach().numpy().tobytes() for _, p in sorted(model.named_parameters()))
    assert weights == b"".join(p.detach().numpy().tobytes() for _, p in sorted(again.named_parameters()))
    assert hashlib.sha256(weights).hexdigest()[:16] == "6234730fd0f30112"


def test_the_default_model_is_that_of_the_source() -> None:
    model = walk_model(RandomWalksConfig())
    config = model.config
    assert (config.n_layer, config.n_embd, config.vocab_size) == (6, 144, 23)
    assert (config.resid_pdrop, config.embd_pdrop, config.attn_pdrop) == (0, 0, 0)
    wide, narrow = model.transformer.h[0].mlp.c_fc.weight, model.transformer.h[0].mlp.c_proj.weight
    assert float(wide.detach().std()) == pytest.approx(0.02, rel=0.02)
    assert float(narrow.detach().std()) == pytest.approx(0.02 / math.sqrt(12), rel=0.02)
    assert float(model.transformer.wte.weight.detach().mean()) == pytest.approx(0, abs=2e-3)
    with pytest.raises(ConfigError, match="n_head divide n_embd"):
        walk_model(RandomWalksConfig(), n_head=7)


def test_expected_optimality_is_the_sum_over_every_text() -> None:
    """All 6**4 completions of four tokens of every start, scored as text."""
    model = walk_model(TINY, n_layer=1, n_embd=16, n_head=2)
    with torch.no_grad():
        model.transformer.wte.weight.mul_(4)  # so that the tokens differ in probability
        for start, expected in expected_optimality(SMALL, sampled(model)).items():
            texts = list(itertools.product(range(6), repeat=4))
            ids = torch.tensor([(ord(start) - ord("a"), *text) for text in texts])
            logprobs = model(input_ids=ids).logits.log_softmax(-1)[:, :-1]
            chances = logprobs.gather(-1, ids[:, 1:, None])[..., 0].sum(-1).exp().tolist()
            decoded = ["".join("abcd#?"[number] for number in row) for row in ids.tolist()]
            slow = sum(p * SMALL.optimality(text) for p, text in zip(chances, decoded, strict=True))
            assert expected == pytest.approx(slow, rel=1e-4)
            assert 0.001 < slow < 0.999


def test_a_walker_that_does_not_look_back_agrees_with_its_chain() -> None:
    """The one that takes every edge with equal probability, against the chances of being at each node."""
    graph, _ = draw(RandomWalksConfig())
    count = len(graph.successors)
    table = torch.full((count, count + 2), -math.inf)
    for node in graph.starts:
        table[node, list(graph.successors[node])] = -math.log(len(graph.successors[node]))
    table[0, count] = 0.0

    def walker(ids: Tensor) -> Tensor:
        return table[ids]

    for start, expected in expected_optimality(graph, walker).items():
        at = {ord(start) - ord("a"): 1.0}
        mean = 0.0
        for nodes in range(2, 11):
            step: dict[int, float] = {}
            for node, chance in at.items():
                for target in graph.successors[node]:
                    step[target] = step.get(target, 0.0) + chance / len(graph.successors[node])
            mean += step.pop(0, 0.0) * (10 - nodes) / (10 - graph.shortest[ord(start) - ord("a")])
            at = step
        assert expected == pytest.approx(mean)


def test_greedy_is_zero_or_what_its_one_walk_earns() -> None:
    model = walk_model(TINY, n_layer=1, n_embd=16, n_head=2)
    with torch.no_grad():
        model.transformer.wte.weight.mul_(4)
    for start, found in expected_optimality(SMALL, greedy(model)).items():
        ids = [ord(start) - ord("a")]
        for _ in range(4):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        assert found == pytest.approx(SMALL.optimality("".join("abcd#?"[number] for number in ids)))


def test_guidance_adds_what_tokens_are_worth() -> None:
    """Heads that say 3 of the token c, and 1 of every state: c gains beta * 2, every other token loses beta."""
    model = walk_model(TINY, n_layer=1, n_embd=16, n_head=2)
    heads = QHeads(16, 6)
    heads.start(seed=0)
    with torch.no_grad():
        heads.value.outer.bias.fill_(1.0)
        for target in heads.targets:
            target.outer.bias[2] = 3.0
    ids = torch.tensor([[1, 3, 1], [2, 0, 4]])
    expected = model(input_ids=ids).logits + 0.5 * torch.tensor([-1.0, -1.0, 2.0, -1.0, -1.0, -1.0])
    policy = Policy(model, q_heads=heads)
    torch.testing.assert_close(guided(policy, 0.5)(ids), expected.log_softmax(-1))
    torch.testing.assert_close(guided(policy, 0.0)(ids), sampled(model)(ids))
    with pytest.raises(ConfigError, match="no Q heads"):
        guided(Policy(model), 1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("walks") / "runs" / "randomwalks"
    write_randomwalks(folder, TINY, n_layer=1, n_embd=8, n_head=2)
    return folder


def records(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_folder_holds_what_the_recipes_read(folder: Path) -> None:
    graph, walks = draw(TINY)
    assert read_graph(folder) == graph
    found = records(folder / "walks.jsonl")
    assert [f"{record['prompt']}{record['completion']}" for record in found] == walks
    assert [record["reward"] for record in found] == [graph.optimality(walk) for walk in walks]
    more = records(folder / "held_out.jsonl")
    assert [f"{record['prompt']}{record['completion']}" for record in [*found, *more]] == draw(
        replace(TINY, n_walks=220)
    )[1]
    assert [record["prompt"] for record in records(folder / "prompts.jsonl")] == ["b", "c", "d"]
    assert [record["prompt"] for record in records(folder / "evaluation.jsonl")] == ["b", "c", "d"] * 25
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert torch.equal(
        model.transformer.wte.weight, walk_model(TINY, n_layer=1, n_embd=8, n_head=2).transformer.wte.weight
    )
    assert AutoTokenizer.from_pretrained(folder / "model")("dcba")["input_ids"] == [3, 2, 1, 0]


def test_allowed_steps_are_the_edges_and_the_end_after_the_goal(folder: Path) -> None:
    graph, tokenizer = read_graph(folder), AutoTokenizer.from_pretrained(folder / "model")
    allowed = read_allowed_tokens(folder / "allowed.json", tokenizer, [4], 6)
    found = {node: tuple(allowed.followers[node].tolist()) for node in range(4)}
    assert found == {0: (4,), **{node: graph.successors[node] for node in (1, 2, 3)}}


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("words")
    with pytest.raises(ConfigError, match="not an empty folder"):
        write_randomwalks(tmp_path, TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_folder_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("no room")

    monkeypatch.setattr("tropism.envs.randomwalks_model.save_plain", fail)
    with pytest.raises(RuntimeError, match="no room"):
        write_randomwalks(tmp_path / "walks", TINY, n_layer=1, n_embd=8, n_head=2)
    assert not list(tmp_path.iterdir())
