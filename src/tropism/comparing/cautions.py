"""What a comparison says in sentences: what was gained, how sure one can be, and what to keep in mind."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from tropism.comparing.difference import FEWEST_SEEDS, Difference
from tropism.comparing.measures import Measures, Results
from tropism.comparing.results import BASE, Comparison, is_trained
from tropism.evaluation.number_texts import change_text, interval_text
from tropism.evaluation.summary import FEW_PROMPTS, KL_FAR, KL_LIMIT

SHORT_OF_BUDGET = 0.9
"""A method that spent less than this share of what the others did is named."""
LONGEST_REASON = 300
"""Characters of a failure's reason that are shown."""


def headlines(comparison: Comparison) -> list[str]:
    """What was gained and how sure that is, in up to four sentences; one where nothing is finished."""
    results = comparison.results
    trained = [row for row in results.rows if row.name != BASE]
    known = [row for row in trained if math.isfinite(row.reward.mean)]
    if not known:
        return ["No method is finished yet, so nothing can be compared."]
    best = max(known, key=lambda row: row.reward.mean)
    sentences = [f"{best.name} has the highest held-out reward: {interval_text(best.reward)}{_from_base(results)}."]
    sentences += _against_sentences(results)
    sentences += _best_sentences(results, best)
    seeds = sorted({len(row.seeds) for row in trained})
    counts = str(seeds[0]) if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    sentences.append(
        f"Intervals hold 95 % over {len(comparison.prompts)} held-out prompts and {counts} seed{'s' * (counts != '1')}."
    )
    return sentences


def _from_base(results: Results) -> str:
    base = next((row for row in results.rows if row.name == BASE), None)
    return f", where the base model has {interval_text(base.reward)}" if base is not None else ""


def _against_sentences(results: Results) -> list[str]:
    tests = [row.to_other for row in results.rows if row.to_other is not None]
    if not tests:
        return []
    above = [one for one in tests if one.significant and one.mean.mean > 0]
    below = [one for one in tests if one.significant and one.mean.mean < 0]
    open_ones = [one for one in tests if one.tested and not one.significant]
    sentences = []
    if above:
        found = ", ".join(f"{one.first} ({change_text(one.mean)})" for one in above)
        sentences.append(f"Better than {results.against} beyond chance: {found}.")
    if below:
        found = ", ".join(f"{one.first} ({change_text(one.mean)})" for one in below)
        sentences.append(f"Worse than {results.against} beyond chance: {found}.")
    if open_ones:
        found = ", ".join(one.first for one in open_ones)
        sentences.append(f"No difference to {results.against} is shown for {found}, which does not mean there is none.")
    return sentences


def _best_sentences(results: Results, best: Measures) -> list[str]:
    """Whether the best is better than the second best."""
    rest = [row for row in results.rows if row.name not in (BASE, best.name) and math.isfinite(row.reward.mean)]
    if not rest:
        return []
    second = max(rest, key=lambda row: row.reward.mean)
    pair = next((one for one in results.pairs if {one.first, one.second} == {best.name, second.name}), None)
    if pair is None or not pair.tested or second.name == results.against:
        return []
    lead = abs(pair.mean.mean)
    verdict = "beyond chance" if pair.significant else "which chance may explain"
    return [f"{best.name} leads the second, {second.name}, by {lead:.3g}, {verdict} (p = {p_text(pair.adjusted)})."]


def p_text(p: float) -> str:
    """``0.021``, ``< 0.001``; empty where there was no test."""
    if math.isnan(p):
        return ""
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def verdict_text(one: Difference | None) -> str:
    """``yes (p 0.004)``, ``worse``, ``not shown`` or why there is no test; empty for None."""
    if one is None:
        return ""
    if not one.tested:
        return f"no test: {one.seeds} of {FEWEST_SEEDS} seeds" if one.seeds < FEWEST_SEEDS else "no test"
    word = "not shown" if not one.significant else "yes" if one.mean.mean > 0 else "worse"
    return f"{word} (p {p_text(one.adjusted)})"


