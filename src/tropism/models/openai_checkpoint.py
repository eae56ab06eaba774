"""GPT-2 as OpenAI published it, and what openai/lm-human-preferences saves, as plain Hugging Face folders.

Names and shapes of the variables: https://github.com/openai/gpt-2/blob/master/src/model.py and
https://github.com/openai/lm-human-preferences (language/model.py, policy.py, rewards.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from numpy.typing import NDArray
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tropism.errors import ConfigError, ModelError
from tropism.foreign.json_files import read_object
from tropism.foreign.paths import file_inside, is_plain_name
from tropism.foreign.reward_facts import OFFSET, Normalised, RewardFacts
from tropism.foreign.tensor_bundle import TensorBundle
from tropism.models.openai_vocabulary import Vocabulary, read_vocabulary
from tropism.models.reward_files import PAD, save_reward_model
from tropism.models.reward_model import RewardModel
from tropism.models.saving import replacing, save_plain, tensors_of

SCOPES = ("model", "policy", "reward_model", "ref_policy")
"""What a checkpoint may hold models under; the first that is there is taken: GPT-2 itself, a policy that was trained, a
reward model, the policy that those two started from."""

_SIZES = ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer")
_DROPOUTS = ("embd_pdrop", "attn_pdrop", "resid_pdrop")
_UNUSED = ("head_pdrop",)
_LEAST = {"n_vocab": 8, "n_ctx": 8}
_POINTER = re.compile(r'^model_checkpoint_path:[ \t]*"([^"\n]*)"[ \t]*\r?$', re.MULTILINE)
_LONGEST_POINTER = 1_000_000
_OPTIMIZER = {"adam", "adam_1"}


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What was converted."""

    folder: Path
    """The folder that was written."""
    scope: str
    """Where the model stood in the checkpoint; one of ``SCOPES``."""
    tensors: int
    """How many of the checkpoint's tensors were used."""
    parameters: int
    """Numbers in them."""
    left_out: dict[str, tuple[str, ...]]
    """All other tensors of the checkpoint: what they are -> their names."""
    offset: float | None
    """Of a reward model: what has to be added to the logit to get the reward."""
    normalised: Normalised | None
    """Of a reward model: how its rewards were put on a scale, where that is known."""


def convert_openai_checkpoint(
    source: str | Path, out: str | Path, *, encoding: str | Path | None = None, scope: str | None = None
) -> Conversion:
    """Write the model of a TensorFlow checkpoint as a folder that the Auto classes load, and load it to see.

    A language model or policy becomes a ``GPT2LMHeadModel``; a policy's value head is left out. A reward model becomes
    a ``GPT2ForSequenceClassification``: its gain goes into ``score.weight``, and what its bias and the head's add up to
    stands in config.json, as this class has no bias.

    Args:
        source: a folder with hparams.json, and with ``checkpoint`` or ``checkpoints/checkpoint``.
        out: the folder to write; a new or an empty one. It appears once it is complete.
        encoding: the folder of encoder.json and vocab.bpe; None: ``source``.
        scope: which of ``SCOPES``; None: the first that is there.

    Raises:
        ConfigError: ``out`` holds something, or ``scope`` does not exist.
        ModelError: files are missing, damaged, or do not belong together; names the file or tensor.
        StorageError: ``out`` cannot be written.
    """
    source, out = Path(source).expanduser(), Path(out).expanduser()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"{out} is there already; name a new folder, or take that one away first")
    bundle = _bundle(source)
    settings = _settings(source, most_layers=len(bundle.entries))
    vocabulary = read_vocabulary(source if encoding is None else Path(encoding).expanduser(), settings["n_vocab"])
    scope = _scope(bundle, scope)
    is_reward = scope == "reward_model"
    taken = _Taken(bundle, "model/" if scope == "model" else f"{scope}/model/")
    weights = _weights(taken, settings)
    config = _config(settings, vocabulary)
    facts: RewardFacts | None = None
    model: PreTrainedModel | RewardModel
    if is_reward:
        model, facts = _reward_model(taken, config, weights, _normalised(source))
    else:
        model = _filled(GPT2LMHeadModel, config, {**weights, "lm_head.weight": weights["transformer.wte.weight"]})
    left_out = taken.left_out(f"{scope}/")
    tokenizer = vocabulary.tokenizer(max_length=settings["n_ctx"], pad=PAD if is_reward else None)
    with replacing(out) as temporary:
        if isinstance(model, RewardModel):
            assert facts is not None
            facts = save_reward_model(model, tokenizer, temporary, facts)
        else:
            save_plain(model, tokenizer, temporary)
        _verify(temporary, model, tokenizer)
        for file in temporary.iterdir():  # weights are written for their owner alone, and servers run as somebody else
            file.chmod((temporary / "config.json").stat().st_mode)
    return Conversion(
        folder=out,
        scope=scope,
        tensors=len(taken.names),
        parameters=taken.parameters,
        left_out=left_out,
        offset=None if facts is None else facts.offset,
        normalised=None if facts is None else facts.normalised,
    )


