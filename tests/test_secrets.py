"""Credentials in URLs and options appear nowhere: not in a message, in what it was raised from, in a traceback, a log or a repr."""

import logging
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from exchanged import fill
from fsspec import register_implementation
from fsspec.implementations.memory import MemoryFileSystem

from lopd.backends.files import cloud, open_files
from lopd.backends.lance import LanceStore
from lopd.backends.memory_store import MemoryStore
from lopd.backends.opening import open_store
from lopd.backends.zarr import ZarrStore
from lopd.engines.server import Servers
from lopd.errors import LopdError, StorePathError, StoreReadError
from lopd.records import Rollout, read_prompts
from lopd.testing import tiny_manifest, tiny_rollout
from lopd.tools.interop import export_parquet, import_parquet
from lopd.verbs.labels import label_rollouts

# Tracebacks show lines of code, so no line has it whole.
WORD = "SEC" + "RET"
#: What follows the scheme, with a secret in every place that a URL has for one.
REST = (
    f"user:{WORD}@127.0.0.1:1/x.jsonl",
    f"user:a/{WORD}@127.0.0.1:1/x.jsonl",
    f"user:a@{WORD}@127.0.0.1:1/x.jsonl",
    f"user:a?{WORD}@127.0.0.1:1/x.jsonl",
    f"user:a\n{WORD}@127.0.0.1:1/x.jsonl",
    f"{WORD}@127.0.0.1:1/x.jsonl",
    f"127.0.0.1:1/x.jsonl?sig={WORD}",
    f"127.0.0.1:1/x.jsonl?a=b&token={WORD}#c",
    f"127.0.0.1:1/x.jsonl?X-Amz-Signature={WORD}",
    f"127.0.0.1:1/x.jsonl#{WORD}",
)
SCHEMES = (
    "memory",
    "talkative",
    "ftp",
    "http",
    "github",
    "s3",
    "gs",
    "az",
    "abfss",
    "unknown",
    "file",
    "simplecache::memory",
    "dir://a::talkative",
)
OPTIONS = {
    "allow_http": "true",
    "aws_endpoint": f"http://user:{WORD}@127.0.0.1:1",
    "aws_secret_access_key": WORD,
    "client_retry_timeout": 0.1,
}


class _Talkative(MemoryFileSystem):
    """Answers everything with an error that repeats the URL, and what it was opened with."""

    protocol = "talkative"
    cachable = False

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path

    def _refuse(self, path: Any, *_: Any, **options: Any) -> Any:
        kind = FileNotFoundError if "lost" in self.storage_options else RuntimeError
        raise kind(f"{path} cannot be had with {self.storage_options}, {WORD}")

    cat_file = cat_ranges = pipe_file = ls = find = open = _refuse


