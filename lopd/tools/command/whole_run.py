"""A whole run over the public API: SFT where it is asked for, rollouts, scores, OPD, evaluation, a page.  Each phase is done once."""

import runpy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from attrs import asdict, evolve, frozen

import lopd
from lopd.engines.finding import local_folder
from lopd.engines.hf import HFScorer, HFSource, exact_reverse_kl, load_model
from lopd.engines.supports import provenance_of
from lopd.errors import InvalidRecordError
from lopd.guards.consistency import check_teacher_consistency, check_vocabulary
from lopd.guards.start import measure_start
from lopd.losses import divergences
from lopd.protocols import OPDLoss
from lopd.protocols.reading import walk
from lopd.records import Prompt, Rollout, RolloutSums, SamplingParams, TokenizerId, fingerprint_tokenizer
from lopd.records.estimates import mean
from lopd.records.paths import without_secrets
from lopd.tools.command.models import Model, running
from lopd.tools.command.settings import Evaluation, RunSettings, Training
from lopd.tools.console import RichProgress, table
from lopd.tools.phases import Run, console, counted_in, digest, train_phase, write_json, write_page
from lopd.verbs import StepStream

_BEFORE, _AFTER = "evaluation before OPD", "evaluation after OPD"
_TITLES = {"reverse_kl": "held-out reverse KL, nats a token", "score": "score of the verifier"}
_Phase = dict[str, Any]


def run_all(s: RunSettings) -> dict[str, Any]:
    """Do what is left of a run, for each seed, and return its summary, which is plain JSON.

    Raises:
        ConflictError: `out` holds a run of other settings, or what it reads has changed.
        TokenizerMismatchError: student and teacher do not share a vocabulary.
        TeacherConsistencyError: the teacher is not known to have written the text of SFT.
        InvalidRecordError: there are too few prompts, or a file that is named is not there.
    """
    transformers.utils.logging.disable_progress_bar()
    tokenizer = s.student.tokenizer()
    ours = fingerprint_tokenizer(tokenizer)
    check_vocabulary(f"Teacher {s.teacher.model!r}", fingerprint_tokenizer(s.teacher.tokenizer()), "the student's", ours)
    _check_writer(s, ours)
    prompts = lopd.read_prompts(s.prompts, tokenizer) if isinstance(s.prompts, str) else lopd.make_prompts(s.prompts, tokenizer)
    if s.evaluation and len(prompts) <= s.evaluation.held_out:
        raise InvalidRecordError(f"Prompts: there are {len(prompts)}, expected more than evaluation.held_out; hold out fewer.")
    inputs = _inputs(s)
    if s.evaluation and s.evaluation.verifier:
        _verifier(s.evaluation.verifier)(prompts[0], "")  # one that cannot judge is found before anything is paid for
    Run(Path(s.out)).claim(s.flat(), inputs)
    return summary(s, {seed: _Seeded.of(s, seed, prompts).finish() for seed in s.seeds})


def _check_writer(s: RunSettings, ours: TokenizerId) -> None:
    """Refuse another SFT teacher, or an unknown one, before anything is paid for; `batches` would refuse it in the end."""
    writer = s.text.written_by if s.text else "teacher"
    if s.consistency == "error" and not (s.sft and writer == "teacher"):
        folder = local_folder(s.student.model, weights=False)
        known = lopd.Lineage.read(folder) if not s.sft else lopd.Lineage() if writer == "unknown" else lopd.Lineage.of(writer)
        policy = lopd.Manifest(ours, s.student.identity(), SamplingParams(), known.sft_teacher)
        check_teacher_consistency(policy, [provenance_of(s.teacher.identity(), ours, "", top_k=0, candidates=0, drawn=0)])


def _inputs(s: RunSettings) -> dict[str, str]:
    """Return digests of what a run reads: it may change under its name.  What a hub sends is the hub's to name."""
    verifier = (s.evaluation and s.evaluation.verifier) or ""
    models = [model for model in (s.student.model, s.teacher.model) if Path(model).is_dir()]
    files = [s.prompts if isinstance(s.prompts, str) else "", s.text.file if s.text else "", verifier.rpartition(":")[0]]
    digests, path = dict[str, str](), ""
    try:
        for path in filter(None, [*models, *files]):
            digests[f"the content of {without_secrets(path)}"] = digest(path)
        if verifier:
            path = verifier
            _function(verifier)
    except (OSError, KeyError) as error:
        raise InvalidRecordError(f"Run: {without_secrets(path)} cannot be read ({type(error).__name__}); correct it.") from None
    return digests


def _function(place: str) -> Any:
    path, _, name = place.rpartition(":")
    return runpy.run_path(path)[name]


def _verifier(place: str) -> Callable[[Prompt, str], float]:
    """Return the verifier, which ends a run in one sentence where it fails; `lopd.evaluate` looks at what it gives."""
    function = _function(place)

    def verify(prompt: Prompt, text: str) -> float:
        try:
            return float(function(prompt, text))
        except Exception as error:
            raise InvalidRecordError(
                f"Verifier {place}: it raised {error!r:.200} for prompt {prompt.prompt_id!r} and the text {text!r:.40}; it takes a prompt and "
                "the text of a response, which may be empty, and gives a number from 0 to 1."
            ) from error

    return verify


