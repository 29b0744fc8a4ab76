"""moto with one conditional write at a time: it looks whether an object is there and then writes it, so two of its threads may both make one."""

import sys
import threading
from typing import Any

from moto.s3.responses import S3Response
from moto.server import main

_LOCK = threading.Lock()


def _alone(method: Any) -> Any:
    def locked(self: S3Response, *args: Any, **options: Any) -> Any:
        with _LOCK:
            return method(self, *args, **options)

    return locked


if __name__ == "__main__":
    for name in ("put_object", "_key_response_post"):
        setattr(S3Response, name, _alone(getattr(S3Response, name)))
    main(sys.argv[1:])
