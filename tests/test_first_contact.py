"""A first contact that fails is reported soon, in one sentence with what to do; a long wait reports what it waits for."""

import copy
import json
import logging
import resource
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from hub_stub import hub  # noqa: F401
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError
from other_stubs import CompletionsStub
from s3_server import S3Server
from served_table import MODEL, TOKENIZER, make_rollouts, scorer_of
from vllm_stub import answer

from lopd.backends import retry
from lopd.backends.files import buckets, cloud
from lopd.backends.lance import LanceStore
from lopd.backends.opening import open_store
from lopd.backends.zarr import ZarrStore
from lopd.engines import finding, pool
from lopd.engines.finding import local_folder
from lopd.engines.hf import load_model
from lopd.engines.identity import folder_model_id
from lopd.engines.server import Servers, ServerScorer
from lopd.errors import EngineError, HubError, InvalidRecordError, LopdError, PromptError, StorePathError, StoreReadError
from lopd.records import Lineage, waiting
from lopd.records.files import read_records
from lopd.testing import tiny_manifest, tiny_rollout
from lopd.tools.share.hub import Repository

#: Of a URL, by whichever way a store is first looked for.
LOOKS: dict[str, Callable[[str, Any], Any]] = {
    "open": open_store,
    "Zarr": lambda url, options: ZarrStore.create(url, tiny_manifest(), storage_options=options),
    "Lance": lambda url, options: LanceStore.open_or_create(url, tiny_manifest(), storage_options=options),
}


@pytest.fixture
def closed() -> Iterator[str]:
    """Yield a port without a listener."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{taken.getsockname()[1]}"


@contextmanager
def listening(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Yield the address of a server with these answers."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def silent() -> Iterator[str]:
    """Yield a port that is listened on, and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        yield f"127.0.0.1:{listener.getsockname()[1]}"


# Buckets


@pytest.mark.s3
@pytest.mark.timeout(60)
@pytest.mark.parametrize("look", LOOKS)
def test_a_missing_bucket_is_named_at_once(s3: S3Server, look: str) -> None:
    with pytest.raises(StorePathError, match="Store s3://nobodys/run: there is no such bucket; create it, or check its name") as caught:
        LOOKS[look]("s3://nobodys/run", s3.storage_options)
    assert "xml" not in str(caught.value)


@pytest.mark.s3
@pytest.mark.parametrize("kind", [ZarrStore, LanceStore])
@pytest.mark.parametrize(("allowed", "options"), [("true", {}), ("1", {}), ("true", {"timeout": "60s", "client_retry_timeout": 1})])
def test_what_the_environment_allows_holds_at_every_request(
    s3: S3Server, kind: Any, allowed: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3.storage_options.items():
        monkeypatch.setenv(name.upper() if name.startswith("aws_") else f"AWS_{name.upper()}", allowed if value == "true" else value)
    url = s3.new_url()
    kind.create(url, tiny_manifest(), storage_options=options).append([tiny_rollout("a")])
    assert len(open_store(url, options)) == 1


def test_every_client_option_of_the_environment_stays_beside_one_that_is_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"AWS_PROXY_EXCLUDES": "host", "AWS_HTTP1_ONLY": "true", "AZURE_TIMEOUT": "1s"}.items():
        monkeypatch.setenv(name, value)
    files = cloud.ObstoreFiles("s3://bucket/run", {"connect_timeout": "3s"}, answered=True)
    assert files._once.client_options == {"proxy_excludes": "host", "http1_only": "true", "connect_timeout": "3s"}
    assert files._store.client_options.items() >= files._once.client_options.items()