def summary(s: RunSettings, runs: dict[int, list[_Phase]]) -> dict[str, Any]:
    """Print how the evaluations of all seeds changed; return it with what was refused."""
    changes = {seed: _changes({phase["name"]: phase for phase in phases}) for seed, phases in runs.items()}
    over_seeds = {}
    for name in next(iter(changes.values())):
        rows: list[list[object]] = [[f"seed {seed}", *change[name].values()] for seed, change in changes.items()]
        if len(rows) > 1:
            over = over_seeds[name] = mean([change[name]["change"] for change in changes.values()])
            rows.append(["mean over seeds", "", "", over.mean, over.ci95])
        console.print(table(_TITLES[name], ["", "before OPD", "after OPD", "change", "± (95 %)"], rows))
    console.print(f"Students, metrics and pages: {s.out}/seed-*/opd, metrics.json, report.html", soft_wrap=True)
    refused = sum(phase.get("refused", 0) for phases in runs.values() for phase in phases)
    return {"out": s.out, "seeds": changes, "over_seeds": {name: asdict(found) for name, found in over_seeds.items()}, "refused": refused}


def _changes(phases: dict[str, _Phase]) -> dict[str, dict[str, float]]:
    """Return what each measure was before and after OPD, and its change over the same prompts."""
    found = dict[str, dict[str, float]]()
    before, after = phases.get(_BEFORE, {}), phases.get(_AFTER, {})
    if "per_prompt" in after:
        sums = [RolloutSums(*(np.array(phase["per_prompt"][part]) for part in ("sums", "counts"))) for phase in (before, after)]
        change = sums[1].minus(sums[0])
        kls = [phase["held_out_reverse_kl"] for phase in (before, after)]
        found["reverse_kl"] = {"before": kls[0], "after": kls[1], "change": change.mean, "ci95": change.ci95}
    if "scores" in after:
        gains = mean(np.subtract(after["scores"], before["scores"]))
        found["score"] = {"before": before["score"], "after": after["score"], "change": gains.mean, "ci95": gains.ci95}
    return found


