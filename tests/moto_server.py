"""moto as S3 alone, with one conditional write at a time: it looks whether an object is there and then writes it, so two threads may both make one.

Left to itself it finds out for each request which of all services is asked, which takes as long as half of the answers, and prints a line.
"""

import sys
import threading
from typing import Any

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from moto.s3.responses import S3Response
from moto.server import main
from werkzeug.serving import WSGIRequestHandler

_LOCK = threading.Lock()


def _alone(method: Any) -> Any:
    def locked(self: S3Response, *args: Any, **options: Any) -> Any:
        with _LOCK:
            return method(self, *args, **options)

    return locked


if __name__ == "__main__":
    for name in ("put_object", "_key_response_post"):
        setattr(S3Response, name, _alone(getattr(S3Response, name)))
    application = create_backend_app("s3")
    setattr(DomainDispatcherApplication, "get_application", lambda *_: application)  # noqa: B010  # mypy refuses to assign a method
    setattr(WSGIRequestHandler, "log_request", lambda *_: None)  # noqa: B010
    main(sys.argv[1:])
