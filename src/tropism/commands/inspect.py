"""tropism inspect RECIPE.yaml"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tropism.commands.console import console, printable
from tropism.commands.recipe_arguments import refuse_python_objects, run_recipe_mapping, with_overrides
from tropism.errors import ConfigError
from tropism.safe_yaml import read_yaml

if TYPE_CHECKING:
    from tropism.config import Recipe
    from tropism.data.demonstrations import Demonstration
    from tropism.episodes import Episode
    from tropism.models.loading import LoadedModel
    from tropism.preferences import Opinion, Pair
    from tropism.recipe_data import Texts
    from tropism.targets.conditioner import Conditioner
    from tropism.types import Prompt, ScoredText, Tokens

SAMPLED = 6
"""Tokens sampled after each prompt, to show where learning begins."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Show a few rows of data as the model sees them: text, token ids, attention mask, positions, loss mask, columns.

    Fields of the recipe can be changed as for tropism train, for example --data.path FILE.
    """

    source: tyro.conf.Positional[str]
    """A recipe, a run folder, or (with --model) a data file."""
    model: str | None = None
    """The model whose tokenizer reads a data file."""
    rows: int = 3
    """Rows to show."""
    tokens: int = 48
    """Most tokens to list of each row; the middle of longer ones is left out."""
    demonstrations: bool = False
    """Read a data file as demonstrations (sft) instead of prompts."""


def run(arguments: Sequence[str]) -> None:
    """Load tokenizer, model and data, and show the rows."""
    options, overrides = tyro.cli(
        Options,
        args=arguments,
        prog="tropism inspect",
        description=Options.__doc__,
        config=(tyro.conf.FlagCreatePairsOff,),
        return_unknown_args=True,
    )
    if options.rows < 1 or options.tokens < 2:
        raise ConfigError("--rows must be at least 1 and --tokens at least 2")
    recipe = _recipe(options, overrides)
    from tropism.commands.quiet import quieten_libraries
    from tropism.models.loading import load_model
    from tropism.models.policy import Policy
    from tropism.recipe_data import demonstrations_of, prompts_of, scored_of
    from tropism.recipe_model import conditioner_of

    quieten_libraries()
    loaded = load_model(recipe.model)
    limit = Policy(loaded.model).context_length
    conditioner = conditioner_of(recipe, loaded)
    taken = 0 if conditioner is None else conditioner.width
    if recipe.algorithm.reads == "prompts":
        prompts, held_out = prompts_of(recipe, loaded.tokenizer, context_length=limit, taken=taken)
        _show_prompts(recipe, loaded, prompts, held_out, options)
    elif recipe.algorithm.reads == "scored":
        assert conditioner is not None
        scored = scored_of(recipe, loaded.tokenizer, context_length=limit, taken=taken)
        _show_scored(recipe, loaded, conditioner, scored, options)
    elif recipe.algorithm.reads in ("pairs", "opinions"):
        from tropism.recipe_pairs import opinions_of, pairs_of

        if recipe.algorithm.reads == "pairs":
            _show_pairs(loaded, pairs_of(recipe, loaded.tokenizer, context_length=limit), options)
        else:
            _show_opinions(loaded, opinions_of(recipe, loaded.tokenizer, context_length=limit), options)
    elif recipe.algorithm.reads == "episodes":
        from tropism.recipe_episodes import episodes_of

        _show_episodes(loaded, episodes_of(recipe, loaded.tokenizer, context_length=limit), options)
    else:
        texts = demonstrations_of(recipe, loaded.tokenizer, context_length=limit)
        _show_demonstrations(loaded, texts.train, texts.held_out, options)


def _recipe(options: Options, overrides: Sequence[str]) -> Recipe:
    from tropism.config import Recipe

    source = Path(options.source)
    if source.is_dir() and (source / "recipe.yaml").is_file():
        mapping = run_recipe_mapping(source)
    elif source.suffix in (".yaml", ".yml"):
        mapping = read_yaml(source)
    elif options.model is None:
        raise ConfigError(f"{source} is no recipe (.yaml); to show a data file, name the model: --model MODEL")
    else:
        # The reward is not called; the method only decides how records are read.
        method = {"algorithm": "sft"} if options.demonstrations else {"algorithm": "grpo", "reward": "length"}
        mapping = {"data": str(source), "sampling": {"max_new_tokens": SAMPLED}, **method}
    if options.model is not None:
        mapping["model"] = options.model
    mapping = with_overrides(mapping, overrides)
    refuse_python_objects(mapping, source)
    return Recipe.from_mapping(mapping)


def _show_prompts(
    recipe: Recipe, loaded: LoadedModel, prompts: Sequence[Prompt], held_out: Sequence[Prompt], options: Options
) -> None:
    """Prompts, each with a few sampled tokens, so that the mask of what is learned can be seen."""
    from tropism.data.files import shown as described
    from tropism.models.policy import Policy
    from tropism.rollouts.engine import EmbeddedSampler
    from tropism.rollouts.randomness import StreamKey

    out, shown = console(), prompts[: options.rows]
    new = min(SAMPLED, recipe.sampling.max_new_tokens)
    sampling = recipe.sampling.shortened(new)
    sampler = EmbeddedSampler(loaded.tokenizer, loaded.tokens.eos_ids)
    key = StreamKey(seed=recipe.seed, purpose="checks")
    tokens = sampler.generate(Policy(loaded.model), shown, sampling, 1, key=key).to("cpu")
    out.print(
        f"{len(prompts)} prompts to train on, {len(held_out)} held out. Here each is followed by {new} sampled tokens "
        f"(in training by at most {recipe.sampling.max_new_tokens}); those are what is learned from."
    )
    for index, prompt in enumerate(shown):
        _show_text(out, index, prompt.text)
        _show_tokens(out, loaded, tokens, tokens.completion_mask, index, options.tokens)
        for name, value in prompt.columns.items():
            label, value_text = printable(f"  {name[:60]}: "), printable(described(value, 300))
            out.print(Text.assemble((label, "cyan"), value_text), soft_wrap=True)


def _show_demonstrations(
    loaded: LoadedModel, learned: Sequence[Demonstration], held_out: Sequence[Demonstration], options: Options
) -> None:
    from tropism.data.demonstrations import collate_demonstrations

    out, shown = console(), learned[: options.rows]
    batch = collate_demonstrations(shown)
    out.print(f"{len(learned)} demonstrations to train on, {len(held_out)} held out.")
    for index, one in enumerate(shown):
        _show_text(out, index, loaded.tokenizer.decode([*one.prompt_ids, *one.completion_ids]))
        _show_tokens(out, loaded, batch, batch.loss_mask, index, options.tokens)


def _show_pairs(loaded: LoadedModel, texts: Texts[Pair], options: Options) -> None:
    """Pairs, each of their completions after the prompt."""
    from tropism.preferences import collate_pairs

    out, shown = console(), texts.train[: options.rows]
    rows = collate_pairs(shown).rows
    out.print(f"{len(texts.train)} pairs to train on, {len(texts.held_out)} held out.")
    for index, pair in enumerate(shown):
        for side, completion in enumerate((pair.chosen_ids, pair.rejected_ids)):
            text = loaded.tokenizer.decode([*pair.prompt_ids, *completion])
            _show_text(out, index, text, label=("chosen", "rejected")[side])
            _show_tokens(out, loaded, rows, rows.completion_mask, 2 * index + side, options.tokens)


def _show_opinions(loaded: LoadedModel, texts: Texts[Opinion], options: Options) -> None:
    from tropism.preferences import collate_opinions

    out, shown = console(), texts.train[: options.rows]
    batch = collate_opinions(shown)
    liked = sum(one.liked for one in texts.train)
    out.print(
        f"{len(texts.train)} opinions to train on, {liked} of them of completions that were liked; "
        f"{len(texts.held_out)} held out."
    )
    for index, one in enumerate(shown):
        text = loaded.tokenizer.decode([*one.prompt_ids, *one.completion_ids])
        _show_text(out, index, text, label="liked" if one.liked else "not liked")
        _show_tokens(out, loaded, batch, batch.loss_mask, index, options.tokens)


def _show_episodes(loaded: LoadedModel, texts: Texts[Episode], options: Options) -> None:
    """Episodes with what each of their tokens is paid, as the method learns it."""
    from tropism.episodes import collate_episodes

    out, shown = console(), texts.train[: options.rows]
    batch = collate_episodes(shown)
    out.print(
        f"{len(texts.train)} episodes to train on, {len(texts.held_out)} held out. Rewards are on the scale that is "
        "learned."
    )
    for index, one in enumerate(shown):
        _show_text(out, index, loaded.tokenizer.decode([*one.prompt_ids, *one.completion_ids]))
        paid = [f"{reward:.3g}" if reward else "" for reward in one.rewards]
        _show_tokens(out, loaded, batch, batch.loss_mask, index, options.tokens, rewards=paid)


def _show_scored(
    recipe: Recipe, loaded: LoadedModel, conditioner: Conditioner, texts: Texts[ScoredText], options: Options
) -> None:
    """Texts as the method makes batches of them, each told all its rewards; in training some are left open."""
    import torch

    from tropism.algorithms.base import RunFacts

    facts = RunFacts(
        total_steps=recipe.total_steps, max_new_tokens=recipe.sampling.max_new_tokens, conditioner=conditioner
    )
    algorithm: Any = recipe.algorithm.build(facts)
    algorithm.take_scores([text.rewards for text in texts.train])
    out, shown = console(), texts.train[: options.rows]
    batch = algorithm.make_batch(shown, range(len(shown)), torch.ones(len(shown), len(conditioner.names)), None)
    out.print(f"{len(texts.train)} scored texts to train on, {len(texts.held_out)} held out.")
    for index, one in enumerate(shown):
        _show_text(out, index, loaded.tokenizer.decode([*one.prompt_ids, *one.completion_ids]))
        told = [f"<{name} {reward:g}>" for name, reward in zip(conditioner.names, one.rewards, strict=True)]
        _show_tokens(out, loaded, batch, batch.loss_mask, index, options.tokens, slots=told)


def _show_text(out: Console, index: int, text: Any, *, label: str = "") -> None:
    name = f"\nrow {index}{label and ', '}{label}  "
    out.print(Text.assemble((name, "bold"), printable(text)[:1000]), soft_wrap=True)


def _show_tokens(
    out: Console,
    loaded: LoadedModel,
    tokens: Tokens,
    learned: Any,
    row: int,
    most: int,
    *,
    slots: Sequence[str] = (),
    rewards: Sequence[str] | None = None,
) -> None:
    """One line per entry of the row as the forward pass gets it, pads included.

    Of an encoder-decoder the row is that of the encoder, and below it that of the decoder with what it begins with.

    Args:
        slots: what the slots that the row begins with say.
        rewards: of each completion token, where they are a part of the data.
    """
    from tropism.models.layout import join
    from tropism.ops.slots import without_slots
    from tropism.texts import decoder_prefix_of

    prefix = decoder_prefix_of(loaded.tokenizer)
    ids, attention, positions, first = join(**tokens.inputs, padding="right")
    begin, total = int(first[row]), int(tokens.total_lengths[row])
    decoded_from = 0 if prefix is None else begin  # where the text begins that a token of the completion adds to
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 2))
    for column in ("index", "id", "token", "attention", "position", "loss", *([] if rewards is None else ["reward"])):
        table.add_column(column, justify="left" if column == "token" else "right")
    places = [*range(total), *range(total, min(total + 2, ids.shape[1]))]
    for line, place in enumerate(places):
        if len(places) > most and most // 2 <= line < len(places) - most // 2:
            if line == most // 2:
                table.add_row("...", "", f"{len(places) - 2 * (most // 2)} more", "", "", "")
            continue
        if place == begin:
            for at, token in enumerate(prefix or ()):
                table.add_row("decoder", str(token), printable(repr(_piece(loaded, [token]))), "1", str(at), "0")
        real = bool(attention[row, place])
        loss = real and place >= begin and bool(learned[row, place - begin])
        number, text = int(ids[row, place]), "(pad)"
        if real and number < 0:
            text = printable(slots[place])
        elif real:
            before = decoded_from if place >= begin else 0
            text = printable(repr(_piece(loaded, list(without_slots(ids[row, before : place + 1].tolist())))))
        number_of = ("slot" if number < 0 else str(number)) if real else ""
        paid = [] if rewards is None else [rewards[place - begin] if real and place >= begin else ""]
        in_decoder = prefix is not None and real and place >= begin
        position = str(place - begin + len(prefix or ()) if in_decoder else int(positions[row, place]))
        table.add_row(str(place), number_of, text, str(int(real)), position, str(int(loss)), *paid)
    out.print(table)


def _piece(loaded: LoadedModel, ids: list[int]) -> str:
    """What the last token adds to the text: decoded alone, many tokenizers lose its leading space."""
    head, whole, alone = (str(loaded.tokenizer.decode(part)) for part in (ids[:-1], ids, ids[-1:]))
    return whole[len(head) :] if whole.startswith(head) else alone
