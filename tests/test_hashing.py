"""Digests as they are stored."""

import hashlib

from trak_dist.hashing import digest_of, truncated


def test_a_digest_is_the_first_half_of_sha256() -> None:
    assert digest_of(b"") == "e3b0c44298fc1c149afbf4c8996fb924"
    sha = hashlib.sha256(b"in ")
    sha.update(b"pieces")
    assert truncated(sha) == digest_of(b"in pieces")
