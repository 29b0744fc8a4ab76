"""What `lopd run` looks at before anything is done: whether a run can end well, and whether it goes on with what is there."""

import math
import runpy
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import date, datetime
from pathlib import Path
from typing import Any

import lopd
from lopd.engines.causal_lm import rope_borders, stated_context
from lopd.engines.finding import described, local_folder
from lopd.engines.inputs import check_prompts
from lopd.engines.supports import provenance_of
from lopd.errors import (
    ConflictError,
    ContextOverflowError,
    EngineError,
    InvalidRecordError,
    PromptWarning,
    RefusedPromptsWarning,
    SamplerWarning,
    TeacherConsistencyError,
    TrainingWarning,
)
from lopd.guards.consistency import check_teacher_consistency, check_vocabulary
from lopd.guards.watch import bias_of
from lopd.protocols.doors import check_prompt_list
from lopd.records import Prompt, SamplingParams, TokenizerId, fingerprint_tokenizer
from lopd.records.chat_template import asks_for_the_day
from lopd.records.paths import asked, local_path, path_or_url, said_without_secrets, without_secrets
from lopd.records.warn import warn_user
from lopd.tools.claims import read_kept
from lopd.tools.command.models import Model
from lopd.tools.command.settings import RunSettings, decisive
from lopd.tools.phases import Run, digest, write_json

_MEASURED = "evaluation-before-opd.json"
#: Key of the file, or section and dot -> the file in `phases` that is there once it was used; one that ends with `*` cannot be removed to do its
#: phase again, as a store keeps what was made of it.
_FIXED_BY = {
    "prompts": "*.attempts",
    "prompts.": "*.attempts",
    "text": "*.attempts",
    "text.": "*.attempts",
    "sft.": "sft.json*",
    "evaluation.reverse_kl": _MEASURED,
    "evaluation.verifier": _MEASURED,
    "evaluation.samples_per_prompt": _MEASURED,
    "loss.top_k": "scores.json*",
    "loss.": "opd.json",
    "opd.": "opd.json",
    "consistency": "opd.json",
}


def prepare(s: RunSettings) -> tuple[list[Prompt], set[str]]:
    """Refuse a run that cannot end well, take its folder, and return the prompts, and the ids of those that do not fit.

    Warns:
        PromptWarning: some have the tokens of another.
        RefusedPromptsWarning: there are some that do not fit, see `_unfit`.
        SamplerWarning: the loss would have a biased gradient.
        TrainingWarning: a rollout may be too long for a micro-batch.

    Raises:
        ConflictError: `out` holds a run of other settings, or files that no run wrote, or what it reads has changed.
        StoreWriteError: `out` cannot be written to.
        TokenizerMismatchError: student and teacher do not share a vocabulary.
        TeacherConsistencyError: the teacher is not known to have written the text of SFT.
        InvalidRecordError: there are too few prompts, two have one id, a file that is named is not there, or the verifier cannot judge an empty text.
    """
    tokenizer = s.student.tokenizer()
    ours = fingerprint_tokenizer(tokenizer)
    check_vocabulary(f"Teacher {s.teacher.model!r}", fingerprint_tokenizer(s.teacher.tokenizer()), "the student's", ours)
    _check_writer(s, ours)
    sampling = s.sampling.params(0)
    if not sampling.neutral and s.loss.kind == "opd" and not s.loss.ratio:
        warn_user(f"Run: loss.ratio is false, and sampling has {bias_of(sampling)}; set it to true.", SamplerWarning)
    day = day_of(s, tokenizer)
    if isinstance(given := s.prompts, list):
        prompts = lopd.make_prompts(given, tokenizer, date=day)
    else:
        variables = given.chat_template_kwargs
        prompts = lopd.read_prompts(
            given.file, tokenizer, field=given.field, template=given.template, chat_template_kwargs=variables, date=day
        )
    check_prompt_list(prompts, unique=True)
    if copies := len(prompts) - len({prompt.token_ids.tobytes() for prompt in prompts}):
        warn_user(
            f"Run: {copies} of {len(prompts)} prompts have the tokens of another, and are sampled beside it, or left out where it is held out; drop "
            "them, and for more samples of each raise sampling.samples_per_prompt.",
            PromptWarning,
        )
    unfit = _unfit(s, prompts, ours)
    fit = len({prompt.token_ids.tobytes() for prompt in prompts if prompt.prompt_id not in unfit})
    if s.evaluation and fit <= s.evaluation.held_out:
        which = " that fit" * bool(unfit) + " of other tokens each" * bool(copies)
        raise InvalidRecordError(f"Prompts: there are {fit}{which}, expected more than evaluation.held_out; hold out fewer.")
    _check_batches(s, [prompt.token_ids.size for prompt in prompts if prompt.prompt_id not in unfit])
    read = _inputs(s)
    if s.evaluation and s.evaluation.verifier:
        read_verifier(s.evaluation.verifier)(prompts[0], "")
    Run(Path(s.out)).claim(s.flat(), read, fixed_by, decisive)
    if day is not None:
        write_json(_day_in(s), day.isoformat())
    return prompts, {*unfit}


