"""What is known of a store, as rows of text for doctor, run report and cards: who sampled and scored it, and how a run would start."""

from typing import Any

from lopd.errors import InvalidRecordError, MissingScoresError
from lopd.guards.consistency import manifest_of_model, verdict
from lopd.guards.start import CLIP, OVERLAPS, SIZE_LEVELS, StartReport, measure_start
from lopd.protocols import LogprobReader
from lopd.records.drift import TAIL
from lopd.records.estimates import Estimate
from lopd.records.identity import ModelId
from lopd.records.lineage import Lineage, StoreId
from lopd.records.manifest import Provenance
from lopd.records.rollouts import BEHAVIOR_COLUMN, SAMPLER_COLUMN


def origins(store: LogprobReader) -> list[tuple[str, str]]:
    """Return name and value of each fact of the manifest."""
    manifest, sampling, tokenizer = store.manifest, store.manifest.sampling, store.manifest.tokenizer
    return [
        *((f"policy of round {number}", describe_model(policy)) for number, policy in store.generations.items()),
        ("its SFT teacher", describe_model(manifest.sft_teacher)),
        ("tokenizer", f"{tokenizer.vocab_size:,} ids, vocabulary {tokenizer.vocab_hash}, ends with {tokenizer.eos_id}"),
        ("chat template", tokenizer.template_hash or "none"),
        ("sampling", f"temperature {sampling.temperature:g}, top-p {sampling.top_p:g}, at most {sampling.max_new_tokens:,} tokens"),
        ("kept beside each token", f"{sampling.candidates} most likely tokens, {sampling.drawn} drawn ones"),
        ("samples per prompt, seed", f"{sampling.samples_per_prompt:,}, {sampling.seed}"),
        ("schema version", str(manifest.schema_version)),
    ]


def score_columns(store: LogprobReader) -> dict[str, list[str]]:
    """Return the cells of each row of a table with one column for each score column; those that the rollouts hold themselves come last."""
    made, own = store.columns.values(), {BEHAVIOR_COLUMN: "temperature 1"}
    if store.scored(SAMPLER_COLUMN).any():
        own[SAMPLER_COLUMN] = "of what was drawn"
    names, blank = [*store.columns, *own], [""] * len(own)
    parity = ["not measured" if p.parity is None else f"{p.parity.mean:.2g} (max {p.parity.max:.2g})" for p in made]
    return {
        "column": names,
        "model": [*(describe_model(p.model) for p in made), *("the policies that sampled" for _ in own)],
        "engine": [*(p.engine for p in made), *blank],
        "log-probs": [*("not these: labels" if p.label else p.logprobs_mode for p in made), *own.values()],
        "top-k": [*map(_support, made), *blank],
        "same vocabulary": [*("yes" if store.manifest.tokenizer.same_vocabulary(p) else "NO" for p in made), *blank],
        "rollouts scored": [f"{int(store.scored(name).sum()):,} of {len(store):,}" for name in names],
        "in quarantine": [*(f"{len(store.quarantined(name)):,}" for name in store.columns), *blank],
        "parity, mean nats": [*parity, *blank],
    }


def judged_columns(store: LogprobReader) -> dict[str, list[str]]:
    """Return `score_columns`, and what the model of each is to the policy."""
    columns, judged = score_columns(store), [verdict(manifest_of_model(store, made), made) for made in store.columns.values()]
    return {**columns, "as teacher": judged + [""] * (len(columns["column"]) - len(judged))}


def trained_on(lineage: Lineage, store: LogprobReader) -> bool | None:
    """Return whether a student was trained on the rollouts of this store; None where its lineage does not record on which."""
    known = lineage.store
    return None if known is None else known == StoreId.of(store.manifest, store.lengths()[: known.rollouts])


def _support(provenance: Provenance) -> str:
    """Say how wide a support is, and what of it is not the model's own choice."""
    parts = {"candidates": provenance.candidates, "drawn": provenance.drawn}
    others = ", ".join(f"{count} {what}" for what, count in parts.items() if count)
    return f"{provenance.top_k}{others and f' ({others})'}"


def describe_model(model: ModelId | None) -> str:
    """Return name, revision and dtype."""
    return "not recorded" if model is None else f"{model.name}@{model.revision}, {model.dtype}"


def find_start(store: LogprobReader, **options: Any) -> StartReport | str:
    """Return what `measure_start` finds, or why it finds nothing."""
    try:
        return measure_start(store, **options)
    except (InvalidRecordError, MissingScoresError) as error:
        return str(error)


def start_rows(start: StartReport) -> list[tuple[str, str]]:
    """Return name and value of each number, the verdict first; what could not be measured is stated, with what it needs."""
    quantiles = ", ".join(f"{level:.1%} {size:.3g}" for level, size in zip(SIZE_LEVELS, start.sizes, strict=True))
    outside = None
    if start.outside is not None:
        least, most = start.outside
        outside = f"{least.mean:.4f} to {most.mean:.4f} (95 %: {least.low:.4f} to {most.high:.4f})"
    return [
        ("verdict", f"{start.verdict}: {start.reason}"),
        (
            "rollouts that were read",
            f"{start.rollouts:,} of {start.available:,}, evenly spaced; {start.tokens:,} response tokens that count",
        ),
        ("reverse KL as the sampled tokens estimate it, nats a token", _or_missing(start, "reverse_kl", start.reverse_kl, also=True)),
        ("reverse KL of the buckets that both know, a lower bound", _or_missing(start, "bucket_kl", start.bucket_kl)),
        *((f"overlap@{k}", _or_missing(start, "overlap", start.overlap.get(k))) for k in OVERLAPS),
        ("student's mass outside the teacher's support", _or_missing(start, "outside", outside)),
        ("sampled tokens outside it", _or_missing(start, "sampled_outside", start.sampled_outside)),
        ("size of the advantage, quantiles, nats", quantiles),
        (f"beyond {-TAIL:g} nats, and beyond {CLIP:g}", f"{start.beyond_tail:.3%}, {start.beyond_clip:.3%}"),
        ("share of all size in 1 % of the tokens", f"{start.heaviest:.1%}"),
        ("floored tokens", f"{start.floored:,}"),
    ]


def _or_missing(start: StartReport, name: str, shown: Estimate | str | None, *, also: bool = False) -> str:
    why = start.missing.get(name, "")
    if shown is None:
        return f"not measured: {why}"
    return f"{shown}; {why}" if also and why else str(shown)
