"""Export of every method's run: plain models with the logits of what was trained, checked before success is said."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

import tropism
from tiny_models import CHARACTERS, EOS_ID, SPECIAL_TOKENS, VOCABULARY, tiny_model, tiny_tokenizer
from tiny_runs import EPISODES, JUDGED, JUDGED_APART, SCORED, TEXTS, Setting, assemble, execute
from tropism.build import Assembly
from tropism.errors import ConfigError, ModelError
from tropism.export import Export, export_model
from tropism.foreign.reward_facts import OFFSET
from tropism.generation import TextPolicy, save_policy
from tropism.models.policy import Policy
from tropism.models.saving import save_adapter
from tropism.text_reward_model import TextRewardModel

IDS = torch.tensor([[5, 9, 11, 7, 3, 30, 8, 6], [9, 12, 20, 36, 20, 6, 6, 4]])
PROMPT, COMPLETION = IDS[:, :4], IDS[:, 4:]

EXPORTED = [
    Setting("sft", False, "llama"),
    Setting("sft", False, "gpt2", train_layers=0),
    Setting("ppo", True, "gpt2"),
    Setting("grpo", False, "llama"),
    Setting("rloo", False, "gpt2", train_layers=1),
    Setting("conditioned", True, "gpt2"),
    Setting("quark", False, "gpt2"),
    Setting("ilql", True, "gpt2"),
    Setting("dpo", True, "llama"),
    Setting("kto", False, "gpt2"),
    Setting("rft", True, "llama"),
    Setting("sft", False, "t5"),
    Setting("ppo", True, "bart"),
    Setting("conditioned", False, "t5"),
    Setting("conditioned", True, "bart"),
    Setting("reward-model", True, "gpt2"),
    Setting("reward-model", False, "llama"),
]
"""Every method, all kinds of training and of models."""

READER = """
import json, sys
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, AutoTokenizer

kinds = {"causal": AutoModelForCausalLM, "seq2seq": AutoModelForSeq2SeqLM, "judge": AutoModelForSequenceClassification}
asked, where = json.load(open(sys.argv[1])), sys.argv[2]
given, found = load_file(where + "/given"), {}
for number, (folder, kind) in enumerate(asked):
    model = kinds[kind].from_pretrained(folder)
    AutoTokenizer.from_pretrained(folder)("a cat")
    rows = {name.split(".")[1]: t for name, t in given.items() if name.split(".")[0] == str(number)}
    with torch.no_grad():
        found[str(number)] = model(**rows).logits.contiguous()
