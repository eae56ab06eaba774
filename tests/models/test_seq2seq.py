"""Encoder-decoders as policies: their log-probs are those of transformers' own forward, whatever lies beside a row."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForSeq2SeqLM, WhisperConfig

from tiny_models import BOS_ID, EOS_ID, PAD_ID, SEQ2SEQ, tiny_model, tiny_tokenizer
from tropism.errors import ModelError
from tropism.models import seq2seq
from tropism.models.conditioning import RewardSlots, make_slots
from tropism.models.heads import ValueHead
from tropism.models.layout import Padding
from tropism.models.loading import load_model
from tropism.models.lora import LoRA, add_lora
from tropism.models.policy import Policy
from tropism.models.reference import Reference
from tropism.models.saving import save_adapter, save_plain, verify_plain
from tropism.ops.slots import slot_id
from tropism.texts import decoder_prefix_of
from tropism.training.memory_facts import architecture_of
from tropism.types import pad_rows

# Lengths differ; two prompts are equal; prompts and completions hold pad, bos, eos and the decoder's start token.
PROMPTS = ((5, 9, 30, 8, 11, 7, 14, EOS_ID), (6, EOS_ID), (PAD_ID, 12, PAD_ID, EOS_ID), (6, EOS_ID), (BOS_ID, 17))
COMPLETIONS = ((7, PAD_ID, 30, EOS_ID), (9, 9), (EOS_ID,), (20, 21, 22, 23, 24, 25, 26, EOS_ID), (PAD_ID, 5, BOS_ID))


def inputs(
    prompts: Sequence[Sequence[int]] = PROMPTS,
    completions: Sequence[Sequence[int]] = COMPLETIONS,
    *,
    wider: int = 0,
    filler: int = PAD_ID,
) -> dict[str, Tensor]:
    """What ``Policy.forward`` takes, with so many further pads on either side."""
    prompt_ids, completion_ids = pad_rows(prompts, left=True), pad_rows(completions)
    return {
        "prompt_ids": torch.nn.functional.pad(prompt_ids, (wider, 0), value=filler),
        "prompt_lengths": torch.tensor([len(ids) for ids in prompts]),
        "completion_ids": torch.nn.functional.pad(completion_ids, (0, wider), value=filler),
        "completion_lengths": torch.tensor([len(ids) for ids in completions]),
    }


def own_logits(model: Any, prompt: Sequence[int], completion: Sequence[int], start: Sequence[int]) -> Tensor:
    """[T, V] logits that predict each completion token, by the model's own forward over one row without pads."""
    decoded = torch.tensor([[*start, *completion]])
    logits: Tensor = model(input_ids=torch.tensor([list(prompt)]), decoder_input_ids=decoded, use_cache=False).logits[0]
    return logits[len(start) - 1 : -1]


def logprobs_of(logits: Tensor, completion: Sequence[int]) -> Tensor:
    return logits.double().log_softmax(-1)[torch.arange(len(completion)), list(completion)]


@pytest.mark.parametrize("family", SEQ2SEQ)
@torch.no_grad()
def test_logprobs_are_those_of_the_models_own_forward(family: str) -> None:
    model = tiny_model(family)
    policy = Policy(model)
    assert policy.encoder_decoder and policy.decoder_prefix == (model.config.decoder_start_token_id,)
    found = policy(**inputs(), want={"logprobs", "entropy"}, temperature=0.7)
    for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        logits = own_logits(model, prompt, completion, [model.config.decoder_start_token_id]) / 0.7
        expected = logprobs_of(logits, completion)
        assert found.logprobs[row, : len(completion)].tolist() == pytest.approx(expected.tolist(), abs=1e-5, rel=2e-6)
        assert not found.logprobs[row, len(completion) :].any()
        p = logits.double().softmax(-1)
        assert found.entropy[row, : len(completion)].tolist() == pytest.approx(
            (-(p * p.log()).sum(-1)).tolist(), abs=1e-5
        )


@pytest.mark.parametrize("family", ["t5", "t5_v1_1", "bart"])
@torch.no_grad()
def test_the_loss_is_that_of_transformers_with_labels(family: str) -> None:
    """There the pad token is masked, and labels are shifted behind the start token by the model itself."""
    model = tiny_model(family)
    rows = [(p, c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True) if PAD_ID not in (*p, *c)]
    given = inputs([p for p, _ in rows], [c for _, c in rows])
    ids = pad_rows([p for p, _ in rows])
    labels = pad_rows([c for _, c in rows], value=-100)
    own = model(input_ids=ids, attention_mask=(ids != PAD_ID).long(), labels=labels).loss
    logprobs = Policy(model)(**given).logprobs
    assert float(-logprobs.sum() / sum(len(c) for _, c in rows)) == pytest.approx(float(own), abs=1e-5)