# Finding --------------------------------------------------------------------------------------------------------------


def _bundle(source: Path) -> TensorBundle:
    """The newest checkpoint of a folder, which a small text file names."""
    if not source.is_dir():
        raise ModelError(f"{source} is no folder; give the one that holds hparams.json")
    for place in ("", "checkpoints/"):
        path = file_inside(source, f"{place}checkpoint")
        if path is None:
            continue
        if path.stat().st_size > _LONGEST_POINTER:
            raise ModelError(f"{source / place}/checkpoint is too large for the name of a checkpoint; it is damaged")
        found = _POINTER.search(path.read_bytes().decode("utf-8", "replace"))
        if found is None:
            raise ModelError(f'{source / place}/checkpoint names no checkpoint: a line model_checkpoint_path: "NAME"')
        if not is_plain_name(found[1]):
            raise ModelError(
                f"{source / place}/checkpoint names {found[1]!r:.200}, which is not in its folder; write the last part "
                "of it there, if the files lie beside it"
            )
        return TensorBundle(source, f"{place}{found[1]}")
    inner = [name for name in ("policy", "reward_model") if (source / name / "hparams.json").is_file()]
    if inner:
        raise ModelError(f"{source} holds models in folders of their own; give {source / inner[0]}")
    raise ModelError(
        f"{source} has no file checkpoint (nor checkpoints/checkpoint), which names the newest checkpoint; download "
        'it, or write it: a line model_checkpoint_path: "model.ckpt"'
    )


def _scope(bundle: TensorBundle, wanted: str | None) -> str:
    there = [name for name in SCOPES if ("" if name == "model" else f"{name}/") + "model/wte" in bundle.entries]
    if wanted is not None and wanted not in there:
        raise ConfigError(f"the checkpoint holds no model under {wanted!r:.80}; there is: {', '.join(there) or 'none'}")
    if not there:
        raise ModelError(
            f"{bundle.folder / bundle.name} holds no GPT-2: none of its {len(bundle.entries)} tensors is called "
            "model/wte, policy/model/wte or reward_model/model/wte"
        )
    return wanted or there[0]


def _settings(source: Path, *, most_layers: int) -> dict[str, Any]:
    """What hparams.json says of the model's size."""
    path = file_inside(source, "hparams.json")
    if path is None:
        raise ModelError(f"{source} has no hparams.json, which says how large its model is; download it")
    settings = read_object(path)
    for name in settings.keys() - {*_SIZES, *_DROPOUTS, *_UNUSED}:
        raise ModelError(f"{path} has the setting {name!r:.80}, which GPT-2 does not know; it may be another model")
    for name in _SIZES:
        least, most = _LEAST.get(name, 1), most_layers if name == "n_layer" else 2**31
        value = settings.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise ModelError(f"{path}: {name} is {value!r:.80}; with these tensors it is from {least} to {most}")
    if settings["n_embd"] % settings["n_head"]:
        raise ModelError(f"{path}: n_embd {settings['n_embd']} is no multiple of n_head {settings['n_head']}")
    for name in (*_DROPOUTS, *_UNUSED):
        value = settings.get(name, 0.1)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1:
            raise ModelError(f"{path}: {name} is {value!r:.80}, and a dropout rate is from 0 to 1")
    return settings


