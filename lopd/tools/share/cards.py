"""The README.md of a student, and that of a store: what is recorded is looked up, and what only their owner knows comes from `About`."""

import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from attrs import field, frozen

from lopd.engines.identity import folder_model_id
from lopd.errors import ArgumentError, EngineError, InvalidRecordError, ManifestMismatchError, ModelError, printable
from lopd.guards.consistency import lineage_after
from lopd.protocols import LogprobReader
from lopd.protocols.doors import check_noun
from lopd.records.checks import a_kind, texts_of
from lopd.records.estimates import Estimate
from lopd.records.identity import UNKNOWN, mixture_id
from lopd.records.lineage import Lineage
from lopd.records.optional import need
from lopd.records.paths import local_path, names_path
from lopd.tools.facts import describe_model, judged_columns, origins, trained_on

ADAPTERS = "adapter_config.json"
#: The file of a store that was pushed.
ROLLOUTS = "rollouts.parquet"
_PAPER = "[Lightning OPD](https://arxiv.org/abs/2604.13010)"
_TAGS = ["lopd", "on-policy-distillation", "knowledge-distillation"]
_SHOWN = ("column", "model", "engine", "log-probs", "top-k", "rollouts scored", "as teacher")
#: What is before the name in a path that begins at a root, at home or at a folder of dots; a name of a hub and a revision begin otherwise.
#: A folder's name may have spaces, and ends where another path begins behind one.
#: The last line is a row of beginnings that lead to no name, which is kept: at each of them the same text would be read again.
_FOLDERS = re.compile(
    r"(?<![\w.:/])(?:(?:file:/+|[A-Za-z]:[/\\]+|~[^\s/\\@:]*[/\\]|\.{1,2}[/\\]|[/\\]+(?=[^\s/\\@:]+[/\\]))"
    r"(?:[^\s/\\@:,;](?:(?!\s(?:~[^\s/\\@:]*|\.{1,2})?[/\\])[^/\\@:,;])*[/\\]+)*(?=[^\s/\\])"
    r"|([/\\]+|~(?:[^\s/\\@:]*~)?))"
)
#: What would be markup in a table; an underscore within a name stays as it is.
_MARKUP = str.maketrans({"<": "&lt;", **{mark: f"\\{mark}" for mark in "\\|[]`*"}})
#: What a card states of its rollouts, by what the lineage records of them.
_ON = {
    True: "Its lineage records these rollouts.\n",
    None: "Its lineage does not record on which rollouts it was trained; these are of the same teachers.\n",
}
#: What a student is that learnt from no teacher's log-probs, by how it was made.
_UNTAUGHT = {
    "SFT": "A language model that was fine-tuned on the text of a teacher, before on-policy distillation.",
    "training on labels": "A language model that learnt from labels of rollouts of its own, and from no teacher's log-probs.",
    "SFT, or training on labels": "A language model that was trained on rollouts, and on no teacher's log-probs.",
}
_Cells = Sequence[Sequence[str]]


def _hub_names(names: str | Sequence[str]) -> list[str]:
    return texts_of("About: datasets", [names] if isinstance(names, str) else names)


@frozen
class About:
    """What no file records of a student or a store, for its card.

    Args:
        licence: its identifier at the hub, for example "apache-2.0"; "other" needs the next two; None if none is stated.
        licence_name: name of another licence.
        licence_link: URL of its text.
        base_model: name in the hub of the model that the student was made from.
        datasets: names in the hub of what the prompts are from.
        language: code of the language, for example "en".
        training: name and value of settings that readers should know, for example `{"steps": 150}`.
        metrics: dataset -> metric -> what was measured, for example `{"openai/gsm8k": {"avg@8": evaluation.avg_at_n}}`.
        notes: more text in Markdown, for example what the student is for, and what it cannot do.

    Raises:
        InvalidRecordError: the licence is "other" without name and link, or a model or dataset is a path of this machine.
        ArgumentError: a metric is not an `Estimate`.
    """

    licence: str | None = None
    licence_name: str | None = None
    licence_link: str | None = None
    base_model: str | None = None
    datasets: Sequence[str] = field(default=(), converter=_hub_names)
    language: str | None = None
    training: Mapping[str, Any] = field(factory=dict)
    metrics: Mapping[str, Mapping[str, Estimate]] = field(factory=dict)
    notes: str = ""

    def __attrs_post_init__(self) -> None:
        for name in (*self.datasets, *([self.base_model] if self.base_model else ())):
            if names_path(name):
                raise InvalidRecordError(f"About: {name!r} is a path, expected a name in the hub; push that first, and pass its name.")
        if self.licence == "other" and not (self.licence_name and self.licence_link):
            raise InvalidRecordError("About: the licence is 'other', without its name or link; pass `licence_name=` and `licence_link=`.")
        for dataset, metric, value in self.results():
            if not isinstance(value, Estimate):
                raise ArgumentError(f"About: {metric} on {dataset} is {a_kind(value)}, expected an Estimate; pass what `evaluate` gave.")

    def results(self) -> list[tuple[str, str, Estimate]]:
        """Return dataset, metric and value of each."""
        return [(dataset, metric, value) for dataset, values in self.metrics.items() for metric, value in values.items()]

    def shared_data(self) -> dict[str, Any]:
        """Return metadata that students and stores have in common, without what is not known."""
        known = {
            "license": self.licence,
            "license_name": self.licence_name,
            "license_link": self.licence_link,
            "language": self.language,
        }
        return {name: value for name, value in known.items() if value}


