"""What obstore raises, in our words."""

import re

#: Of a download that ended before all of it was there.
CUT_OFF = "its download was cut off, so pass a longer `timeout` and `client_retry_timeout` if the link is slow"
_NOT_OPENED = {
    "Account must be specified": "its URL names no account, expected that of Azure; set AZURE_STORAGE_ACCOUNT_NAME, or write "
    "abfss://container@account/path",
    "Unable to open service account file": "the file that GOOGLE_APPLICATION_CREDENTIALS or an option names cannot be opened, expected one of "
    "credentials; check its path and permissions",
}
_METADATA_HOST = "169.254.169.254"


def not_opened(error: BaseException, prefix: str | None) -> str:
    """Return why obstore opens no bucket, without the URL and the values of options.

    Args:
        error: what it raises.
        prefix: begin of the names of the variables that it reads; None where options were given.
    """
    if known := next((why for words, why in _NOT_OPENED.items() if words in str(error)), None):
        return known
    expected = "storage options of object_store; check their names"
    if prefix:
        expected = f"a URL and an environment of object_store; check the URL, and the variables that begin with {prefix}"
    return f"it cannot be opened ({type(error).__name__}), expected {expected}"


def said(error: Exception, *, late: bool = False) -> str:
    """Return an error of obstore in a few words: neither XML nor a query, which may carry a signature.

    Args:
        error: what it raises.
        late: whether the storage has answered before, so that a request whose time is over was too slow.
    """
    text = str(error)
    host, code, status = (re.search(p, text) for p in (r"https?://([^/\s?]+)", r"<Code>(\w+)", r"status code: (\d+ [\w ]*\w)"))
    if host is None:
        return CUT_OFF if "response body" in text else text.split("\n", 1)[0][:300]
    if host[1] == _METADATA_HOST:
        return f"no credentials were given, and {host[1]}, which machines in the cloud have them from, does not help"
    if re.search(r"redirect without LOCATION|the region \S+ is wrong", text):
        return f"{host[1]} answers that the bucket is in another region than AWS_REGION (or the option `aws_region`) names"
    if code is not None and code[1] == "ExpiredToken":
        return f"{host[1]} answers that the credentials have expired ({code[1]}), so set fresh ones and start again"
    if answer := code or status:
        return f"{host[1]} answers {answer[1]}"
    slow = late and "kind: Timeout" in text and "Connect" not in text
    return f"{host[1]} does not answer" + (" in time, so pass a longer `timeout` if the link is slow" if slow else "")
