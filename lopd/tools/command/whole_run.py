"""A whole run over the public API: SFT where it is asked for, rollouts, scores, OPD, evaluation, a page.  Each phase is done once."""

from collections.abc import Callable, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from attrs import asdict, evolve, frozen

import lopd
from lopd.engines.causal_lm import context_length
from lopd.engines.hf import HFScorer, HFSource, exact_reverse_kl, load_model
from lopd.errors import ContextOverflowError, ContextWarning, printable
from lopd.guards.start import measure_start
from lopd.losses import divergences
from lopd.protocols import OPDLoss
from lopd.protocols.doors import ids_of
from lopd.protocols.reading import walk
from lopd.records import Prompt, Rollout, RolloutSums
from lopd.records.estimates import mean
from lopd.records.warn import noting, warn_user
from lopd.tools.command.before import check_held_out, day_of, prepare, read_verifier
from lopd.tools.command.models import Model, running
from lopd.tools.command.settings import Evaluation, Prompts, RunSettings, Training
from lopd.tools.console import RichProgress, table
from lopd.tools.phases import EVALUATION_SEEDS, TEXT_SEEDS, Run, console, counted_in, train_phase, write_json, write_page
from lopd.verbs import StepStream

_BEFORE, _AFTER = "evaluation before OPD", "evaluation after OPD"
_TITLES = {"reverse_kl": "held-out reverse KL, nats a token", "score": "score of the verifier"}
_Phase = dict[str, Any]


def run_all(s: RunSettings) -> dict[str, Any]:
    """Do what is left of a run, for each seed, and return its summary, which is plain JSON.

    Raises:
        LopdError: it cannot be done; see `prepare`, which finds what can be found before anything is paid for.
    """
    transformers.utils.logging.disable_progress_bar()
    with noting() as said:
        prompts, unfit = prepare(s)
    seeded = [_Seeded.of(s, seed, prompts, unfit) for seed in s.seeds]
    runs = {each.seed: each.finish() for each in seeded}
    said += [
        f"seed {seed}, {phase['name']}: {text}" for seed, phases in runs.items() for phase in phases for text in phase.get("warnings", ())
    ]
    found = summary(s, runs)
    for text in said:
        console.print(printable(text), soft_wrap=True)
    return {**found, "warnings": said}


def summary(s: RunSettings, runs: dict[int, list[_Phase]]) -> dict[str, Any]:
    """Print how the evaluations of all seeds changed; return it with what was refused."""
    changes = {seed: _changes({phase["name"]: phase for phase in phases}) for seed, phases in runs.items()}
    over_seeds = {}
    for name in dict.fromkeys(name for change in changes.values() for name in change):
        found = {seed: change[name] for seed, change in changes.items() if name in change}
        rows: list[list[object]] = [[f"seed {seed}", *change.values()] for seed, change in found.items()]
        if len(rows) > 1:
            over = over_seeds[name] = mean([change["change"] for change in found.values()])
            rows.append(["mean over seeds", "", "", over.mean, over.ci95])
        console.print(table(_TITLES[name], ["", "before OPD", "after OPD", "change", "± (95 %)"], rows))
    console.print(f"Students, metrics and pages: {s.out}/seed-*/opd, metrics.json, report.html", soft_wrap=True)
    refused = sum(phase.get("refused", 0) for phases in runs.values() for phase in phases)
    return {"out": s.out, "seeds": changes, "over_seeds": {name: asdict(found) for name, found in over_seeds.items()}, "refused": refused}


def _changes(phases: dict[str, _Phase]) -> dict[str, dict[str, float]]:
    """Return what each measure was before and after OPD, and its change over the same prompts."""
    found = dict[str, dict[str, float]]()
    before, after = phases.get(_BEFORE, {}), phases.get(_AFTER, {})
    if "per_prompt" in before and "per_prompt" in after and (sums := _shared(before["per_prompt"], after["per_prompt"])):
        change, kls = sums[1].minus(sums[0]), [float(part.sums.sum() / part.counts.sum()) for part in sums]
        found["reverse_kl"] = {"before": kls[0], "after": kls[1], "change": change.mean, "ci95": change.ci95}
    if "scores" in after:
        gains = mean(np.subtract(after["scores"], before["scores"]))
        found["score"] = {"before": before["score"], "after": after["score"], "change": gains.mean, "ci95": gains.ci95}
    return found


