"""Tables of the pages, out of benchmarks/results/*.json, the Makefile and lopd/errors.py: nothing is measured here.

python benchmarks/docs_tables.py     # between the markers of the pages in `TABLES`; a few seconds
"""

import ast
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import pairs_claims
from claims_summary import Ratio, Runs, change, passed, ratios, show_measured, spent
from evidence_summary import MEASURES, Found, cost, final
from pairs_report import correlation_lines, correlation_titles, pair_lines, pair_titles, words
from record import ROOT, fill
from testbed.arms import ONLINE, PLAIN, RATIO

Row = dict[str, Any]
RESULTS, DOCS = ROOT / "benchmarks" / "results", ROOT / "docs"

#: Files whose goals benchmarks/RESULTS.md has in words; `publish.py` makes their parts.
IN_WORDS = ("claims", "claims_estimators", "claims_long", "evidence")
#: The regime of the paper's claims, and one in which the method fails (`benchmarks/claims.py`).
WORKS, FAILS = "doubt, SFT 700", "certain, SFT 300"
LOSSES = {
    "Lightning": "`FusedOPDLoss()`",
    "Lightning, ratio to ref": "`FusedOPDLoss(ratio_to_ref=True)`",
    "ratio, clip 1": "`FusedOPDLoss(ratio_to_ref=True, clip=1.0)`",
    "stored top-8, reverse KL": "`FusedLoss(TopKObjective(reverse_kl))`",
    "stored top-8, forward KL": "`FusedLoss(TopKObjective(forward_kl))`",
    "refresh every 5 steps": "`FusedOPDLoss()`, `refresh_every(5, ...)`",
    "online OPD": "`FusedOPDLoss()`, `refresh_every(1, ...)`",
    "no teacher: -0.5 on the least likely fifth": "`FusedOPDLoss(advantage=-0.5, transforms=(lowest_logprobs,))`",
    "TRL DistillationTrainer": "TRL, not lopd: full-vocabulary reverse KL, teacher alive",
}
STORES = {
    "zarr": "`ZarrStore`",
    "zarr, compacted": "`ZarrStore`, compacted",
    "zarr, float16": '`ZarrStore`, `logprob_dtype="float16"`',
    "lance": "`LanceStore`",
    "lance, compacted": "`LanceStore`, compacted",
    "memory": "`MemoryStore`",
    "parquet": "a parquet file, for comparison",
    "memmap": "a bare memory map, for comparison",
    "memmap, flushed": "the same, flushed at every append",
}
ENGINES = {"hf": ("`HFSource`", "`HFScorer`"), "vllm": ("`VLLMSource`", "`VLLMScorer`"), "served": ("`ServerSource`", "`ServerScorer`")}
ABILITIES = {
    "score": "scoring",
    "sample": "sampling",
    "length": "past its context",
    "gradient": "packed gradient",
    "export": "export",
    "identity": "identity",
    "lora": "LoRA",
    "bfloat16": "bfloat16",
}
VERDICTS = ("right", "refused", "wrong", "raw", "not built")
#: Families of `bench_estimators`.
ESTIMATORS = {
    "Lightning, no ratio": "`FusedOPDLoss(clip=None)`",
    "ratio": "`FusedOPDLoss(clip=None, ratio_to_ref=True)`",
    "teacher's top K": "`FusedLoss(TopKObjective(reverse_kl))`",
    "candidates": "`FusedLoss(TopKObjective(reverse_kl))`",
    "teacher's top K + residual": "`FusedLoss(TopKObjective(reverse_kl, residual=True))`",
    "candidates + residual": "`FusedLoss(TopKObjective(reverse_kl, residual=True))`",
    "candidates, generalised KL + residual": "`FusedLoss(TopKObjective(generalised_kl, residual=True))`",
    "union + residual": "`FusedLoss(TopKObjective(reverse_kl, residual=True))`",
    "drawn": "`FusedLoss(TopKObjective(reverse_kl, residual=True))`",
    "candidates + drawn": "`FusedLoss(TopKObjective(reverse_kl, residual=True))`",
    "ratio, window of 8": "`FusedLoss(WindowRatio(OPDObjective(clip=None, ratio_to_ref=True)))`",
    "teacher's top K + residual, window of 8": "`FusedLoss(WindowRatio(TopKObjective(reverse_kl, residual=True)))`",
    "candidates + residual, window of 8": "`FusedLoss(WindowRatio(TopKObjective(reverse_kl, residual=True)))`",
    "whole vocabulary": "",
    "online, sampled anew": "`FusedOPDLoss(clip=None)`, `refresh_every(1, ...)`",
}
#: Tokens of twenty steps of `bench_estimators`.
LONG_RUN = 20 * 384
#: Ways to the loss that `bench_loss` measures.
PATHS = {
    "three products": "bare matrix products, the floor",
    "fused": "`FusedOPDLoss`",
    "recomputed": "`selected_logprobs`, and whole-rollout variants",
    "full logits": "`ReferenceOPDLoss`",
    "torch linear_cross_entropy, chunk 512": "torch `linear_cross_entropy`, chunk 512",
    "cut-cross-entropy, torch.compile": "cut-cross-entropy, `torch.compile`",
    "Liger's fallback without a GPU": "Liger's fallback without a GPU",
    "Liger, scaled cross-entropy": "Liger's fallback without a GPU",  # results of before name it so
}
#: Of `bench_loss`: the largest size of the larger vocabulary.
LOSS_SIZE = (2048, "151936x896")