@pytest.mark.parametrize("padding", ["right", "left", "both"])
@pytest.mark.parametrize("family", SEQ2SEQ)
@torch.no_grad()
def test_neither_pads_nor_neighbours_matter(family: str, padding: Padding) -> None:
    policy = Policy(tiny_model(family))
    alone = [policy(**inputs([p], [c])).logprobs[0] for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    policy.padding = padding
    for given in (inputs(), inputs(wider=5), inputs(wider=3, filler=EOS_ID), inputs(wider=2, filler=19)):
        together = policy(**given).logprobs
        for row, expected in enumerate(alone):
            assert float((together[row, : len(expected)] - expected).abs().max()) < 1e-5


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_prompts_that_rows_share_are_encoded_once(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Policy(tiny_model(family))
    assert policy.halves is not None
    encoded: list[tuple[int, ...]] = []
    encode = policy.halves.encode
    monkeypatch.setattr(
        policy.halves, "encode", lambda ids, *rest: (encoded.append(tuple(ids.shape)), encode(ids, *rest))[1]
    )
    policy(**inputs()).logprobs.sum().backward()
    assert encoded == [(4, 8)]
    shared = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad()
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        policy(**inputs([prompt], [completion])).logprobs.sum().backward()
    scale = max(float(gradient.abs().max()) for gradient in shared.values())
    for name, parameter in policy.named_parameters():
        if name in shared:
            torch.testing.assert_close(parameter.grad, shared[name], rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("family", SEQ2SEQ)
@torch.no_grad()
def test_values_read_the_states_of_the_decoder(family: str) -> None:
    model = tiny_model(family)
    head = ValueHead(32)
    torch.nn.init.normal_(head.linear.weight, generator=torch.Generator().manual_seed(1))
    policy = Policy(model, value_head=head)
    found = policy(**inputs(), want={"values", "bootstrap_values", "hidden"})
    for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        decoded = torch.tensor([[model.config.decoder_start_token_id, *completion]])
        own = model(input_ids=torch.tensor([list(prompt)]), decoder_input_ids=decoded, output_hidden_states=True)
        states = own.decoder_hidden_states[-1][0]
        expected = states @ head.linear.weight[0] + head.linear.bias
        assert found.values[row, : len(completion)].tolist() == pytest.approx(expected[:-1].tolist(), abs=1e-4)
        assert float(found.bootstrap_values[row]) == pytest.approx(float(expected[-1]), abs=1e-4)
        torch.testing.assert_close(found.hidden[row, : len(completion)], states[:-1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(policy.logits(states), own.logits[0], rtol=1e-4, atol=1e-4)


def test_tied_t5_scales_its_states_and_the_others_do_not() -> None:
    scales = {family: Policy(tiny_model(family)).hidden_scale for family in SEQ2SEQ}
    assert scales.pop("t5") == pytest.approx(32**-0.5)
    assert set(scales.values()) == {1.0}


@torch.no_grad()
def test_the_bias_of_barts_logits_counts() -> None:
    model = tiny_model("bart")
    before = Policy(model)(**inputs(), want={"logprobs"}).logprobs
    model.final_logits_bias.zero_()
    policy = Policy(model)
    plain = policy(**inputs(), want={"logprobs"}).logprobs
    assert float((before - plain).abs().max()) > 0.1
    logits = own_logits(model, PROMPTS[0], COMPLETIONS[0], [EOS_ID])
    assert plain[0, :4].tolist() == pytest.approx(logprobs_of(logits, COMPLETIONS[0]).tolist(), abs=1e-5)


@torch.no_grad()
def test_a_forced_first_token_is_a_part_of_what_the_decoder_begins_with() -> None:
    model = tiny_model("mbart")
    model.generation_config.forced_bos_token_id = 33
    policy = Policy(model)
    assert policy.decoder_prefix == (EOS_ID, 33)
    found = policy(**inputs()).logprobs
    for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        expected = logprobs_of(own_logits(model, prompt, completion, [EOS_ID, 33]), completion)
        assert found[row, : len(completion)].tolist() == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("start", "message"), [(None, "names no decoder_start_token_id"), (99, "embeddings for 37 tokens")]
)
def test_a_decoder_without_a_start_is_refused(start: int | None, message: str) -> None:
    model = tiny_model("t5")
    for config in (model.config, model.generation_config):
        config.decoder_start_token_id, config.bos_token_id = start, None
    with pytest.raises(ModelError, match=message):
        Policy(model)


def test_a_family_that_counts_positions_unknown_to_us_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """BART counts columns; without positions of our own, rows of different lengths would be silently wrong."""
    monkeypatch.setattr(seq2seq, "_placed", lambda *_: nullcontext())
    Policy(tiny_model("t5"))
    with pytest.raises(ModelError, match="padded on the left"):
        Policy(tiny_model("bart"))


# Slots ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mechanism", ["linear", "add", "replace", "token"])
@pytest.mark.parametrize("family", ["t5", "bart"])
@torch.no_grad()
def test_slots_stand_before_what_the_encoder_reads(family: str, mechanism: str) -> None:
    model = tiny_model(family)
    slots: RewardSlots = make_slots(model, mechanism=mechanism, rewards=1, bins=3, base_id=BOS_ID)
    slots.start(model.get_input_embeddings(), seed=3, ones=False)
    for parameter in slots.parameters():
        parameter.copy_(0.4 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    policy = Policy(model, conditioning=slots)
    found = policy(**inputs([(slot_id(0, 2.0), *p) for p in PROMPTS])).logprobs
    table = model.get_input_embeddings().weight
    base = table[BOS_ID]
    vector = {
        "linear": lambda: 2.0 * slots.weight[0] + slots.bias[0],
        "add": lambda: base + 2.0 * slots.direction[0],
        "replace": lambda: 2.0 * slots.direction[0],
        "token": lambda: slots.table[0, 2],
    }[mechanism]()
    for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        read = torch.cat([vector[None], table[list(prompt)]])[None]
        start = model.config.decoder_start_token_id
        logits = model(inputs_embeds=read, decoder_input_ids=torch.tensor([[start, *completion]])).logits[0, :-1]
        expected = logprobs_of(logits, completion)
        assert found[row, : len(completion)].tolist() == pytest.approx(expected.tolist(), abs=1e-5)


# Loading and saving ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_a_saved_folder_is_loaded_with_the_same_logits(family: str, tmp_path: Path) -> None:
    model, tokenizer = tiny_model(family), tiny_tokenizer(add_eos=True)
    save_plain(model, tokenizer, tmp_path / "model")
    assert verify_plain(model, tmp_path / "model", torch.tensor([[5, 9, 30, 8]])) < 1e-5
    loaded = load_model(str(tmp_path / "model"))
    assert type(loaded.model) is type(model)
    assert decoder_prefix_of(loaded.tokenizer) == (model.config.decoder_start_token_id,)
    with torch.no_grad():
        expected, found = Policy(model)(**inputs()).logprobs, Policy(loaded.model)(**inputs()).logprobs
    assert float((found - expected).abs().max()) < 2e-5  # with another attention function


def test_untied_embeddings_stay_apart_when_saved(tmp_path: Path) -> None:
    """transformers' configuration of T5 v1.1 says that they are tied, and its weights say that they are not."""
    model = tiny_model("t5_v1_1")
    save_plain(model, tiny_tokenizer(), tmp_path / "model")
    loaded: Any = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert torch.equal(loaded.shared.weight, model.shared.weight)
    assert not torch.equal(loaded.shared.weight, loaded.lm_head.weight)


@pytest.mark.parametrize("family", ["t5", "t5_v1_1", "bart"])
@torch.no_grad()
def test_an_adapter_is_merged_and_goes_on(family: str, tmp_path: Path) -> None:
    plain = tiny_model(family)
    save_plain(plain, tiny_tokenizer(), tmp_path / "base")
    base = load_model(str(tmp_path / "base"))
    adapted = add_lora(base.model, LoRA(rank=2), seed=0)
    assert adapted.peft_config["default"].task_type == "SEQ_2_SEQ_LM"
    policy = Policy(adapted)
    reference = Reference(policy)
    before = policy(**inputs()).logprobs
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    trained = policy(**inputs()).logprobs
    assert float((trained - before).abs().max()) > 1e-2
    with reference.active() as model:
        assert torch.equal(model(**inputs()).logprobs, before)
    save_plain(adapted, base.tokenizer, tmp_path / "merged")
    merged = Policy(load_model(str(tmp_path / "merged")).model)(**inputs()).logprobs
    assert float((merged - trained).abs().max()) < 1e-4
    save_adapter(adapted, tmp_path / "adapter")
    base.tokenizer.save_pretrained(tmp_path / "adapter")
    again = load_model(str(tmp_path / "adapter"))
    assert decoder_prefix_of(again.tokenizer) is not None
    assert float((Policy(again.model)(**inputs()).logprobs - trained).abs().max()) < 1e-5


def test_a_tokenizer_is_told_whose_it_is() -> None:
    tokenizer = tiny_tokenizer()
    assert decoder_prefix_of(tokenizer) is None
    load_model((tiny_model("bart"), tokenizer))
    assert decoder_prefix_of(tokenizer) == (EOS_ID,)
    load_model((tiny_model("gpt2"), tokenizer))
    assert decoder_prefix_of(tokenizer) is None


def test_what_writes_no_text_is_refused(tmp_path: Path) -> None:
    body = AutoModel.from_config(tiny_model("t5").config)
    with pytest.raises(ModelError, match="no output embedding"):
        load_model((body, tiny_tokenizer()))
    WhisperConfig().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x02\x00\x00\x00\x00\x00\x00\x00{}")
    with pytest.raises(ModelError, match=r"whisper.* does not go from text to text"):
        load_model(str(tmp_path))


# Sizes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["t5", "t5_v1_1", "bart"])
def test_the_memory_estimate_knows_both_halves(family: str) -> None:
    sizes = architecture_of(Policy(tiny_model(family)))
    assert (sizes.layers, sizes.cached_layers) == (5, 2)
    assert (sizes.hidden_size, sizes.heads, sizes.head_size, sizes.intermediate_size) == (32, 4, 8, 48)
    assert sizes.mlp_tensors == (4 if family == "t5_v1_1" else 2)
