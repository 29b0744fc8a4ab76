"""Every error lopd raises on purpose.

Each class is a `LopdError` and also the standard class it specialises, so both `except LopdError` and `except FileNotFoundError` work.
Messages are one sentence, `<Thing> <id>: <what> is <got>, expected <wanted>; <what to do>.`, and name the first offender only.
Messages may quote a store, a model or a server: what a terminal would not print is spelled out in them.
To add one: subclass `LopdError` and the nearest standard class, take a single message so that it pickles, state what it means and what to do.
"""


def printable(text: str) -> str:
    r"""Return text as a terminal may have it: escape sequences, other controls and marks of direction are spelled out.

    >>> printable("a \x1b[31mred\x1b[0m id")
    'a \\x1b[31mred\\x1b[0m id'
    """
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


class LopdError(Exception):
    """Base of all lopd errors."""

    def __str__(self) -> str:
        """Return the message, printable."""
        return printable(super().__str__())


class LopdWarning(UserWarning):
    """Base of all lopd warnings."""

    def __str__(self) -> str:
        """Return the message, printable."""
        return printable(super().__str__())


class InvalidRecordError(LopdError, ValueError):
    """A prompt, rollout, score or batch that breaks the contract of its type.
    To do: Look at the record or setting that the message names; it states what was found and what is expected.
    """


class ArgumentError(InvalidRecordError, TypeError):
    """An argument of another kind than the call takes.
    To do: Pass what the message asks for; the signature is in the API pages.
    """


class PromptError(LopdError, ValueError):
    """A prompt, or a file of prompts, that cannot be turned into token ids.
    To do: Mend the record of the file that the message names, or pass the argument that it suggests.
    """


class PromptWarning(LopdWarning):
    """Prompts that may not be what their records mean: keys that nothing reads, a template applied twice, today's date.
    To do: Read one rendered prompt as text; pass `verbatim=True`, `date=` or the named key if the doubt is right.
    """


class ContextOverflowError(LopdError, ValueError):
    """A prompt or rollout that does not fit into the model's context.
    To do: Drop what is too long (`max_tokens=`), or use a model with a longer context.
    """


class TokenizerMismatchError(LopdError, ValueError):
    """Two parts of a run that do not share one token-to-id map.
    To do: Use a teacher with the student's tokenizer, or give it the one that the message names if only added tokens differ: they have what their
    rows give, trained or not; lopd does not distil across tokenizers.
    """


class EngineError(LopdError, RuntimeError):
    """A model that was not found, or an engine or a server that failed for a reason of its own, also after it was started or asked again.
    To do: Do what the message proposes; where it names a log, read that.  The same call again goes on after what was committed.
    """


class ModelError(LopdError, TypeError):
    """A model that cannot be sampled, scored or trained here without changing what it computes.
    To do: Do what the message proposes; the page "Models that were tried" lists what each family can do.
    """


class ModelWarning(LopdWarning):
    """A model that computes at random, with an attention that was changed to keep what it computes, without a cache, in a bfloat16 that its card
    lacks, or with rounded logits; or whose export vLLM will not start.
    To do: Make the model compute one function (set dropout to 0), accept that sampling is slow, or do what the message names.
    """


class StoreNotFoundError(LopdError, FileNotFoundError):
    """No store at this path.
    To do: Check the path, and `open_or_create` where a new store is meant.
    """


class StorePathError(LopdError, ValueError):
    """A path where this kind of store cannot live.
    To do: Choose another place, or another kind of store for this one.
    """


class NoSuchRowError(LopdError, IndexError):
    """A row index outside a store.
    To do: Ask for rows from 0 to `len(store) - 1`.
    """


class StoreExistsError(LopdError, FileExistsError):
    """A store (or something else) is already at this path.
    To do: `open` what is there, or choose another path; nothing is overwritten.
    """


class ManifestMismatchError(LopdError, ValueError):
    """A store that holds something else than what the caller is about to use it for, by its manifest.
    To do: Sample into a new store, or make the settings the same as those that the store names.
    """


class ConflictError(LopdError, ValueError):
    """Different content under an id, another model under a column, or another policy under a round, that is already committed.
    To do: Write to another column or store; what is committed is never replaced.
    """


class MissingScoresError(LopdError, LookupError):
    """A score column, or a rollout's entry in it, that is not there.
    To do: Run `score_rollouts` with the column's name, or name a column that is there.
    """


class CorruptStoreError(LopdError, ValueError):
    """Stored bytes that do not match their checksum or hash.
    To do: Restore the named files from a backup; `lopd verify` lists all damage.
    """


class UncheckedDataWarning(LopdWarning):
    """Imported data without checksums, in which damage cannot be noticed; or a store with other contents, beside which a pull puts its own.
    To do: Export again with lopd, or compare some rows with their source; pull into a new store, unless both belong there.
    """


