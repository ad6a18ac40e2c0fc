"""Settings come from flags, then the environment, then defaults, and a mistake is one line that names it."""

from pathlib import Path

import pytest
from pydantic import Field, ValidationError
from pydantic_settings import SettingsConfigDict

from gateway.settings import GatewaySettings
from shared.settings import EmbeddingStoreSettings, ServiceSettings


class ExampleSettings(ServiceSettings, EmbeddingStoreSettings):
    """The settings of a service."""

    model_config = SettingsConfigDict(env_prefix="EXAMPLE_")

    model: Path = Field(description="what to serve")
    max_tiles: int = Field(12, ge=1, description="a number")


def read(*flags: str) -> ExampleSettings:
    return ExampleSettings.from_command_line("example", flags)


def test_flags_win_over_the_environment_which_wins_over_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXAMPLE_MAX_TILES", "6")
    monkeypatch.setenv("EXAMPLE_REDIS_URL", "redis://127.0.0.1:1/0")
    assert read("--model", "m").max_tiles == 6
    assert read("--model", "m", "--max-tiles", "3").max_tiles == 3
    assert read("--model", "m").redis_url.get_secret_value() == "redis://127.0.0.1:1/0"
    assert read("--model", "m").listen == "127.0.0.1:0"


def test_metrics_are_off_until_a_flag_or_the_environment_asks_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read("--model", "m").metrics_listen == ""
    assert read("--model", "m", "--metrics-listen", "127.0.0.1:9464").metrics_listen == "127.0.0.1:9464"
    monkeypatch.setenv("EXAMPLE_METRICS_LISTEN", "127.0.0.1:0")
    assert read("--model", "m").metrics_listen == "127.0.0.1:0"


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ([], "--model (or EXAMPLE_MODEL)"),
        (["--model", "m", "--max-tiles", "0"], "--max-tiles (or EXAMPLE_MAX_TILES)"),
        (["--model", "m", "--max-tiles", "many"], "--max-tiles (or EXAMPLE_MAX_TILES)"),
        (["--model", "m", "--listen", "127.0.0.1:99999"], "--listen (or EXAMPLE_LISTEN)"),
        (["--model", "m", "--listen", "127.0.0.1"], "--listen (or EXAMPLE_LISTEN)"),
        (["--model", "m", "--metrics-listen", "9464"], "--metrics-listen (or EXAMPLE_METRICS_LISTEN)"),
        (["--model", "m", "--redis-url", "localhost:6379"], "--redis-url (or EXAMPLE_REDIS_URL)"),
        (["--model", "m", "--no-such-flag", "1"], "--no-such-flag"),
    ],
)
def test_a_mistake_is_named_and_ends_with_status_2(
    flags: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        read(*flags)
    assert ended.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("example: ")
    assert named in last


def test_help_describes_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        read("--help")
    assert ended.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for name, field in ExampleSettings.model_fields.items():
        assert f"--{name.replace('_', '-')}" in shown
        assert field.description
        assert " ".join(field.description.split()[:4]) in shown


def test_settings_cannot_be_changed_and_do_not_show_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXAMPLE_EMBEDDING_KEY", "very-secret")
    settings = read("--model", "m")
    with pytest.raises(ValueError, match="frozen"):
        settings.max_tiles = 1  # type: ignore[misc]
    assert "very-secret" not in repr(settings)


@pytest.mark.parametrize(
    "url",
    [
        "redis://127.0.0.1",
        "redis://store:6379",
        "redis://store:6379/",
        "redis://store:6379/3",
        "redis://:pa%2Fs3cret@[::1]:6379/0",
        "rediss://user:s3cret@store.example/0?ssl_ca_certs=/etc/ca.pem",
        "unix:///run/redis.sock?db=2",
    ],
)
def test_a_url_that_redis_can_be_reached_under_is_kept_and_never_shown(url: str) -> None:
    settings = read("--model", "m", "--redis-url", url)
    assert settings.redis_url.get_secret_value() == url
    assert url not in repr(settings)
    assert "s3cret" not in f"{settings!r} {settings} {settings.model_dump()}"


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("http://s3cret@store", "redis://"),
        ("redis://", "host"),
        ("redis://:pa/s3cret@127.0.0.1:6379", "percent-encoded"),
        ("redis://u:s3cret@[::1:6379/0", "percent-encoded"),
        ("redis://u:s3cret@127.0.0.1:63x79/0", "port"),
        ("redis://u:s3cret@127.0.0.1:70000/0", "port"),
        ("redis://u:s3cret@127.0.0.1:0", "port"),
        ("redis://u:s3cret@127.0.0.1/first", "database"),
        ("redis://u:s3cret@127.0.0.1/0/s3cret", "database"),
        ("redis://u:s3cret@127.0.0.1?db=-1", "database"),
        ("redis://u:s3cret@127.0.0.1/0#s3cret", "percent-encoded"),
        ("redis://127.0.0.1/0?decode_responses=s3cret", "decode_responses"),
        ("redis://127.0.0.1/0?socket_timeout=40", "socket_timeout"),
        ("unix://?db=s3cret", "path"),
    ],
)
def test_a_url_that_cannot_work_is_refused_in_one_line_without_quoting_it(
    url: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        read("--model", "m", "--redis-url", url)
    line = capsys.readouterr().err
    assert line.startswith("example: --redis-url (or EXAMPLE_REDIS_URL): ")
    assert line.count("\n") == 1
    assert says in line
    assert "s3cret" not in line
    with pytest.raises(ValidationError) as caught:
        ExampleSettings(model=Path("m"), redis_url=url)  # type: ignore[arg-type]
    assert "s3cret" not in str(caught.value)


def test_no_url_is_no_store_for_embeddings_and_a_mistake_for_the_gateway(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not read("--model", "m").redis_url
    monkeypatch.setenv("GATEWAY_REDIS_URL", "")
    targets = ["--vision-target", "v:1", "--llm-target", "l:1"]
    with pytest.raises(SystemExit):
        GatewaySettings.from_command_line("gateway", targets)
    assert "--redis-url (or GATEWAY_REDIS_URL)" in capsys.readouterr().err
    monkeypatch.delenv("GATEWAY_REDIS_URL")
    assert "6379" in GatewaySettings.from_command_line("gateway", targets).redis_url.get_secret_value()


def test_help_shows_no_password_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EXAMPLE_REDIS_URL", "redis://:s3cret@127.0.0.1/0")
    with pytest.raises(SystemExit):
        read("--help")
    assert "s3cret" not in capsys.readouterr().out