def model_card(folder: str | Path, about: About | None = None, store: LogprobReader | None = None) -> Any:
    """Make the card of an exported student, a `huggingface_hub.ModelCard`.

    Args:
        folder: what `CausalLMStudent.export` wrote; its weights are hashed (some seconds per GB) unless they are adapters.
        about: what is not recorded.
        store: what the student was trained on.

    Raises:
        ManifestMismatchError: the student was not trained on the rollouts of the store, their SFT teacher is not its own, or none of the columns
            is of its teacher.
        CorruptStoreError: the lineage cannot be read.
        ArgumentError: an argument is something else.
        MissingDependencyError: huggingface_hub is not installed.
    """
    hub, about, folder = need("huggingface_hub", "Cards", "hub"), _about(about), local_path("Export", folder)
    lineage, adapters = Lineage.read(folder), (folder / ADAPTERS).exists()
    if store is not None:
        _check_store(folder, lineage, store)
    data = hub.ModelCardData(
        **about.shared_data(),
        library_name="peft" if adapters else "transformers",
        pipeline_tag="text-generation",
        base_model=about.base_model,
        datasets=[*about.datasets] or None,
        tags=[*_TAGS, *(["lightning-opd"] if lineage.opd_teacher else [])],
        model_name=folder.resolve().name if about.metrics else None,
        eval_results=[_result(hub, *one) for one in about.results()] or None,
    )
    made = [
        ("method", f"{_PAPER if lineage.opd_teacher else _untaught(lineage, store)}, by lopd {version('lopd')}"),
        ("teacher whose log-probs it learnt from", describe_model(lineage.opd_teacher)),
        ("teacher that wrote its SFT text", describe_model(lineage.sft_teacher)),
        ("base model", about.base_model or "not stated"),
        ("prompts from", ", ".join(about.datasets) or "not stated"),
        *((name, str(value)) for name, value in about.training.items()),
        *(() if adapters else [("identity of these weights", _identity(folder))]),
    ]
    results = [
        (*one, f"{value.mean:.3g}", f"{value.low:.3g} to {value.high:.3g}", f"{value.clusters:,}") for *one, value in about.results()
    ]
    text = [
        f"# {folder.resolve().name}\n\n{_what(lineage, store)}\n\n## How it was made\n",
        _table(("", ""), made),
        *(() if store is None else ["\n## Rollouts that it learnt from\n", _ON[trained_on(lineage, store)], *_contents(store)]),
        "\n## Results\n",
        _table(("dataset", "metric", "mean", "95 % interval", "prompts"), results) if results else "None were given.",
        f"\n## Licence\n\n{_licence(about)}",
    ]
    return hub.ModelCard(_join(data, [*text, f"\n{about.notes}"]))


def dataset_card(store: LogprobReader, name: str, about: About | None = None) -> Any:
    """Make the card of a store, a `huggingface_hub.DatasetCard`.

    Raises:
        ArgumentError: an argument is something else.
        MissingDependencyError: huggingface_hub is not installed.
    """
    check_noun(store, LogprobReader)
    hub, about = need("huggingface_hub", "Cards", "hub"), _about(about)
    data = hub.DatasetCardData(
        **about.shared_data(),
        pretty_name=name,
        source_datasets=[*about.datasets] or None,
        task_categories=["text-generation"],
        tags=[*_TAGS, "logprobs"],
        configs=[{"config_name": "default", "data_files": ROLLOUTS}],
    )
    text = [
        f"# {name}\n\nRollouts of a policy, and log-probs of their tokens in nats, for offline on-policy distillation ({_PAPER}): a store of",
        f"lopd {version('lopd')}.  Token ids and log-probs are kept, texts are not.\n",
        *_contents(store),
        f"\nPrompts from: {_cell(', '.join(about.datasets) or 'not stated')}.",
        "\nA row is a rollout: its ids, and a column of log-probs for each model that scored it.  `pull_store` of `lopd.tools.share` makes a",
        f"store of it again, and verifies each row; manifest and provenance are in the metadata of `{ROLLOUTS}`.",
        f"\n## Licence\n\n{_licence(about)}",
    ]
    return hub.DatasetCard(_join(data, [*text, f"\n{about.notes}"]))