class StoreWriteError(LopdError, OSError):
    """The operating system refused a write: nothing of it was committed, or its durability is in doubt; the message states which.
    To do: Free space or mend permissions, and repeat the call; what was committed before stays.
    """


class TeacherConsistencyError(LopdError, ValueError):
    """The scoring teacher is not, or cannot be shown to be, the teacher whose data trained the reference policy.
    To do: Score with the teacher that wrote the SFT text, or record who wrote it; otherwise `residualise`, and expect less.
    """


class TeacherConsistencyWarning(LopdWarning):
    """The same as `TeacherConsistencyError`, where the caller chose to go on, or before that is decided.
    To do: Nothing, if you meant it; the student's lineage records what was done.
    """


class AdvantageWarning(LopdWarning):
    """A teacher far from what it judges, or many tokens that it finds nearly impossible: training goes wrong on such.
    To do: Take the ratio (`FusedOPDLoss(ratio_to_ref=True)`, `batches(ref=...)`), or do more SFT first.
    """


class TrainingWarning(LopdWarning):
    """A run that trains something else than its author will think: weights that stay as they are, labels that are not read, or other steps.
    To do: Check the optimizer's parameters and the settings that the message names, before you pay for more steps.
    """


class DriftWarning(LopdWarning):
    """A student that has left the policy whose rollouts it trains on.
    To do: Lower the rate, take the ratio, or sample again (`refresh_when`).
    """


class SamplerWarning(LopdWarning):
    """A loss whose gradient takes tokens for draws of the policy itself, though another temperature or top-p drew them.
    To do: Pass `ref="behavior"` and take a loss with the ratio, or sample at temperature 1 and top-p 1.
    """


class SourceError(LopdError, RuntimeError):
    """A source that gives other rollouts than it was asked for.
    To do: Report it to the author of the source; `SourceConformance` finds it before a run does.
    """


class ScorerError(LopdError, RuntimeError):
    """A scorer that does not give the same log-probs twice, or not those of its model.
    To do: Turn off prefix caching and quantisation, check that all replicas are alike, and compare with `Preflight(truth=...)`.
    """


class QuarantineWarning(LopdWarning):
    """Rollouts without scores, which training leaves out, and why.
    To do: Read the reasons (`store.quarantined(column)`); `score_rollouts(retry_quarantined=True)` tries them again.
    """


class RefusedPromptsWarning(LopdWarning):
    """Prompts that could not be sampled and were left out, and why; the next collection tries them again.
    To do: Read the reasons; mend or drop these prompts, and run the collection again.
    """


class ContextWarning(LopdWarning):
    """Responses that the policy's context cut before `max_new_tokens`, or that are too long for the teacher in an evaluation or the student in SFT.
    To do: Sample with a longer context or shorter prompts, or set `max_new_tokens` to what fits beside them.
    """


class RepeatedRolloutsWarning(LopdWarning):
    """A step larger than what there is to train on, so that rollouts repeat within it.
    To do: Sample more, or take fewer `rollouts_per_step`.
    """


class EndTokenWarning(LopdWarning):
    """A teacher that finds the tokens that end the policy's responses next to impossible, or a text of SFT that ends with another token than those
    at which the student stops.
    To do: Let the student stop where its teacher does (`student.stop_at(token)`, or `SamplingParams(stop_ids=...)`), before scores are paid for.
    """


class EngineChangeWarning(LopdWarning):
    """A column that another engine, or another version of the same engine, continues.
    To do: Nothing, if parity is good; otherwise score into a new column with one engine.
    """


class CheckpointError(LopdError, ValueError):
    """A checkpoint that does not fit the student or optimizer it is loaded into.
    To do: Build student, optimizer and steps as they were when it was saved, or begin a new folder.
    """


class TrainingDivergedError(LopdError, ArithmeticError):
    """A loss or gradient norm that is not finite.
    To do: Lower the learning rate, and look at the batch of the step that it names.
    """


class GradientError(LopdError, RuntimeError):
    """A gradient that a fused loss does not have: a second one, or one of its gradient.
    To do: Use `ReferenceOPDLoss`, which has gradients of every order.
    """


class MissingDependencyError(LopdError, ImportError):
    """An optional package that this call needs is not installed, or cannot be imported; or lopd is imported on Windows.
    To do: Install the extra that the message names; on Windows, work in WSL2.
    """


class HubError(LopdError, OSError):
    """A model hub that refuses a request, or cannot be reached.
    To do: Check the name, `hf auth login` and the network; nothing is pushed in part except what the message names.
    """


class ForkedStoreError(LopdError, RuntimeError):
    """A store whose library does not survive a fork, used in a forked process.
    To do: Start workers with the 'spawn' or 'forkserver' method.
    """


class StoreReadError(LopdError, OSError):
    """The storage refused a read, also after retries; what is stored is as it was.
    To do: Check network, credentials and endpoint, and call again; what is stored is as it was.
    """
