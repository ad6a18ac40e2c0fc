"""Which URLs, hosts and addresses are allowed, before anything is connected to."""

from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.remote import HostList
from gateway.remote.addresses import PublicAddresses
from gateway.remote.limits import FetchLimits
from gateway.remote.refusals import Outcome, Refused
from gateway.remote.url import RemoteUrl, parse_url

HOSTILE = [
    "http://pictures.example/a.png",
    "ftp://pictures.example/a.png",
    "file:///etc/passwd",
    "//pictures.example/a.png",
    "https:/pictures.example/a.png",
    "https:///a.png",
    "https://",
    "https://127.0.0.1/",
    "https://[::1]/",
    "https://[::ffff:127.0.0.1]/",
    "https://[::ffff:7f00:1]/",
    "https://0x7f.1/",
    "https://0x7f000001/",
    "https://2130706433/",
    "https://0177.0.0.1/",
    "https://127.1/",
    "https://pictures.example@127.0.0.1/",
    "https://user@pictures.example/a.png",
    "https://user:secret@pictures.example/a.png",
    "https://pictures.example\\@evil.example/",
    "https://evil.example\\.pictures.example/",
    "https:\\\\pictures.example/a.png",
    "https://pictures.example%2eevil.example/",
    "https://pictures.example%00.evil.example/",
    "https://pictures.example\x00/",
    "https://pictures.example/a.png\r\nHost: evil.example",
    "https://pictures.example/a b.png",
    "https://pictures.example\t/a.png",
    " https://pictures.example/a.png",
    "https://pictures.example/a.png\n",
    "https://pictures.example./a.png",
    "https://-pictures.example/a.png",
    "https://pictures..example/a.png",
    "https://pictures.example:0/",
    "https://pictures.example:99999/",
    "https://pictures.example:443:80/",
    "https://pictures.example:+443/",
    "https://pictures。example/a.png",
    "https://p\u0456ctures.example/a.png",  # a Cyrillic letter
    "https://ⓟictures.example/a.png",
    "https://pictures.example/ä.png",
    "https://picture\u017f.example/a.png",  # upper case turns the long s into an S
    "https://" + "a." * 150 + "example/",
    "https://pictures.example/" + "a" * 5000,
]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_url_that_two_programs_might_read_differently_is_refused(text: str) -> None:
    with pytest.raises(Refused) as refused:
        parse_url(text)
    assert refused.value.outcome is Outcome.NOT_ALLOWED


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://pictures.example/a.png", RemoteUrl("pictures.example", 443, "/a.png")),
        ("HTTPS://Pictures.EXAMPLE", RemoteUrl("pictures.example", 443, "/")),
        ("https://pictures.example:8443/a?b=c%20d", RemoteUrl("pictures.example", 8443, "/a?b=c%20d")),
        ("https://pictures.example?b", RemoteUrl("pictures.example", 443, "/?b")),
        ("https://xn--bcher-kva.example/a#part", RemoteUrl("xn--bcher-kva.example", 443, "/a")),
        ("https://pictures.example/@127.0.0.1/", RemoteUrl("pictures.example", 443, "/@127.0.0.1/")),
    ],
)
def test_a_plain_url_is_read_in_one_way(text: str, expected: RemoteUrl) -> None:
    assert parse_url(text) == expected


@given(st.text(st.characters(codec="utf-8"), max_size=40), st.sampled_from(["/", "?", "#", ":", "@", "\\", ".", ""]))
def test_whatever_stands_behind_an_allowed_name_never_becomes_another_host(rest: str, separator: str) -> None:
    try:
        url = parse_url(f"https://pictures.example{separator}{rest}")
    except Refused:
        return
    assert url.host.startswith("pictures.example")
    assert url.host == "pictures.example" or separator in (".", "")
    assert url.host.isascii()
    assert not set(url.target) & set(" \r\n\t\\#")


