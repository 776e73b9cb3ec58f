"""What the watcher reads from its environment."""

# ruff: noqa: RUF009 - `setting` only makes a dataclass field

import ipaddress
import re
from dataclasses import dataclass

from shared.settings import CommonSettings, flag, setting, text_value

# Kubelet's id of a static pod, which its cgroup shows in place of the uid.
CONFIG_HASH = "kubernetes.io/config.hash"
# Names as the API takes them (apimachinery validation.IsDNS1123Label, IsDNS1123Subdomain).
_DNS_LABEL = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
_DNS_SUBDOMAIN = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*"


@dataclass(frozen=True, slots=True)
class Address:
    """A TCP address to listen on; no host is every address, of IPv6 and of IPv4."""

    host: str
    port: int

    def __str__(self) -> str:
        """Return it as the setting has it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


def _namespace(value: str) -> str:
    # Of one that cannot exist the API lists no pods, without an error: limits would be given back.
    if not re.fullmatch(_DNS_LABEL, value):
        raise ValueError("not the name of one namespace such as team-a")
    return value


def _node(value: str) -> str:
    if len(value) > 253 or not re.fullmatch(_DNS_SUBDOMAIN, value):
        raise ValueError("not the name of a node such as node-1.example.com")
    return value


def _annotation(value: str) -> str:
    # A qualified name (apimachinery validation.IsQualifiedName): an optional DNS prefix, a name.
    prefix = r"(?:[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/)?"
    if not re.fullmatch(prefix + r"[A-Za-z0-9](?:[-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?", value):
        raise ValueError("not an annotation key such as example.com/name")
    if value == CONFIG_HASH:
        raise ValueError("the kubelet's own: it holds the id of a static pod")
    return value


def _address(value: str) -> Address | None:
    if value == "off":
        return None
    host, colon, port = text_value(value).rpartition(":")
    if not colon or not re.fullmatch(r"[0-9]{1,5}", port) or int(port) > 65535:
        raise ValueError("neither `off` nor an address such as :9100 or 0.0.0.0:9100")
    if host and host == f"[{host[1:-1]}]":
        return Address(_ip6(host[1:-1]), int(port))
    if ":" in host:
        raise ValueError(f"an IPv6 address takes brackets, as in [{host.strip('[]')}]:{port}")
    if not re.fullmatch(r"[A-Za-z0-9.-]*", host):
        raise ValueError(f"{host!r} is no host; write :{port} to listen on every address")
    return Address(host, int(port))


def _ip6(host: str) -> str:
    # Without the zone, which names an interface (RFC 4007): ipaddress takes only some of them.
    try:
        ipaddress.IPv6Address(host.partition("%")[0])
    except ValueError as error:
        raise ValueError(f"[{host}] is no IPv6 address such as [::]") from error
    return host


@dataclass(frozen=True, kw_only=True, slots=True)
class WatcherSettings(CommonSettings):
    """What the watcher reads."""

    node: str = setting("NODE_NAME", None, "node whose pods are watched", _node, required=True)
    kubeconfig: str | None = setting(
        "KUBECONFIG", None, "used outside a cluster (in-cluster configuration comes first)"
    )
    namespace: str | None = setting(
        "WATCH_NAMESPACE", None, "only pods of this namespace", _namespace
    )
    annotation: str = setting(
        "POWER_AGENT_ANNOTATION",
        "dynamo.nvidia.com/gpu-power-limit",
        "annotation key",
        _annotation,
    )
    metrics: Address | None = setting(
        "POWER_AGENT_METRICS_ADDR",
        ":9100",
        "/metrics, /healthz, /readyz; without a host IPv4 and IPv6; off disables",
        _address,
    )
    events: bool = setting(
        "POWER_AGENT_EVENTS", "false", "write Kubernetes Events (needs the extra rule)", flag
    )
