"""Which addresses may be connected to: public ones, and nothing that could be a machine of ours."""

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Final, Protocol, TypeAlias

Address: TypeAlias = IPv4Address | IPv6Address

# IANA's special-purpose registry, written out: what Python's `is_global` says has changed from release to release.
_SPECIAL_V4: Final = tuple(
    IPv4Network(network)
    for network in (
        "0.0.0.0/8",  # this network, and "any"
        "10.0.0.0/8",
        "100.64.0.0/10",  # carriers' NAT; a cloud's metadata at 100.100.100.200
        "127.0.0.0/8",
        "168.63.129.16/32",  # a cloud's agent behind a public number
        "169.254.0.0/16",  # link-local; most clouds' metadata
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.31.196.0/24",
        "192.52.193.0/24",
        "192.88.99.0/24",  # relays of 6to4
        "192.168.0.0/16",
        "192.175.48.0/24",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, and broadcast
    )
)
# Global unicast only: that leaves out loopback, "any", link-local, site-local, unique local and multicast addresses,
# IPv4 in ::ffff:0:0/96 and ::/96, and NAT64 in 64:ff9b::/96 and 64:ff9b:1::/48.
_GLOBAL_V6: Final = IPv6Network("2000::/3")
_SPECIAL_V6: Final = tuple(
    IPv6Network(network)
    for network in (
        "2001::/23",  # protocol assignments: Teredo and ORCHID among them
        "2001:db8::/32",
        "2002::/16",  # 6to4, which carries any IPv4 address
        "2620:4f:8000::/48",
        "3ffe::/16",
        "3fff::/20",
    )
)


class AddressPolicy(Protocol):
    """Says which addresses media may be fetched from."""

    def allows(self, address: Address) -> bool:
        """Whether `address` may be connected to."""


class PublicAddresses:
    """Public addresses of the Internet."""

    def allows(self, address: Address) -> bool:
        """Whether `address` is public, in itself and not as a wrapping of another."""
        if isinstance(address, IPv4Address):
            return not any(address in network for network in _SPECIAL_V4)
        return (
            address.scope_id is None
            and address in _GLOBAL_V6
            and not any(address in network for network in _SPECIAL_V6)
        )