def _shared(*measured: dict[str, list[float]]) -> list[RolloutSums]:
    """Return the sums of the prompts that have tokens in all of these; nothing for fewer than two, which have no interval."""
    found_PFB = np.array([[each["sums"], each["counts"]] for each in measured])
    found_PFB = found_PFB[:, :, (found_PFB[:, 1] > 0).all(axis=0)]
    return [RolloutSums(*each_FB) for each_FB in found_PFB] if found_PFB.shape[2] > 1 else []


def _reverse_kl(source: HFSource, teacher: HFScorer, rollouts: Sequence[Rollout], samples: int) -> dict[str, list[float]]:
    """Return the sums of `exact_reverse_kl` and their tokens by prompt, without the rollouts that the teacher cannot read.

    Warns:
        ContextWarning: there are such rollouts.
    """
    context = context_length(teacher.model)
    reads_B = np.array([len(rollout) <= context for rollout in rollouts])
    if not reads_B.all():
        warn_user(
            f"Evaluation: {(~reads_B).sum()} of {len(rollouts)} responses, with their prompts, are longer than the teacher's context of {context}, "
            "so the KL leaves them out; it needs a smaller sampling.max_new_tokens, and another folder, to have them all.",
            ContextWarning,
        )
    found_FB = np.zeros((2, len(rollouts)))
    if reads_B.any():
        sums = exact_reverse_kl(source, teacher, [rollouts[i] for i in np.flatnonzero(reads_B).tolist()])
        found_FB[:, reads_B] = sums.sums, sums.counts
    return dict(zip(("sums", "counts"), found_FB.reshape(2, -1, samples).sum(axis=-1).tolist(), strict=True))


