"""Conversations of a policy with tools and users, as an agent framework recorded them, into a store."""

import os
from collections.abc import Iterable, Mapping, Sequence
from datetime import date as Date  # noqa: N812 -- `date` is an argument here
from pathlib import Path
from typing import Any

from lopd.backends.memory_store import MemoryStore
from lopd.protocols import LogprobStore
from lopd.records.checks import check_kind
from lopd.records.identity import UNKNOWN, ModelId, fingerprint_tokenizer
from lopd.records.lineage import Lineage
from lopd.records.manifest import Manifest, SamplingParams
from lopd.records.optional import need
from lopd.records.rendering import Rendering
from lopd.records.trajectories import Choice, Recorded, Turns, make_trajectories
from lopd.tools.interop.filling import StoreMaker, check_maker, fill, records_of


def import_trajectories(
    trajectories: str | os.PathLike[str] | Iterable[Any],
    tokenizer: Any,
    *,
    policy: str | Path | ModelId,
    sampling: SamplingParams,
    lineage: Lineage | None = None,
    store: StoreMaker = MemoryStore,
    turns: Turns = "together",
    logprobs: Recorded | None = None,
    tools: Sequence[Any] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    date: Date | None = None,
) -> LogprobStore:
    """Import multi-turn and tool-using conversations into a store, as rollouts of the policy: what it drew counts, what others wrote does not.

    A record has token ids as an agent framework recorded them, or messages; `docs/howto/trajectories.md` has the keys of verl, verifiers,
    prime-rl and agent-lightning.  Recorded ids stay as they are, and are compared with the text beside them.  Messages are rendered turn by turn:
    a turn reads what the chat template makes of all before it, and its answer is tokenised as a policy would draw it.  Tokens of tools and users
    between turns are in the response with `loss_mask` False: teachers score them, and no loss reads them.

    Turns make one rollout only where each reads the turns before it as they were drawn.  A history that was rewritten is refused by name.

    Like `import_text`: the same call again adds nothing, and nothing is committed unless all records are right.  "id", "finish_reason", "tools" and
    "chat_template_kwargs" of a record are read; without an id it is named after its first prompt, and its rollouts are samples of that.

    Args:
        trajectories: a file with one record per line (`.jsonl`) or row (`.parquet`), as in `read_prompts`; or records in memory.
        tokenizer: the policy's tokenizer.
        policy: who drew: a folder or a hub name, whose weights are read for their identity, or a `ModelId`.
        sampling: how it drew; a cut to the top k or by a least probability has no place there, and such log-probs are of another distribution.
        lineage: what the policy was trained on; None is the lineage in its folder, and nothing for a `ModelId`.
        store: makes the store, for example `lambda manifest: ZarrStore.open_or_create("run.zarr", manifest)`.
        turns: "together" for one rollout of all turns; "each" for a rollout each, whose prompt is all before it; or the numbers of some (from 0,
            or from the end as -1), each a rollout too (prefix replay).
        logprobs: what recorded log-probs are of, where temperature or top-p is not 1: "sampler" for the distribution that drew, "behavior" for
            the policy's own.
        tools: for records of messages without tools.
        chat_template_kwargs: variables of the chat template, for messages.
        date: what the chat template reads as today, for messages.

    Raises:
        PromptError: a record cannot be read, its parts or turns do not fit together, or its text is not that of its ids; it names the record.
        InvalidRecordError: something is not a token id of the vocabulary, a mask or a log-prob; or `turns` or `logprobs` makes no sense.
        ArgumentError: the tokenizer, the sampling, the lineage or the store is something else.
        EngineError: there is no such policy.
        ModelError: the policy cannot be identified.
        ManifestMismatchError: the store is of another policy, sampling or tokenizer.
        ConflictError: the store has another rollout under an id, or the same with other log-probs, without them, or with another end.
    """
    of = fingerprint_tokenizer(tokenizer)
    check_kind("Trajectories: sampling", sampling, SamplingParams, "make it: `SamplingParams(...)`")
    check_maker("Trajectories", store)
    choice = Choice(turns, sampling, logprobs)
    called, records = records_of("Trajectory", trajectories)
    rendering = Rendering(called[0], tokenizer, verbatim=False, tools=tools, variables=chat_template_kwargs, day=date)
    drew = Lineage.of(policy).sft_teacher or UNKNOWN
    rollouts = make_trajectories(called, records, rendering, choice)
    rendering.warn()
    return fill(store, Manifest(of, drew, sampling, _trained(policy, lineage).sft_teacher), rollouts)


def _trained(policy: str | Path | ModelId, lineage: Lineage | None) -> Lineage:
    """Return what the policy was trained on, as it was passed or as its folder records."""
    if lineage is not None:
        check_kind("Trajectories: lineage", lineage, Lineage, "pass `Lineage(sft_teacher=...)`, or leave it out")
        return lineage
    if isinstance(policy, ModelId):
        return Lineage()
    return Lineage.read(need("lopd.engines.finding", "import_trajectories").local_folder(policy, weights=False))
