"""Models with a target built in: for plain transformers they are the conditioned model, row by row and id by id."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)

from conditioned_policies import conditioned_policy
from slots_by_hand import logits_by_hand, slot_vectors
from tiny_models import BOS_ID, CHARACTERS, EOS_ID, FAMILIES, SPECIAL_TOKENS, VOCABULARY, tiny_model, tiny_tokenizer
from tropism.errors import ModelError
from tropism.export import export_at_target
from tropism.generation import TextPolicy
from tropism.models.conditioning import HIDDEN
from tropism.models.lora import LoRA, add_lora
from tropism.targets.config import Mechanism

ROOM = VOCABULARY + 3
"""Rows of a model whose tokenizer leaves three of them unused."""
TEXT = "is it so, my friend?"
WORDS = ("low", "lower", "cat", "concat", "rarely")


@pytest.fixture(autouse=True)
def _one_completion(monkeypatch: pytest.MonkeyPatch) -> None:
    """One greedy completion per export: most of the time goes there."""
    monkeypatch.setattr("tropism.export_checks.GREEDY", 1)


def ids_of(text: str) -> list[int]:
    """By the tiny tokenizer: five special tokens, then the characters."""
    return [len(SPECIAL_TOKENS) + CHARACTERS.index(letter) for letter in text]


@torch.no_grad()
def loaded_logits(folder: Path, ids: Sequence[int]) -> Tensor:
    """[L, V] of a folder, as anybody loads it."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    row = torch.tensor([[*ids]])
    logits: Tensor = model(input_ids=row, attention_mask=torch.ones_like(row)).logits[0]
    return logits.double()


def by_hand(policy: TextPolicy, held: Sequence[float | None], ids: Sequence[int] | None = None) -> Tensor:
    """[L, V] of slots that hold ``held`` before the ids of a text, from embeddings laid side by side."""
    slots, model = policy.policy.conditioning, policy.policy.language_model
    assert slots is not None
    with torch.no_grad():
        return logits_by_hand(model, slot_vectors(slots, model, held), ids_of(TEXT) if ids is None else ids)


def close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))


TIED = [(family, True) for family in FAMILIES] + [(family, False) for family in ("gpt2", "llama", "gemma2")]


@pytest.mark.parametrize(("family", "tied"), TIED)
def test_a_slot_becomes_a_row_that_no_token_has(family: str, tied: bool, tmp_path: Path) -> None:
    # transformers makes tokenizers of Qwen2 models anew from their vocabulary, by rules that it takes for granted.
    tokenizer: Any = byte_tokenizer() if family == "qwen2" else tiny_tokenizer()
    row = len(tokenizer)
    policy = conditioned_policy(family, tokenizer=tokenizer, vocab_size=row + 3, tie_word_embeddings=tied)
    output = policy.policy.language_model.get_output_embeddings().weight.detach().clone()
    before = {name: tensor.clone() for name, tensor in policy.policy.state_dict().items()}

    export = export_at_target(policy, 0.7, tmp_path / "out")

    ids = AutoTokenizer.from_pretrained(tmp_path / "out")(TEXT)["input_ids"]
    assert ids == [row, *tokenizer(TEXT)["input_ids"]]
    assert [(slot.row, slot.kind) for slot in export.slots] == [(row, "padding")]
    close(loaded_logits(tmp_path / "out", ids), by_hand(policy, [0.7], ids[1:]))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(model.get_output_embeddings().weight, output)
    assert model.config.tie_word_embeddings is False
    assert model.generation_config.suppress_tokens == [row]
    after = policy.policy.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before), "the live model is never touched"