def read(name: str) -> Row:
    """Read a result file."""
    found: Row = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def table(head: Sequence[str], rows: Iterator[Sequence[str]], text: int = 1) -> list[str]:
    """Make a Markdown table; all columns after the first `text` hold numbers."""
    rule = ["---"] * text + ["--:"] * (len(head) - text)
    return [f"| {' | '.join(cells)} |" for cells in (head, rule, *rows)]


def number(value: float) -> str:
    """Format a number with three figures."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def when() -> list[str]:
    """Show where offline OPD works and where it does not, by how much of the advantages is in the tail."""
    rows, runs = read("claims")["rows"], Runs.of(read("claims")["rows"])

    def lines() -> Iterator[Sequence[str]]:
        for name in sorted((row["name"] for row in rows if row["kind"] == "setting"), key=lambda name: _tail(runs, name)):
            cells = [runs.mean(runs.where(name, arm), change).show("+.3f") for arm in list(LOSSES)[:2]]
            yield name, f"{_tail(runs, name):.1%}", *cells, runs.mean(runs.where(name, "online OPD"), change).show("+.3f")

    return table(("teacher, student", "advantages below -5 nats", "Lightning", "Lightning, ratio to ref", "online OPD"), lines())


def _tail(runs: Runs, setting: str) -> float:
    return runs.mean(runs.where(setting, "Lightning"), lambda row: float(row["tail"])).mean


def losses() -> list[str]:
    """Show what each loss gains and costs."""
    runs = Runs.of(read("claims")["rows"])

    def lines() -> Iterator[Sequence[str]]:
        for arm, code in LOSSES.items():
            works, fails = (runs.where(setting, arm) for setting in (WORKS, FAILS))
            gains = [runs.mean(cell, change).show("+.3f") if cell else "not run" for cell in (works, fails)]
            yield arm, code, *gains, runs.mean(works, spent).show(".1f")

    return table(("loss", "in code", "gain where OPD works", "gain where it fails", "CPU s"), lines(), 2)


def estimators() -> list[str]:
    """Show the estimators by family, at the largest drift.

    The columns are SmolLM2 at every size, for a step and for twenty, the enumerated worlds, and what a step costs.
    """
    rows = read("estimators")["rows"]
    moved = {kind: max(row["drift"] for row in rows if row["kind"] == kind) for kind in ("states", "world")}
    sizes = sorted({row["policy"] for row in rows if row["kind"] == "states" and row["family"] == "candidates"})
    middle = sizes[len(sizes) // 2]

    def size(row: Row) -> int:
        return max(row["policy"] + row["teacher"], row["policy"] + row["drawn"])

    def cell(found: list[Row], key: str, form: str = ".2f") -> str:
        return format(mean(row[key] for row in found), form) if found else ""

    def lines() -> Iterator[Sequence[str]]:
        for family, code in ESTIMATORS.items():
            mine = [row for row in rows if row["family"] == family and row.get("drift", moved.get(row["kind"])) == moved.get(row["kind"])]
            states = {size(row): row for row in mine if row["kind"] == "states"}
            at = [states[here] for here in (middle, 0) if here in states][:1]
            long = [{"rmse": ((0 if row["unbiased"] else row["bias"] ** 2) + row["variance"] / LONG_RUN) ** 0.5} for row in at]
            bias = f"0 ± {at[0]['bias_noise']:.2f}" if at and at[0]["unbiased"] else cell(at, "bias")
            costs = [row for row in mine if row["kind"] == "cost" and size(row) in (middle, 0)]
            errors = [cell([states[here]] if here in states else at if 0 in states else [], "rmse") for here in sizes]
            worlds = [[row for row in mine if row.get("world") == name] for name in ("mixing", "modes")]
            smallest = [cell([row for row in found if size(row) == min(map(size, found))], "rmse") for found in worlds]
            yield (
                family,
                code,
                cell(at, "bytes", ".0f"),
                bias,
                *errors,
                cell(long, "rmse"),
                *smallest,
                cell(costs, "over_ratio"),
            )

    head = (
        "estimator",
        "in code",
        "bytes",
        "bias",
        *(f"a step, K = {here}" for here in sizes),
        "20 steps",
        "mixing, K = 4",
        "modes, K = 4",
        "cost",
    )
    return table(head, lines(), 2)


def paths() -> list[str]:
    """Show time, memory and error of the ways to compute the same loss."""

    def lines() -> Iterator[Sequence[str]]:
        for row in read("bench_loss")["rows"]:
            if (row.get("tokens"), row.get("shape")) == LOSS_SIZE and row["path"] in PATHS:
                name = f"{PATHS[row['path']]}, oneDNN" if row["library"] == "onednn" else PATHS[row["path"]]
                rest = (f"{row['beyond_gradients_mib']:,.0f}", f"{row['weight_error']:.1e}") if "weight_error" in row else ("", "")
                yield name, row["dtype"], f"{row['cpu_s']:.1f}", f"{row['over_floor']:.2f}", *rest

    return table(("path", "weights", "CPU s", "over three products", "MiB beyond the gradients", "error of dW"), lines(), 2)


def precision() -> list[str]:
    """Show the errors of log-probs and gradients by what is multiplied."""

    def lines() -> Iterator[Sequence[str]]:
        for row in read("precision")["rows"]:
            nats = [f"{row[key]:.1e}" for key in ("nats", "nats_p99", "nats_max")]
            yield (
                row["weights"],
                row["products"],
                *nats,
                *(f"{row[key]:.1e} ± {row[f'{key}_ci95']:.0e}" for key in ("by_hidden", "by_weight")),
            )

    error = "relative error of the gradient by"
    return table(("weights", "products", "nats, mean", "99 %", "largest", f"{error} hidden states", f"{error} the weight"), lines(), 2)


def stores() -> list[str]:
    """Show speed and size: what training reads, and its share of what it reads from a memory map, before what single reads take."""
    rows = read("bench_store")["rows"]
    stored, trained = ({row[key]: row for row in rows if key in row} for key in ("backend", "training"))

    def lines() -> Iterator[Sequence[str]]:
        for name, title in STORES.items():
            if name not in {*stored, *trained}:
                continue
            batch = [number(trained[name][key]["median"]) for key in ("to_batch", "of_memmap")] if name in trained else ["", ""]
            keys = ("append", "sequential", "random", "bytes_per_token")
            yield title, *batch, *([number(stored[name][key]["median"]) for key in keys] if name in stored else [""] * 4)

    head = ("store", "to a collated batch", "share of a memory map", "append", "read in order", "read 64 random rollouts", "bytes a token")
    return table(head, lines())


def growth() -> list[str]:
    """Show the times at the smallest and at the largest size."""
    rows = [row for row in read("scale")["rows"] if row["kind"] == "growth"]
    sizes = {min(row["rollouts"] for row in rows), max(row["rollouts"] for row in rows)}

    def lines() -> Iterator[Sequence[str]]:
        for row in rows:
            if row["rollouts"] in sizes:
                times = [f"{1e3 * row[key]:.3g}" for key in ("open_s", "read_s", "read_compacted_s")]
                yield row["store"], f"{row['rollouts']:,}", *times

    return table(("store", "rollouts", "open, ms", "read 64 random rollouts, ms", "the same when compacted"), lines())


def servers() -> list[str]:
    """Show what object servers do, and what four writers lost on each."""

    def lines() -> Iterator[Sequence[str]]:
        for row in read("servers")["rows"]:
            counts = [f"{row[backend]['acknowledged']}, {row[backend]['lost']}" for backend in ("zarr", "lance")]
            yield f"{row['server']} {row['version']}", row["said"], number(row["asking_ms"]), *counts

    return table(("server", "what lopd finds", "asking, ms", "Zarr: acknowledged, lost", "Lance: acknowledged, lost"), lines(), 2)


def commits() -> list[str]:
    """Show the costs at the smallest and at the largest number of commits, and their exponents."""
    rows = [row for row in read("commits")["rows"] if row["kind"] == "commits"]
    sizes = {min(row["commits"] for row in rows), max(row["commits"] for row in rows)}
    costs = ("append_s", "append_scores_s", "open_s", "read_s")

    def lines() -> Iterator[Sequence[str]]:
        for row in rows:
            if row["commits"] in sizes:
                times = [f"{1e3 * row[key]:.3g}" for key in (*costs, "query_s")]
                rest = number(row["tokens_per_s"] / 1e6), f"{row['bookkeeping_bytes'] / 1e3:,.0f}", f"{row['files']:,}"
                yield row["store"], f"{row['commits']:,}", *times, *rest
        for row in read("commits")["rows"]:
            if row["kind"] == "exponents":
                found = {key: f"{row[key]['all']:+.2f} ({row[key]['low']:+.2f} to {row[key]['high']:+.2f})" for key in costs}
                yield row["store"], "exponent", *found.values(), "", "", f"{row['bookkeeping_bytes']['all']:+.2f}", ""

    names = ("append, ms", "append_scores, ms", "open, ms", "read 64 random rollouts, ms", "who begins with `1/`, ms")
    return table(("store", "commits", *names, "read in order, M tokens/s", "bookkeeping a commit, kB", "files"), lines())


def engines() -> list[str]:
    """Show the tokens a second on two cores."""
    rows = read("bench_engines")["rows"]

    def lines() -> Iterator[Sequence[str]]:
        for engine, (source, scorer) in ENGINES.items():
            for what, key in ((scorer, "scoring"), (f"{scorer}, top-20", "scoring, top-k"), (source, "sampling")):
                yield what, *(number(row[engine][key]["median"]) for row in rows)

    return table(("tokens a second", *(row["model"] for row in rows)), lines())


def parity() -> list[str]:
    """Show how far vLLM is from transformers."""

    def lines() -> Iterator[Sequence[str]]:
        for row in read("bench_engines")["rows"]:
            for head, gap in row["gaps"].items():
                yield f"{row['model']}, {head}", *(f"{gap[key]:.2g}" for key in ("mean", "p99", "max"))

    return table(("vLLM against transformers, nats a token", "mean", "99 %", "largest"), lines())


def teachers() -> list[str]:
    """Show what a teacher that did not write the SFT text does, and what residuals repair."""
    methods = ("offline", "offline, residual", "online")
    cells = {(row["sft_teacher"], row["opd_teacher"], row["method"]): row for row in read("consistency")["rows"] if row.get("cell")}

    def lines() -> Iterator[Sequence[str]]:
        for sft, opd in sorted({key[:2] for key in cells}):
            found = [cells[sft, opd, method] for method in methods]
            changes = [f"{row['change']:+.3f} ± {row['change_ci95']:.3f}" for row in found]
            yield sft, opd, str(found[0]["seeds"]), f"{found[0]['start']:.3f}", *changes

    return table(("SFT teacher", "OPD teacher", "seeds", "accuracy after SFT", *methods), lines(), 2)


def passes() -> list[str]:
    """Show the ends of runs on parts of one store of real weights, passed over once or more often, and of live runs."""
    found = Found(read("evidence")["rows"])
    forms = [name for name in found.names() if name.split(" (")[0] == found.best]
    stored = {name.removeprefix(found.best).strip(" ()") or "all of the store": name for name in forms}
    said = f"The stored runs are of the arm *{found.best}*; {len(found.starts())} seeds.  {found.beside_trl()}"
    whole = found.cell(found.best)

    def lines() -> Iterator[Sequence[str]]:
        for title, name in {**stored, **found.rivals()}.items():
            cell = found.cell(name)
            beside = (found.paired(cell, whole, lambda ours, theirs, k=kind: final(ours, k) - final(theirs, k)) for kind in MEASURES)
            shown = ("", "") if name == found.best else (more.show("+.3f") for more in beside)
            yield title, str(next(iter(cell.values()))["curve"][-1]["step"]), found.mean(cell, cost).show(".0f"), *shown

    return [
        said,
        "",
        *table(("trained on", "steps", "CPU s", "reverse KL minus that of all of the store", "forward KL, likewise"), lines()),
    ]


def savings() -> list[str]:
    """State how many times as much as a stored run online OPD costs at equal steps, beside how often each stored rollout is used there."""
    rows, found = read("claims")["rows"], Found(read("evidence")["rows"])
    live, size = found.cell(ONLINE.name), found.plan
    small = {arm.name: ratios(Runs.of(rows), WORKS, ONLINE.name, arm.name)["equal steps"] for arm in (PLAIN, RATIO)}
    cells = {name: found.cell(name) for name in ("ratio", found.best)}
    real = {name: Ratio.of([cost(live[seed]) / cost(cell[seed]) for seed in cell]) for name, cell in cells.items()}
    sizes = passed(rows, WORKS, PLAIN.name), (size["opd_prompts"], next(iter(live.values()))["steps"] * size["batch"])

    def line(where: str, stored: int, trained: int, times: dict[str, Ratio]) -> str:
        said = " and ".join(f"{more.show('.2f')} times as much as *{name}*" for name, more in times.items())
        passes = f"{trained / stored:.2g}"
        return (
            f"- {where} {stored:,} stored rollouts are passed over {'once' if passes == '1' else f'{passes} times'}, and online OPD samples and "
            f"scores {trained:,}: at equal steps it costs {said}."
        )

    return [line("On the testbed of the claims", *sizes[0], small), line("On real weights", *sizes[1], real)]


def step() -> list[str]:
    """State how a training step does beside TRL's; a file without TRL's second way to cut a step has a figure that is not quoted."""
    found = read("bench_train")
    (goal,) = (goal for goal in found["goals"] if "TRL" in goal["name"])
    terms = "with its teacher's layers not counted (`benchmarks/results/bench_train.json`); that was on CPUs"
    if any("in four parts" in row["path"] for row in found["rows"]):
        ways = "the faster of two ways to cut it, at once and in four accumulated parts"
        return [f"One training step of lopd took {number(goal['measured'])} times as many tokens a second as TRL's, {ways}, {terms}."]
    return [
        f"One training step of TRL's was slower than lopd's {terms}, and TRL took it at once: in accumulated parts it was not measured."
    ]


def pairs() -> list[str]:
    """Show what was known of each pair before its first step, and what each arm reached."""
    return table(pair_titles(), pair_lines(read("pairs")["rows"]))


def start_words() -> list[str]:
    """State what the threshold of the first verdict was fitted to, and how it does elsewhere."""
    return pairs_claims.words(read("pairs")["goals"])


def starts() -> list[str]:
    """Show the starts of the claims by the tail of their advantages, and what became of them."""
    return table(pairs_claims.table_titles(), pairs_claims.table_lines(read("claims")["rows"]))


def pair_correlations() -> list[str]:
    """Show how well each diagnostic ranks pairs as an outcome does."""
    return table(correlation_titles(), correlation_lines(read("pairs")["rows"]))


def pair_words() -> list[str]:
    """State what was found on pairs, in sentences."""
    return words(read("pairs")["rows"])


def goals() -> list[str]:
    """Count the goals that each benchmark met."""

    def lines() -> Iterator[Sequence[str]]:
        for path in sorted(RESULTS.glob("*.json")):
            found = json.loads(path.read_text())
            if found["goals"]:
                met = sum(goal["met"] for goal in found["goals"])
                yield f"`benchmarks/results/{path.name}`", str(len(found["goals"])), str(met), str(len(found["goals"]) - met)

    return table(("result file", "goals", "met", "missed"), lines())


def missed() -> list[str]:
    """List every missed goal, except those that benchmarks/RESULTS.md has in words."""

    def lines() -> Iterator[Sequence[str]]:
        for path in sorted(RESULTS.glob("*.json")):
            for goal in json.loads(path.read_text())["goals"]:
                if path.stem not in IN_WORDS and not goal["met"]:
                    measured = show_measured(goal) if goal.get("ci95") else goal["measured"]
                    yield f"`{path.name}`", goal["name"], goal["goal"], measured if isinstance(measured, str) else number(measured)

    return table(("result file", "goal", "wanted", "measured"), lines(), 3)


def tried_with() -> list[str]:
    """Versions of what the models were built and trained with."""
    versions = read("families")["versions"]
    return ["Tried with " + ", ".join(f"{name} {versions[name]}" for name in ("transformers", "peft", "torch")) + "."]


def abilities() -> list[str]:
    """Count the models that have each ability."""
    built = [row for row in read("families")["rows"] if "not_built" not in row]

    def lines() -> Iterator[Sequence[str]]:
        for ability, title in ABILITIES.items():
            verdicts = [row[ability]["verdict"] for row in built]
            yield title, *(str(verdicts.count(verdict)) for verdict in VERDICTS)

    return table(("ability", *VERDICTS), lines())


def models() -> list[str]:
    """Show the verdict on each ability of each family."""

    def lines() -> Iterator[Sequence[str]]:
        for row in read("families")["rows"]:
            if "not_built" not in row:
                yield row["family"], f"`{row['class']}`", *(_verdict(row[ability]) for ability in ABILITIES)

    return table(("family", "class", *ABILITIES.values()), lines(), 2)


def _verdict(found: Row) -> str:
    size, verdict = found.get("error", 0), str(found["verdict"])
    return {"right": f"{size:.0e}" if size else "0", "wrong": f"**wrong**: {size:.2g}", "raw": "**raw**"}.get(verdict, verdict)


def causes() -> list[str]:
    """List why families were refused or could not be built; numbers are left out, so that like causes stand together."""
    found: dict[tuple[str, str], dict[str, set[str]]] = {}
    for row in read("families")["rows"]:
        parts = {"family": {"verdict": "not built", "cause": row["not_built"]}} if "not_built" in row else row
        for ability, title in {"family": "the model itself", **ABILITIES}.items():
            if "cause" in (part := parts.get(ability, {})):
                cause = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", part["cause"])
                cause = re.sub(r"(?<!\w)\d+(\.\d+)?", "N", cause).replace("|", "/").replace("`", "'")
                entry = found.setdefault((part["verdict"], cause), {"abilities": set(), "families": set()})
                entry["abilities"].add(title)
                entry["families"].add(row["family"])
    titles = ["the model itself", *ABILITIES.values()]

    def lines() -> Iterator[Sequence[str]]:
        for (verdict, cause), entry in sorted(found.items(), key=lambda item: (VERDICTS.index(item[0][0]), item[0][1])):
            yield verdict, f"`{cause}`", ", ".join(sorted(entry["abilities"], key=titles.index)), ", ".join(sorted(entry["families"]))

    return table(("verdict", "cause", "abilities", "families"), lines(), 4)


def roofline_table() -> list[str]:
    """Show what a step must cost, and the share of the head: before and after its operands were bfloat16, and for float32 weights."""
    rows = read("roofline")["rows"]
    ways = list(rows[0]["head_share"])
    timed = [ways[0], *ways[2:]]

    def lines() -> Iterator[Sequence[str]]:
        for row in rows:
            shares = [f"{share:.0%}" for share in row["head_share"].values()]
            speeds = [number(row["tokens_per_s"][way]) for way in timed]
            yield row["model"], row["card"], f"{1e3 * row['layers_s']:.0f}", *shares, *speeds

    columns = ("model", "card", "layers, ms", *(f"head, {way}" for way in ways), *(f"tokens a second, {way}" for way in timed))
    return table(columns, lines(), 2)


def planned_memory() -> list[str]:
    """Show the planned memory beside the measured one."""
    rows = read("gpu_memory")["rows"]

    def lines() -> Iterator[Sequence[str]]:
        for row in rows:
            yield (
                row["case"],
                f"{row['parameters'] / 1e6:.0f} M",
                *(f"{row[key]:.3f}" for key in ("measured_gb", "planned_gb")),
                f"{row['ratio']:.2f}",
            )

    return table(("phase", "parameters", "measured, GB", "planned, GB", "planned over measured"), lines(), 1)


def planned_families() -> list[str]:
    """Show which families the planner refuses, phase by phase."""
    rows = read("plan_families")["rows"]

    def lines() -> Iterator[Sequence[str]]:
        for phase in ("sampling", "scoring", "training"):
            refused = [f"`{row['family']}`" for row in rows if row[phase] != "answered"]
            yield phase, ", ".join(refused), str(len(rows) - len(refused))

    return table(("phase", "refused", "families answered"), lines(), 2)


def card() -> list[str]:
    """Show what was measured on one card, or state that `make gpu` has not been run."""
    path = RESULTS / "gpu.json"
    if not path.exists():
        return ["`make gpu` has not been run on a card: there is not a file gpu.json yet."]
    found = json.loads(path.read_text())
    lines = ((goal["name"], goal["goal"], str(goal["measured"]), "yes" if goal["met"] else "no") for goal in found["goals"])
    return [f"{found['machine']['card']}, torch {found['versions']['torch']}:", "", *table(("goal", "wanted", "measured", "met"), lines, 1)]


def commands() -> list[str]:
    """Show what `make` does, by target."""
    found = re.findall(r"^([\w-]+):.*?  ## (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return table(("command", "what it does"), ((f"`make {name}`", words) for name, words in sorted(found)), 2)


def gallery() -> list[str]:
    """Show every numbered example: what it is about, its code, and what it prints."""
    lines = []
    for row in read("gallery")["rows"]:
        page = ROOT / "examples" / f"{row['name']}.py"
        words, _, code = page.read_text().removeprefix('"""').partition('"""\n\n')
        title, _, rest = words.partition("\n")
        command = " ".join((f"python examples/{page.name}", *row["arguments"]))
        shown = [
            f"## {row['name'].replace('_', ' ')}",
            "",
            title,
            *rest.splitlines(),
            "",
            "<!-- not run: tests/test_examples.py runs the file -->",
        ]
        lines += [
            *shown,
            "```python",
            *code.splitlines(),
            "```",
            "",
            f"`{command}` prints:",
            "",
            "```text",
            *row["printed"].splitlines(),
            "```",
            "",
        ]
    return lines


def errors() -> list[str]:
    """List every error: what it means, and what to do."""
    return _raised("Error")


def warnings() -> list[str]:
    """List every warning: what it means, and what to do."""
    return _raised("Warning")


def _raised(kind: str) -> list[str]:
    tree = ast.parse((ROOT / "lopd" / "errors.py").read_text())

    def lines() -> Iterator[Sequence[str]]:
        for node in sorted((node for node in tree.body if isinstance(node, ast.ClassDef)), key=lambda node: node.name):
            meaning, _, todo = (ast.get_docstring(node) or "").partition("\nTo do: ")
            if node.name.endswith(kind) and not node.name.startswith("Lopd"):
                yield f"`{node.name}`", " ".join(meaning.split()), " ".join(todo.split())

    return table(("class", "what it means", "what to do"), lines(), 3)


TABLES = {
    "examples.md": {"gallery": gallery},
    "commands.md": {"commands": commands},
    "troubleshooting.md": {"errors": errors, "warnings": warnings},
    "index.md": {"when": when},
    "comparison.md": {"step": step},
    "go-offline.md": {"savings": savings},
    "choose.md": {
        "losses": losses,
        "estimators": estimators,
        "paths": paths,
        "stores": stores,
        "growth": growth,
        "servers": servers,
        "commits": commits,
        "engines": engines,
        "parity": parity,
        "teachers": teachers,
        "passes": passes,
        "start words": start_words,
        "starts": starts,
        "pair words": pair_words,
        "pairs": pairs,
        "pair correlations": pair_correlations,
    },
    "decisions/0003-losses.md": {"precision": precision},
    "models.md": {"versions": tried_with, "abilities": abilities, "models": models, "causes": causes},
    "gpu.md": {"roofline": roofline_table, "memory": planned_memory, "planned families": planned_families, "card": card},
    "reliability.md": {"goals": goals, "missed": missed},
}


def main(folder: Path = DOCS) -> None:
    """Fill the pages."""
    for page, tables in TABLES.items():
        for name, make in tables.items():
            fill(folder / page, f"{name} table", make())


if __name__ == "__main__":
    main()