def _normalised(source: Path) -> Normalised | None:
    """How lm-human-preferences put a reward model on a scale; its settings lie beside the model's folder."""
    name = "train_reward_hparams.json"
    path = file_inside(source.absolute().parent, name)
    if path is None:
        return None
    settings = read_object(path)
    samples, batch = settings.get("normalize_samples"), settings.get("rollout_batch_size")
    numbers = all(isinstance(n, int) and not isinstance(n, bool) and 0 < n < 2**31 for n in (samples, batch))
    if settings.get("normalize_after") is not True or not numbers:
        return None
    task = settings.get("task")
    policy = task.get("policy") if isinstance(task, dict) else None
    start = policy.get("initial_model") if isinstance(policy, dict) else None
    # Its samples come in whole batches, and the scores of these very samples have mean 0 and deviation 1 afterwards.
    whole = -(-samples // batch) * batch  # type: ignore[operator]
    return Normalised(mean=0.0, std=1.0, samples=whole, policy=str(start or "its initial model")[:200])


# Tensors --------------------------------------------------------------------------------------------------------------


class _Taken:
    """Reads tensors of a checkpoint and remembers which."""

    def __init__(self, bundle: TensorBundle, prefix: str) -> None:
        self.bundle, self.prefix = bundle, prefix
        self.names: set[str] = set()
        self.parameters = 0

    def __call__(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """The tensor ``name``, behind the prefix unless it begins with "/", which must have the shape ``shape``."""
        name = name.removeprefix("/") if name.startswith("/") else self.prefix + name
        entry = self.bundle.entries.get(name)
        where = f"{self.bundle.folder / self.bundle.name}"
        if entry is None:
            raise ModelError(f"{where} does not hold the tensor {name}, which a model as in hparams.json has")
        if entry.shape != shape:
            raise ModelError(
                f"the tensor {name} of {where} has the shape {list(entry.shape)}; by hparams.json it is {list(shape)}"
            )
        values = self.bundle.read(name)
        if not np.isfinite(values).all():
            raise ModelError(f"the tensor {name} of {where} holds numbers that are not finite; the training had failed")
        self.names.add(name)
        self.parameters += values.size
        return values

    def left_out(self, scope: str) -> dict[str, tuple[str, ...]]:
        """All tensors that were not read, by what they are.

        Raises:
            ModelError: the model itself has a tensor that GPT-2 has not.
        """
        groups: dict[str, list[str]] = {}
        for name in sorted(self.bundle.entries.keys() - self.names):
            parts = name.split("/")
            if parts[-1].lower() in _OPTIMIZER and name.startswith(scope):
                group = "state of the optimizer"
            elif name.startswith(f"{self.prefix}heads/value/"):
                group = "value head"
            elif name.startswith(self.prefix):
                raise ModelError(
                    f"{self.bundle.folder / self.bundle.name} holds the tensor {name!r:.200}, which a GPT-2 as in "
                    "hparams.json has not; the model is another one"
                )
            else:
                group = parts[0] if len(parts) > 1 else "counters"
            groups.setdefault(group, []).append(name)
        return {group: tuple(names) for group, names in groups.items()}


def _weights(taken: _Taken, settings: dict[str, Any]) -> dict[str, Tensor]:
    """The state dict of the body, under the names of ``GPT2LMHeadModel``."""
    return {
        f"transformer.{name}": torch.from_numpy(taken(theirs, shape)).reshape(shape[-2:])
        for name, theirs, shape in _layout(settings)
    }


def _layout(settings: dict[str, Any]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(our name, their name, their shape) of every tensor of the body; their convolutions of width 1 are our layers."""
    width = settings["n_embd"]
    yield "wte.weight", "wte", (settings["n_vocab"], width)
    yield "wpe.weight", "wpe", (settings["n_ctx"], width)
    yield from _norm("ln_f", "ln_f", width)
    for layer in range(settings["n_layer"]):
        ours, theirs = f"h.{layer}", f"h{layer}"
        for norm in ("ln_1", "ln_2"):
            yield from _norm(f"{ours}.{norm}", f"{theirs}/{norm}", width)
        for part, name, inner, outer in (
            ("attn", "c_attn", width, 3 * width),
            ("attn", "c_proj", width, width),
            ("mlp", "c_fc", width, 4 * width),
            ("mlp", "c_proj", 4 * width, width),
        ):
            yield f"{ours}.{part}.{name}.weight", f"{theirs}/{part}/{name}/w", (1, inner, outer)
            yield f"{ours}.{part}.{name}.bias", f"{theirs}/{part}/{name}/b", (outer,)


def _norm(ours: str, theirs: str, width: int) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    yield f"{ours}.weight", f"{theirs}/g", (width,)
    yield f"{ours}.bias", f"{theirs}/b", (width,)


# Models ---------------------------------------------------------------------------------------------------------------


def _config(settings: dict[str, Any], vocabulary: Vocabulary) -> GPT2Config:
    return GPT2Config(
        vocab_size=settings["n_vocab"],
        n_positions=settings["n_ctx"],
        **{name: settings[name] for name in ("n_embd", "n_head", "n_layer")},
        **{name: settings[name] for name in _DROPOUTS if name in settings},
        bos_token_id=vocabulary.end_id,
        eos_token_id=vocabulary.end_id,
    )


def _filled(kind: type[PreTrainedModel], config: GPT2Config, weights: dict[str, Tensor]) -> PreTrainedModel:
    """A model that holds the tensors themselves."""
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = kind(config)
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    model.eval()
    return model


def _reward_model(
    taken: _Taken, config: GPT2Config, weights: dict[str, Tensor], normalised: Normalised | None
) -> tuple[RewardModel, RewardFacts]:
    """reward = gain * (h . w + b) + bias, of which ``score`` takes gain * w, and the offset what is left."""
    head = taken("heads/reward/w", (config.n_embd,))
    head_bias = float(taken("heads/reward/b", ()))
    gain, bias = (float(taken(f"/reward_model/reward_norm/{name}", ())) for name in ("gain", "bias"))
    embedding = weights["transformer.wte.weight"]
    # Plain classifiers find the last token of a row by the pad's id, which must be nothing else's.
    weights["transformer.wte.weight"] = torch.cat([embedding, torch.zeros_like(embedding[:1])])
    weights["score.weight"] = torch.from_numpy(head)[None]
    config.pad_token_id, config.vocab_size, config.num_labels = config.vocab_size, config.vocab_size + 1, 1
    model = RewardModel(_filled(GPT2ForSequenceClassification, config, weights))
    model.rescale(gain=gain, bias=gain * head_bias + bias)
    facts = RewardFacts(
        text="prompt+completion", max_length=None, gain=gain, bias=bias, offset=0.0, normalised=normalised
    )
    return model, facts


@torch.no_grad()
def _verify(folder: Path, model: PreTrainedModel | RewardModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Load the folder as anybody would, and compare weights, scores and tokens.

    Raises:
        ModelError: it differs; says in what.
    """
    is_reward = isinstance(model, RewardModel)
    auto: Any = AutoModelForSequenceClassification if is_reward else AutoModelForCausalLM
    loaded, info = auto.from_pretrained(
        str(folder), dtype=torch.float32, output_loading_info=True, trust_remote_code=False
    )
    loaded.eval()
    problems = [f"{kind}: {sorted(map(str, info[kind]))[0]}" for kind in sorted(info) if info[kind]]
    expected, found = tensors_of(model.classifier if isinstance(model, RewardModel) else model), tensors_of(loaded)
    head = {"score.weight"} if is_reward else set()
    problems += [f"{name} differs" for name in expected.keys() - head if not torch.equal(expected[name], found[name])]
    ids = torch.arange(5)[None]
    logits = loaded(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()
    if is_reward:
        logits = logits[:, 0] + getattr(loaded.config, OFFSET)
        own = model(ids, torch.tensor([ids.shape[1]]))
    else:
        own = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    if not (own - logits).abs().max() <= 1e-5 * own.abs().max().clamp(min=1.0):  # NaN is not
        problems.append("its numbers differ")
    if AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False).get_vocab() != tokenizer.get_vocab():
        problems.append("its tokens differ")
    if problems:
        raise ModelError(f"what was written is not the model of the checkpoint, and was not kept: {problems[0]}")
