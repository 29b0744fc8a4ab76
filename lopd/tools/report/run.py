"""A run as one HTML page: what was sampled and scored, how training went, what it cost, and rollouts token by token.

A page is a file of its own: no server, no network, no fonts, no libraries; dark or light as the browser is.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lopd.guards.consistency import manifest_of_model, verdict
from lopd.guards.start import StartReport
from lopd.guards.watch import MAX_TAIL
from lopd.protocols import LogprobReader
from lopd.protocols.reading import evenly, named
from lopd.records.checks import check_at_least
from lopd.records.drift import TAIL, AdvantageSummary
from lopd.records.lineage import Lineage
from lopd.records.rollouts import BEHAVIOR_COLUMN
from lopd.records.steps import StepMetrics
from lopd.tools.advantages import SampledAdvantages, check_columns, sample_advantages, scored_rows
from lopd.tools.facts import describe_model, find_start, judged_columns, origins, start_rows, trained_on
from lopd.tools.report.charts import Chart, over_steps, write_page
from lopd.tools.report.history import Phase, read_steps
from lopd.tools.report.tokens import Decode, TokenReport, advantage_parts, show_rollout

_GAP = (
    "Mean of student minus teacher log-prob over the stored tokens, in nats, each times its importance ratio where there is a ref column.  With "
    "weights by token it estimates the reverse KL from one sample each, so it may be negative; by rollout it shows a trend.  Judge a student by "
    "held-out rollouts."
)
#: Name, value in a few words, more words, and "good", "bad" or nothing.
_Fact = tuple[str, str, str, str]


def write_run_report(
    path: str | Path,
    store: LogprobReader,
    history: Iterable[StepMetrics | Mapping[str, Any]] = (),
    *,
    phases: Sequence[Phase] = (),
    report: TokenReport | None = None,
    decode: Decode | None = None,
    lineage: Lineage | None = None,
    versions: Mapping[str, str] | None = None,
    title: str = "Run report",
) -> None:
    """Write a page about one run; what is not known (no steps, no scores, no log-probs of the policy) is stated.

    Memory is that of three rollouts, of one number for each token of the sample, and of `measure_start`.

    Args:
        path: where the page goes.
        store: the rollouts of the run, and their scores.
        history: metrics of the training, `StepMetrics` or `attrs.asdict` of them.
        phases: what each phase of the run cost; without any, the tokens that the store counts, and the time of the training.
        report: which columns, the clip, and how many rollouts are behind the advantages; teacher minus behavior if None.
        decode: token id -> text, `decoder_of(tokenizer)`; ids are shown without one.
        lineage: the exported student's lineage.
        versions: library -> version, of the program that trained.
        title: the page's title.

    Raises:
        MissingScoresError: a column of `report` is not there, and its columns are not the default ones.
        InvalidRecordError: an entry of `history` is not a step's metrics, or `report` has no sample.
    """
    report, steps = report or TokenReport(), read_steps(history)
    check_at_least("Run report", "sample", report.sample, 1)
    if report.columns != TokenReport().columns:  # those may be absent: the rollouts are not scored yet
        check_columns(store, report.columns)
    sampled = sample_advantages(store, report.teacher, report.student, evenly(scored_rows(store, report.columns), report.sample))
    advantages = advantage_parts(report, sampled)
    ref = None if report.student == BEHAVIOR_COLUMN else report.student
    start = find_start(store, teacher=report.teacher, ref=ref)
    parts = {
        "title": title,
        "facts": [*_store_facts(store, report), *_training_facts(steps), *_advantage_facts(advantages["summary"]), *_start_facts(start)],
        "curves": step_charts(steps),
        "costs": _costs(phases or _known_phases(store, steps)),
        "sampled": len(sampled.rows),
        "missing": _missing(store, report),
        "start": start if isinstance(start, str) else start_rows(start),
        "rollouts": _rollouts(store, report, sampled, decode),
        "named": decode is not None,
        "origins": _origins(store, lineage, versions or {}),
        "columns": judged_columns(store),
    }
    write_page(path, "run.html", {**parts, **advantages})


def step_charts(steps: Sequence[StepMetrics]) -> list[Chart]:
    """Return a curve of every metric by step; those of drift and of the gap to a teacher where any step has it.  None without steps."""
    if not steps:
        return []
    drifts, gaps = [m.drift for m in steps], [m.reverse_kl for m in steps]
    wanted: list[tuple[str, str, dict[str, list[float]]]] = [
        ("Loss", "nats a token", {"loss": [m.loss for m in steps]}),
        *[("Gap to the teacher on the stored tokens", "nats a token", {"gap": gaps})] * any(gaps),
        ("Gradient norm", "before clipping", {"gradient norm": [m.grad_norm for m in steps]}),
        ("Clipped advantages", "share of tokens", {"clipped": [m.clip_fraction for m in steps]}),
    ]
    if any(drifts):
        for title, unit, name in (
            ("Ratio to the policy that sampled", "mean over tokens", "ratio_mean"),
            ("Effective rollouts (ESS)", "share of the step's", "ess"),
            ("Distance from the policy that sampled", "KL, nats a token", "kl"),
        ):
            wanted.append((title, unit, {title: [np.nan if d is None else getattr(d, name) for d in drifts]}))
        gain = {
            "all tokens": [np.nan if d is None else d.mean_gain for d in drifts],
            "least likely fifth": [np.nan if d is None else d.gain[0] for d in drifts],
        }
        wanted.append(("Learned: nearer to the teacher", "nats a token", gain))
    return [over_steps(title, unit, [m.step for m in steps], series) for title, unit, series in wanted]


def _store_facts(store: LogprobReader, report: TokenReport) -> list[_Fact]:
    prompt, response = store.lengths().sum(axis=0).tolist()
    policies, sampling = store.generations, store.manifest.sampling
    drawn = f"{store.manifest.policy.dtype}, temperature {sampling.temperature:g}, top-p {sampling.top_p:g}"
    rounds = "" if len(policies) == 1 else f", the first of {len(policies)} rounds"
    facts = [
        ("rollouts", f"{len(store):,}", f"{response:,} response tokens, {prompt:,} prompt tokens", ""),
        ("sampled by", str(store.manifest.policy), drawn + rounds, ""),
    ]
    scored = store.columns.get(report.teacher)
    if scored is None:
        where, absent = _elsewhere(store, report), f"there is no column {report.teacher}"
        return [*facts, ("scored by", f"not in the column {report.teacher}" if where else "not scored yet", where or absent, "")]
    many, refused = int(store.scored(report.teacher).sum()), len(store.quarantined(report.teacher))
    note = f"{many:,} of {len(store):,} rollouts{f', {refused:,} in quarantine' if refused else ''}; by {scored.engine}"
    judged, _, why = verdict(manifest_of_model(store, scored), scored).partition(": ")
    return [
        *facts,
        ("scored by", str(scored.model), note, ""),
        ("teacher consistency", judged, why, "good" if judged.startswith(("consistent", "privileged")) else "bad"),
    ]


def _training_facts(steps: Sequence[StepMetrics]) -> list[_Fact]:
    if not steps:
        return [("training", "no steps", "no history was given", "")]
    first, last = steps[0], steps[-1]
    tokens, seconds = sum(m.read_tokens for m in steps), sum(m.seconds for m in steps)
    read = f"{sum(m.rollouts for m in steps):,} rollouts, {tokens:,} read tokens, {duration(seconds)}"
    training = [("training", f"{len(steps):,} steps", read, "")]
    if any(m.reverse_kl for m in steps):  # exactly 0 only where no teacher is seen
        moved = f"{first.reverse_kl:.3f} → {last.reverse_kl:.3f}"
        training.append(("gap to the teacher, first and last step", moved, _GAP, ""))
    return training


def _advantage_facts(summary: AdvantageSummary | None) -> list[_Fact]:
    if summary is None:
        return []
    heavy = summary.tail > MAX_TAIL
    advice = (
        f"more than {MAX_TAIL:.0%}: a loss without importance ratio is not to be trusted" if heavy else f"at most {MAX_TAIL:.0%} is fine"
    )
    share = f"{summary.tail:.2%} below {TAIL:g} nats"
    return [("advantages", share, f"{advice}; mean {summary.mean:+.3f} nats", "bad" if heavy else "good")]


def _start_facts(start: StartReport | str) -> list[_Fact]:
    if isinstance(start, str):
        return []
    state = {"offline": "good", "more SFT first": "bad"}.get(start.verdict, "")
    return [("before the first step", start.verdict, start.reason, state)]


def _known_phases(store: LogprobReader, steps: Sequence[StepMetrics]) -> list[Phase]:
    """Return the phases that store and history record; a store does not record how long they took."""
    lengths, phases = store.lengths(), list[Phase]()
    # what labels and privileged scorers read is not the rollouts
    scored = [name for name, made in store.columns.items() if not made.label and not made.privileged]
    for name, rows_N2 in {"rollouts": lengths, **{f"scores: {name}": lengths[store.scored(name)] for name in scored}}.items():
        if len(rows_N2):
            phases.append(Phase(name, None, int(rows_N2.sum()), response_tokens=int(rows_N2[:, 1].sum())))
    if steps:
        read, responses = sum(m.read_tokens for m in steps), sum(m.response_tokens for m in steps)
        phases.append(Phase("training", sum(m.seconds for m in steps), read, response_tokens=responses))
    return phases


def _costs(phases: Sequence[Phase]) -> list[dict[str, Any]]:
    """Return the cells of each phase; shares where the time of each was measured, and all of it."""
    times = [phase.seconds for phase in phases if phase.seconds is not None and phase.attempts == 1]
    total = sum(times) or 1.0 if len(times) == len(phases) else None
    return [
        {
            "name": phase.name,
            "seconds": "not measured" if phase.seconds is None else duration(phase.seconds),
            "share": None if total is None or phase.seconds is None else phase.seconds / total,
            "response": f"{phase.response_tokens:,}" if phase.response_tokens else "",
            "read": f"{phase.read_tokens:,}" if phase.read_tokens else "",
            "rate": f"{phase.read_tokens / phase.seconds:,.0f}" if phase.read_tokens and phase.seconds and phase.attempts == 1 else "",
            "result": phase.result,
        }
        for phase in phases
    ]


def _missing(store: LogprobReader, report: TokenReport) -> str:
    """Return why there are no advantages to show."""
    if not len(store):
        return "the store is empty"
    for column in report.columns:
        if not store.scored(column).any():
            where = _elsewhere(store, report) if column == report.teacher else ""
            more = ", the log-probs that the policy reported while it sampled" if column == BEHAVIOR_COLUMN else where and f"; {where}"
            return f"no rollout has scores in the column {column}{more}"
    return "no token that counts has scores in every column"


def _elsewhere(store: LogprobReader, report: TokenReport) -> str:
    """Return in which columns teachers have scored rollouts, and how to show them; "" where none has."""
    policies = store.generations.values()
    of_teachers = [name for name, made in store.columns.items() if not (made.label or any(map(made.is_of, policies)))]
    there = [name for name in of_teachers if store.scored(name).any()]
    return f"scores are in {', '.join(there)}; pass `--columns {there[0]} {report.student}`" if there else ""


def _rollouts(store: LogprobReader, report: TokenReport, sampled: SampledAdvantages, decode: Decode | None) -> list[dict[str, Any]]:
    """Return the least, the median and the most divergent rollout of the sample, by their mean |advantage|; fewer where there are fewer."""
    counted, counts = np.unique(sampled.segments, return_counts=True)
    if not counted.size:
        return []
    divergence = np.bincount(sampled.segments, np.abs(sampled.gap))[counted] / counts
    order, last = np.argsort(divergence, kind="stable"), len(counted) - 1
    chosen = sorted({last: "most divergent", len(counted) // 2: "median", 0: "least divergent"}.items())
    records = store.read(sampled.rows[counted[order[[i for i, _ in chosen]]]].tolist(), columns=report.columns)
    notes = [f"{name} of {len(counted):,}, mean |advantage| {divergence[order[i]]:.3f}" for i, name in chosen]
    return [show_rollout(record, report, decode, note) for record, note in zip(records, notes, strict=True)]


def _origins(store: LogprobReader, lineage: Lineage | None, versions: Mapping[str, str]) -> list[tuple[str, str]]:
    rows = [("store", named(store)), *origins(store)]
    if lineage is not None:
        rows.append(("student's SFT teacher", describe_model(lineage.sft_teacher)))
        rows.append(("student's OPD teacher", describe_model(lineage.opd_teacher)))
        on = {True: "these rollouts", False: "OTHER ROLLOUTS than these", None: "not recorded"}
        rows.append(("student was trained on", on[trained_on(lineage, store)]))
    return [*rows, *((f"version of {name}", version) for name, version in versions.items())]


def duration(seconds: float) -> str:
    """Return it in the two largest units that are not 0.

    >>> duration(0.25), duration(75), duration(7300)
    ('0.2 s', '1 min 15 s', '2 h 1 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60} min"
