"""What an agent saves, what takes it up again, and the plain model that ``tropism-dump`` makes of it."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from tiny_models import tiny_model, tiny_tokenizer
from tiny_textrl import LettersEnv, make_actor, make_env, play_episode
from tropism.commands.textrl_dump import main
from tropism.errors import ConfigError, ModelError

SETTINGS: dict[str, Any] = {"update_interval": 1, "epochs": 2, "lr": 0.01}


def trained(family: str = "gpt2", *, layers: int = 0, optimizer: str = "adamw", seed: int = 0) -> tuple[Any, Any]:
    env = make_env(LettersEnv, family=family, seed=seed)
    agent = make_actor(env, optimizer=optimizer, unfreeze_layer_from_past=layers).agent_ppo(**SETTINGS)
    play_episode(agent, env, "a cat")
    return agent, env


def fresh(family: str = "gpt2", *, layers: int = 0, optimizer: str = "adamw", seed: int = 0) -> tuple[Any, Any]:
    env = make_env(LettersEnv, family=family, seed=seed)
    return make_actor(env, optimizer=optimizer, unfreeze_layer_from_past=layers).agent_ppo(**SETTINGS), env


def logits(model: Any) -> torch.Tensor:
    ids = torch.tensor([[5, 9, 11, 6]])
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.detach()


def base_folder(family: str, folder: Path, *, seed: int = 0) -> str:
    tiny_model(family, seed=seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(("family", "layers"), [("gpt2", 0), ("gpt2", 2), ("bloom", 1)])
def test_a_saved_agent_goes_on_where_it_was(family: str, layers: int, tmp_path: Path) -> None:
    agent, env = trained(family, layers=layers)
    agent.save(tmp_path / "saved")
    weights = copy.deepcopy(env.policy.state_dict())
    other, other_env = fresh(family, layers=layers)
    assert not torch.equal(logits(env.model), logits(other_env.model))
    other.load(tmp_path / "saved")
    assert all(torch.equal(value, weights[name]) for name, value in other_env.policy.state_dict().items())
    # Adam's moments, too: the next update of both is the same.
    for one, where in ((agent, env), (other, other_env)):
        one._episodes = 7  # which keys the draws
        play_episode(one, where, "oh")
    found = other_env.policy.state_dict()
    assert all(torch.allclose(value, found[name], atol=1e-6) for name, value in env.policy.state_dict().items())


def test_the_folder_is_a_plain_model(tmp_path: Path) -> None:
    agent, env = trained(layers=1)
    agent.save(tmp_path / "saved")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.allclose(logits(plain), logits(env.model), atol=1e-5)
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "saved")("a cat")["input_ids"] == env.tokenizer("a cat")["input_ids"]
    )
    assert not [path for path in (tmp_path / "saved").iterdir() if path.suffix in (".bin", ".pt", ".pkl")]


def test_saving_again_replaces_and_loading_takes_a_step_back(tmp_path: Path) -> None:
    agent, env = trained()
    agent.save(tmp_path / "best")
    before = logits(env.model)
    play_episode(agent, env, "oh")
    assert not torch.equal(logits(env.model), before)
    agent.load(str(tmp_path / "best"))
    assert torch.equal(logits(env.model), before)
    play_episode(agent, env, "oh")
    agent.save(tmp_path / "best")
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_nothing_but_an_older_agent_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "out" / "best").mkdir(parents=True)
    with pytest.raises(ConfigError, match="holds other files, and no saved agent; name a new folder"):
        trained()[0].save(tmp_path / "out")
    assert (tmp_path / "out" / "best").is_dir()
    (tmp_path / "empty").mkdir()
    trained()[0].save(tmp_path / "empty")


def test_nothing_but_an_older_dump_is_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = base_folder("gpt2", tmp_path / "base")
    trained()[0].save(tmp_path / "out" / "best")
    for taken in ("out", "out/best", "base"):
        words = ["--model", model, "--rl", str(tmp_path / "out" / "best"), "--dump", str(tmp_path / taken)]
        assert main(words) == 2
        assert "is there already and is no earlier dump; name a new folder" in capsys.readouterr().err
    for _ in range(2):
        assert main(["--model", model, "--rl", str(tmp_path / "out" / "best"), "--dump", str(tmp_path / "new")]) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "new") is not None


def test_a_dump_has_the_tokenizer_that_was_trained_with(tmp_path: Path) -> None:
    model = base_folder("gpt2", tmp_path / "base")
    agent, _ = trained()
    agent.tokenizer.chat_template = "{{ messages[0]['content'] }}"
    agent.save(tmp_path / "rl")
    assert main(["--model", model, "--rl", str(tmp_path / "rl"), "--dump", str(tmp_path / "out")]) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == "{{ messages[0]['content'] }}"


def test_another_optimizer_begins_anew_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    agent, env = trained()
    agent.save(tmp_path / "saved")
    other, other_env = fresh(optimizer="sgd")
    with caplog.at_level(logging.WARNING, logger="tropism"):
        other.load(tmp_path / "saved")
    assert "begins anew" in caplog.text
    assert torch.equal(logits(other_env.model), logits(env.model))


@pytest.mark.parametrize(
    ("family", "layers", "seed"),
    [("gpt2", 0, 1), ("llama", 0, 0), ("gpt2", 1, 0)],
    ids=["other weights", "other family", "other blocks"],
)
def test_a_folder_of_another_model_is_refused(family: str, layers: int, seed: int, tmp_path: Path) -> None:
    trained()[0].save(tmp_path / "saved")
    other, env = fresh(family, layers=layers, seed=seed)
    before = copy.deepcopy(env.policy.state_dict())
    with pytest.raises(ModelError, match=r"of another model|unfreeze_layer_from_past=0"):
        other.load(tmp_path / "saved")
    assert all(torch.equal(value, before[name]) for name, value in env.policy.state_dict().items())


def test_what_is_no_saved_agent_is_refused(tmp_path: Path) -> None:
    agent, _ = trained()
    base_folder("gpt2", tmp_path / "model")
    for folder in (tmp_path / "model", tmp_path / "nothing"):
        with pytest.raises(ModelError, match="holds no saved agent"):
            agent.load(folder)
    agent.save(tmp_path / "saved")
    (tmp_path / "saved" / "value_head.safetensors").unlink()
    with pytest.raises(ModelError, match=r"holds no value_head.safetensors"):
        agent.load(tmp_path / "saved")


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 2}', '{"format": 1, "steps": 1}'])
def test_a_damaged_folder_is_refused(content: str, tmp_path: Path) -> None:
    agent, _ = trained()
    agent.save(tmp_path / "saved")
    (tmp_path / "saved" / "textrl.json").write_text(content)
    with pytest.raises(ModelError, match=r"textrl.json"):
        agent.load(tmp_path / "saved")


# tropism-dump ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["--dump", "--dumpdir"])
def test_pitfall_13_dump_takes_both_spellings(flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    agent, env = trained()
    agent.save(tmp_path / "rl")
    base = base_folder("gpt2", tmp_path / "base")
    assert main(["--model", base, "--rl", str(tmp_path / "rl"), flag, str(tmp_path / "out")]) == 0
    assert "verified" in capsys.readouterr().out
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.allclose(logits(plain), logits(env.model), atol=1e-5)
    assert {path.name for path in (tmp_path / "out").iterdir()}.isdisjoint({"textrl.json", "value_head.safetensors"})
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == env.tokenizer.get_vocab()


@pytest.mark.parametrize(("family", "layers"), [("gpt2", 0), ("gpt2", 1), ("llama", 0), ("llama", 2)])
def test_pitfall_19_dump_puts_back_what_was_trained(
    family: str, layers: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """TextRL rebuilds the actor with no trained blocks, whatever there were."""
    agent, env = trained(family, layers=layers)
    agent.save(tmp_path / "rl")
    base = base_folder(family, tmp_path / "base")
    assert main(["--model", base, "--rl", str(tmp_path / "rl"), "--dump", str(tmp_path / "out")]) == 0
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.allclose(logits(plain), logits(env.model), atol=1e-5)
    assert not torch.allclose(logits(plain), logits(tiny_model(family)), atol=1e-3)


@pytest.mark.parametrize(("family", "layers"), [("t5_v1_1", 0), ("t5", 1), ("bart", 1)])
def test_encoder_decoders_are_trained_saved_and_dumped(
    family: str, layers: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    agent, env = trained(family, layers=layers)
    assert agent.learner.trainer.counts.updates == 2
    agent.save(tmp_path / "rl")
    other, other_env = fresh(family, layers=layers)
    other.load(tmp_path / "rl")
    base = base_folder(family, tmp_path / "base")
    assert main(["--model", base, "--rl", str(tmp_path / "rl"), "--dump", str(tmp_path / "out")]) == 0
    ids = torch.tensor([[5, 9, 11, 6]])
    given = {"input_ids": ids, "decoder_input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = env.model(**given).logits
    plain = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
    assert torch.allclose(plain(**given).logits, expected, atol=1e-5)
    assert torch.allclose(other_env.model(**given).logits, expected, atol=1e-6)
    assert not torch.allclose(tiny_model(family)(**given).logits, expected, atol=1e-4)


def test_dump_on_another_model_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained()[0].save(tmp_path / "rl")
    base = base_folder("gpt2", tmp_path / "base", seed=5)
    assert main(["--model", base, "--rl", str(tmp_path / "rl"), "--dump", str(tmp_path / "out")]) == 2
    assert "of another model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_agent_goes_on_from_its_own_folder_as_a_model(tmp_path: Path) -> None:
    agent, _ = trained(layers=1)
    agent.save(tmp_path / "rl")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "rl")
    env = LettersEnv(model, AutoTokenizer.from_pretrained(tmp_path / "rl"), ["a cat"], max_length=4)
    play_episode(make_actor(env).agent_ppo(**SETTINGS), env)


def test_facts_hold_no_weights(tmp_path: Path) -> None:
    trained()[0].save(tmp_path / "rl")
    facts = json.loads((tmp_path / "rl" / "textrl.json").read_text())
    assert facts["unfreeze_layer_from_past"] == 0 and facts["optimizer"] == "adamw"
    assert ["model.lm_head.weight", [37, 32]] in facts["trained"]