class _Breaking(MemoryFileSystem):
    """Breaks off behind the first read of a file, with an error that repeats the URL."""

    protocol = "breaking"

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        file, reads = super()._open(path, mode, **options), iter(range(1))
        read = file.read

        def read_once(size: int = -1) -> Any:
            for _ in reads:
                return read(size)
            raise RuntimeError(f"{path} broke off")

        file.read = read_once
        return file


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    register_implementation("talkative", _Talkative, clobber=True)
    register_implementation("breaking", _Breaking, clobber=True)
    monkeypatch.setattr(cloud, "_FIRST_S", 0.1)
    monkeypatch.setattr(cloud, "_FIRST_TIMEOUTS", {"timeout": "1s", "connect_timeout": "1s"})
    yield
    MemoryFileSystem.store.clear()


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, and all that Python remembers of how it came about, shown or not."""
    if error is not None:
        yield error
        yield from _chain(error.__cause__)
        yield from _chain(error.__context__)


def _assert_says_nothing(call: Callable[[], object], log: pytest.LogCaptureFixture) -> BaseException | None:
    caught: BaseException | None = None
    try:
        call()
    except LopdError as error:
        caught = error
    assert not [link for link in _chain(caught) if WORD in f"{link!s} {link!r}"]
    assert caught is None or WORD not in "".join(traceback.format_exception(caught))
    assert WORD not in log.text
    return caught


@pytest.mark.parametrize("rest", REST)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_store_says_nothing_of_its_secrets(scheme: str, rest: str, caplog: pytest.LogCaptureFixture) -> None:
    if scheme in ("az", "abfss") and rest.startswith(WORD):
        return  # there it is the container
    url = f"{scheme}://{rest}"
    caplog.set_level(logging.DEBUG, "lopd")
    options = OPTIONS if scheme == "s3" else {}

    def use(make: Callable[..., Any]) -> None:
        store = make()
        assert WORD not in f"{store!r} {store}"
        store.append([tiny_rollout("a")])

    for make in (
        lambda: open_store(url, options),
        lambda: ZarrStore.create(url, tiny_manifest(), storage_options=options),
        lambda: LanceStore.create(url, tiny_manifest(), storage_options=options),
    ):
        _assert_says_nothing(lambda make=make: use(make), caplog)  # type: ignore[misc]


@pytest.mark.parametrize("options", [{"password": WORD}, {"password": WORD, "lost": True}])
def test_a_file_system_says_nothing_of_its_options(options: dict[str, Any]) -> None:
    files = open_files("talkative://here", options)
    for call in (lambda: open_store("talkative://here", options), lambda: files.read("x"), lambda: files.put_if_absent("x", b"")):
        with pytest.raises((LopdError, OSError)) as caught:
            call()
        assert not [link for link in _chain(caught.value) if WORD in str(link)]


@pytest.mark.parametrize(
    "options", [{"client_max_retries": WORD}, {"timeout": WORD}, {"aws_access_key": WORD}, {"client_retry_timeout": WORD}]
)
def test_an_option_that_is_refused_is_not_shown(options: dict[str, Any]) -> None:
    with pytest.raises(LopdError) as caught:
        open_store("s3://bucket/run", options)
    assert not [link for link in _chain(caught.value) if WORD in str(link)]


@pytest.mark.parametrize("rest", REST)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_prompt_file_says_nothing_of_its_secrets(scheme: str, rest: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "lopd")
    if scheme == "file" or (scheme in ("az", "abfss") and rest.startswith(WORD)):
        return  # a path of this machine, with signs in it; a container
    _assert_says_nothing(lambda: read_prompts(f"{scheme}://{rest}", None), caplog)  # type: ignore[arg-type]


@pytest.mark.parametrize("rest", REST)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_exported_file_says_nothing_of_its_secrets(scheme: str, rest: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "lopd")
    if scheme == "file":
        return
    url = f"{scheme}://{rest}"
    for call in (import_parquet, lambda url, store: export_parquet(store, url)):
        _assert_says_nothing(lambda call=call: call(url, MemoryStore(tiny_manifest())), caplog)  # type: ignore[misc]


def test_a_file_whose_storage_fails_midway_is_not_called_damaged_and_says_nothing_of_its_secrets(caplog: pytest.LogCaptureFixture) -> None:
    url = f"breaking://host/run.parquet?sig={WORD}"
    export_parquet(fill(MemoryStore(tiny_manifest())), url)
    caught = _assert_says_nothing(lambda: import_parquet(url, MemoryStore(tiny_manifest())), caplog)
    assert isinstance(caught, StoreReadError)
    assert str(caught).startswith("Parquet file breaking://host/run.parquet: reading it failed with RuntimeError, expected")


def test_bytes_are_not_shown() -> None:
    for call in (open_store, lambda path: read_prompts(path, None)):
        with pytest.raises(LopdError, match=r"the path is .*bytes, expected text or a ") as caught:
            call(f"s3://user:{WORD}@bucket/run".encode())
        assert WORD not in str(caught.value)


@pytest.mark.parametrize("url", [f"http://user:{WORD}@host", f"http://host?key={WORD}", f"http://user:{WORD}", f"http://user:{WORD}/v1"])
def test_a_server_is_not_named_with_a_secret(url: str) -> None:
    with pytest.raises(LopdError) as caught:
        Servers(url, "model")
    assert not [link for link in _chain(caught.value) if WORD in str(link)]


def test_a_proxy_is_not_named_with_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://user:{WORD}@host:{WORD}")
    with pytest.raises(LopdError, match="no client can be made for it") as caught:
        _ = Servers("http://127.0.0.1:1", "model").served
    assert not [link for link in _chain(caught.value) if WORD in str(link)]


# Azure's ways to write a URL


@pytest.mark.parametrize(
    "url",
    [
        "abfss://box@account/run",
        "abfs://box@account/run",
        "az://box@account/run",
        "abfss://box@account.dfs.core.windows.net/run",
        "abfss://box@account.blob.core.windows.net/run",
        "wasbs://box@account.blob.core.windows.net/run",
        "https://account.blob.core.windows.net/box/run",
        "https://account.dfs.core.windows.net/box/run",
    ],
)
def test_azure_is_reached_by_every_way_to_write_its_url(url: str) -> None:
    files: Any = open_files(url, {"azure_storage_account_key": "a2V5"})
    assert files.url == url
    assert (files._store.config["account_name"], files._store.config["container_name"], files._store.prefix) == ("account", "box", "run")


@pytest.mark.parametrize("url", ["az://box/run", "abfs://box/run", "abfss://box/run", "azure://box/run", "adl://box/run", "AZ://box/run"])
def test_azure_is_reached_by_an_account_in_the_options(url: str) -> None:
    files: Any = open_files(url, {"azure_storage_account_name": "account"})
    assert files.url == url
    assert (files._store.config["account_name"], files._store.config["container_name"], files._store.prefix) == ("account", "box", "run")


@pytest.mark.parametrize("rest", [f"?sig={WORD}", f"#{WORD}", f"#{WORD}/run.zarr", f"?{WORD}#/run"])
@pytest.mark.parametrize("url", ["s3://box/run", "gs://box/run", "abfss://box@a/run", "https://a.blob.core.windows.net/box/run"])
def test_what_a_bucket_would_not_see_of_a_url_is_refused_and_not_repeated(url: str, rest: str) -> None:
    for make in (open_store, lambda url: LanceStore.create(url, tiny_manifest())):
        with pytest.raises(StorePathError, match=rf"Store {url}: its URL has a `\?` or `#`, .*azure_storage_sas_token") as caught:
            make(url + rest)
        assert WORD not in str(caught.value)


def test_a_verifier_is_not_named_with_what_partials_of_it_pass() -> None:
    def asking(_prompt: None, _rollout: Rollout, key: str) -> float:
        return float(len(key))

    inner = partial(asking, key=WORD)
    inner.version = 1  # type: ignore[attr-defined]  # with an attribute it stays inside
    store = MemoryStore(tiny_manifest())
    store.append([tiny_rollout("r0")])
    label_rollouts(store, partial(inner), None)
    assert store.columns["label"].model.name == asking.__qualname__
