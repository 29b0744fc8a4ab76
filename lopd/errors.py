"""Every error lopd raises on purpose.

Each class is a `LopdError` and also the standard class it specialises, so both `except LopdError` and `except FileNotFoundError` work.
Messages are one sentence, `<Thing> <id>: <what> is <got>, expected <wanted>; <what to do>.`, and name the first offender only.
Messages may quote a store, a model or a server: what a terminal would not print is spelled out in them.
To add one: subclass `LopdError` and the nearest standard class, and take a single message argument so that it pickles.
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
        """The message, printable."""
        return printable(super().__str__())


class LopdWarning(UserWarning):
    """Base of all lopd warnings."""

    def __str__(self) -> str:
        """The message, printable."""
        return printable(super().__str__())


class InvalidRecordError(LopdError, ValueError):
    """A prompt, rollout, score or batch that breaks the contract of its type."""


class ArgumentError(InvalidRecordError, TypeError):
    """An argument of another kind than the call takes."""


class PromptError(LopdError, ValueError):
    """A prompt, or a file of prompts, that cannot be turned into token ids."""


class PromptWarning(LopdWarning):
    """Prompts that may not be what their records mean: keys that nothing reads, a template applied twice, today's date."""


class ContextOverflowError(LopdError, ValueError):
    """A prompt or rollout that does not fit into the model's context."""


class TokenizerMismatchError(LopdError, ValueError):
    """Two parts of a run that do not share one token-to-id map."""


class EngineError(LopdError, RuntimeError):
    """An engine or a server that failed for a reason of its own, also after it was started anew or asked again."""


class ModelError(LopdError, TypeError):
    """A model that cannot be sampled, scored or trained here without changing what it computes."""


class ModelWarning(LopdWarning):
    """A model that computes at random, with an attention that was changed to keep what it computes, or without a cache."""


class StoreNotFoundError(LopdError, FileNotFoundError):
    """No store at this path."""


class StorePathError(LopdError, ValueError):
    """A path where this kind of store cannot live."""


class NoSuchRowError(LopdError, IndexError):
    """A row index outside a store."""


class StoreExistsError(LopdError, FileExistsError):
    """A store (or something else) is already at this path."""


class ManifestMismatchError(LopdError, ValueError):
    """A store that says it holds something else than what the caller is about to use it for."""


class ConflictError(LopdError, ValueError):
    """Different content under an id, or another model under a column, that is already committed."""


class MissingScoresError(LopdError, LookupError):
    """A score column, or a rollout's entry in it, that is not there."""


class CorruptStoreError(LopdError, ValueError):
    """Stored bytes that do not match their checksum or hash."""


class UncheckedDataWarning(LopdWarning):
    """Imported data without checksums, in which damage cannot be noticed."""


class StoreWriteError(LopdError, OSError):
    """The operating system refused a write: nothing of it was committed, or its durability is in doubt; the message says which."""


class TeacherConsistencyError(LopdError, ValueError):
    """The scoring teacher is not, or cannot be shown to be, the teacher whose data trained the reference policy."""


class TeacherConsistencyWarning(LopdWarning):
    """What `TeacherConsistencyError` says, when the caller chose to go on."""


class AdvantageWarning(LopdWarning):
    """A teacher far from what it judges, or many tokens that it finds nearly impossible: training goes wrong on such."""


class TrainingWarning(LopdWarning):
    """A run that trains something else than its author will think: weights that stay where they are, or other steps than before."""


class DriftWarning(LopdWarning):
    """A student that has left the policy whose rollouts it trains on."""


class SamplerWarning(LopdWarning):
    """A loss whose gradient takes tokens for draws of the policy itself, though another temperature or top-p drew them."""


class SourceError(LopdError, RuntimeError):
    """A source that gives other rollouts than it was asked for."""


class ScorerError(LopdError, RuntimeError):
    """A scorer that does not give the same log-probs twice, or not those of the model that it says it is."""


class QuarantineWarning(LopdWarning):
    """Rollouts without scores, which training leaves out, and why."""


class RefusedPromptsWarning(LopdWarning):
    """Prompts that could not be sampled and were left out, and why; the next collection tries them again."""


class RepeatedRolloutsWarning(LopdWarning):
    """A step larger than what there is to train on, so that rollouts repeat within it."""


class EndTokenWarning(LopdWarning):
    """A teacher that finds the tokens that end the policy's responses next to impossible."""


class EngineChangeWarning(LopdWarning):
    """A column that another engine, or another version of the same engine, continues."""


class CheckpointError(LopdError, ValueError):
    """A checkpoint that does not fit the student or optimizer it is loaded into."""


class TrainingDivergedError(LopdError, ArithmeticError):
    """A loss or gradient norm that is not finite."""


class GradientError(LopdError, RuntimeError):
    """A gradient that a fused loss does not have: a second one, or one of its gradient."""


class MissingDependencyError(LopdError, ImportError):
    """An optional package that this call needs is not installed."""


class HubError(LopdError, OSError):
    """A model hub that refuses a request, or cannot be reached."""


class ForkedStoreError(LopdError, RuntimeError):
    """A store whose library does not survive a fork, used in a forked process."""


class StoreReadError(LopdError, OSError):
    """The storage refused a read, also after retries; what is stored is as it was."""
