"""Who may call: keys that are known by their hashes, and the file that they are in, which may change at any time."""

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from structlog.testing import capture_logs

from gateway import keys as keys_module
from gateway.auth import presented_key
from gateway.caller import ANYBODY, Caller
from gateway.keys import KeyRing, KeysDocument, KeysFileInvalid, TenantLimits, hash_of, new_key
from gateway.keys_file import FollowedKeys, read_keys_file
from gateway.settings import GatewaySettings
from shared.digest import digest_of
from shared.errors import ApiKeyInvalid

KEY, OTHER = "ivl_canary-of-acme", "ivl_canary-of-umbrella"


def tenant(name: str, *keys: str, **more: Any) -> dict[str, Any]:
    entries = [{"name": f"key{index}", "sha256": hash_of(key)} for index, key in enumerate(keys)]
    return {"name": name, "keys": entries} | more


def content_of(*tenants: dict[str, Any]) -> bytes:
    return json.dumps({"tenants": tenants}).encode()


def ring(*tenants: dict[str, Any], clock: Callable[[], float] = lambda: 0.0) -> KeyRing:
    return KeyRing(KeysDocument.parsed(content_of(*tenants)), clock)


def refusal_of(keys: KeyRing, presented: str | None) -> tuple[type[Exception], str]:
    with pytest.raises(ApiKeyInvalid) as caught:
        keys.verify(presented)
    assert caught.value.field is caught.value.resource is caught.value.retry_after_s is None
    return type(caught.value), caught.value.message


def test_a_key_is_its_tenant_s() -> None:
    keys = ring(
        tenant("acme", KEY, "ivl_second"),
        tenant("umbrella", OTHER, isolated=True),
        tenant("us", "ivl_us", operator=True),
    )
    assert keys.verify(KEY) == Caller("acme", "key0")
    assert keys.verify("ivl_second") == Caller("acme", "key1")
    assert keys.verify(OTHER) == Caller("umbrella", "key0", is_isolated=True)
    assert keys.verify("ivl_us") == Caller("us", "key0", is_operator=True)


def test_without_a_keys_file_everybody_is_nobody_in_particular() -> None:
    assert KeyRing().is_open
    for presented in (None, "", KEY):
        assert KeyRing().verify(presented) is ANYBODY


def test_a_keys_file_without_keys_lets_nobody_in() -> None:
    assert not ring().is_open
    for presented in (None, "", KEY):
        refusal_of(ring(), presented)


def test_missing_unknown_wrong_and_expired_keys_are_refused_with_the_same_words() -> None:
    late = tenant("late", "ivl_late")
    late["keys"][0]["expires"] = "2026-01-01T00:00:00Z"
    keys = ring(tenant("acme", KEY), late, clock=lambda: 1_767_225_600.0)
    presented = (
        None,
        "",
        "nonsense",
        "ivl_unknown",
        KEY[:-1],
        KEY + " ",
        KEY.upper(),
        hash_of(KEY),
        "\udc80é",
        "ivl_late",
    )
    assert len({refusal_of(keys, each) for each in presented}) == 1


def test_a_key_is_good_until_the_moment_it_expires() -> None:
    entry = tenant("acme", KEY)
    entry["keys"][0]["expires"] = "1970-01-01T00:01:00+00:00"
    now = 59.9
    keys = ring(entry, clock=lambda: now)
    assert keys.verify(KEY).tenant == "acme"
    now = 60.0
    refusal_of(keys, KEY)


def test_every_hash_is_compared_whichever_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = 0

    def counting(one: bytes, other: bytes) -> bool:
        nonlocal compared
        compared += 1
        return one == other

    keys = ring(tenant("acme", KEY, "ivl_second"), tenant("umbrella", OTHER))
    monkeypatch.setattr(keys_module.hmac, "compare_digest", counting)
    for presented in (KEY, OTHER):
        keys.verify(presented)
    refusal_of(keys, "ivl_unknown")
    assert compared == 9


def test_limits_are_the_tenant_s_and_nobody_else_has_any() -> None:
    keys = ring(tenant("acme", KEY, limits={"requests_per_minute": 60, "tokens_per_minute": 1000}), tenant("umbrella"))
    assert keys.limits_of("acme") == TenantLimits(requests_per_minute=60, tokens_per_minute=1000)
    assert keys.limits_of("umbrella") == keys.limits_of("") == KeyRing().limits_of("acme") == TenantLimits()


