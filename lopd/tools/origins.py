"""Who sampled and scored a store, and how, as rows of text: what the doctor and the run report show."""

from lopd.guards.consistency import verdict
from lopd.protocols import LogprobReader
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
    columns, judged = score_columns(store), [verdict(store.manifest, made) for made in store.columns.values()]
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
