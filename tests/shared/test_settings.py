"""Settings come from flags, then the environment, then defaults, and a mistake is one line that names it."""

from pathlib import Path

import pytest
from pydantic import Field
from pydantic_settings import SettingsConfigDict

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
    assert read("--model", "m").redis_url == "redis://127.0.0.1:1/0"
    assert read("--model", "m").listen == "127.0.0.1:0"


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ([], "--model (or EXAMPLE_MODEL)"),
        (["--model", "m", "--max-tiles", "0"], "--max-tiles (or EXAMPLE_MAX_TILES)"),
        (["--model", "m", "--max-tiles", "many"], "--max-tiles (or EXAMPLE_MAX_TILES)"),
        (["--model", "m", "--listen", "127.0.0.1:99999"], "--listen (or EXAMPLE_LISTEN)"),
        (["--model", "m", "--listen", "127.0.0.1"], "--listen (or EXAMPLE_LISTEN)"),
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
