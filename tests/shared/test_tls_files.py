"""Files of certificates are checked before they are used, and taken up when they have been replaced."""

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from shared.tls_files import TlsError, TlsFiles, WatchedTls
from tests.tls_certificates import Authority


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "authority")


def refusal(files: TlsFiles) -> str:
    with pytest.raises(TlsError) as caught:
        files.read()
    return str(caught.value)


def test_what_is_read_are_the_files(authority: Authority) -> None:
    files = authority.issue("server")
    content = files.read()
    assert (files.ca_file, files.cert_file, files.key_file) != (None, None, None)
    assert content.ca == authority.ca_file.read_bytes()
    assert content.cert_chain == (authority.directory / "server-cert.pem").read_bytes()
    assert content.key == (authority.directory / "server-key.pem").read_bytes()


def test_a_client_may_have_no_certificate_and_no_authority_of_its_own(authority: Authority) -> None:
    assert TlsFiles().read().ca is None
    assert TlsFiles(authority.ca_file).read().cert_chain is None


def test_a_key_is_not_shown_where_what_was_read_is(authority: Authority) -> None:
    assert "PRIVATE KEY" not in repr(authority.issue("server").read())


def test_a_missing_file_is_named(authority: Authority) -> None:
    files = authority.issue("server")
    assert files.key_file is not None
    files.key_file.unlink()
    assert refusal(files) == f"{files.key_file}: cannot be read: No such file or directory."


def test_a_key_of_another_certificate_is_refused_with_both_names(authority: Authority) -> None:
    files, other = authority.issue("server"), authority.issue("other")
    message = refusal(replace(files, key_file=other.key_file))
    assert str(files.cert_file) in message
    assert str(other.key_file) in message


def test_an_encrypted_key_is_refused_and_nobody_is_asked_for_its_password(authority: Authority) -> None:
    files = authority.issue("server")
    encrypted = authority.directory / "encrypted.pem"
    subprocess.run(
        ["openssl", "pkey", "-in", str(files.key_file), "-aes256", "-passout", "pass:x", "-out", str(encrypted)],
        check=True,
    )
    assert "the key not encrypted" in refusal(replace(files, key_file=encrypted))


def test_a_file_without_an_authority_is_refused_by_name(authority: Authority) -> None:
    empty = authority.directory / "empty.pem"
    empty.write_text("nothing")
    assert refusal(TlsFiles(empty)) == f"{empty}: holds no certificate of an authority in PEM format."


def test_a_replaced_certificate_is_there_when_somebody_asks_and_stays_the_same_until_the_next(
    authority: Authority,
) -> None:
    watched = WatchedTls(authority.issue("server"))
    first = watched.content
    assert watched.content is first
    renewed = authority.issue("server").read()
    second = watched.content
    assert second == renewed != first
    assert watched.content is second


def test_the_files_are_looked_at_once_in_a_while(authority: Authority) -> None:
    now = 100.0
    watched = WatchedTls(authority.issue("server"), look_every_s=10.0, clock=lambda: now)
    first = watched.content
    renewed = authority.issue("server").read()
    now = 109.0
    assert watched.content is first
    now = 110.0
    assert watched.content == renewed


def test_while_one_file_of_two_is_replaced_what_was_read_before_stays_and_the_log_says_so_once(
    authority: Authority,
) -> None:
    files = authority.issue("server")
    watched = WatchedTls(files)
    first = watched.content
    assert files.key_file is not None
    old_key = files.key_file.read_bytes()
    renewed = authority.issue("server").read()
    new_key = files.key_file.read_bytes()
    files.key_file.write_bytes(old_key)
    with capture_logs() as events:
        assert watched.content is first
        assert watched.content is first
    assert [event["event"] for event in events] == ["certificate_refused"]
    files.key_file.write_bytes(new_key)
    assert watched.content == renewed


def test_the_commands_of_the_handbook_make_certificates_that_are_taken(tmp_path: Path) -> None:
    handbook = (Path(__file__).parents[2] / "docs/operations.md").read_text()
    section = handbook.partition("## Certificates without cert-manager")[2]
    commands = section.partition("```sh")[2].partition("```")[0]
    subprocess.run(["sh", "-e", "-c", commands], cwd=tmp_path, check=True, capture_output=True)
    for service in ("gateway", "vision", "llm"):
        files = TlsFiles(tmp_path / "ca.crt", tmp_path / f"{service}.crt", tmp_path / f"{service}.key")
        assert files.read().cert_chain
        verify = ["openssl", "verify", "-verify_hostname", "internvl-stage", "-CAfile", str(files.ca_file)]
        subprocess.run([*verify, str(files.cert_file)], check=True, capture_output=True)
