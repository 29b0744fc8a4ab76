"""Stores that somebody made to do harm: every file of theirs gives what it says, or one error of ours; never a hang, a bomb or a stray file."""

import pytest
import zstandard

from lopd.backends.zarr.format import decode_zstd

# Compressed arrays


@pytest.mark.parametrize("sized", [True, False])
def test_what_is_decompressed_has_the_size_that_was_recorded(sized: bool) -> None:
    bomb = zstandard.ZstdCompressor(write_content_size=sized).compress(bytes(1 << 26))
    assert len(bomb) < 10_000
    with pytest.raises(ValueError, match="it holds more bytes than 4096"):
        decode_zstd(bomb, 4096)
    small = zstandard.ZstdCompressor(write_content_size=sized).compress(b"1234")
    assert decode_zstd(small, 4).tobytes() == b"1234"