assert not [name for name in sys.modules if name.split(".")[0] == "tropism"]
save_file(found, where + "/found")
"""


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tropism.export_checks.GREEDY", 1)


@dataclass
class Written:
    """One export, and what the model in memory said that training ended with."""

    assembly: Assembly
    export: Export
    expected: Tensor
    given: dict[str, Tensor]
    kind: str


def target_of(setting: Setting) -> Any:
    return 0.5 if setting.method == "conditioned" else None


def taught(setting: Setting, run: Path, **changes: Any) -> Assembly:
    """A tiny run; those of conditioned models have rows of the vocabulary that no token has."""
    rows = VOCABULARY + 3 if setting.method == "conditioned" else VOCABULARY
    model = (tiny_model(setting.family, seed=3, vocab_size=rows), tiny_tokenizer(add_eos=setting.two_sided))
    return execute(assemble(setting, run, **{"model": model, **changes}), export=True)


@torch.no_grad()
def measured(setting: Setting, assembly: Assembly, export: Export) -> Written:
    """What the live model says, and what a plain one has to be given to say it."""
    policy, given, kind = assembly.policy, {"input_ids": IDS}, "causal"
    if setting.method == "reward-model":
        kind = "judge"
        expected = policy(IDS, torch.tensor([8, 8]))[:, None]
    elif setting.two_sided:
        kind = "seq2seq"
        start = torch.full((2, 1), policy.language_model.config.decoder_start_token_id)
        read = {"decoder_input_ids": torch.cat([start, COMPLETION], dim=1)}
        given = {"input_ids": PROMPT, **read}
        if export.slots:
            assert assembly.conditioner is not None and policy.conditioning is not None
            prefix = assembly.conditioner.prefix(target_of(setting))
            rows = torch.cat([torch.tensor([prefix, prefix]), PROMPT], dim=1)
            with policy.conditioning.embedded(policy.input_embedding):
                expected = policy.model(input_ids=rows, **read).logits
            slots = torch.tensor([[slot.row for slot in export.slots]] * 2)
            given["input_ids"] = torch.cat([slots, PROMPT], dim=1)
        else:
            expected = policy.model(**given).logits
    elif export.slots:  # ids below 0 are rewards, which the plain model reads as rows of its vocabulary
        assert assembly.conditioner is not None
        asked = target_of(setting)
        prefix = assembly.conditioner.prefix(assembly.conditioner.default if asked is None else asked)
        rows = torch.cat([torch.tensor([prefix, prefix]), IDS], dim=1)
        positions = torch.arange(rows.shape[1]).expand_as(rows)
        expected = policy.logits(policy.hidden_states(rows, torch.ones_like(rows, dtype=torch.bool), positions))
        slots = torch.tensor([[slot.row for slot in export.slots]] * 2)
        given = {"input_ids": torch.cat([slots, IDS], dim=1)}
    else:
        expected = policy.model(input_ids=IDS).logits
    return Written(assembly, export, expected, given, kind)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Written]:
    """An export of every setting, by the setting's name."""
    folder = tmp_path_factory.mktemp("exports")
    found = {}
    for setting in EXPORTED:
        assembly = taught(setting, folder / str(setting) / "run")
        out = folder / str(setting) / "out"
        export = export_model(folder / str(setting) / "run", out, targets=target_of(setting))
        found[str(setting)] = measured(setting, assembly, export)
    return found