def test_new_keys_are_recognized_and_never_the_same() -> None:
    made = {new_key() for _ in range(100)}
    assert len(made) == 100
    assert all(key.startswith("ivl_") and len(key) == len("ivl_") + 43 for key in made)
    assert hash_of(KEY) == digest_of(KEY.encode())


SOUND = tenant("acme", KEY)
BROKEN = {
    "no JSON": KEY.encode(),
    "cut short": content_of(SOUND)[:-4],
    "not UTF-8": b'{"tenants": [{"name": "\xff"}]}',
    "no object": b"[]",
    "no tenants": b"{}",
    "a misspelt limit": content_of(SOUND | {"limits": {"requests_per_minut": 1}}),
    "a limit of nothing": content_of(SOUND | {"limits": {"requests_per_minute": 0}}),
    "a key instead of its hash": content_of({"name": "acme", "keys": [{"name": "a", "sha256": KEY}]}),
    "a hash in capitals": content_of({"name": "acme", "keys": [{"name": "a", "sha256": hash_of(KEY).upper()}]}),
    "no hash": content_of({"name": "acme", "keys": [{"name": "a"}]}),
    "a time without a zone": content_of(
        {"name": "acme", "keys": [{"name": "a", "sha256": hash_of(KEY), "expires": "2026-01-01T00:00:00"}]}
    ),
    "no name": content_of(tenant("")),
    "a name that would be a part of other keys": content_of(tenant("a:b")),
    "a name with a line's end": content_of(tenant("acme\n")),
    "two tenants of one name": content_of(tenant("acme"), tenant("acme")),
    "two keys of one name": content_of({"name": "acme", "keys": [{"name": "a", "sha256": c * 64} for c in "ab"]}),
    "a key of two tenants": content_of(tenant("acme", KEY), tenant("umbrella", KEY)),
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_document_that_is_not_sound_is_refused_without_its_words(content: bytes) -> None:
    with pytest.raises(KeysFileInvalid) as caught:
        KeysDocument.parsed(content)
    assert str(caught.value)
    assert KEY not in str(caught.value)
    assert hash_of(KEY) not in str(caught.value)


async def test_a_changed_file_counts_from_the_next_look_on(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    file.write_bytes(content_of(tenant("acme", KEY)))
    followed = FollowedKeys(file)
    file.write_bytes(content_of(tenant("acme", OTHER)))
    assert followed.ring.verify(KEY).tenant == "acme"
    await followed.refresh()
    refusal_of(followed.ring, KEY)
    assert followed.ring.verify(OTHER).tenant == "acme"


async def test_a_secret_that_is_swapped_by_its_link_is_noticed(tmp_path: Path) -> None:
    """As Kubernetes does it: the file is a link through `..data`, which is turned to another folder at once."""
    for name, key in (("one", KEY), ("two", OTHER)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "keys.json").write_bytes(content_of(tenant("acme", key)))
    data, file = tmp_path / "..data", tmp_path / "keys.json"
    data.symlink_to("one")
    file.symlink_to("..data/keys.json")
    followed = FollowedKeys(file)
    turned = tmp_path / "..data_tmp"
    turned.symlink_to("two")
    turned.replace(data)
    await followed.refresh()
    refusal_of(followed.ring, KEY)
    assert followed.ring.verify(OTHER).tenant == "acme"


@pytest.mark.parametrize("content", [*BROKEN.values(), None], ids=[*BROKEN, "no file"])
async def test_a_file_that_breaks_is_logged_once_and_the_keys_stay(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "keys.json"
    file.write_bytes(content_of(tenant("acme", KEY)))
    followed = FollowedKeys(file)
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    with capture_logs() as events:
        await followed.refresh()
        await followed.refresh()
    assert [event["event"] for event in events] == ["keys_file_rejected"]
    assert KEY not in str(events)
    assert followed.ring.verify(KEY).tenant == "acme"
    file.write_bytes(content_of(tenant("umbrella", OTHER)))
    await followed.refresh()
    refusal_of(followed.ring, KEY)


async def test_the_file_is_looked_at_again_and_again(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    file.write_bytes(content_of(tenant("acme", KEY)))
    followed = FollowedKeys(file)
    following = asyncio.create_task(followed.follow(0.001))
    for key in (OTHER, KEY, OTHER):
        file.with_suffix(".new").write_bytes(content_of(tenant("acme", key)))
        file.with_suffix(".new").replace(file)
        async with asyncio.timeout(20):
            while not knows(followed.ring, key):
                await asyncio.sleep(0.001)
    following.cancel()


def knows(keys: KeyRing, key: str) -> bool:
    try:
        return bool(keys.verify(key))
    except ApiKeyInvalid:
        return False


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([("authorization", "Bearer k")], "k"),
        ([("authorization", "bearer  k ")], "k"),
        ([("x-api-key", "k")], "k"),
        ([("x-api-key", "other"), ("authorization", "Bearer k")], "k"),
        ([("authorization", "Basic abc"), ("x-api-key", "k")], "k"),
        ([("authorization", "Basic abc")], None),
        ([("authorization", "k")], None),
        ([("authorization", b"Bearer k")], None),
        ([("authorization", "Bearer k"), ("authorization", "Bearer k")], None),
        ([("x-api-key", "k"), ("x-api-key", "other")], None),
        ([("x-request-id", "k"), ("cookie", "k")], None),
        ([], None),
    ],
)
def test_a_key_is_shown_as_a_bearer_token_or_by_name(
    pairs: list[tuple[str, str | bytes]], expected: str | None
) -> None:
    assert presented_key(pairs) == expected


@given(st.text(max_size=100))
def test_no_text_but_the_key_lets_in(presented: str) -> None:
    refusal_of(ring(tenant("acme", KEY)), presented)


TARGETS = {"vision_target": "a:1", "llm_target": "a:2"}


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "127.0.0.9:50051", "[::1]:0", "localhost:0"])
def test_on_loopback_the_gateway_needs_no_keys(listen: str) -> None:
    assert GatewaySettings(listen=listen, **TARGETS).keys_file is None