@frozen
class _Seeded:
    """A run of one seed, which decides sampling, the order of rollouts, and the prompts that are held out."""

    s: RunSettings
    seed: int
    run: Run
    prompts: list[Prompt]
    held_out: list[Prompt]

    @classmethod
    def of(cls, s: RunSettings, seed: int, prompts: list[Prompt], unfit: set[str]) -> "_Seeded":
        np.random.default_rng(seed).shuffle(shuffled := [*prompts])
        shuffled.sort(key=lambda prompt: prompt.prompt_id in unfit)  # an evaluation asks for all of its prompts, and would end
        distinct = dict[bytes, Prompt]()  # copies of one would be draws of one question, and be sampled only to be dropped
        for prompt in shuffled:
            distinct.setdefault(prompt.token_ids.tobytes(), prompt)
        held_out = dict([*distinct.items()][: s.evaluation.held_out if s.evaluation else 0])
        sampled = [prompt for prompt in shuffled if prompt.token_ids.tobytes() not in held_out]
        found = cls(s, seed, Run(Path(s.out) / f"seed-{seed}"), sampled, [*held_out.values()])
        if _BEFORE in (kept := found.run.kept(work := found._work())) and len(kept) < len(work):  # the other is evaluated again
            # runs were begun when copies were held out as several, and nothing was kept of which
            check_held_out(found.run.folder / "phases", ids_of(found.held_out), ids_of(shuffled[: len(held_out)]))
        return found

    def finish(self) -> list[_Phase]:
        """Do the phases that are left; return all of them."""
        phases = self.run.phases(self._work())
        self._report(phases)
        return phases

    def _work(self) -> dict[str, Callable[[], _Phase]]:
        """Return all phases by name, in order."""
        s, start, work = self.s, self.s.student.model, dict[str, Callable[[], _Phase]]()
        if s.sft:
            work |= {"SFT text": self._text, "SFT": partial(self._sft, s.sft)}
            start = str(self.run.folder / "sft")
        if s.evaluation:
            work[_BEFORE] = partial(self._evaluate, s.evaluation, start)
        work["rollouts"] = partial(self._sample, evolve(s.student, model=start), "rollouts", self.seed)
        work |= {"scores": self._score, "OPD": partial(self._opd, start)}
        if s.evaluation:
            work[_AFTER] = partial(self._evaluate, s.evaluation, str(self.run.folder / "opd"))
        return work

    def _url(self, name: str) -> str:
        return f"{(self.s.store or self.s.out).rstrip('/')}/seed-{self.seed}/{name}.zarr"

    def _text(self) -> _Phase:
        """Return what SFT trains on: the teacher's responses, or a file."""
        if self.s.text is None:
            return self._sample(self.s.teacher, "text", self.seed + TEXT_SEEDS)
        text, writer, teacher, tokenizer = self.s.text, self.s.text.written_by, self.s.teacher, self.s.student.tokenizer()
        of_prompts = Prompts("") if isinstance(self.s.prompts, list) else self.s.prompts
        variables = of_prompts.chat_template_kwargs if text.chat_template_kwargs is None else text.chat_template_kwargs
        store = lopd.import_text(
            text.file,
            tokenizer,
            date=day_of(self.s, tokenizer),
            teacher=None if writer == "unknown" else teacher.identity() if writer == "teacher" else writer,
            field=text.field,
            response=text.response,
            template=of_prompts.template if text.template is None else text.template,
            chat_template_kwargs=variables,
            store=partial(lopd.ZarrStore.open_or_create, self._url("text")),
        )
        return {**counted_in(store), "rollouts": len(store)}

    def _sample(self, model: Model, name: str, seed: int) -> _Phase:
        with running(model.fitted(self._longest).source(self.s.sampling.params(seed), self.s.sampling.rows)) as source:
            store = lopd.ZarrStore.open_or_create(self._url(name), source.manifest)
            together = model.together(self.s.sampling.samples_per_prompt)
            report = lopd.collect_rollouts(source, self.prompts, store, prompts_per_batch=together, progress=RichProgress(console))
        return {**counted_in(store), "rollouts": len(store), "refused": len(report.refused)}

    @property
    def _longest(self) -> int:
        return max(prompt.token_ids.size for prompt in self.prompts) + self.s.sampling.max_new_tokens

    def _score(self) -> _Phase:
        store = lopd.ZarrStore.open(self._url("rollouts"))
        with running(self.s.teacher.fitted(self._longest).scorer(self.s.loss.top_k)) as scorer:
            lopd.score_rollouts(store, scorer, progress=RichProgress(console))
        start = measure_start(store)
        console.print(f"before OPD: {start.verdict}, as {start.reason}", soft_wrap=True)
        return {**counted_in(store), "refused": len(store.quarantined("teacher"))}

    def _sft(self, plan: Training) -> _Phase:
        return self._train("sft", self.s.student.model, partial(self._steps, "text", plan, teacher=None), lopd.FusedSFTLoss(), plan)

    def _opd(self, start: str) -> _Phase:
        of, on_top_k = self.s.loss, self.s.loss.kind != "opd"
        policy = lopd.ConsistencyPolicy(self.s.consistency)
        steps = partial(self._steps, "rollouts", self.s.opd, ref="behavior", top_k=on_top_k, consistency=policy)
        if on_top_k:
            return self._train("opd", start, steps, lopd.FusedLoss(lopd.TopKObjective(getattr(divergences, of.kind))), self.s.opd)
        loss = lopd.FusedOPDLoss(ratio_to_ref=bool(of.ratio))
        return self._train("opd", start, steps, loss if of.clip is None else evolve(loss, clip=of.clip), self.s.opd)

    def _steps(self, name: str, plan: Training, context: int, **columns: Any) -> StepStream:
        """Return the steps over what a student of this context can read.

        Warns:
            ContextWarning: there is more, which is left out.

        Raises:
            ContextOverflowError: it can read none of it.
        """
        # a file of texts, or a store of another run, may answer prompts that are held out
        store, held_out = lopd.ZarrStore.open(self._url(name)), {prompt.token_ids.tobytes() for prompt in self.held_out}
        rows = np.arange(len(store))
        if held_out:
            trained = np.array([record.rollout.prompt_ids.tobytes() not in held_out for record in walk(store, rows)])
            rows = np.flatnonzero(trained)
            if not trained.all():
                console.print(f"{(~trained).sum()} of {len(trained)} responses answer prompts that are held out, and are not trained on")
        fits = store.lengths()[rows].sum(axis=1) - 1 <= context  # the last token is not read
        if not fits.all():
            said = f"Training: {(~fits).sum()} of {len(fits)} responses, with their prompts, are longer than the student's context of {context}, so"
            remedy = "it needs shorter ones, or a student with a longer context, and another folder"
            if not fits.any():
                raise ContextOverflowError(f"{said} none is left; {remedy}.")
            warn_user(f"{said} they are left out; {remedy}, to have them all.", ContextWarning)
            rows = rows[fits]
        return lopd.batches(
            store,
            rows=rows if len(rows) < len(store) else None,
            rollouts_per_step=plan.rollouts_per_step,
            tokens_per_batch=plan.tokens_per_batch,
            seed=self.seed,
            weighting=lopd.by_token if plan.weighting == "token" else lopd.by_rollout,
            **columns,
        )[: plan.steps]

    def _train(self, name: str, start: str, steps_for: Callable[[int], StepStream], loss: OPDLoss, plan: Training) -> _Phase:
        """Train, resumably, and export the student to the folder of this name."""
        autocast = None if plan.autocast is None else getattr(torch, plan.autocast)
        model, tokenizer = load_model(start, torch.float32, self.s.student.place, autocast=autocast)
        steps = steps_for(context_length(model))
        student = lopd.CausalLMStudent(model, tokenizer, autocast=autocast, gradient_checkpointing=plan.gradient_checkpointing)
        optimizer = torch.optim.AdamW(student.parameters(), betas=(0.9, 0.98), weight_decay=0.0)
        # what was begun with other settings is not gone on with
        asked_for = sha256(repr(plan if name == "sft" else (plan, self.s.loss)).encode()).hexdigest()[:8]
        found = train_phase(self.run.folder / "checkpoints" / f"{name}-{asked_for}", student, optimizer, steps, loss, rate=plan.rate)
        student.export(self.run.folder / name, tokenizer, steps.lineage)
        return found

    def _evaluate(self, asked: Evaluation, folder: str) -> _Phase:
        """Evaluate a model on transformers, in float32 as it is trained, at temperature 1."""
        plain = evolve(self.s.sampling, temperature=1.0, top_p=1.0, samples_per_prompt=asked.samples_per_prompt)
        source = HFSource.from_folder(
            folder, plain.params(self.seed + EVALUATION_SEEDS), torch.float32, self.s.student.place, rows_per_batch=plain.rows
        )
        found: _Phase = {"held_out": ids_of(self.held_out)}
        if asked.verifier:
            judge, scores = read_verifier(asked.verifier), list[float]()

            def verify(prompt: Prompt, rollout: Rollout) -> float:
                scores.append(judge(prompt, source.tokenizer.decode(rollout.response_ids.tolist(), skip_special_tokens=True)))
                return scores[-1]

            judged = lopd.evaluate(source, self.held_out, verify).avg_at_n
            by_prompt = np.reshape(scores, (len(self.held_out), -1)).mean(axis=1)
            found |= {"score": judged.mean, "score_ci95": judged.ci95, "scores": by_prompt.tolist()}
        if asked.reverse_kl:
            rollouts = source.sample(self.held_out)  # before the teacher takes its share of the memory
            teacher = HFScorer.from_folder(self.s.teacher.model, self.s.teacher.torch_dtype, self.s.teacher.place)
            found["per_prompt"] = _reverse_kl(source, teacher, rollouts, asked.samples_per_prompt)
            for kl in (sums.per_token() for sums in _shared(found["per_prompt"])):
                found |= {"held_out_reverse_kl": kl.mean, "ci95": kl.ci95, "response_tokens": kl.values}
        return found

    def _report(self, phases: list[_Phase]) -> None:
        """Write `metrics.json` and `report.html`."""
        folder, (history,) = self.run.folder, (phase["history"] for phase in phases if phase["name"] == "OPD")
        versions = {"lopd": lopd.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
        shown = [{key: value for key, value in phase.items() if key != "history"} for phase in phases]
        write_json(folder / "metrics.json", {"phases": shown, "history": history, "settings": self.s.flat(), "versions": versions})
        write_page(folder, lopd.ZarrStore.open(self._url("rollouts")), f"Lightning OPD, seed {self.seed}")
