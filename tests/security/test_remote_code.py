"""Code in a model folder does not run, whatever names it, unless who loads the model says so; nobody is asked."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM, LlamaForSequenceClassification

from tiny_models import FAMILIES, tiny_config, tiny_tokenizer
from tropism.commands.recipe_arguments import with_overrides
from tropism.config import Recipe
from tropism.errors import ConfigError, ModelError
from tropism.models.loading import ModelConfig, load_model
from tropism.rewards.registry import make_reward

AUTO_MAP = {
    "AutoConfig": "evil.Config",
    "AutoModelForCausalLM": "evil.Model",
    "AutoModelForSequenceClassification": "evil.Model",
    "AutoTokenizer": ["evil.Slow", "evil.Fast"],
}


@pytest.fixture
def witness(tmp_path: Path) -> Path:
    """The file that exists once code of a model has run."""
    return tmp_path / "ran"


@pytest.fixture
def folder(tmp_path: Path, witness: Path) -> Path:
    """A saved tiny Llama, with Python files under every name that something might import."""
    FAMILIES["llama"]().save_pretrained(tmp_path / "tiny")
    tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    add_code(tmp_path / "tiny", witness)
    return tmp_path / "tiny"


def add_code(folder: Path, witness: Path) -> None:
    code = (
        f"open({str(witness)!r}, 'w').close()\nclass Config: ...\nclass Model: ...\nclass Slow: ...\nclass Fast: ...\n"
    )
    (folder / "custom_generate").mkdir()
    names = ("evil", "sitecustomize", "usercustomize", "conftest", "modeling_llama", "configuration_llama", "__init__")
    for name in (*names, "tokenization_llama", "torch", "json", "custom_generate/generate", "hubconf", "handler"):
        (folder / f"{name}.py").write_text(code)
    (folder / "requirements.txt").write_text("no-such-package-at-all\n")


def edit(file: Path, **fields: Any) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | fields))


def test_a_model_that_names_code_everywhere_loads_without_it(folder: Path, witness: Path) -> None:
    keys: dict[str, Any] = {
        "auto_map": AUTO_MAP,
        "trust_remote_code": True,
        "custom_generate": "evil",
        "custom_pipelines": {"text-generation": {"impl": "evil.Model"}},
        "kernel_config": {"Linear": "someone/kernel:Linear"},
        "use_kernels": True,
        "fusion_config": {"norm": True},
        "_auto_class": "evil.Model",
        "attn_implementation": "someone/kernel",
        "_attn_implementation": "someone/kernel",
        "_attn_implementation_internal": "someone/kernel",
        "_experts_implementation": "someone/kernel",
        "_experts_implementation_internal": "someone/kernel",
        "__class__": "evil.Config",
    }
    nested = {**keys, "sub_config": keys, "sub": [{"deeper": keys}]}
    for name in ("config.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json"):
        edit(folder / name, **(nested if name == "config.json" else keys))
    for name in ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"):
        edit(folder / name, **keys, processor_class="evil.Model")
    loaded = load_model(str(folder))
    assert type(loaded.model) is LlamaForCausalLM
    assert loaded.model.config._attn_implementation in ("sdpa", "eager")
    assert "evil" not in json.dumps(loaded.model.config.to_dict(), default=str)
    assert "someone/kernel" not in json.dumps(loaded.model.config.to_dict(), default=str)
    loaded.tokenizer.save_pretrained(folder.parent / "again")
    assert "evil" not in (folder.parent / "again" / "tokenizer_config.json").read_text()
    assert not witness.exists()


def test_code_runs_when_who_loads_the_model_says_so(folder: Path, witness: Path) -> None:
    edit(folder / "config.json", auto_map=AUTO_MAP, model_type="evil")
    with pytest.raises(ModelError, match=r"'evil'.*trust_remote_code=True if the model ships its own code"):
        load_model(str(folder))
    assert not witness.exists()
    with pytest.raises(ModelError):  # what the code defines is no model
        load_model(ModelConfig(name=str(folder), trust_remote_code=True))
    assert witness.exists()


@pytest.mark.parametrize(
    "kind", ["Trainer", "AutoModel", "AutoTokenizer.__init__", "os.system", "../evil", 5, ["evil"]]
)
def test_a_tokenizer_class_is_a_tokenizer(folder: Path, witness: Path, kind: Any) -> None:
    edit(folder / "tokenizer_config.json", tokenizer_class=kind)
    with pytest.raises(ModelError, match=r"tokenizer_config\.json: tokenizer_class is .* no tokenizer"):
        load_model(str(folder))
    edit(folder / "tokenizer_config.json", tokenizer_class="EvilTokenizer")
    load_model(str(folder))
    assert not witness.exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "mxfp4"},
        {"quant_method": "fp8"},
        {"quant_method": "evil"},
        {"quant_method": ["gptq"]},
        {},
        "evil",
        5,
    ],
    ids=str,
)
def test_quantisations_that_download_kernels_are_refused(folder: Path, settings: Any) -> None:
    edit(folder / "config.json", quantization_config=settings)
    with pytest.raises(ModelError, match=r"config\.json asks for the quantisation .*downloaded and run"):
        load_model(str(folder))


def test_a_classifier_runs_no_code(tmp_path: Path, witness: Path) -> None:
    folder = tmp_path / "scorer"
    LlamaForSequenceClassification(tiny_config("llama", num_labels=1)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    add_code(folder, witness)
    for name in ("config.json", "tokenizer_config.json"):
        edit(folder / name, auto_map=AUTO_MAP, trust_remote_code=True, _attn_implementation_internal="someone/kernel")
    reward = make_reward("classifier", {"model": str(folder), "device": "cpu"})
    assert type(reward).__name__ != "Model" and len(reward(prompts=["a"], completions=["b"])) == 1
    edit(folder / "config.json", model_type="evil")
    with pytest.raises(ModelError, match="cannot load the classifier"):
        make_reward("classifier", {"model": str(folder), "device": "cpu"})
    assert not witness.exists()


# Adapters.


@pytest.fixture
def adapter(folder: Path, witness: Path) -> Path:
    """A LoRA adapter on the tiny Llama."""
    adapted: Any = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(str(folder.parent / "adapter"))
    add_code(folder.parent / "adapter", witness)
    return folder.parent / "adapter"


def test_an_adapter_that_names_code_loads_without_it(adapter: Path, witness: Path) -> None:
    expected = load_model(str(adapter)).model.state_dict()
    edit(
        adapter / "adapter_config.json",
        auto_mapping={"base_model_class": "Model", "parent_library": "evil"},
        megatron_core="evil",
        trust_remote_code=False,
        target_modules="(a|a)*b" * 5,  # a pattern that takes forever
        exclude_modules="(.*)*x",
        revision="evil",
    )
    found = load_model(str(adapter)).model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert not witness.exists()


@pytest.mark.parametrize(
    "fields",
    [
        {"megatron_config": {"a": 1}, "megatron_core": "evil"},
        {"peft_type": "evil.Model"},
        {"peft_type": ["LORA"]},
        {"peft_type": "PROMPT_TUNING"},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [1]},
        {"layer_replication": [[0, 2], [0, 2]]},
        {"trust_remote_code": True},
        {"init_lora_weights": "pissa"},
        {"rank_pattern": {"(.*)*x": 4}},
        {"r": "8"},
        {"r": -1},
        {"r": 10**9},
        {"base_model_name_or_path": None},
        {"base_model_name_or_path": ["x"]},
        {"base_model_name_or_path": "../nothing"},
    ],
    ids=str,
)
def test_what_is_no_plain_adapter_is_refused(adapter: Path, witness: Path, fields: dict[str, Any]) -> None:
    edit(adapter / "adapter_config.json", **fields)
    with pytest.raises(ModelError):
        load_model(str(adapter))
    assert not witness.exists()


def test_the_base_that_an_adapter_names_is_read_by_the_same_rules(adapter: Path, folder: Path, witness: Path) -> None:
    edit(folder / "config.json", auto_map=AUTO_MAP, model_type="evil")
    with pytest.raises(ModelError, match="'evil'"):
        load_model(str(adapter))
    assert not witness.exists()


def test_a_damaged_adapter_is_named(adapter: Path) -> None:
    weights = (adapter / "adapter_model.safetensors").read_bytes()
    (adapter / "adapter_model.safetensors").write_bytes(weights[:-1])
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors is damaged"):
        load_model(str(adapter))
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match="holds no adapter weights"):
        load_model(str(adapter))
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"adapter_config\.json is no valid JSON"):
        load_model(str(adapter))


# Who may say so.


def test_a_recipe_file_cannot_allow_code(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("model: {name: m, trust_remote_code: true}\nalgorithm: sft\ndata: d.jsonl\n")
    mend = r"a file cannot allow a model's code to run\. .*--model\.trust_remote_code true"
    with pytest.raises(ConfigError, match=mend):
        Recipe.from_file(file)
    values = {"model": {"name": "m", "trust_remote_code": True}, "algorithm": "sft", "data": "d.jsonl"}
    with pytest.raises(ConfigError, match=mend):
        with_overrides(values, ["--seed", "1"])
    assert with_overrides(values, ["--model.trust_remote_code", "true"])["model"]["trust_remote_code"] is True
    assert with_overrides(values, ["--model.trust_remote_code=false"])["model"]["trust_remote_code"] is False
    assert with_overrides({**values, "model": "m"}, ["--model.trust_remote_code", "true"])["model"] == {
        "name": "m",
        "trust_remote_code": True,
    }
    assert Recipe.from_mapping(values).model.trust_remote_code is True  # given by a Python program


def test_the_command_line_refuses_such_a_recipe(tmp_path: Path) -> None:
    recipe = "model: {name: m, trust_remote_code: true}\nalgorithm: sft\ndata: d.jsonl\n"
    (tmp_path / "recipe.yaml").write_text(recipe)
    for command in (["train", "--resume", "."], ["evaluate", "."]):
        ended = subprocess.run(
            [sys.executable, "-m", "tropism.cli", *command], cwd=tmp_path, capture_output=True, text=True, timeout=300
        )
        assert ended.returncode != 0 and "a file cannot allow a model's code to run" in ended.stderr
        assert "Traceback" not in ended.stderr


SCRIPT = """
import sys
from tropism.errors import ModelError
from tropism.models.loading import load_model
for name in sys.argv[1:]:
    try:
        print("loaded", type(load_model(name).model).__name__)
    except ModelError as error:
        print("refused", error)
