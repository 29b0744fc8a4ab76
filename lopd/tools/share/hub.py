"""What is asked of a model hub, by `huggingface_hub`: one commit of the files that are named, or one sentence that states why not.

The token is the one that `hf auth login` or HF_TOKEN gave to `huggingface_hub`.  It is never an argument, and no message repeats it.
"""

import errno
from collections.abc import Callable, Iterable, Iterator, Mapping
from json import JSONDecodeError
from pathlib import Path
from typing import Any, Literal, TypeVar

from attrs import frozen

from lopd.backends.retry import repeat
from lopd.engines.placing import WEIGHTS
from lopd.errors import HubError, InvalidRecordError, LopdError, StoreExistsError
from lopd.records.checks import texts_of
from lopd.records.optional import need
from lopd.records.paths import said_without_secrets, without_secrets

T = TypeVar("T")
#: The hub puts it into a new repository.
_ITS_OWN = {".gitattributes"}


@frozen
class Repository:
    """One repository of a hub.

    Args:
        name: `owner/name`.
        kind: what it holds.
        endpoint: URL of the hub; None for that of HF_ENDPOINT, or huggingface.co.

    Raises:
        InvalidRecordError: the name is not of that form.
        MissingDependencyError: huggingface_hub is not installed.
    """

    name: str
    kind: Literal["model", "dataset"]
    endpoint: str | None = None

    def __attrs_post_init__(self) -> None:
        hub = need("huggingface_hub", "Hub", "hub")
        try:
            hub.utils.validate_repo_id(texts_of("Repository", [self.name])[0])
            fits = "/" in self.name
        except hub.utils.HFValidationError:
            fits = False
        if not fits:
            raise InvalidRecordError(f"Repository {self.name!r:.80}: the name does not fit, expected `owner/name`; name both.")

    @property
    def owner(self) -> str:
        """How messages name it."""
        return f"Repository {self.name} ({self.kind}) at {without_secrets(self._api.endpoint)}"

    def commit(self, files: Mapping[str, Path | bytes], message: str, *, private: bool, exist_ok: bool) -> str:
        """Put these files into the repository, in one commit, and return the hash of the commit.

        A repository that is not there is made.  Files of the same content as those that are there are not sent again.

        Raises:
            StoreExistsError: the repository has files already, without `exist_ok`; or weights that these would not replace.
            HubError: it is public and `private` is asked for, or the hub refuses, or cannot be reached.
        """
        hub, api = need("huggingface_hub", "Hub", "hub"), self._api
        parent = self.look(files, private=private, exist_ok=exist_ok)
        if parent is None:
            self._ask(lambda: api.create_repo(self.name, repo_type=self.kind, private=private, exist_ok=True))
            parent = self.look(files, private=private, exist_ok=exist_ok, made=True)

        def commit() -> Any:
            # an addition cannot be sent twice
            added = [hub.CommitOperationAdd(name, content) for name, content in files.items()]
            return api.create_commit(self.name, added, repo_type=self.kind, commit_message=message, parent_commit=parent)

        return str(self._ask(commit).oid)

    def look(self, names: Iterable[str], *, private: bool, exist_ok: bool, made: bool = False) -> str | None:
        """Return the last commit, None where there is no repository, if files of these names may be committed; nothing is made.

        Where the hub does not answer whether the token may write, that shows later.  A repository that was `made` must be there.

        Raises:
            StoreExistsError, HubError: as `commit`.
        """
        if not self._token():
            raise HubError(f"{self.owner}: there is no token that may write; run `hf auth login`, or set HF_TOKEN.")
        there = self._ask(lambda: self._info(made))
        if there is not None:
            self._check(there, {*names}, private=private, exist_ok=exist_ok)
        if not made and self._only_reads(new=there is None):
            raise HubError(f"{self.owner}: the token may not write there; use one that may (`hf auth login`, or HF_TOKEN).")
        sha: str | None = None if there is None else there.sha
        return sha

    def _info(self, made: bool) -> Any:
        """Return what the hub knows of the repository; None if it is not `made`, and not there, or the token may not see it."""
        try:
            return self._api.repo_info(self.name, repo_type=self.kind)
        except need("huggingface_hub", "Hub", "hub").utils.HfHubHTTPError as error:
            # not every hub adds to its 404 what is not there
            if made or _status(error) != 404:
                raise
            return None

    def _only_reads(self, *, new: bool) -> bool:
        """Return whether the hub answers that the token may not write there; False where it does not answer that."""
        try:
            if new:
                return bool(self._api.whoami()["auth"]["accessToken"]["role"] == "read")
            self._api.auth_check(self.name, repo_type=self.kind, write=True)
        except Exception as error:  # not every hub knows these two
            return not new and _status(error) in (401, 403)
        return False

    def fetch(self, name: str, revision: str | None) -> Path:
        """Download a file into the cache of `huggingface_hub`, unless it is there, and return where it is.

        Raises:
            HubError: there is no such repository, file or revision, or the token may not read it, or the hub cannot be reached.
        """
        api = self._api
        return Path(self._ask(lambda: api.hf_hub_download(self.name, name, repo_type=self.kind, revision=revision), resumes=True))

    @property
    def _api(self) -> Any:
        return need("huggingface_hub", "Hub", "hub").HfApi(endpoint=self.endpoint, library_name="lopd")

    def _check(self, there: Any, given: set[str], *, private: bool, exist_ok: bool) -> None:
        names = {sibling.rfilename for sibling in there.siblings or ()} - _ITS_OWN
        if private and there.private is not True:
            raise HubError(
                f"{self.owner}: it is public, and this is meant to be private; pass `private=False` if all may read it, or name another."
            )
        if names and not exist_ok:
            raise StoreExistsError(
                f"{self.owner}: it has {len(names)} files already, for example {min(names)!r}; pass `exist_ok=True` to commit to it, or name another."
            )
        stale = next((name for name in sorted(names - given) if name.endswith(WEIGHTS)), None)
        if stale:
            raise StoreExistsError(
                f"{self.owner}: it has {stale!r}, which this commit does not replace, so engines might load either; remove it there, or name another."
            )

    def _ask(self, work: Callable[[], T], *, resumes: bool = False) -> T:
        """Return what the hub answers; what fails for a reason that passes is asked again, and a download goes on where it was."""
        try:
            # what huggingface_hub repeats itself has failed for longer than this when it raises
            return repeat(work, _passes, seconds=20.0, times=4, pause=1.0, longest=8.0)
        except Exception as error:
            if isinstance(error, LopdError):
                raise
            refused = self._refusal(error, "run this again, which resumes" if resumes else "run this again")
        # the error of huggingface_hub holds the request, and so the token
        raise refused from None

    def _refusal(self, error: Exception, again: str) -> HubError:
        status, what = _status(error), type(error).__name__
        if status in (401, 403):
            return HubError(f"{self.owner}: the hub answers {status}; use a token that may do this (`hf auth login`, or HF_TOKEN).")
        if status == 404:
            return HubError(f"{self.owner}: the hub answers 404 ({what}); check the names, and whether the token may read it.")
        if status in (409, 412):
            return HubError(f"{self.owner}: the hub answers {status}, somebody else commits to it; run this again.")
        if _busy(status):
            return HubError(f"{self.owner}: the hub answers {status}, also when asked again; run this again later.")
        if what == "OfflineModeIsEnabled" or need("huggingface_hub", "Hub", "hub").constants.HF_HUB_OFFLINE:
            return HubError(f"{self.owner}: HF_HUB_OFFLINE is set, so the hub is not asked; unset it.")
        causes, endpoint = [*_causes(error)], self._api.endpoint
        said = " from ".join(dict.fromkeys(map(_told, (causes[0], causes[-1]))))
        if without_secrets(endpoint) != endpoint or any(token in str(one) for one in causes for token in [self._token()] if token):
            said = what
        answered = "" if status is None else f", status {status}"
        garbled = status is None and isinstance(error, JSONDecodeError | KeyError | TypeError | AttributeError)
        remedy = "check what is pushed, and the URL of the hub"
        if garbled:
            remedy = "that is not the answer of a hub, so check `endpoint=` or HF_ENDPOINT"
        elif any(getattr(one, "errno", None) in (errno.ENOSPC, errno.EDQUOT) for one in causes):
            remedy = f"free space where HF_HOME is, and {again}"
        elif _passes(error):
            remedy = f"check the connection and the URL of the hub, and {again}"
        return HubError(f"{self.owner}: it failed with {said}{answered}; {remedy}.")

    @staticmethod
    def _token() -> str | None:
        token: str | None = need("huggingface_hub", "Hub", "hub").get_token()
        return token


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _told(error: BaseException) -> str:
    # a presigned URL carries its signature in its query
    return f"{type(error).__name__} ({' '.join(said_without_secrets(str(error)).split())[:300].rstrip('.')})"


def _status(error: Exception) -> int | None:
    """Return what the hub answered: the error, or what it was raised from, has it."""
    found = (getattr(getattr(one, "response", None), "status_code", None) for one in _causes(error))
    return next((status for status in found if status is not None), None)


def _passes(error: Exception) -> bool:
    """Return whether to ask again: the hub is busy, or the connection broke."""
    status = _status(error)
    return _busy(status) or (status is None and any(type(one).__module__.startswith("httpx") for one in _causes(error)))


def _busy(status: int | None) -> bool:
    return status is not None and (status in (408, 429) or status >= 500)