def byte_tokenizer() -> Qwen2Tokenizer:
    """Of Qwen2's own class, with a token per byte and one for the end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return Qwen2Tokenizer(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[])


@pytest.mark.parametrize("mechanism", HIDDEN)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_every_hidden_mechanism(family: str, mechanism: Mechanism, tmp_path: Path) -> None:
    policy = conditioned_policy(family, mechanism, vocab_size=ROOM)
    export_at_target(policy, 0.5, tmp_path / "out")
    held = 2.0 if mechanism == "token" else 0.5  # rewards above 0.4 and up to 0.6 are in the third of five bins
    close(loaded_logits(tmp_path / "out", [VOCABULARY, *ids_of(TEXT)]), by_hand(policy, [held]))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert not {"conditioning.json", "conditioning.safetensors"} & names
    assert "reward_conditioning" not in (tmp_path / "out" / "config.json").read_text()
    assert TextPolicy.load(tmp_path / "out").conditioner is None, "the export is a plain model here, too"


def test_other_targets_are_other_models(tmp_path: Path) -> None:
    policy = conditioned_policy(vocab_size=ROOM)
    export_at_target(policy, 0.1, tmp_path / "low")
    export_at_target(policy, 0.9, tmp_path / "high")
    ids = [VOCABULARY, *ids_of(TEXT)]
    assert (loaded_logits(tmp_path / "low", ids) - loaded_logits(tmp_path / "high", ids)).abs().max() > 0.01


def test_several_rewards_take_several_rows_and_may_stay_open(tmp_path: Path) -> None:
    policy = conditioned_policy(targets=("warmth", "length"), vocab_size=ROOM)
    export = export_at_target(policy, {"length": 0.3}, tmp_path / "out")
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")(TEXT)["input_ids"]
    assert ids == [VOCABULARY, VOCABULARY + 1, *ids_of(TEXT)]
    assert [slot.name for slot in export.slots] == ["<|warmth=open|>", "<|length=0.3|>"]
    close(loaded_logits(tmp_path / "out", ids), by_hand(policy, [None, 0.3]))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_text_is_a_matter_of_the_tokenizer(family: str, tmp_path: Path) -> None:
    policy = conditioned_policy(family, "text", tokenizer=tiny_tokenizer(add_bos=True))
    export = export_at_target(policy, 0.5, tmp_path / "out")
    # "reward: 0.50" and a line break, where the tokenizer has neither colon nor digit nor line break but "?" for them.
    unknown = ids_of("?")
    written = [*ids_of("reward"), *unknown, *ids_of(" "), *unknown, *ids_of("."), *unknown * 3]
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")(TEXT)["input_ids"]
    assert ids == [BOS_ID, *written, *ids_of(TEXT)]
    assert export.slots == ()
    with torch.no_grad():
        expected = policy.policy.language_model(input_ids=torch.tensor([ids])).logits[0].double()
    close(loaded_logits(tmp_path / "out", ids), expected)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi", "opt"])
def test_control_tokens_without_room_are_appended(family: str, tmp_path: Path) -> None:
    policy = conditioned_policy(family, "token", targets=("a", "b"))
    model = policy.policy.language_model
    export = export_at_target(policy, {"a": 1.0, "b": 0.0}, tmp_path / "out")
    assert [(slot.row, slot.kind) for slot in export.slots] == [(37, "appended"), (38, "appended")]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert plain.config.vocab_size == plain.get_output_embeddings().weight.shape[0] == 39
    assert plain.generation_config.suppress_tokens == [37, 38]
    found = loaded_logits(tmp_path / "out", [37, 38, *ids_of(TEXT)])
    close(found[:, :37], by_hand(policy, [4.0, 0.0]))
    same = (found[:, :37] == found[:, 37:38]).all(dim=0)
    assert same.sum() == 1, "the output of a token that the model finds unlikely"
    assert torch.equal(plain.get_output_embeddings().weight[:37], model.get_output_embeddings().weight)


def test_an_adapter_is_merged(tmp_path: Path) -> None:
    adapted = add_lora(tiny_model("llama", vocab_size=ROOM), LoRA(rank=4), seed=0)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    policy = conditioned_policy(model=adapted)
    export_at_target(policy, 0.7, tmp_path / "out")
    close(loaded_logits(tmp_path / "out", [VOCABULARY, *ids_of(TEXT)]), by_hand(policy, [0.7]))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_half_precision_is_held_to_its_own_tolerance(family: str, tmp_path: Path) -> None:
    policy = conditioned_policy(model=tiny_model(family, vocab_size=ROOM).bfloat16())
    export = export_at_target(policy, 0.7, tmp_path / "out")
    assert export.found.dtype == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    assert 1e-3 < export.found.tolerance < 0.1


# Tokenizers -----------------------------------------------------------------------------------------------------------


def merging_tokenizer(post: Any = None, **special: str) -> PreTrainedTokenizerFast:
    """Merges letters: low, lo + w; lower, low + er; cat, c + at; rarely, which nothing is built from."""
    merges = [
        "l o",
        "lo w",
        "e r",
        "low er",
        "a t",
        "c at",
        "c o",
        "n cat",
        "co ncat",
        "r a",
        "r e",
        "ra re",
        "l y",
        "rare ly",
    ]
    alphabet = [*"abcdefghijklmnopqrstuvwxyz", "\u0120"]
    pieces = ["<pad>", "<s>", "</s>", "<unused0>", *alphabet, *(merge.replace(" ", "") for merge in merges)]
    pairs = [(left, right) for left, right in map(str.split, merges)]
    core = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=pairs))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.post_processor = post
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", **special
    )


BOS, EOS = ("<s>", BOS_ID), ("</s>", EOS_ID)
ENDINGS: dict[str, tuple[Any, list[int], list[int]]] = {
    "none": (None, [], []),
    "byte-level": (processors.ByteLevel(trim_offsets=True), [], []),
    "bos": (processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[BOS]), [1], []),
    "eos": (
        processors.TemplateProcessing(single="<s> $A </s>", pair="<s> $A $B </s>", special_tokens=[BOS, EOS]), [1], [2],
    ),
    "sequence": (
        processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=True),
                processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[BOS]),
            ]
        ),
        [1],
        [],
    ),
}  # fmt: skip
"""Name -> a post-processor, what it puts before a text and what behind."""


@pytest.mark.parametrize("mechanism", ["linear", "text"])
@pytest.mark.parametrize("ending", ENDINGS)
def test_tokenizers_of_all_kinds_put_it_where_the_model_saw_it(
    ending: str, mechanism: Mechanism, tmp_path: Path
) -> None:
    post, first, last = ENDINGS[ending]
    tokenizer = merging_tokenizer(post)
    policy = conditioned_policy(mechanism=mechanism, tokenizer=tokenizer, vocab_size=len(tokenizer) + 1)
    export_at_target(policy, 0.5, tmp_path / "out")
    baked = AutoTokenizer.from_pretrained(tmp_path / "out")
    asked = (
        [len(tokenizer)] if mechanism == "linear" else tokenizer("reward: 0.50\n", add_special_tokens=False).input_ids
    )

    def whole(*texts: str) -> list[int]:
        ids = [i for text in texts for i in tokenizer(text, add_special_tokens=False).input_ids]
        begin = [*asked, *first] if mechanism == "linear" else [*first, *asked]
        return [*begin, *ids, *last]

    for word in ("", *WORDS):
        assert baked(word).input_ids == whole(word)
        assert baked(word, "low").input_ids == whole(word, "low")
        bare = tokenizer(word, add_special_tokens=False).input_ids
        assert baked(word, add_special_tokens=False).input_ids == bare
    for side in ("left", "right"):
        batch = baked(["low", "concat rarely"], padding=True, padding_side=side)
        kept = [
            [i for i, m in zip(ids, mask, strict=True) if m]
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
        assert kept == [whole("low"), whole("concat rarely")]
    cut = baked("low lower cat", truncation=True, max_length=len(asked) + len(first) + len(last) + 1).input_ids
    assert cut == whole("low"), "what asks for the target is never cut off"
    if mechanism == "linear":
        assert baked.decode(whole("lower"), skip_special_tokens=True) == tokenizer.decode(
            whole("lower")[1:], skip_special_tokens=True
        )


def test_a_reserved_token_is_taken_where_no_row_is_without_a_token(tmp_path: Path) -> None:
    tokenizer = merging_tokenizer()
    policy = conditioned_policy(tokenizer=tokenizer, vocab_size=len(tokenizer))
    export = export_at_target(policy, 0.5, tmp_path / "out")
    assert [(slot.row, slot.name, slot.kind) for slot in export.slots] == [(3, "<unused0>", "reserved")]
    baked = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert baked("low").input_ids == [3, *tokenizer("low").input_ids]
    assert baked.decode([3, *tokenizer("low").input_ids], skip_special_tokens=True) == "low"


def test_a_reserved_token_that_has_found_a_use_is_not_taken(tmp_path: Path) -> None:
    tokenizer = merging_tokenizer()
    tokenizer.pad_token = "<unused0>"
    policy = conditioned_policy(tokenizer=tokenizer, vocab_size=len(tokenizer))
    with pytest.raises(ModelError, match="no free row"):
        export_at_target(policy, 0.5, tmp_path / "out")


def test_reserved_names() -> None:
    from tropism.models.baked_tokenizer import RESERVED

    theirs = "<|reserved_special_token_0|> <unused12> [unused1] <extra_id_99> <|unused_3|> <SPECIAL_20> <|extra_204|>"
    theirs += " [control_768] <|placeholder1|> <|dummy_5|> <|reserved_200017|>"
    assert all(RESERVED.fullmatch(name) for name in theirs.split())
    used = (
        "<s>",
        "<|endoftext|>",
        "<|im_start|>",
        "<mask>",
        "<0x0A>",
        "unused",
        "<|eot_id|>",
        "[INST]",
        "<pad0>",
        "<h1>",
    )
    assert not any(RESERVED.fullmatch(name) for name in used)


def test_a_token_that_is_named_is_taken_out_of_the_vocabulary(tmp_path: Path) -> None:
    tokenizer = merging_tokenizer(ENDINGS["bos"][0])
    policy = conditioned_policy(tokenizer=tokenizer, vocab_size=len(tokenizer))
    export = export_at_target(policy, 0.5, tmp_path / "out", slot_tokens="rarely")
    row, *spelled = (tokenizer.get_vocab()[piece] for piece in ("rarely", "rare", "ly"))
    assert [(slot.row, slot.name, slot.kind) for slot in export.slots] == [(row, "<|reward=0.5|>", "named")]
    baked = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert baked("rarely").input_ids == [row, 1, *spelled], "no text can ask for the target"
    for word in WORDS[:-1]:
        assert baked(word).input_ids == [row, *tokenizer(word).input_ids]
    assert baked.convert_ids_to_tokens(row) == "<|reward=0.5|>"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("low", "other tokens are built from it"),
        ("z", "single character"),
        ("</s>", "the tokenizer's eos token"),
        (1, "the tokenizer's bos token"),
        ("rarely low", "is 3 tokens"),
        (900, "no token of the vocabulary has the id 900"),
        (["rarely", "rarely"], "1 reward slot"),
    ],
)
def test_tokens_that_cannot_be_given_up(name: Any, message: str, tmp_path: Path) -> None:
    tokenizer = merging_tokenizer(ENDINGS["bos"][0])
    policy = conditioned_policy(tokenizer=tokenizer, vocab_size=len(tokenizer))
    with pytest.raises(ModelError, match=message):
        export_at_target(policy, 0.5, tmp_path / "out", slot_tokens=name)
    assert list(tmp_path.iterdir()) == []


def test_a_token_that_the_texts_need_cannot_be_given_up(tmp_path: Path) -> None:
    policy = conditioned_policy()
    with pytest.raises(ModelError, match="the text 'a' needs it"):
        export_at_target(policy, 0.5, tmp_path / "out", slot_tokens="a")
    export_at_target(policy, 0.5, tmp_path / "out", slot_tokens="z")
    close(loaded_logits(tmp_path / "out", [ids_of("z")[0], *ids_of(TEXT)]), by_hand(policy, [0.5]))


def test_no_free_row_says_what_could_be_named(tmp_path: Path) -> None:
    policy = conditioned_policy(tokenizer=tiny_tokenizer())
    with pytest.raises(ModelError, match=r"no free row for 1 reward slot.*Candidates: .*'<user>' \(id 3\)"):
        export_at_target(policy, 0.5, tmp_path / "out")
    chat = conditioned_policy(tokenizer=tiny_tokenizer(chat=True))
    with pytest.raises(ModelError, match="the chat template writes it"):
        export_at_target(chat, 0.5, tmp_path / "out", slot_tokens="<user>")


@pytest.mark.parametrize("mechanism", ["linear", "text"])
@pytest.mark.parametrize("template", ["{{ bos_token }}", "<bos>", ""])
def test_chats_ask_for_it_too(template: str, mechanism: Mechanism, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.chat_template = template + str(tokenizer.chat_template)
    policy = conditioned_policy(mechanism=mechanism, tokenizer=tokenizer, vocab_size=ROOM)
    export_at_target(policy, 0.5, tmp_path / "out")
    baked: Any = AutoTokenizer.from_pretrained(tmp_path / "out")
    chat = [
        {"role": "user", "content": "oh no"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "a"},
    ]
    found = baked.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    bos, user, assistant, end = ([BOS_ID] if template else []), [3], [4], [2]
    said = [*user, *ids_of("oh no"), *assistant, *ids_of("yes"), *end, *user, *ids_of("a"), *assistant]
    if mechanism == "text":
        assert found == [*bos, *tokenizer("reward: 0.50\n").input_ids, *said]
    else:
        assert found == [VOCABULARY, *bos, *said]


def test_real_texts_are_encoded_as_before(stories: Path, tmp_path: Path) -> None:
    policy = TextPolicy.load(stories)
    told = conditioned_policy(model=policy.policy.model, tokenizer=policy.tokenizer)
    with pytest.raises(ModelError, match="no free row"):
        export_at_target(told, 0.5, tmp_path / "out")
    export = export_at_target(told, 0.5, tmp_path / "out", slot_tokens=391)
    baked, before = AutoTokenizer.from_pretrained(tmp_path / "out"), AutoTokenizer.from_pretrained(stories)
    texts = ["Once upon a time, Tim went to the park.", 'She said:\n\n"No"!', "caf\u00e9 \U0001f600", "<s>Hi", "  a"]
    for text in texts:
        assert baked(text).input_ids == [391, *before(text).input_ids]
    assert export.found.largest_difference <= 1e-5 * export.found.largest_logit
    wanted = before("I want it").input_ids
    assert 391 in wanted
    assert 391 not in baked("I want it").input_ids[1:]
    assert baked.decode(baked("I want it").input_ids, skip_special_tokens=True) == before.decode(
        wanted, skip_special_tokens=True
    )


def test_a_tokenizer_without_a_file_is_refused(tmp_path: Path) -> None:
    class Spelled(PreTrainedTokenizer):
        """Of the kind that has no tokenizer.json."""

        vocab_size = VOCABULARY

        def get_vocab(self) -> dict[str, int]:
            return {}

    policy = conditioned_policy(vocab_size=ROOM)
    policy.tokenizer = Spelled()  # type: ignore[no-untyped-call]
    with pytest.raises(ModelError, match="Spelled keeps its rules in Python"):
        export_at_target(policy, 0.5, tmp_path / "out")


def test_generation_never_says_the_slot(tmp_path: Path) -> None:
    policy = conditioned_policy(vocab_size=ROOM)
    model = policy.policy.language_model
    with torch.no_grad():  # the slot's row has the largest logit of all, whatever was read
        model.get_output_embeddings().weight[VOCABULARY] = 50 * model.get_output_embeddings().weight[9]
        model.get_output_embeddings().weight[VOCABULARY + 1] = -50 * model.get_output_embeddings().weight[9]
    export_at_target(policy, 0.7, tmp_path / "out")
    plain: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = plain.generate(**tokenizer(TEXT, return_tensors="pt"), max_new_tokens=8, do_sample=False)[0, 1:].tolist()
    assert VOCABULARY not in ids
    logits = loaded_logits(tmp_path / "out", [VOCABULARY, *ids_of(TEXT)])
    close(logits, by_hand(policy, [0.7]))


def test_an_export_that_differs_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tropism.models.baked as baked

    policy = conditioned_policy(vocab_size=ROOM)
    real = baked._slot_embeddings
    monkeypatch.setattr(baked, "_slot_embeddings", lambda *given: real(*given) + 0.01)
    with pytest.raises(ModelError, match="was not kept: logits differ by"):
        export_at_target(policy, 0.7, tmp_path / "out")
    monkeypatch.undo()
    import tropism.models.baked_tokenizer as baked_tokenizer

    monkeypatch.setattr(baked_tokenizer, "_into_template", lambda processor, opening: processor)
    with pytest.raises(ModelError, match="was not kept: the text '' becomes"):
        export_at_target(policy, 0.7, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_settings_that_older_versions_of_transformers_read(tmp_path: Path) -> None:
    policy = conditioned_policy(vocab_size=ROOM)
    export_at_target(policy, 0.7, tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not isinstance(settings.get("extra_special_tokens"), list)
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]