@pytest.mark.parametrize("listen", ["0.0.0.0:50051", "[::]:50051", "10.0.0.1:0", "gateway:50051", "127.0.0.1.evil:1"])
def test_elsewhere_it_does_not_start_without_keys_and_says_what_to_do(
    listen: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    flags = ["--listen", listen, "--vision-target", "a:1", "--llm-target", "a:2"]
    with pytest.raises(SystemExit) as ended:
        GatewaySettings.from_command_line("gateway", flags)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert listen in line
    assert "--keys-file" in line
    assert "--allow-anyone" in line
    file = tmp_path / "keys.json"
    file.write_bytes(content_of())
    assert GatewaySettings.from_command_line("gateway", [*flags, "--allow-anyone"]).allow_anyone
    assert GatewaySettings.from_command_line("gateway", [*flags, "--keys-file", str(file)]).keys_file == file


def test_http_is_no_back_door() -> None:
    with pytest.raises(ValidationError, match=r"0\.0\.0\.0:8000"):
        GatewaySettings(listen="127.0.0.1:0", http_listen="0.0.0.0:8000", **TARGETS)
    assert GatewaySettings(listen="127.0.0.1:0", http_listen="127.0.0.1:8000", **TARGETS).http_listen


def test_keys_and_an_open_door_contradict_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "keys.json"
    file.write_bytes(content_of())
    flags = ["--vision-target", "a:1", "--llm-target", "a:2", "--keys-file", str(file), "--allow-anyone"]
    with pytest.raises(SystemExit):
        GatewaySettings.from_command_line("gateway", flags)
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_keys_file_that_cannot_be_used_stops_the_start_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "keys.json"
    file.write_bytes(BROKEN["a key instead of its hash"])
    flags = ["--vision-target", "a:1", "--llm-target", "a:2", "--listen", "0.0.0.0:1", "--keys-file", str(file)]
    with pytest.raises(SystemExit):
        GatewaySettings.from_command_line("gateway", flags)
    (line,) = capsys.readouterr().err.splitlines()
    assert "tenants.0.keys.0.sha256" in line
    assert KEY not in line


def test_the_guide_s_keys_file_is_a_keys_file() -> None:
    guide = (Path(__file__).parents[2] / "docs/keys.md").read_text()
    (example,) = re.findall(r"```json\n(.*?)```", guide, re.DOTALL)
    traits = {
        tenant.name: (tenant.isolated, tenant.operator) for tenant in KeysDocument.parsed(example.encode()).tenants
    }
    assert traits == {"acme": (False, False), "clinic": (True, False), "us": (False, True)}


def test_the_command_prints_a_key_once_and_an_entry_that_lets_it_in(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gateway.keys", "new", "--tenant", "acme", "--name", "laptop"]
    printed = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True).stdout
    key, _, entry = printed.partition("\n\n")
    file = tmp_path / "keys.json"
    file.write_bytes(content_of(json.loads(entry)))
    assert KeyRing(read_keys_file(file)).verify(key) == Caller("acme", "laptop")
    assert key not in entry
