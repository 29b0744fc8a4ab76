"""What a push looks at before it reads, and what is run again after a push or a pull broke off."""

import errno
import os
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from exchanged import assert_equal_stores, fill
from hub_stub import READER, Hub, hub  # noqa: F401

from lopd import MemoryStore, ZarrStore
from lopd.errors import ConflictError, HubError, StoreExistsError
from lopd.testing import tiny_manifest, tiny_rollout
from lopd.tools.share import pull_store, push_store, sharing

# huggingface_hub passes `data=` to its own HTTP client where it uploads by LFS
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def store() -> MemoryStore:
    return fill(MemoryStore(tiny_manifest()))


@pytest.mark.parametrize("why", ["no token", "a token that may only read", "a repository that has files", "a public repository"])
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
    else:
        monkeypatch.setenv("HF_TOKEN", READER)
    monkeypatch.setattr(sharing, "export_parquet", lambda *_: pytest.fail("the store was read"))
    with pytest.raises(error):
        push_store(store, "me/rollouts")


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
    with pytest.raises(HubError, match=r"; check the connection and the URL of the hub, and run this again, which resumes\.$"):
        push_store(store, "me/rollouts", endpoint="http://127.0.0.1:1")


def test_a_pull_that_broke_off_is_not_filled_up_with_another_revision(hub: Hub, tmp_path: Path) -> None:
    manifest, rollouts = tiny_manifest(), [tiny_rollout(f"r{i}") for i in range(5)]
    stores = [MemoryStore(manifest), MemoryStore(manifest)]
    stores[0].append(rollouts[:4])
    stores[1].append(rollouts[1:])
    first = push_store(stores[0], "me/rollouts")
    push_store(stores[1], "me/rollouts", exist_ok=True)
    broken = ZarrStore.create(tmp_path / "run.zarr", manifest)
    broken.append(rollouts[:2])

    def pull(revision: str | None = None) -> Any:
        return pull_store("me/rollouts", revision=revision, store=lambda made: ZarrStore.open_or_create(tmp_path / "run.zarr", made))

    with pytest.raises(
        ConflictError, match="it has 1 rollouts that this revision lacks, and lacks 3 of it; pull into a new store, or pass"
    ):
        pull()
    broken.refresh()
    assert len(broken) == 2
    whole = pull(first)
    assert_equal_stores(whole, stores[0])
    # who goes on with what was pulled may run the pull again
    whole.append([tiny_rollout("own")])
    assert len(pull(first)) == 5
