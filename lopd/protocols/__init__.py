"""The five nouns.  Structural: implement the methods, inherit nothing; `lopd.testing` has suites that check an implementation.

Each docstring states the contract that the *weakest* implementation must keep.  Nothing here has a default or a body.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import Parameter

from lopd.protocols.stated import StatesBaseline as StatesBaseline
from lopd.protocols.stated import StatesCorrection as StatesCorrection
from lopd.protocols.stated import StatesEnds as StatesEnds
from lopd.protocols.stated import StatesLabels as StatesLabels
from lopd.protocols.stated import StatesName as StatesName
from lopd.protocols.stated import StatesRatio as StatesRatio
from lopd.records.identity import ModelId, TokenizerId
from lopd.records.manifest import Commit, Manifest, Provenance
from lopd.records.rollouts import Prompt, Rollout, Scores
from lopd.records.rows import Rows
from lopd.records.steps import Batch, LMHead, LossOutput

#: What a number of tokens counts: those of responses, or all that a model reads, prompts included.
Counted = Literal["response tokens", "read tokens"]


class RolloutSource(Protocol):
    """Something that answers prompts: an engine with a policy in it."""

    @property
    def manifest(self) -> Manifest:
        """The manifest of a store of these rollouts: policy, tokenizer, sampling, generation, SFT teacher."""
        ...

    def sample(self, prompts: Sequence[Prompt], /) -> Sequence[Rollout]:
        """Return `samples_per_prompt` rollouts for each prompt, in the order of the prompts.

        Ids are `rollout_id(prompt, sample, generation)`, and each rollout has the very tokens of its prompt, and the generation.  The same call on
        the same prompts gives the same rollouts, so an interrupted collection can be repeated.  No prompts give no rollouts.  Where
        `manifest.sampling` is not `neutral`, rollouts have `sampler_logprobs` if the engine can report them; elsewhere None.  Where it has
        `candidates` or `drawn`, rollouts have `behavior_logprobs` and `candidates`: first the policy's most likely tokens at temperature 1, whatever
        was sampled, then drawn ones.  A source that cannot keep them raises InvalidRecordError when it is made.

        Raises:
            ContextOverflowError: a prompt leaves no room for a response; it names the prompt, and nothing is sampled.
            InvalidRecordError: an id is outside the model's vocabulary; it names the prompt, and nothing is sampled.
            EngineError: the engine failed for a reason of its own.
        """
        ...


class TeacherScorer(Protocol):
    """Something that computes one model's log-probs of the tokens of rollouts.  The reference policy is scored through it too."""

    @property
    def provenance(self) -> Provenance:
        """Whose log-probs these are."""
        ...

    def score(self, rollouts: Sequence[Rollout], /) -> Sequence[Scores]:
        """Return scores, the i-th with (T_i,) log-probs, nats, of the i-th rollout's response tokens; independent of what else is in the call.

        Where `provenance.top_k` is more than 0, it has a support: the first `provenance.candidates` ids of the rollout's candidates, the model's own
        most likely tokens outside of these, and the last `provenance.drawn` ids of the candidates, in their order.

        Raises:
            ContextOverflowError: a rollout is longer than the model's context; it names the rollout, and nothing is computed.
            InvalidRecordError: an id is outside the model's vocabulary, a rollout lacks candidates, or the model gave something that is not a
                log-prob.
            EngineError: the engine failed for a reason of its own.

        The first two name one rollout: the verb then asks in halves, and goes on without the rollouts that are refused alone.  Raise another
        for what is wrong with the call as a whole.
        """
        ...


class LogprobReader(Protocol):
    """The half of a store that training needs.

    The columns `behavior` and `behavior/sampler` are virtual: they read the rollouts' own `behavior_logprobs` and `sampler_logprobs`.
    `columns` does not list them, and they cannot be written to.

    It may be asked from another thread than the one that made it, one call at a time: where a process uses a GPU, `batches` reads ahead in threads.
    """

    @property
    def manifest(self) -> Manifest:
        """What all rollouts have in common."""
        ...

    @property
    def columns(self) -> Mapping[str, Provenance]:
        """Score columns and who computed them."""
        ...

    def __len__(self) -> int:
        """Return the number of committed rollouts."""
        ...

    @property
    def generations(self) -> Mapping[int, ModelId]:
        """Rounds of sampling, and the policy that sampled in each; the first is that of the manifest."""
        ...

    def find(self, rollout_ids: Sequence[str], /) -> NDArray[np.int64]:
        """Return (len(rollout_ids),): the row of each committed rollout, -1 where there is none."""
        ...

    def lengths(self) -> NDArray[np.int64]:
        """Return (len, 2): prompt and response tokens of each rollout."""
        ...

    def scored(self, column: str, /) -> NDArray[np.bool_]:
        """Return (len,): which rollouts have scores in this column; all False for a column that is not there."""
        ...

    def quarantined(self, column: str, /) -> Mapping[int, str]:
        """Return rows that the column's model could not score, and why; a row that has scores is not among them."""
        ...

    def read(self, indices: Sequence[int], /, columns: Sequence[str] = (), top_k: Sequence[str] = ()) -> Rows:
        """Return these rollouts end to end, with these columns and the top-k support of these, in the order asked; an index may repeat.

        Everything is verified before it is given.  A store that keeps records makes them columns with `Rows.of`.
        Names of columns may come from a generator, which gives them once.
        Those of lopd refuse a mask of rows, which would be taken for row numbers, and one text in place of several.

        Raises:
            MissingScoresError: a rollout has no scores in a column, or a column has no top-k support.
            CorruptStoreError: stored bytes do not match their checksum, or scores were computed on other tokens.
            NoSuchRowError: there is no such row.
        """
        ...