"""


def in_terminal(command: list[str], **options: Any) -> str:
    """What a command writes whose input is a terminal at which somebody has typed y."""
    master, slave = pty.openpty()
    os.write(master, b"y\ny\ny\n")
    try:
        ended = subprocess.run(command, stdin=slave, capture_output=True, text=True, timeout=300, **options)
    finally:
        os.close(master)
        os.close(slave)
    return f"{ended.stdout}{ended.stderr}"


def with_closed_input(command: list[str], **options: Any) -> str:
    """What a command writes whose input is at its end."""
    ended = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300, **options)
    return f"{ended.stdout}{ended.stderr}"


@pytest.mark.parametrize("call", [in_terminal, with_closed_input])
def test_nobody_is_asked_on_stdin(folder: Path, witness: Path, call: Callable[..., str]) -> None:
    """The working directory is the model's folder, where a json.py lies in wait."""
    edit(folder / "config.json", auto_map=AUTO_MAP)
    edit(folder / "tokenizer_config.json", auto_map=AUTO_MAP)
    shutil.copytree(folder, folder.parent / "unknown")
    edit(folder.parent / "unknown" / "config.json", model_type="evil")
    said = call([sys.executable, "-P", "-c", SCRIPT, str(folder), str(folder.parent / "unknown")], cwd=folder)
    assert "loaded LlamaForCausalLM" in said and "refused" in said and "'evil'" in said and "[y/N]" not in said
    assert not witness.exists()


def test_transformers_would_have_asked(folder: Path, witness: Path) -> None:
    edit(folder / "config.json", auto_map=AUTO_MAP, model_type="evil")
    script = "import sys; from transformers import AutoConfig; AutoConfig.from_pretrained(sys.argv[1])"
    said = in_terminal([sys.executable, "-P", "-c", script, str(folder)], cwd=folder.parent)
    assert "Do you wish to run the custom code? [y/N]" in said
    assert witness.exists()