@pytest.fixture(scope="module")
def read_elsewhere(written: dict[str, Written], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """Logits of all exports, by a process that has transformers and no tropism."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "asked").write_text(json.dumps([(str(one.export.folder), one.kind) for one in written.values()]))
    given = {f"{n}.{key}": t for n, one in enumerate(written.values()) for key, t in one.given.items()}
    save_file({name: tensor.clone() for name, tensor in given.items()}, folder / "given")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", READER, str(folder / "asked"), str(folder)]
    ended = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]
    found = load_file(folder / "found")
    return {name: found[str(number)] for number, name in enumerate(written)}


# Every method ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", EXPORTED, ids=str)
def test_a_stranger_loads_what_was_trained(
    setting: Setting, written: dict[str, Written], read_elsewhere: dict[str, Tensor]
) -> None:
    one = written[str(setting)]
    found = read_elsewhere[str(setting)]
    if one.kind == "judge":
        found = found + json.loads((one.export.folder / "config.json").read_text()).get(OFFSET, 0.0)
    found = found[..., : one.expected.shape[-1]]  # an appended control token has a row more
    assert float((found - one.expected).abs().max()) < 1e-5
    assert one.export.found.largest_difference < 1e-5 * max(1.0, one.export.found.largest_logit)
    assert one.export.step == one.assembly.recipe.total_steps


@pytest.mark.parametrize("setting", EXPORTED, ids=str)
def test_only_plain_files_are_there(setting: Setting, written: dict[str, Written]) -> None:
    folder = written[str(setting)].export.folder
    names = {path.name for path in folder.iterdir()}
    extra = {"reward_model.json"} if setting.method == "reward-model" else {"generation_config.json"}
    plain = {"README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert names - {"training.png"} == plain | extra | {"tropism_export.json"}
    config = json.loads((folder / "config.json").read_text())
    assert not {"auto_map", "reward_conditioning", "tropism_q_heads"} & config.keys()
    own = str(folder.parent)
    for path in folder.iterdir():
        if path.suffix in (".json", ".md"):
            assert own not in path.read_text(), f"{path.name} tells where it was written"


@pytest.mark.parametrize(
    ("setting", "note"),
    [
        (Setting("ppo", True, "gpt2"), "the value head (PPO's critic) is left out"),
        (Setting("ilql", True, "gpt2"), "the Q heads are left out, so there is no beta to steer with"),
        (Setting("reward-model", False, "llama"), "so the score is the logit plus"),
    ],
    ids=str,
)
def test_what_is_left_out_is_said(setting: Setting, note: str, written: dict[str, Written]) -> None:
    export = written[str(setting)].export
    assert note in " ".join(export.notes)
    assert note[1:] in (export.folder / "README.md").read_text()


def test_grpo_has_nothing_to_say_of_heads(written: dict[str, Written]) -> None:
    assert written[str(Setting("grpo", False, "llama"))].export.notes == ()


def test_pitfall_19_an_export_holds_the_trained_layers_in_the_whole_model(written: dict[str, Written]) -> None:
    """TextRL's dump built the actor without its unfrozen layers, and silenced every logger of the process."""
    folder = written[str(Setting("rloo", False, "gpt2", train_layers=1))].export.folder
    exported = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    before = tiny_model("gpt2", seed=3).state_dict()
    moved = {name for name, value in exported.items() if not torch.equal(value, before[name])}
    assert moved and all(name.startswith(("transformer.h.1.", "transformer.ln_f.")) for name in moved)
    assert {name.split(".")[3] for name in moved if ".h.1." in name} >= {"attn", "mlp"}
    assert logging.root.manager.disable < logging.WARNING


def holes_tokenizer(holes: tuple[int, ...]) -> PreTrainedTokenizerFast:
    """The tiny tokenizer, where some ids belong to no token."""
    free = [number for number in range(VOCABULARY + len(holes)) if number not in holes]
    names = (*SPECIAL_TOKENS, *CHARACTERS)
    core = Tokenizer(WordLevel(dict(zip(names, free, strict=True)), unk_token="?"))
    core.pre_tokenizer = Split("", "isolated")
    core.decoder = decoders.Fuse()
    core.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="?"
    )
    tokenizer.clean_up_tokenization_spaces = False
    return tokenizer