@pytest.mark.parametrize(
    ("url", "environment", "words"),
    [
        ("az://box/run", {}, "its URL names no account.*set AZURE_STORAGE_ACCOUNT_NAME, or write abfss://container@account/path"),
        (
            "gs://box/run",
            {"GOOGLE_APPLICATION_CREDENTIALS": "/SECRET"},
            "GOOGLE_APPLICATION_CREDENTIALS or an option names cannot be opened",
        ),
        ("s3://box/x//run", {}, "its path has `//`, .*leave one out"),
        ("s3:///run", {}, "cannot be opened .*check the URL, and the variables that begin with AWS_"),
        ("s3://box/run", {"AWS_ENDPOINT_URL_S3": "http://h"}, "its endpoint is http://h, .*set AWS_ALLOW_HTTP=true"),
    ],
)
def test_what_keeps_a_bucket_from_being_opened_is_said(
    url: str, environment: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    for name, value in {"AWS_ENDPOINT": "https://other", **environment}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StorePathError, match=f"^Store {url}: .*{words}") as caught:
        open_store(url)
    assert "SECRET" not in str(caught.value)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["closed", "silent"])
def test_an_endpoint_that_does_not_answer_is_said_soon(kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cloud._FIRST_S <= 10
    monkeypatch.setattr(cloud, "_FIRST_S", 0.3)
    monkeypatch.setattr(cloud, "_FIRST_TIMEOUTS", {"timeout": "1s"})
    host = request.getfixturevalue(kind)
    options = {"aws_endpoint": f"http://{host}", "allow_http": "true", "aws_access_key_id": "a", "aws_secret_access_key": "SECRET"}
    for look in LOOKS.values():
        with pytest.raises(StoreReadError, match=rf"{host} does not answer; .*check the path, credentials, endpoint, proxies") as caught:
            look("s3://lopd/run", options)
        assert "SECRET" not in str(caught.value)


@pytest.mark.s3
@pytest.mark.timeout(60)
def test_a_proxy_or_certificates_of_the_environment_that_do_not_work_are_said_soon(
    s3: S3Server, closed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cloud, "_FIRST_S", 0.3)
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.setenv("HTTP_PROXY", f"http://{closed}")
    with pytest.raises(StoreReadError, match=r"does not answer; .*proxies"):
        open_store(s3.url("run"), s3.storage_options)
    with pytest.raises(StoreReadError, match=r"does not answer; .*certificates"):
        open_store(s3.url("run"), s3.storage_options | {"aws_endpoint": s3.endpoint.replace("http", "https")})


@pytest.mark.s3
def test_a_storage_that_has_answered_is_given_time(s3: S3Server) -> None:
    files = ZarrStore.create(s3.new_url(), tiny_manifest(), storage_options=s3.storage_options)._files
    assert files._patience == 180
    assert copy.copy(files)._patience == 180


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (
            "Error GET http://h:1/b?sig=SECRET - status code: 403 Forbidden: <?xml?><Code>InvalidAccessKeyId</Code>",
            "h:1 answers InvalidAccessKeyId",
        ),
        (
            "Error GET http://h:1/b?sig=SECRET - status code: 400 Bad Request: <?xml?><Code>ExpiredToken</Code>",
            "h:1 answers that the credentials have expired (ExpiredToken), so set fresh ones",
        ),
        ("Error GET http://h:1/b?sig=SECRET - status code: 503 Slow Down: <html>", "h:1 answers 503 Slow Down"),
        (
            "Error GET http://h:1/b?sig=SECRET in 155 ms - Received redirect without LOCATION, this normally indicates",
            "h:1 answers that the bucket is in another region than AWS_REGION",
        ),
        (
            "Error GET http://h:1/b?sig=SECRET - status code: 400 Bad Request: <?xml?><Message>the region 'us-east-1' is wrong; expecting 'eu'",
            "h:1 answers that the bucket is in another region than AWS_REGION",
        ),
        ("Error PUT http://169.254.169.254/latest/api/token in 5ms - HTTP error", "no credentials were given"),
        ("unsigned payload\nDebug source", "unsigned payload"),
    ],
)
def test_what_a_bucket_says_is_said_without_xml_and_secrets(said: str, words: str) -> None:
    shown = buckets.said(ValueError(said))
    assert shown.startswith(words)
    assert not any(word in shown for word in ("SECRET", "xml", "html", "Debug"))


def test_repetitions_that_take_long_say_why_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(retry, "QUIET_S", 0.0)
    with pytest.raises(OSError, match="busy"):
        retry.repeat(busy, lambda _: True, seconds=60, times=3, pause=0.001, longest=0.001)
    assert caplog.text.count("Storage: trying again, for up to 60 s: busy") == 1