def day_of(s: RunSettings, tokenizer: Any) -> date | None:
    """Return what the chat template reads as today: the day on which the run was begun.  None where it does not ask."""
    if not asks_for_the_day(tokenizer):
        return None
    kept = read_kept(_day_in(s), str)
    return datetime.now().date() if kept is None else date.fromisoformat(kept)


def _day_in(s: RunSettings) -> Path:
    return Path(s.out) / "day.json"


def _unfit(s: RunSettings, prompts: list[Prompt], ours: TokenizerId) -> dict[str, str]:
    """Return why prompts leave no room for a response in the context of student or teacher, by id."""
    found = dict[str, str]()
    for model in (s.student, s.teacher):
        config = _described(model)
        # vLLM has one side of a border; an evaluation runs on transformers
        borders = rope_borders(config) if model is s.student and (s.evaluation or model.engine == "hf") else ()
        for prompt in prompts:
            try:
                check_prompts([prompt], ours, model.context or stated_context(config), borders, s.sampling.max_new_tokens)
            except ContextOverflowError as error:
                found.setdefault(prompt.prompt_id, str(error))
    if found:
        first, reason = next(iter(found.items()))
        warn_user(
            f"Run: {len(found)} of {len(prompts)} prompts do not fit, so they are not held out, and a phase that cannot take them leaves them out; "
            f"the first is {first!r} ({reason})",
            RefusedPromptsWarning,
        )
    return found


def _check_batches(s: RunSettings, sizes: list[int]) -> None:
    """Warn of micro-batches that cannot hold the longest rollout that prompts of these sizes may get; `batches` refuses one when all is paid for.

    Where all seeds have begun to draw them, their true lengths decide.
    """
    readable = stated_context(_described(s.student))
    student, teacher = s.student.context or readable, s.teacher.context or stated_context(_described(s.teacher))
    drawn = (("sft", None if s.text else s.sft, "sft-text", min(teacher, readable + 1)), ("opd", s.opd, "rollouts", min(teacher, student)))
    for section, plan, phase, most in drawn:
        positions = min(max(sizes, default=0) + s.sampling.max_new_tokens, most) - 1  # the last token is not read
        begun = (read_kept(Path(s.out) / f"seed-{seed}/phases/{phase}.attempts", int) for seed in s.seeds)
        if plan and plan.tokens_per_batch < positions and not all(begun):
            warn_user(
                f"Run: {section}.tokens_per_batch is {plan.tokens_per_batch}, and a rollout may have {positions} positions; one of more would end "
                "the run after sampling, so raise it, or lower sampling.max_new_tokens.",
                TrainingWarning,
            )


def _described(model: Model) -> Any:
    """Return the configuration of a model about text; None of adapters, and where there is a tokenizer alone, as a server has the rest."""
    with suppress(EngineError):
        return described(local_folder(model.model, weights=False)).get_text_config()
    return None