@frozen
class _Seeded:
    """A run of one seed, which decides sampling, the order of rollouts, and the prompts that are held out."""

    s: RunSettings
    seed: int
    run: Run
    prompts: list[Prompt]
    held_out: list[Prompt]

    @classmethod
    def of(cls, s: RunSettings, seed: int, prompts: list[Prompt]) -> "_Seeded":
        held_out = s.evaluation.held_out if s.evaluation else 0
        np.random.default_rng(seed).shuffle(shuffled := [*prompts])
        return cls(s, seed, Run(Path(s.out) / f"seed-{seed}"), shuffled[held_out:], shuffled[:held_out])

    def finish(self) -> list[_Phase]:
        """Do the phases that are left; return all of them."""
        s, phase, start = self.s, self.run.phase, self.s.student.model
        phases = list[_Phase]()
        if s.sft:
            phases += [phase("SFT text", self._text), phase("SFT", partial(self._sft, s.sft))]
            start = str(self.run.folder / "sft")
        if s.evaluation:
            phases.append(phase(_BEFORE, partial(self._evaluate, s.evaluation, start)))
        phases += [
            phase("rollouts", partial(self._sample, evolve(s.student, model=start), "rollouts")),
            phase("scores", self._score),
            phase("OPD", partial(self._opd, start)),
        ]
        if s.evaluation:
            phases.append(phase(_AFTER, partial(self._evaluate, s.evaluation, str(self.run.folder / "opd"))))
        self._report(phases)
        return phases

    def _url(self, name: str) -> str:
        return f"{(self.s.store or self.s.out).rstrip('/')}/seed-{self.seed}/{name}.zarr"

    def _text(self) -> _Phase:
        """Return what SFT trains on: the teacher's responses, or a file."""
        if self.s.text is None:
            return self._sample(self.s.teacher, "text")
        writer, teacher = self.s.text.written_by, self.s.teacher
        store = lopd.import_text(
            self.s.text.file,
            self.s.student.tokenizer(),
            teacher=None if writer == "unknown" else teacher.identity() if writer == "teacher" else writer,
            store=partial(lopd.ZarrStore.open_or_create, self._url("text")),
        )
        return {**counted_in(store), "rollouts": len(store)}

    def _sample(self, model: Model, name: str) -> _Phase:
        with running(model.source(SamplingParams(**asdict(self.s.sampling), seed=self.seed))) as source:
            store = lopd.ZarrStore.open_or_create(self._url(name), source.manifest)
            report = lopd.collect_rollouts(source, self.prompts, store, progress=RichProgress(console))
        return {**counted_in(store), "rollouts": len(store), "refused": len(report.refused)}

    def _score(self) -> _Phase:
        store = lopd.ZarrStore.open(self._url("rollouts"))
        with running(self.s.teacher.scorer(self.s.loss.top_k)) as scorer:
            lopd.score_rollouts(store, scorer, progress=RichProgress(console))
        start = measure_start(store)
        console.print(f"before OPD: {start.verdict}, as {start.reason}", soft_wrap=True)
        return {**counted_in(store), "refused": len(store.quarantined("teacher"))}

    def _sft(self, plan: Training) -> _Phase:
        return self._train("sft", self.s.student.model, self._steps("text", plan, teacher=None), lopd.FusedSFTLoss(), plan)

    def _opd(self, start: str) -> _Phase:
        of, on_top_k = self.s.loss, self.s.loss.kind != "opd"
        policy = lopd.ConsistencyPolicy(self.s.consistency)
        steps = self._steps("rollouts", self.s.opd, ref="behavior", top_k=on_top_k, consistency=policy)
        if on_top_k:
            return self._train("opd", start, steps, lopd.FusedLoss(lopd.TopKObjective(getattr(divergences, of.kind))), self.s.opd)
        loss = lopd.FusedOPDLoss(ratio_to_ref=of.ratio)
        return self._train("opd", start, steps, loss if of.clip is None else evolve(loss, clip=of.clip), self.s.opd)

    def _steps(self, name: str, plan: Training, **columns: Any) -> StepStream:
        # a file of texts, or a store of another run, may answer prompts that are held out
        store, held_out = lopd.ZarrStore.open(self._url(name)), {prompt.token_ids.tobytes() for prompt in self.held_out}
        rows = np.array([record.rollout.prompt_ids.tobytes() not in held_out for record in walk(store, np.arange(len(store)))])
        if not rows.all():
            console.print(f"{(~rows).sum()} of {len(rows)} responses answer prompts that are held out, and are not trained on")
        return lopd.batches(
            store,
            rows=np.flatnonzero(rows),
            rollouts_per_step=plan.rollouts_per_step,
            tokens_per_batch=plan.tokens_per_batch,
            seed=self.seed,
            weighting=lopd.by_token if plan.weighting == "token" else lopd.by_rollout,
            **columns,
        )[: plan.steps]

    def _train(self, name: str, start: str, steps: StepStream, loss: OPDLoss, plan: Training) -> _Phase:
        """Train, resumably, and export the student to the folder of this name."""
        model, tokenizer = load_model(start, torch.float32, self.s.student.place)
        autocast = None if plan.autocast is None else getattr(torch, plan.autocast)
        student = lopd.CausalLMStudent(model, tokenizer, autocast=autocast, gradient_checkpointing=plan.gradient_checkpointing)
        optimizer = torch.optim.AdamW(student.parameters(), betas=(0.9, 0.98), weight_decay=0.0)
        found = train_phase(self.run.folder / "checkpoints" / name, student, optimizer, steps, loss, rate=plan.rate)
        student.export(self.run.folder / name, tokenizer, steps.lineage)
        return found

    def _evaluate(self, asked: Evaluation, folder: str) -> _Phase:
        """Evaluate a model on transformers, in float32 as it is trained, at temperature 1; with another seed than that of the rollouts."""
        sampling = SamplingParams(self.s.sampling.max_new_tokens, samples_per_prompt=asked.samples_per_prompt, seed=self.seed + 1000)
        source, found = HFSource.from_folder(folder, sampling, torch.float32, self.s.student.place), _Phase()
        if asked.verifier:
            judge, scores = _verifier(asked.verifier), list[float]()

            def verify(prompt: Prompt, rollout: Rollout) -> float:
                scores.append(judge(prompt, source.tokenizer.decode(rollout.response_ids.tolist(), skip_special_tokens=True)))
                return scores[-1]

            judged = lopd.evaluate(source, self.held_out, verify).avg_at_n
            by_prompt = np.reshape(scores, (len(self.held_out), -1)).mean(axis=1)
            found |= {"score": judged.mean, "score_ci95": judged.ci95, "scores": by_prompt.tolist()}
        if asked.reverse_kl:
            teacher = HFScorer.from_folder(self.s.teacher.model, self.s.teacher.torch_dtype, self.s.teacher.place)
            sums = exact_reverse_kl(source, teacher, source.sample(self.held_out)).pooled(asked.samples_per_prompt)
            kl, per_prompt = sums.per_token(), {"sums": sums.sums.tolist(), "counts": sums.counts.tolist()}
            found |= {"held_out_reverse_kl": kl.mean, "ci95": kl.ci95, "response_tokens": kl.values, "per_prompt": per_prompt}
        return found

    def _report(self, phases: list[_Phase]) -> None:
        """Write `metrics.json` and `report.html`."""
        folder, (history,) = self.run.folder, (phase["history"] for phase in phases if phase["name"] == "OPD")
        versions = {"lopd": lopd.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
        shown = [{key: value for key, value in phase.items() if key != "history"} for phase in phases]
        write_json(folder / "metrics.json", {"phases": shown, "history": history, "settings": self.s.flat(), "versions": versions})
        write_page(folder, lopd.ZarrStore.open(self._url("rollouts")), f"Lightning OPD, seed {self.seed}")