def test_pitfall_19_a_vocabulary_with_holes_keeps_its_order(tmp_path: Path) -> None:
    """Rows belong to ids, wherever ids without a token lie, and so do those beyond the last token."""
    holes = (6, 7, 20)
    tokenizer, rows = holes_tokenizer(holes), VOCABULARY + len(holes) + 24
    assembly = taught(
        Setting("sft", False, "gpt2", train_layers=0),
        tmp_path / "run",
        model=(tiny_model("gpt2", seed=3, vocab_size=rows), tokenizer),
    )
    export_model(tmp_path / "run", tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again("oh no, a cat.").input_ids == tokenizer("oh no, a cat.").input_ids
    assert loaded.config.vocab_size == rows == loaded.lm_head.weight.shape[0]
    for name in ("transformer.wte.weight", "lm_head.weight"):
        assert torch.equal(loaded.state_dict()[name], assembly.policy.model.state_dict()[name])


def test_tied_embeddings_stay_tied_and_untied_ones_apart(written: dict[str, Written]) -> None:
    tied = written[str(Setting("rloo", False, "gpt2", train_layers=1))].export.folder
    model = AutoModelForCausalLM.from_pretrained(tied)
    assert model.config.tie_word_embeddings and model.lm_head.weight is model.transformer.wte.weight
    assert "lm_head.weight" not in load_file(tied / "model.safetensors")
    apart = written[str(Setting("sft", False, "gpt2", train_layers=0))].export.folder
    model = AutoModelForCausalLM.from_pretrained(apart)
    assert not model.config.tie_word_embeddings
    assert not torch.equal(model.lm_head.weight, model.transformer.wte.weight), "the head alone was trained"
    assert torch.equal(model.transformer.wte.weight, tiny_model("gpt2", seed=3).transformer.wte.weight)


def test_chat_template_and_generation_config_are_kept(tmp_path: Path) -> None:
    model = tiny_model("llama", seed=3)
    model.generation_config.update(
        do_sample=True, temperature=0.6, top_k=7, max_new_tokens=11, eos_token_id=[EOS_ID, 4]
    )
    taught(Setting("dpo", True, "llama"), tmp_path / "run", model=(model, tiny_tokenizer(chat=True)))
    export_model(tmp_path / "run", tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config
    assert (loaded.do_sample, loaded.temperature, loaded.top_k, loaded.max_new_tokens) == (True, 0.6, 7, 11)
    assert loaded.eos_token_id == [EOS_ID, 4]
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    chat = [{"role": "user", "content": "oh no"}]
    assert again.apply_chat_template(chat, tokenize=False) == "<user>oh no"


def test_folders_of_chat_templates_stay_readable(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "{{ messages[0]['content'] }}"}
    taught(Setting("dpo", True, "llama"), tmp_path / "run", model=(tiny_model("llama", seed=3), tokenizer))
    export_model(tmp_path / "run", tmp_path / "out")
    folders = [path for path in (tmp_path / "out").rglob("*") if path.is_dir()]
    assert folders and all(path.stat().st_mode & 0o100 for path in folders)
    assert set(AutoTokenizer.from_pretrained(tmp_path / "out").chat_template) == {"default", "tool_use"}


def test_q_heads_are_kept_where_that_is_asked(written: dict[str, Written], tmp_path: Path) -> None:
    one = written[str(Setting("ilql", True, "gpt2"))]
    export = export_model(one.assembly.folder.path, tmp_path / "out", keep_heads=True)
    assert export.heads_kept and "kept" in export.notes[0]
    told = TextPolicy.load(tmp_path / "out")
    live = one.assembly.policy.q_heads
    assert told.policy.q_heads is not None and live is not None
    for name, value in live.state_dict().items():
        assert torch.equal(told.policy.q_heads.state_dict()[name], value)
    steered = told.generate("a cat", beta=8.0, max_new_tokens=3)
    assert steered == TextPolicy(one.assembly.policy, one.assembly.loaded).generate("a cat", beta=8.0, max_new_tokens=3)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")  # which takes no notice of them
    with torch.no_grad():
        assert float((plain(input_ids=IDS).logits - one.expected).abs().max()) < 1e-5
    with pytest.raises(ConfigError, match="this model has none"):
        export_model(
            written[str(Setting("grpo", False, "llama"))].assembly.folder.path, tmp_path / "no", keep_heads=True
        )
    assert not (tmp_path / "no").exists()


def test_models_in_memory(written: dict[str, Written], tmp_path: Path) -> None:
    one = written[str(Setting("ppo", True, "gpt2"))]
    export = export_model(TextPolicy(one.assembly.policy, one.assembly.loaded), tmp_path / "out")
    assert export.notes == (
        "the adapter is merged into the weights",
        "the value head (PPO's critic) is left out; only training needs it",
    )
    exported, stored = (load_file(f / "model.safetensors") for f in (tmp_path / "out", one.export.folder))
    assert exported.keys() == stored.keys() and all(torch.equal(exported[name], stored[name]) for name in stored)


def test_the_scale_of_a_reward_model_stays_known(written: dict[str, Written]) -> None:
    one = written[str(Setting("reward-model", False, "llama"))]
    before, after = (
        json.loads((folder / "reward_model.json").read_text())
        for folder in (one.assembly.folder.path / "model", one.export.folder)
    )
    assert before == after and after["normalised"]["samples"] == 8
    scores = TextRewardModel.load(one.export.folder).score("a cat", [" ran.", " sat."])
    live = one.assembly.result().reward_model.score("a cat", [" ran.", " sat."])
    assert scores == pytest.approx(live, abs=1e-5)


# What differs is not written ------------------------------------------------------------------------------------------


def test_an_export_that_differs_is_not_kept(
    written: dict[str, Written], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tropism.models.baked import baked_model

    def spoilt(*args: Any, **options: Any) -> Any:
        model = baked_model(*args, **options)
        with torch.no_grad():
            weights = model.get_output_embeddings().weight
            weights.data = weights.detach().clone()
            weights[9] += 0.01
        return model

    monkeypatch.setattr("tropism.export.baked_model", spoilt)
    for setting in (Setting("grpo", False, "llama"), Setting("sft", False, "t5")):
        with pytest.raises(ModelError, match=r"is not the model that it was made of.*logits differ by"):
            export_model(written[str(setting)].assembly.folder.path, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []


def test_a_reward_model_that_differs_is_not_kept(
    written: dict[str, Written], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tropism.models.reward_files import save_reward_model

    def spoilt(model: Any, tokenizer: Any, folder: Any, facts: Any) -> Any:
        model.rescale(gain=1.01, bias=model.bias.item())
        try:
            return save_reward_model(model, tokenizer, folder, facts)
        finally:
            model.rescale(gain=1.0, bias=model.bias.item())

    monkeypatch.setattr("tropism.export_reward_model.save_reward_model", spoilt)
    run = written[str(Setting("reward-model", False, "llama"))].assembly.folder.path
    with pytest.raises(ModelError, match="scores differ by"):
        export_model(run, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("lost", ["vocabulary", "chat template", "rows"])
def test_tokenizers_are_compared_too(lost: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = TextPolicy.load((tiny_model("llama"), tiny_tokenizer(chat=True)))
    from tropism.models.saving import save_plain

    def spoilt(model: Any, tokenizer: Any, folder: Path, **options: Any) -> None:
        save_plain(model, tokenizer, folder, **options)
        if lost == "chat template":
            (folder / "chat_template.jinja").unlink()
        elif lost == "vocabulary":
            rules = json.loads((folder / "tokenizer.json").read_text())
            rules["model"]["vocab"]["zz"] = 36
            del rules["model"]["vocab"]["'"]
            (folder / "tokenizer.json").write_text(json.dumps(rules))
        else:
            settings = json.loads((folder / "generation_config.json").read_text())
            (folder / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": 5}))

    monkeypatch.setattr("tropism.export.save_plain", spoilt)
    messages = {"vocabulary": "vocabulary", "chat template": "chat template", "rows": "eos_token_id 5 instead of 2"}
    with pytest.raises(ModelError, match=messages[lost]):
        export_model(policy, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# Going on -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "algorithm", "data"),
    [
        (Setting("ppo", True, "gpt2"), tropism.SFT(), TEXTS),
        (Setting("conditioned", True, "gpt2"), tropism.SFT(), TEXTS),
        (Setting("ilql", True, "gpt2"), tropism.ILQL(), EPISODES),
        (Setting("sft", False, "gpt2", train_layers=0), tropism.GRPO(group_size=2), ["a cat", "oh"]),
        (Setting("sft", False, "t5"), tropism.SFT(), SCORED),
        (Setting("reward-model", False, "llama"), tropism.RewardModeling(), JUDGED),
    ],
    ids=["ppo", "conditioned", "ilql", "head alone", "t5", "reward model"],
)
def test_training_goes_on_from_an_export(
    setting: Setting, algorithm: Any, data: Any, written: dict[str, Written], tmp_path: Path
) -> None:
    folder = written[str(setting)].export.folder
    judges = setting.method == "reward-model"
    data = [{**item, "completion": item["completion"].strip()} for item in SCORED] if setting.two_sided else data
    result = tropism.train(
        model=str(folder),
        algorithm=algorithm,
        data=data,
        reward=(lambda completions: [float(len(text)) for text in completions]) if data == ["a cat", "oh"] else None,
        run=str(tmp_path / "run"),
        total_steps=1,
        prompts_per_step=2,
        sampling=tropism.Sampling(max_new_tokens=3),
        trainer=tropism.TrainerConfig(progress=False, learning_rate=1e-3),
    )
    kind = AutoModelForSequenceClassification if judges else None
    again = export_model(result.path, tmp_path / "again").folder
    first, second = (load_file(one / "model.safetensors") for one in (folder, again))
    assert first.keys() == second.keys()
    assert any(not torch.equal(first[name], second[name]) for name in first)
    if kind is not None:
        kind.from_pretrained(again)


# Where it comes from --------------------------------------------------------------------------------------------------


def test_an_adapter_folder_is_merged_and_its_base_may_have_moved(tmp_path: Path) -> None:
    base = tmp_path / "base"
    save_policy(Policy(tiny_model("llama", seed=3)), tiny_tokenizer(), None, base)
    assembly = execute(assemble(Setting("sft", True, "llama"), tmp_path / "run", model=str(base)))
    save_adapter(assembly.policy.model, tmp_path / "adapter")
    with torch.no_grad():
        expected = assembly.policy.model(input_ids=IDS).logits
    export_model(tmp_path / "adapter", tmp_path / "out")
    base.rename(tmp_path / "moved")
    with pytest.raises(ModelError, match=r"the adapter .* stands on .*base, which cannot be loaded.*\n.*--base MODEL"):
        export_model(tmp_path / "adapter", tmp_path / "out2")
    export_model(tmp_path / "adapter", tmp_path / "out2", base=tmp_path / "moved")
    for name in ("out", "out2"):
        with torch.no_grad():
            found = AutoModelForCausalLM.from_pretrained(tmp_path / name)(input_ids=IDS).logits
        assert float((found - expected).abs().max()) < 1e-5


def test_what_is_no_run_and_no_model_is_told(written: dict[str, Written], tmp_path: Path) -> None:
    run = written[str(Setting("grpo", False, "llama"))].assembly.folder.path
    (tmp_path / "photos").mkdir()
    checkpoint = next((run / "checkpoints").iterdir())
    for source, options, message in [
        (tmp_path / "photos", {}, "neither a run .* nor a model folder"),
        (checkpoint, {}, "is a part of the run .* tropism export .* --step N --out DIR"),
        (run / "model", {"step": 1}, "is no run folder .* leave --step out"),
        (run / "model", {"base": "demo"}, "--base is for checkpoints and adapters"),
        (run, {"base": "demo"}, "--base is for checkpoints and adapters"),
        (run, {"step": 1, "best": True}, "give one of them"),
        (run, {"targets": 0.5}, "leave --target-reward out"),
    ]:
        with pytest.raises(ConfigError, match=message):
            export_model(source, tmp_path / "out", **options)
    judge = written[str(Setting("reward-model", False, "llama"))].assembly.folder.path
    with pytest.raises(ConfigError, match="gives scores and is asked for none; leave --slot-token out"):
        export_model(judge, tmp_path / "out", slot_tokens="z")
    with pytest.raises(ConfigError, match="Q heads of ilql"):
        export_model(judge, tmp_path / "out", keep_heads=True)
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_a_run_that_has_not_finished(written: dict[str, Written], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(written[str(Setting("grpo", False, "llama"))].assembly.folder.path, run)
    content = json.loads((run / "environment.json").read_text())
    (run / "environment.json").write_text(json.dumps({**content, "exported": {"step": 1, "update": 2}}))
    with pytest.raises(ConfigError, match=r"went on after its model was written: that is of step 1, .* of step 2\."):
        export_model(run, tmp_path / "out")
    shutil.rmtree(run / "model")
    with pytest.raises(ConfigError, match=r"has not finished.*--resume.*or export a checkpoint: --step 2"):
        export_model(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_held_out_judgements_are_told_from_those_of_the_run(tmp_path: Path) -> None:
    """A reward model with an evaluation is verified and described like any other."""
    taught(Setting("reward-model", False, "llama"), tmp_path / "run", eval_data=JUDGED_APART)
    export = export_model(tmp_path / "run", tmp_path / "out")
    assert "| accuracy |" in (export.folder / "README.md").read_text()
