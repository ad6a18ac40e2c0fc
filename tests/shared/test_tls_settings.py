"""Settings of TLS are checked before anything begins: what goes together is given together."""

from pathlib import Path

import pytest
from pydantic_settings import SettingsConfigDict

from shared.settings import ServiceSettings, StageTlsSettings
from shared.tls_files import TlsFiles


class ExampleSettings(ServiceSettings, StageTlsSettings):
    """The settings of a service that calls others."""

    model_config = SettingsConfigDict(env_prefix="EXAMPLE_")


def read(*flags: str) -> ExampleSettings:
    return ExampleSettings.from_command_line("example", flags)


def test_without_files_everything_is_plaintext() -> None:
    settings = read()
    assert settings.server_tls is None
    assert settings.stage_tls is None
    assert settings.health_listen == ""


def test_an_empty_variable_is_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TLS_CERT_FILE", "TLS_KEY_FILE", "TLS_CLIENT_CA_FILE", "STAGE_CA_FILE", "STAGE_CERT_FILE"):
        monkeypatch.setenv(f"EXAMPLE_{name}", "")
    assert read().server_tls is None
    assert read().stage_tls is None


def test_a_certificate_and_its_key_turn_tls_on_and_an_authority_asks_callers_for_theirs() -> None:
    flags = ("--tls-cert-file", "c", "--tls-key-file", "k")
    assert read(*flags).server_tls == TlsFiles(None, Path("c"), Path("k"))
    assert read(*flags, "--tls-client-ca-file", "a").server_tls == TlsFiles(Path("a"), Path("c"), Path("k"))


def test_stages_are_called_with_what_the_settings_say() -> None:
    assert read("--stage-ca-file", "a").stage_tls == TlsFiles(Path("a"))
    flags = ("--stage-ca-file", "a", "--stage-cert-file", "c", "--stage-key-file", "k", "--stage-name", "n")
    assert read(*flags).stage_tls == TlsFiles(Path("a"), Path("c"), Path("k"), "n")


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("--tls-cert-file", "c"), "--tls-key-file (or EXAMPLE_TLS_KEY_FILE)"),
        (("--tls-key-file", "k"), "goes with --tls-cert-file: give both or neither"),
        (("--tls-client-ca-file", "a"), "--tls-client-ca-file (or EXAMPLE_TLS_CLIENT_CA_FILE)"),
        (("--stage-cert-file", "c", "--stage-key-file", "k"), "needs --stage-ca-file"),
        (("--stage-ca-file", "a", "--stage-cert-file", "c"), "--stage-key-file (or EXAMPLE_STAGE_KEY_FILE)"),
        (("--stage-ca-file", "a", "--stage-key-file", "k"), "goes with --stage-cert-file: give both or neither"),
        (("--stage-name", "n"), "--stage-name (or EXAMPLE_STAGE_NAME)"),
        (("--health-listen", "8080"), "--health-listen (or EXAMPLE_HEALTH_LISTEN)"),
        (("--part-stall-s", "0"), "--part-stall-s (or EXAMPLE_PART_STALL_S)"),
    ],
)
def test_what_is_missing_is_one_line_that_names_it(
    flags: tuple[str, ...], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        read(*flags)
    assert ended.value.code == 2
    assert complaint in capsys.readouterr().err