def busy() -> None:
    raise OSError("busy")


# Servers


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("kind", "error"), [("closed", "ConnectError"), ("silent", "ReadTimeout")])
def test_a_server_that_never_answered_is_said_soon_and_what_to_check(kind: str, error: str, request: pytest.FixtureRequest) -> None:
    url = f"http://{request.getfixturevalue(kind)}"
    assert Servers(url, "m").first_contact_s <= 15 < Servers(url, "m").patience_s
    scorer = ServerScorer(Servers(url, "m", first_contact_s=0.3), TOKENIZER, MODEL)
    for ask in (lambda: scorer.provenance, lambda: scorer.score([tiny_rollout("a")])):
        with pytest.raises(
            EngineError, match=f"Server {url}: .* fails with {error}, .*check the URL, whether it is started, and HTTP_PROXY"
        ):
            ask()


@pytest.mark.parametrize(("name", "value"), [("HTTP_PROXY", "foo://x"), ("SSL_CERT_FILE", "/nowhere")])
def test_a_proxy_or_certificates_that_cannot_be_used_are_one_sentence(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(EngineError, match=r"no client can be made for it .*look at HTTP_PROXY, .*SSL_CERT_FILE"):
        _ = Servers("http://localhost:1", "m").served


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_where_no_more_files_may_be_opened_the_limit_is_named_and_not_the_server(closed: str, host: str) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    servers = Servers(f"http://{closed.replace('127.0.0.1', host)}", "m", first_contact_s=0.1)
    with pytest.raises(EngineError, match="fails with ConnectError"):
        _ = servers.served
    with socket.socket() as next_file:
        lowest = next_file.fileno()
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        with pytest.raises(EngineError, match=rf"too many files are open here \({lowest} .*; raise `ulimit -n`, or lower `concurrency`"):
            _ = servers.served
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("url", ["http://h/v1?token=SECRET", "http://h/#SECRET", "http://SECRET@h"])
def test_a_secret_in_the_url_of_a_server_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(InvalidRecordError, match=r"Servers: url 0 is one with a .*api_key") as caught:
        Servers(url, "m")
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"urls": []}, "number of urls is 0"),
        ({"urls": ["localhost:8000"]}, "'localhost:8000', expected http://"),
        ({"urls": ["http://"]}, "'http:', expected http://"),
        ({"urls": ["http://[::1"]}, "'http://\\[::1', expected http://"),
        ({"urls": ["http://me:sesame@localhost"]}, "one with a user or password"),
        ({"urls": "http://a", "api_key": "sesame\n"}, "api_key has spaces"),
        ({"urls": "http://a", "concurrency": 0}, "concurrency is 0"),
        ({"urls": "http://a", "attempts": 0}, "attempts is 0"),
        ({"urls": "http://a", "patience_s": 0}, "patience_s is 0"),
        ({"urls": "http://a", "timeout_s": -1}, "timeout_s is -1"),
    ],
)
def test_settings_that_make_no_sense_are_refused_and_secrets_not_repeated(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidRecordError, match=says) as caught:
        Servers(model="table", **settings)
    assert "sesame" not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        ({"type": "invalid_request_error", "code": "unsupported_parameter"}, r"answers 400 \(in a 200: no\), expected 200; check URL"),
        ({"type": "InvalidRequestError", "code": None}, "answers 400"),
        ({"type": "server_error", "code": "model_not_found"}, "answers 400"),
        ({"type": "invalid_request_error", "code": "invalid_api_key"}, "answers 401 .* key"),
        ({"type": "authentication_error"}, "answers 401"),
        ({"type": "permission_error"}, "answers 403"),
        ({"type": "billing_error"}, r"answers 402 .*, expected credit"),
    ],
)
def test_a_server_that_refuses_for_good_in_an_answer_of_200_is_asked_once(error: dict[str, Any], says: str) -> None:
    with closing(CompletionsStub()) as host:
        host.fail(10**6, answer(200, body={"error": {"message": "no", **error}}))
        with pytest.raises(EngineError, match=says):
            scorer_of(host, speaks="openai", context=64, patience_s=1).score(make_rollouts())
        assert len(host.requests) == 1