def _about(about: object) -> About:
    if not isinstance(about, About | None):
        raise ArgumentError(f"Card: about is {a_kind(about)}, expected `About(...)`; pass one.")
    return about or About()


def _check_store(folder: Path, lineage: Lineage, store: LogprobReader) -> None:
    check_noun(store, LogprobReader)
    teacher, known = lineage.opd_teacher, lineage.store
    if known is not None and not trained_on(lineage, store):
        raise ManifestMismatchError(
            f"Export {folder.name}: it was trained on {known.rollouts:,} other rollouts than those of the store, which has {len(store):,}, of "
            f"{store.manifest.policy}; pass the store that it was trained on."
        )
    # without a teacher it has imitated the writer of the rollouts, or learnt from their labels
    if lineage.sft_teacher != store.manifest.sft_teacher and (teacher or not _imitates(lineage, store)):
        own = store.manifest.sft_teacher if teacher else mixture_id(store.generations.values())
        raise ManifestMismatchError(
            f"Export {folder.name}: its SFT teacher is {lineage.sft_teacher}, expected {own}, the store's; pass the store that it was trained on."
        )
    taught = [lineage_after(store.manifest, [provenance]).opd_teacher for provenance in store.columns.values()]
    scored = [part for model in taught if model for part in model.parts]
    unknown = next((part for part in (teacher.parts if teacher else ()) if not any(part.same_weights(one) for one in scored)), None)
    if unknown is not None:
        raise ManifestMismatchError(
            f"Export {folder.name}: its teacher is {unknown}, which no column of the store is of; pass the store that it was trained on."
        )


def _imitates(lineage: Lineage, store: LogprobReader) -> bool:
    """Return whether the SFT teacher of a student is who sampled one or more rounds of a store; of which it has the rows is not recorded."""
    taught = lineage.sft_teacher or UNKNOWN
    within = [policy for policy in store.generations.values() if all(part in taught.parts for part in policy.parts)]
    return mixture_id(within) == taught


def _identity(folder: Path) -> str:
    try:
        return describe_model(folder_model_id(folder))
    except ModelError:
        return "not known"
    except EngineError as error:
        if "trust_remote_code" not in str(error):  # it is damaged
            raise
        return "not known"  # it is of a class that is not transformers', whose code is not run


def _untaught(lineage: Lineage, store: LogprobReader | None) -> str:
    """Return how a student without a teacher's log-probs was made: a lineage that records rollouts does not tell what was learnt from them."""
    if store is None:
        return "SFT" if lineage.store is None else "SFT, or training on labels"
    return "SFT" if _imitates(lineage, store) else "training on labels"


def _what(lineage: Lineage, store: LogprobReader | None) -> str:
    if lineage.opd_teacher is None:
        return _UNTAUGHT[_untaught(lineage, store)]
    same = lineage.sft_teacher is not None and lineage.sft_teacher.same_weights(lineage.opd_teacher)
    known = "the same model" if same else "not recorded" if lineage.sft_teacher is None else "another model"
    return (
        "A language model that learnt from the log-probs that a teacher gives to rollouts of its own, by offline on-policy distillation: rollouts "
        f"were sampled once, before training, and scored once.  The teacher that wrote its SFT text is {known}."
    )


def _contents(store: LogprobReader) -> list[str]:
    """Return what a store holds, who sampled it, and who scored it."""
    tokens = int(store.lengths()[:, 1].sum())
    columns = judged_columns(store)
    return [
        _table(("", ""), [("rollouts", f"{len(store):,}, {tokens:,} response tokens"), *origins(store)]),
        "",
        _table(_SHOWN, list(zip(*(columns[name] for name in _SHOWN), strict=True))),
    ]


def _result(hub: Any, dataset: str, metric: str, value: Estimate) -> Any:
    return hub.EvalResult(
        task_type="text-generation", dataset_type=dataset, dataset_name=dataset, metric_type=metric, metric_value=round(value.mean, 6)
    )


def _licence(about: About) -> str:
    if about.licence is None:
        return "None is stated."
    return f"[{_cell(about.licence_name)}]({about.licence_link})" if about.licence_name and about.licence_link else _cell(about.licence)


def _table(head: Sequence[str], rows: _Cells) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    """Return text as a cell has it: whatever a store or a folder puts in it stays text, and of a path its name is left."""
    return _FOLDERS.sub(r"\1", " ".join(printable(text).split())).translate(_MARKUP)


def _join(data: Any, parts: Sequence[str]) -> str:
    text = "\n".join(parts).strip()
    return f"---\n{data.to_yaml()}\n---\n\n{text}\n"
