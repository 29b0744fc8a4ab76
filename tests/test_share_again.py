"""What a push looks at before it reads, and what is run again after a push or a pull broke off."""

import errno
import os
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from exchanged import assert_equal_stores, fill
from hub_stub import READER, Hub, hub  # noqa: F401

from lopd import MemoryStore, ZarrStore
from lopd.errors import HubError, InvalidRecordError, MissingDependencyError, StoreExistsError, UncheckedDataWarning
from lopd.testing import tiny_manifest, tiny_provenance, tiny_rollout, tiny_scores
from lopd.tools.share import pull_store, push_store, sharing

# huggingface_hub passes `data=` to its own HTTP client where it uploads by LFS
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def store() -> MemoryStore:
    return fill(MemoryStore(tiny_manifest()))


@pytest.mark.parametrize(
    "why",
    [
        "no token",
        "a token that is not known",
        "a token that may only read",
        "a token that may not write there",
        "a repository that has files",
        "a public repository",
    ],
)
def test_a_push_that_may_not_be_is_refused_before_the_store_is_read(
    hub: Hub, store: MemoryStore, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    error: type[Exception] = HubError
    if why == "no token":
        monkeypatch.delenv("HF_TOKEN")
    elif why == "a repository that has files":
        hub.add("datasets/me/rollouts", files={"another.txt": b""})
        error = StoreExistsError
    elif why == "a public repository":
        hub.add("datasets/me/rollouts", private=False)
    elif why == "a token that is not known":
        monkeypatch.setenv("HF_TOKEN", "hf_" + "other")
    else:
        monkeypatch.setenv("HF_TOKEN", READER)
        if why == "a token that may not write there":
            hub.add("datasets/me/rollouts")
    monkeypatch.setattr(sharing, "export_parquet", lambda *_: pytest.fail("the store was read"))
    with pytest.raises(error):
        push_store(store, "me/rollouts")


@pytest.mark.parametrize(
    "why", ["its export fails", "its token may only read", "its repository cannot be seen", "pyarrow is not installed"]
)
def test_a_push_that_fails_before_its_commit_makes_no_repository(
    hub: Hub, store: MemoryStore, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    error: type[Exception] = HubError
    if why == "its export fails":
        store.append([tiny_rollout("a\ud800")])
        error = InvalidRecordError
    elif why == "its token may only read":
        monkeypatch.setenv("HF_TOKEN", READER)
    elif why == "its repository cannot be seen":
        hub.fail("info", 403)
    else:
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        error = MissingDependencyError
    with pytest.raises(error):
        push_store(store, "me/rollouts")
    assert hub.repositories == {}


@pytest.mark.parametrize("status", [404, 501, 403])
def test_a_hub_that_does_not_answer_whether_a_token_may_write_is_pushed_to(hub: Hub, store: MemoryStore, status: int) -> None:
    hub.fail("whoami", status, 99)
    push_store(store, "me/rollouts")
    hub.fail("auth", 404, 99)
    assert push_store(store, "me/rollouts", exist_ok=True) == hub.repositories["datasets/me/rollouts"].head


def test_a_hub_whose_404_has_no_code_is_pushed_to_and_what_was_made_must_be_seen(hub: Hub, store: MemoryStore) -> None:
    hub.fail("info", 404, 2)
    assert push_store(store, "me/rollouts") == hub.repositories["datasets/me/rollouts"].head
    hub.fail("info", 404, 3)
    hub.add("datasets/me/public", private=False)
    with pytest.raises(HubError, match="the hub answers 404"):
        push_store(store, "me/public")
    assert len(hub.repositories["datasets/me/public"].commits) == 1


def test_a_full_disk_and_a_broken_connection_are_named_with_what_to_do(
    hub: Hub, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    push_store(store, "me/rollouts")

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x.incomplete")

    with monkeypatch.context() as patched:
        patched.setattr(huggingface_hub.HfApi, "hf_hub_download", full)
        with pytest.raises(HubError, match=r"No space left on device.*; free space where HF_HOME is, and run this again, which resumes\.$"):
            pull_store("me/rollouts")
    monkeypatch.setattr("lopd.backends.retry.time.sleep", lambda _: None)
    nowhere, said = "http://127.0.0.1:1", "; check the connection and the URL of the hub, and run this again"
    with pytest.raises(HubError, match=rf"{said}, which resumes\.$"):
        pull_store("me/other", endpoint=nowhere)
    with pytest.raises(HubError, match=rf"{said}\.$"):
        push_store(store, "me/rollouts", endpoint=nowhere)


def test_a_pull_that_broke_off_goes_on_and_warns_where_another_revision_was_begun(hub: Hub, tmp_path: Path) -> None:
    manifest, rollouts = tiny_manifest(), [tiny_rollout(f"r{i}") for i in range(5)]
    stores = [MemoryStore(manifest), MemoryStore(manifest)]
    stores[0].append(rollouts[:4])
    stores[1].append(rollouts[1:])
    first = push_store(stores[0], "me/rollouts")
    push_store(stores[1], "me/rollouts", exist_ok=True)
    ZarrStore.create(tmp_path / "run.zarr", manifest).append(rollouts[:2])

    def pull(revision: str | None = None) -> Any:
        return pull_store("me/rollouts", revision=revision, store=lambda made: ZarrStore.open_or_create(tmp_path / "run.zarr", made))

    whole = pull(first)
    assert_equal_stores(whole, stores[0])
    # who goes on with what was pulled may run the pull again
    whole.append([tiny_rollout("own")])
    assert len(pull(first)) == 5
    with pytest.warns(
        UncheckedDataWarning, match="it has 2 rollouts that this revision lacks, and got what it lacked itself; if a pull of"
    ):
        assert len(pull()) == 6


def test_a_pull_warns_of_columns_that_its_revision_lacks(hub: Hub) -> None:
    manifest, rollouts = tiny_manifest(), [tiny_rollout(f"r{i}") for i in range(3)]
    first, second, broken = (MemoryStore(manifest) for _ in range(3))
    for made, column, rows in ((first, "teacher", rollouts), (second, "other", rollouts), (broken, "teacher", rollouts[:2])):
        made.append(rows)
        made.append_scores(column, tiny_provenance(column), [tiny_scores(rollout) for rollout in rows])
    commit = push_store(first, "me/rollouts")
    push_store(second, "me/rollouts", exist_ok=True)
    with pytest.warns(UncheckedDataWarning, match=r"it has 1 columns \(teacher\) that this revision lacks") as warned:
        pull_store("me/rollouts", store=lambda _: broken)
    assert {"teacher", "other"} == {*broken.columns}
    assert warned[0].filename == __file__
    # all of this revision is there now, or will be of what was begun
    pull_store("me/rollouts", store=lambda _: broken)
    again = MemoryStore(manifest)
    again.append(rollouts[:2])
    assert_equal_stores(pull_store("me/rollouts", revision=commit, store=lambda _: again), first)


def test_a_pull_warns_where_it_adds_scores_alone(hub: Hub) -> None:
    rollouts = [tiny_rollout(f"r{i}") for i in range(5)]
    pushed, broken = MemoryStore(tiny_manifest()), MemoryStore(tiny_manifest())
    for made, rows, scored in ((pushed, 4, 4), (broken, 5, 2)):
        made.append(rollouts[:rows])
        made.append_scores("teacher", tiny_provenance("teacher"), [tiny_scores(rollout) for rollout in rollouts[:scored]])
    push_store(pushed, "me/rollouts")
    with pytest.warns(UncheckedDataWarning, match="it has 1 rollouts that this revision lacks"):
        pull_store("me/rollouts", store=lambda _: broken)
    assert int(broken.scored("teacher").sum()) == 4
    pull_store("me/rollouts", store=lambda _: broken)  # which adds nothing, and so does not warn


def test_two_repositories_are_pulled_into_one_store(hub: Hub) -> None:
    manifest = tiny_manifest()
    both = MemoryStore(manifest)
    for name in ("a", "b"):
        part = MemoryStore(manifest)
        part.append([tiny_rollout(name)])
        push_store(part, f"me/{name}")
    pull_store("me/a", store=lambda _: both)
    with pytest.warns(UncheckedDataWarning, match="it has 1 rollouts that this revision lacks"):
        pull_store("me/b", store=lambda _: both)
    assert len(both) == 2