def test_a_long_wait_for_a_server_says_what_it_waits_for(
    closed: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pool, "QUIET_S", 0.2)
    with pytest.raises(EngineError):
        _ = Servers(f"http://{closed}", "m", first_contact_s=0.8).served
    assert f"Servers: waiting for 1 to start; Server http://{closed}: http://{closed}/health fails with ConnectError" in caplog.text


def test_a_long_wait_for_a_storage_says_so_once_and_a_short_one_does_not(
    silent: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(waiting, "QUIET_S", 0.2)
    monkeypatch.setattr(cloud, "_FIRST_TIMEOUTS", {"timeout": "1s"})
    monkeypatch.setattr(cloud, "_FIRST_S", 0.1)
    ZarrStore.create(tmp_path / "run", tiny_manifest())
    with pytest.raises(LopdError):
        open_store(
            "s3://lopd/run",
            {"aws_endpoint": f"http://{silent}", "allow_http": "true", "aws_access_key_id": "a", "aws_secret_access_key": "b"},
        )
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert said == ["Store s3://lopd/run: waiting for its storage to answer, for up to 0 s"]


@pytest.mark.parametrize(("kind", "error"), [("closed", "ConnectError"), ("silent", "ReadTimeout")])
def test_a_hub_that_does_not_answer_is_asked_once(
    kind: str, error: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://{request.getfixturevalue(kind)}")
    monkeypatch.setattr(finding, "_PATIENCE_S", 0.5)
    monkeypatch.setattr(finding, "snapshot_download", lambda *_, **__: pytest.fail("it was asked for files"))
    with pytest.raises(
        EngineError, match=rf"Model 'somebody/model': it cannot be loaded \(there is no such folder, .*; {error} of http://127.*proxies"
    ):
        local_folder("somebody/model")


class _Slow(BaseHTTPRequestHandler):
    """Sends ten records one by one; after five it goes away where the name says so."""

    def do_GET(self) -> None:
        self.send_response(200)
        for name, value in {"Content-Length": 160, "ETag": '"e"', "Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT"}.items():
            self.send_header(name, str(value))
        self.end_headers()
        with suppress(OSError):
            for _ in range(5 if "cut" in self.path else 10):
                self.wfile.write(b'{"prompt": "a"}\n')
                time.sleep(0.1)

    def log_message(self, *_: Any) -> None:
        pass


def test_a_file_whose_download_takes_longer_than_a_first_contact_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cloud, "_FIRST_S", 0.1)
    monkeypatch.setattr(cloud, "_FIRST_TIMEOUTS", {"timeout": "500ms"})
    with listening(_Slow) as host:
        for name, value in {"ENDPOINT": f"http://{host}", "ALLOW_HTTP": "true", "ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b"}.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        assert len(read_records("Prompt file", "s3://lopd/p.jsonl")[1]) == 10
        monkeypatch.setattr(cloud.ObstoreFiles, "_patience", 0.1)
        with pytest.raises(PromptError, match=r"cut.jsonl: its download was cut off, .*\), .*; copy it to this machine, or try again"):
            read_records("Prompt file", "s3://lopd/cut.jsonl")


class _Pages(BaseHTTPRequestHandler):
    """Answers whatever is asked with a page, as a router or a desktop application does; one path moves elsewhere."""

    def do_GET(self) -> None:
        moved = self.path.startswith("/moved")
        self.send_response(308 if moved else 200)
        self.send_header("Location", "https://elsewhere/v1?token=SECRET") if moved else self.send_header(
            "Content-Type", "text/html; charset=utf-8"
        )
        self.end_headers()
        self.wfile.write(b"<html><title>Router</title></html>")

    do_POST = do_GET

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def pages() -> Iterator[str]:
    """Yield the address of something that is neither a hub nor a model server."""
    with listening(_Pages) as host:
        yield host


@pytest.mark.parametrize("speaks", ["vllm", "sglang", "openai"])
def test_what_answers_with_pages_is_no_model_server(pages: str, speaks: Any) -> None:
    wrong = {
        "": "answers 200 with text/html, expected the JSON of a model server; check host, port and path",
        "/moved": r"answers 308 \(go to https://elsewhere/v1\), expected 200",
    }
    for path, what in wrong.items():
        servers = Servers(f"http://{pages}{path}", "m", context=64, speaks=speaks)
        with pytest.raises(EngineError, match=f"^Server http://{pages}{path}: .*{what}"):
            ServerScorer(servers, TOKENIZER, MODEL).score([tiny_rollout("a")])


@pytest.mark.parametrize("name", ["somebody/model", "my student"])
def test_a_name_that_is_neither_a_folder_nor_in_the_hub_is_said(
    name: str, hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    why = "no model in the hub can have this name" if " " in name else f"{hub.url} does not know it"
    for read in (local_folder, load_model, folder_model_id):
        with pytest.raises(
            EngineError, match=rf"^Model '{name}': .*there is no such folder, seen from {tmp_path}; {why}.*; check the path"
        ):
            read(name)


def test_a_name_in_the_hub_is_not_looked_for_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for read in (local_folder, load_model, folder_model_id, Lineage.of):
        with pytest.raises(
            EngineError, match=rf"there is no such folder, seen from {tmp_path}; HF_HUB_OFFLINE is set.*unset HF_HUB_OFFLINE"
        ):
            read("studnt")


def test_what_answers_with_pages_is_no_hub(pages: str, hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", f"http://{pages}")
    with pytest.raises(EngineError, match=rf"http://{pages} does not answer as a hub.*check the path, or HF_ENDPOINT"):
        local_folder("somebody/model")
    with pytest.raises(
        HubError, match=rf"at http://{pages}: it failed with .*; that is not the answer of a hub, so check `endpoint=` or HF_ENDPOINT"
    ):
        Repository("me/student", "model").commit({"README.md": b"#"}, "message", private=True, exist_ok=False)


def test_a_gated_model_is_said_to_be_one_with_what_opens_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers raises an error of its own from that of the hub, and what remains of it in one line names no remedy."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError("You are trying to access a gated repo.\nMake sure") from GatedRepoError.__new__(GatedRepoError)

    says = rf"it is for those who have accepted its terms\), expected .*accept them at {constants.ENDPOINT}/org/model, then `hf auth login`"
    monkeypatch.setattr(finding, "_reach_hub", lambda _: None)
    monkeypatch.setattr(finding.transformers.AutoTokenizer, "from_pretrained", refuse)
    monkeypatch.setattr(finding, "snapshot_download", refuse)
    for look in (finding.load_tokenizer, finding.local_folder):
        with pytest.raises(EngineError, match=says):
            look("org/model")


@pytest.mark.parametrize("mapped", ["config.json", "tokenizer_config.json"])
def test_a_model_with_code_of_its_own_is_said_to_be_one_and_nothing_is_asked(
    mapped: str, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a terminal transformers would wait for an answer."""
    monkeypatch.setattr("builtins.input", lambda _: pytest.fail("it was asked"))
    tokenizer.save_pretrained(tmp_path)
    codes = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model", "AutoTokenizer": ["own.Tokenizer", None]}
    for file in {"config.json", mapped}:
        written = json.loads(path.read_text()) if (path := tmp_path / file).exists() else {"model_type": "own"}
        path.write_text(json.dumps({**written, "tokenizer_class": "OwnTokenizer", "auto_map": codes} if file == mapped else written))
    says = r"cannot be loaded \(The repository .* contains custom code .*; load it and its tokenizer with transformers \(`trust"
    for look in (load_model, finding.load_tokenizer if mapped == "tokenizer_config.json" else finding.described):
        with pytest.raises(EngineError, match=says):
            look(tmp_path)


def test_what_a_quantiser_asks_for_is_one_sentence_and_memory_is_torchs_own_error(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    monkeypatch.setattr(finding.transformers.AutoModelForCausalLM, "from_pretrained", refuse)
    error: Exception = RuntimeError("GPU is required to quantize or run quantize model.")
    with pytest.raises(EngineError, match=r"cannot be loaded \(GPU is required .* model\), .*; see that what it asks for is there"):
        load_model(tmp_path)
    error = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        load_model(tmp_path)