def _check_writer(s: RunSettings, ours: TokenizerId) -> None:
    """Refuse another SFT teacher, or an unknown one, before anything is paid for; `batches` would refuse it in the end."""
    writer = s.text.written_by if s.text else "teacher"
    if s.consistency == "error" and not (s.sft and writer == "teacher"):
        folder = local_folder(s.student.model, weights=False)
        known = lopd.Lineage.read(folder) if not s.sft else lopd.Lineage() if writer == "unknown" else lopd.Lineage.of(writer)
        policy = lopd.Manifest(ours, s.student.identity(), SamplingParams(), known.sft_teacher)
        try:
            check_teacher_consistency(policy, [provenance_of(s.teacher.identity(), ours, "", top_k=0, candidates=0, drawn=0)])
        except TeacherConsistencyError as error:
            wrong, _, remedy = str(error).partition("; ")
            if known.sft_teacher is None:
                remedy = "add `sft`, or write `Lineage.of(TEACHER).write(FOLDER)` for a student in a folder that was fine-tuned on its text"
            if writer == "unknown":
                remedy = "state who wrote it in `text.written_by`, or leave out `text`"
            remedy = remedy.partition(", or train ")[0]  # what only a program can do
            raise type(error)(f"{wrong}; {remedy}, or set `consistency: warn`.") from None


def fixed_by(name: str) -> str:
    """Return the file in `phases` that is there once a setting, or a file that it names, was used: stores notice all but other prompts."""
    key = name.split(",", 1)[0]
    section, dot, _ = key.partition(".")
    return _FIXED_BY.get(key) or _FIXED_BY.get(section + dot, "*.json")


def _inputs(s: RunSettings) -> dict[str, str]:
    """Return digests of what a run reads: it may change under its name.  What a hub sends is the hub's to name."""
    models = {f"{role}.model": model.model for role, model in (("student", s.student), ("teacher", s.teacher)) if model.folder.is_dir()}
    verifier = (s.evaluation and s.evaluation.verifier) or ""
    files = {"prompts.file": "" if isinstance(s.prompts, list) else s.prompts.file, "text.file": s.text.file if s.text else ""}
    named = {**models, **files, "evaluation.verifier": verifier.rpartition(":")[0]}
    return {f"{key}, the content of {without_secrets(path)}": _digest(key, path) for key, path in named.items() if path}


def _digest(key: str, path: str) -> str:
    try:
        return asked(path, lambda: digest(path_or_url(f"Run: {key}", path)))
    except OSError as error:
        raise InvalidRecordError(f"Run: {key} is {without_secrets(path)}, which cannot be read ({error}); correct it.") from None


def check_held_out(phases: Path, ids: list[str], usual: list[str]) -> None:
    """Refuse a run whose evaluation after OPD would have other prompts than that before OPD, with which it is compared by prompt.

    Args:
        phases: folder of the rows of a seed.
        ids: those of what is held out now.
        usual: those of what was held out where an evaluation did not keep them.

    Raises:
        ConflictError: they are others.
    """
    kept = read_kept(phases / _MEASURED, Mapping[str, Any], "remove it, to do its phase again")
    if kept is not None and kept.get("held_out", usual) != ids:
        raise ConflictError(
            f"File {phases / _MEASURED}: other prompts were held out when it was written than are now, and the evaluation after OPD is compared "
            "with it prompt by prompt; remove it, to do its phase and those after it again, or choose another folder."
        )


def read_verifier(place: str) -> Callable[[Prompt, str], float]:
    """Return the verifier, which ends a run in one sentence where it fails."""
    file, _, name = place.rpartition(":")
    path = local_path("Run: evaluation.verifier", file)
    if (folder := str(path.resolve().parent)) not in sys.path:
        sys.path.insert(0, folder)  # where a program looks first; it stays, as functions may import when they are called
    try:
        names = runpy.run_path(str(path))
    except (Exception, SystemExit) as error:  # whatever a file does that is run as a program
        raise InvalidRecordError(
            f"Run: evaluation.verifier is {place}, and the file cannot be run ({said_without_secrets(repr(error)):.200}); correct it."
        ) from error
    if name not in names:
        raise InvalidRecordError(f"Run: evaluation.verifier is {place}, and there is no such function; correct it.")
    function = names[name]

    def verify(prompt: Prompt, text: str) -> float:
        score, cause = math.nan, None
        try:
            score = float(function(prompt, text))
            said = f"it gave {score:g}"
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # some timeouts, and `sys.exit` of a program, are not an Exception
            said, cause = f"it raised {said_without_secrets(repr(error)):.200}", error
        if not 0 <= score <= 1:
            raise InvalidRecordError(
                f"Verifier {place}: {said} for prompt {prompt.prompt_id!r} and the text {text!r:.40}; it takes a prompt and the text of a response, "
                "which may be empty, and gives a number from 0 to 1."
            ) from cause
        return score

    return verify
