"""`--help` is enough to work with, for every command."""

import re
from typing import Any

import pytest
import typer.main

from internvl_client import cli
from tests.client.command_line import run

COMMANDS = {command.name or command.callback.__name__: command for command in cli._commands().registered_commands}  # type: ignore[union-attr]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_shows_how_it_is_used(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out = run(capsys, monkeypatch, name, "--help")
    assert code == 0
    assert f"  internvl {name}" in out.partition("Examples:")[2]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_says_what_it_does(name: str) -> None:
    command = _command(name)
    assert command.help
    assert not [parameter.name for parameter in command.params if not parameter.help and parameter.name != "help"]


@pytest.mark.parametrize("name", COMMANDS)
def test_the_options_of_examples_exist(name: str) -> None:
    known = {option for parameter in _command(name).params for option in parameter.opts}
    examples = re.findall(r"^  internvl (.*)$", COMMANDS[name].epilog or "", re.MULTILINE)
    assert examples
    for example in examples:
        unquoted = re.sub(r'"[^"]*"', "", example)
        assert set(re.findall(r"(?<!\S)--?[a-z][a-z-]*", unquoted)) <= known, example


def _command(name: str) -> Any:
    return typer.main.get_command(cli._commands()).commands[name]  # type: ignore[attr-defined]
