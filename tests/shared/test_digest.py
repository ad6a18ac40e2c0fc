"""Identity is full-width, and no two lists of fields share it."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.digest import checked_digest, digest_of, digest_of_fields
from shared.errors import InvalidRequest

FIELDS = st.lists(st.one_of(st.text(max_size=5), st.binary(max_size=5)), max_size=4)


def test_a_digest_is_the_sha256_of_the_bytes() -> None:
    assert digest_of(b"abc") == hashlib.sha256(b"abc").hexdigest()


def encoded(fields: list[str | bytes]) -> list[bytes]:
    return [field if isinstance(field, bytes) else field.encode() for field in fields]


@given(FIELDS, FIELDS)
def test_different_fields_have_different_digests(left: list[str | bytes], right: list[str | bytes]) -> None:
    assert (digest_of_fields(*left) == digest_of_fields(*right)) is (encoded(left) == encoded(right))


@pytest.mark.parametrize("text", ["", "ab", "G" * 64, "A" * 64, "a" * 63, "a" * 65, "a" * 64 + "\n", "../" + "a" * 61])
def test_what_is_no_digest_is_refused_by_its_field(text: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        checked_digest(text, "media.digest")
    assert refused.value.field == "media.digest"