class LogprobWriter(Protocol):
    """The half of a store that collecting and scoring need.  Each call is all or nothing, durable on return, and safe to repeat.

    After a call the store's own reader sees everything that is committed by then, by whomever.
    """

    def begin_generation(self, generation: int, policy: ModelId, /) -> None:
        """Say which policy samples in another round; rollouts of it can be appended from then on.

        Raises:
            ConflictError: another policy sampled in this round.
            InvalidRecordError: it is not the number of a round, an int of at least 0 and below 2**50.
            StoreWriteError: the write failed; nothing was committed.
        """
        ...

    def append(self, rollouts: Sequence[Rollout], /) -> None:
        """Add rollouts.  Those that are already there, with the same content, are skipped.

        Content is token ids and loss mask.  A rollout that is appended again keeps the `behavior_logprobs`, the `sampler_logprobs` and the
        `finish_reason` that came first: a repeated request may round log-probs otherwise.  A call without rollouts asks whether it may write.

        Raises:
            ConflictError: other content under an id that is there, or twice in the call.
            InvalidRecordError: a token id is outside the manifest's vocabulary, or the generation was not begun.
            StoreWriteError: the write failed; nothing was committed.
        """
        ...

    def append_scores(self, column: str, provenance: Provenance, scores: Sequence[Scores], /) -> None:
        """Add one model's scores.  Rows already scored by the same model are skipped.

        No scores commit nothing, and do not begin a column; a column of another model is refused all the same, so a call without scores asks whose
        column it is before anything is paid for.

        Raises:
            ConflictError: the column belongs to another model, or the scores were computed on other tokens.
            MissingScoresError: no such rollout.
            InvalidRecordError: not one log-prob per response token, not the top-k that the provenance names, or a column name other
                than letters, digits, `_`, `-`, `.`.
            StoreWriteError: the write failed; nothing was committed.
        """
        ...

    def quarantine(self, column: str, provenance: Provenance, reasons: Mapping[str, str], /) -> None:
        """Say which rollouts this model cannot score, and why.  Rows that have scores are skipped; the latest reason counts.

        Raises:
            ConflictError: the column belongs to another model.
            MissingScoresError: no such rollout.
            InvalidRecordError: a column name as in `append_scores`.
            StoreWriteError: the write failed; nothing was committed.
        """
        ...


class LogprobStore(LogprobReader, LogprobWriter, Protocol):
    """Rollouts, and one column of scores per model that has read them."""


class DurableStore(LogprobStore, Protocol):
    """A store that outlives the process: what looking after one needs."""

    def refresh(self) -> None:
        """See what was committed since this store was opened, last refreshed or last written to."""
        ...

    def compact(self) -> None:
        """Merge many small appends into large ones; rows keep their numbers, and readers that are open read on.  Refreshes."""
        ...

    def history(self) -> Sequence[Commit]:
        """Return what was committed, oldest first."""
        ...

    def stored_bytes(self) -> int:
        """Return bytes of all files that the current state is made of."""
        ...

    def verify(self) -> Iterator[str]:
        """Return one sentence for each problem found in the stored bytes; reads all of them.  Nothing for a sound store.

        Raises:
            StoreReadError: the storage refused a read, which shows nothing about the store.
        """
        ...


class OPDLoss(Protocol):
    """A loss on a packed batch.  It takes hidden states and not logits, so that the plain and the fused paths are one protocol."""

    def __call__(self, hidden_ND: Tensor, head: LMHead, batch: Batch, /) -> LossOutput:
        """Return weighted sums over the batch's tokens; never a mean, the loop divides once."""
        ...


class Student(Protocol):
    """The model being trained, cut below its head.  One call per micro-batch, so hooks of wrappers (DDP, FSDP) fire.

    A batch is several rollouts end to end: `segment_ids` and `position_ids` say where one begins, and none may see another.
    """

    @property
    def tokenizer(self) -> TokenizerId:
        """Whose ids it reads; `opd_steps` refuses steps of another."""
        ...

    def __call__(self, batch: Batch, loss: OPDLoss, /) -> LossOutput:
        """Return `loss` of this batch under the current weights; moves the batch to where it computes (`Batch.to`)."""
        ...

    def named_parameters(self) -> Iterable[tuple[str, Parameter]]:
        """Return all parameters; those that require a gradient are trained and go into checkpoints."""
        ...


class Verifier(Protocol):
    """A judge of a response."""

    def __call__(self, prompt: Prompt, rollout: Rollout, /) -> float:
        """Return a score in [0, 1]; 1 is right."""
        ...


class Labeller(Protocol):
    """What `label_rollouts` takes: a `Verifier`, or the same for tokens."""

    def __call__(self, prompt: Prompt, rollout: Rollout, /) -> float | NDArray[Any] | Sequence[float]:
        """Return a finite number for the rollout, or (T,) of them, one for each response token."""
        ...


class Progress(Protocol):
    """Shows how far a verb has come; `lopd.tools.console.RichProgress` draws it.

    Tokens are those that `counted` names: sampling counts response tokens, and what reads rollouts counts the tokens of their prompts as well.
    """

    def begin(self, what: str, total: int, done: int, tokens: int | None, counted: Counted, /) -> None:
        """Show that work starts: `done` of `total` rollouts were there already, and the others have `tokens` tokens, if that is known."""
        ...

    def advance(self, rollouts: int, tokens: int, refused: int, /) -> None:
        """Show that so many more rollouts, with so many tokens, are committed, and so many more were refused."""
        ...

    def end(self) -> None:
        """Show that work is over, or was interrupted."""
        ...