def allowed(entries: str, url: str) -> bool:
    return HostList.parsed(entries).allows(parse_url(url))


def test_only_listed_hosts_and_ports_are_allowed() -> None:
    entries = "pictures.example, cdn.example:8443"
    assert allowed(entries, "https://pictures.example/a")
    assert allowed(entries, "https://cdn.example:8443/a")
    assert not allowed(entries, "https://cdn.example/a")
    assert not allowed(entries, "https://pictures.example:8443/a")
    assert not allowed(entries, "https://www.pictures.example/a")
    assert not allowed(entries, "https://pictures.example.evil.example/a")
    assert not allowed(entries, "https://notpictures.example/a")
    assert not allowed("", "https://pictures.example/a")


def test_a_domain_lets_in_what_lies_below_it_and_not_itself() -> None:
    assert allowed("*.bucket.example", "https://eu.bucket.example/a")
    assert allowed("*.bucket.example", "https://a.eu.bucket.example/a")
    assert not allowed("*.bucket.example", "https://bucket.example/a")
    assert not allowed("*.bucket.example", "https://evilbucket.example/a")


def test_any_host_is_any_host_at_the_port_of_https() -> None:
    assert allowed("*", "https://pictures.example/a")
    assert not allowed("*", "https://pictures.example:6379/a")


@pytest.mark.parametrize(
    "entry", ["127.0.0.1", "[::1]", "https://pictures.example", "a/b", "a.*.b", "a:0", "a:x", "*:1"]
)
def test_a_list_with_a_mistake_is_refused(entry: str) -> None:
    with pytest.raises(ValueError, match=r"has to be host names|takes no port"):
        HostList.parsed(f"pictures.example,{entry}")


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0",
        "10.1.2.3",
        "100.64.0.1",
        "100.100.100.200",
        "127.0.0.1",
        "127.255.255.254",
        "168.63.129.16",
        "169.254.169.254",
        "172.16.0.1",
        "172.31.255.255",
        "192.0.0.192",
        "192.168.1.1",
        "198.18.0.1",
        "203.0.113.9",
        "224.0.0.1",
        "239.255.255.250",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::127.0.0.1",
        "::ffff:127.0.0.1",
        "::ffff:8.8.8.8",
        "64:ff9b::7f00:1",
        "64:ff9b::a9fe:a9fe",
        "64:ff9b:1::a00:1",
        "100::1",
        "2001::1",
        "2001:0:4136:e378:8000:63bf:3fff:fdd2",
        "2001:db8::1",
        "2002:7f00:1::",
        "2002:a00:1::1",
        "3fff::1",
        "fc00::1",
        "fd00:ec2::254",
        "fe80::1",
        "fe80::1%eth0",
        "2606:4700::1%eth0",
        "fec0::1",
        "ff02::1",
        "5f00::1",
    ],
)
def test_an_address_that_is_not_public_is_not_connected_to(address: str) -> None:
    assert not PublicAddresses().allows(ip_address(address))


@pytest.mark.parametrize("address", ["8.8.8.8", "172.32.0.1", "100.128.0.1", "2606:4700::1111", "2a00:1450:4001::8"])
def test_a_public_address_may_be_connected_to(address: str) -> None:
    assert PublicAddresses().allows(ip_address(address))


@given(st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)))
def test_what_python_knows_as_not_global_is_never_allowed(address: object) -> None:
    checked = ip_address(str(address))
    if PublicAddresses().allows(checked):
        # Its anycast addresses Python takes for global, which is no matter here.
        assert checked.is_global
        assert not checked.is_multicast
        assert checked not in ip_network("100.64.0.0/10")


def test_a_body_is_too_slow_only_after_its_grace() -> None:
    limits = FetchLimits(grace_s=3, min_bytes_per_s=1000)
    assert not limits.is_too_slow(0, 3.0)
    assert not limits.is_too_slow(4000, 4.0)
    assert limits.is_too_slow(3999, 4.0)
