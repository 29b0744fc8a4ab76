"""Stores on real servers: safe where a server keeps its word, and refused by name where it does not.  `make test-servers` installs them."""

from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest
from crash_worker import Place, rollout
from real_servers import RealServer, four_writers, running

from lopd.backends.lance import LanceStore
from lopd.backends.opening import open_store
from lopd.backends.zarr import ZarrStore
from lopd.errors import StorePathError
from lopd.testing import assert_holds, tiny_manifest

BACKENDS = {"zarr": ZarrStore, "lance": LanceStore}


@pytest.fixture(scope="module")
def pool() -> Iterator[Executor]:
    """Start four processes."""
    with ProcessPoolExecutor(4, get_context("spawn")) as made:
        yield made


@pytest.fixture(scope="module", params=["seaweedfs", "azurite"])
def sound(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    """Yield a server that writes conditionally and reads ranges."""
    with running(request.param, tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture(scope="module", params=["s3rver", "rclone"])
def unsound(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    """Yield a server that lets every writer win."""
    with running(request.param, tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.mark.parametrize("backend", BACKENDS)
def test_four_writers_lose_nothing_on_a_sound_server(backend: str, sound: RealServer, pool: Executor) -> None:
    found = four_writers(Place(backend, sound.new_url(), sound.storage_options), pool)
    assert (found.acknowledged, found.lost, found.problems, found.errors) == (48, 0, [], [])


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_unsound_server_gets_no_store_and_no_writer(backend: str, unsound: RealServer, pool: Executor) -> None:
    place = Place(backend, unsound.new_url(), unsound.storage_options)
    with pytest.raises(StorePathError, match=r"[2-4] of 4 writers created the same object, expected 1; .*If-None-Match"):
        place.open_or_create()
    found = four_writers(place, pool)
    assert found.acknowledged == 0
    assert len(found.errors) == 4


@pytest.mark.parametrize("form", ["abfss://lopd@{}/{}", "https://{}.blob.core.windows.net/lopd/{}", "abfs://lopd/{1}", "az://lopd/{1}"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_azure_is_reached_by_every_way_to_write_its_url(backend: str, form: str, sound: RealServer) -> None:
    if sound.scheme != "az":
        pytest.skip("not Azure")
    options: dict[str, Any] = dict(sound.storage_options)
    url = form.format(options["azure_storage_account_name"], sound.new_url(f".{backend}").rsplit("/", 1)[1])
    store = BACKENDS[backend].create(url, tiny_manifest(), storage_options=options)
    store.append([rollout(0)])
    assert_holds(open_store(url, options), [rollout(0)])
    assert str(store).startswith(f"Store {url}:")