def cautions(comparison: Comparison) -> list[str]:
    """What to keep in mind before believing the table; the gravest first."""
    return [
        *_missing(comparison),
        *_seeds(comparison),
        *[sentence for row in comparison.results.rows for sentence in _of_method(row, comparison.results)],
        *_budget(comparison),
        *_prompts(comparison),
        *comparison.notes,
    ]


def _missing(comparison: Comparison) -> list[str]:
    failed = [
        f"{cell.method} with seed {cell.seed} failed and is left out: {(cell.failure or '')[:LONGEST_REASON]}"
        for cell in comparison.failed
    ]
    if comparison.results.rows and comparison.against not in comparison.methods:
        failed.append(f"{comparison.against} has no finished cell, so nothing is tested against it.")
    if not comparison.missing:
        return failed
    listed = ", ".join(comparison.missing[:8]) + (", ..." if len(comparison.missing) > 8 else "")
    count = len(comparison.missing)
    return [*failed, f"{count} cell{'s are' if count > 1 else ' is'} not there yet: {listed}."]


def _seeds(comparison: Comparison) -> list[str]:
    few = [row for row in comparison.results.rows if row.name != BASE and len(row.seeds) < FEWEST_SEEDS]
    if not few:
        return []
    single = [row.name for row in few if len(row.seeds) == 1 and is_trained(row.name)]
    sentences = [
        f"Nothing is called significant with fewer than {FEWEST_SEEDS} seeds, because fewer say too little about what "
        f"another seed changes: {', '.join(f'{row.name} has {len(row.seeds)}' for row in few)}."
    ]
    if single and all(len(row.seeds) == 1 for row in comparison.results.rows if is_trained(row.name)):
        sentences.append("With a single seed the intervals are over prompts alone, and too narrow.")
    return sentences


def _of_method(row: Measures, results: Results) -> list[str]:
    sentences = []
    if row.scored < row.answered:
        sentences.append(f"{row.answered - row.scored} of {row.answered} completions of {row.name} got no reward.")
    if row.kl.mean > KL_LIMIT and not row.bounded:
        far = "far from ordinary language" if row.kl.mean > KL_FAR else "far from the base"
        sentences.append(
            f"{row.name} is {row.kl.mean:.1f} nats from the base model, {far}: read its samples before believing its "
            "reward."
        )
    if row.kl.known and row.kl.high < 0:
        sentences.append(
            f"The KL of {row.name} is estimated below 0 ({row.kl.mean:.2f} nats), which no KL can be: its completions "
            "were not sampled from the distribution that their log-probs belong to."
        )
    base = next((one for one in results.rows if one.name == BASE), None)
    if base is None or base is row:
        return sentences
    if row.distinct_2 < base.distinct_2 / 2:
        sentences.append(
            f"{row.name} says much the same to every prompt: distinct word pairs fell from {base.distinct_2:.0%} to "
            f"{row.distinct_2:.0%}."
        )
    if base.length > 0 and not base.length / 2 <= row.length <= 2 * base.length:
        sentences.append(f"The length under {row.name} went from {base.length:.0f} to {row.length:.0f} tokens.")
    return sentences


def _budget(comparison: Comparison) -> list[str]:
    """Methods that spent clearly less than the one that spent most, by whatever the budget is in."""
    section = comparison.plan["compare"]
    unit = "seconds" if section.get("seconds") else "completions"
    spent = {row.name: getattr(row, unit) for row in comparison.results.rows if is_trained(row.name)}
    most = max((value for value in spent.values() if math.isfinite(value)), default=0.0)
    short = [f"{name} ({value:,.0f})" for name, value in spent.items() if value < SHORT_OF_BUDGET * most]
    return [f"Not all spent the whole budget: of {most:,.0f} {unit}, {', '.join(short)}."] if short else []


def _prompts(comparison: Comparison) -> list[str]:
    prompts: Sequence[str] = comparison.prompts
    repeated = sum(count - 1 for count in Counter(prompts).values())
    sentences = []
    if repeated:
        sentences.append(
            f"{repeated} of {len(prompts)} held-out prompts are repetitions, so the intervals are too narrow."
        )
    if 0 < len(prompts) < FEW_PROMPTS:
        sentences.append(f"There are only {len(prompts)} held-out prompts: the intervals are rough.")
    return sentences
