"""A real Prometheus beside a simulated node, on whose rules time passes faster.

It knows the API of Prometheus and nothing of what is scraped.
"""

from __future__ import annotations

import json
import re
import subprocess
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any, Self

import yaml

from tests.simnode.controlplane_process import free_ports
from tests.waiting import HANG_S, until

SCRAPE_S = 0.5
# So much shorter is each `for` and each range, and so much lower each bound on an age in seconds:
# the programs' own heartbeats, every two seconds, stay as they are.
SHORTER, YOUNGER = 60, 15
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def hurried(rules: str, shorter: int = SHORTER) -> str:
    """The same rules where a minute is a second, or less with a larger `shorter`."""
    spec = yaml.safe_load(rules)

    def span(found: re.Match[str]) -> str:
        return f"{found[1]}{int(found[2]) * _UNITS_S[found[3]] * 1000 // shorter}ms"

    for rule in (rule for group in spec["groups"] for rule in group["rules"]):
        spans = re.sub(r"(\[|offset )(\d+)([smhd])", span, rule["expr"])
        rule["expr"] = re.sub(r"(_age_seconds\)? [<>]=? )(\d+)", _age, spans)
        if "for" in rule:
            rule["for"] = re.sub(r"()(\d+)([smhd])", span, rule["for"])
    return yaml.safe_dump(spec, width=10_000)


def _age(found: re.Match[str]) -> str:
    return f"{found[1]}{int(found[2]) / YOUNGER:g}"


class Prometheus:
    """`with Prometheus(programs, folder, port, rules) as prometheus: prometheus.query("up")`."""

    def __init__(self, programs: Path, folder: Path, target_port: int, rules: str) -> None:
        """`target_port` is scraped as the PodMonitor has it: the pods' own labels are kept."""
        self._program, self._folder = programs / "prometheus", folder
        self._port = free_ports(1)[0]
        (folder / "rules.yaml").write_text(rules)
        scrape = {
            "job_name": "dynamo-system/power-agent",
            "honor_labels": True,
            "static_configs": [
                {"targets": [f"127.0.0.1:{target_port}"], "labels": {"node": "node-a"}}
            ],
        }
        every = f"{SCRAPE_S * 1000:g}ms"
        times = {
            "scrape_interval": every,
            "scrape_timeout": every,
            "evaluation_interval": every,
        }
        made = {"global": times, "rule_files": ["rules.yaml"], "scrape_configs": [scrape]}
        (folder / "prometheus.yml").write_text(yaml.safe_dump(made))

    def __enter__(self) -> Self:
        self._log = (self._folder / "log").open("wb")
        self._process = subprocess.Popen(
            [
                self._program,
                f"--config.file={self._folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={self._folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{self._port}",
            ],
            stdout=self._log,
            stderr=self._log,
        )
        until(self._ready, "Prometheus", explain=(self._folder / "log").read_text)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()

    def _ready(self) -> bool:
        assert self._process.poll() is None, (self._folder / "log").read_text()
        try:
            return bool(self.query("up == 1"))
        except OSError:
            return False

    def query(self, expression: str) -> list[dict[str, Any]]:
        """What an instant query gives now."""
        found: list[dict[str, Any]] = self._get("query", query=expression)["result"]
        return found

    def alerts(self) -> dict[str, list[dict[str, Any]]]:
        """Those that fire, by name: labels, annotations, and since when without a break."""
        firing: dict[str, list[dict[str, Any]]] = {}
        for alert in self._get("alerts")["alerts"]:
            if alert["state"] == "firing":
                firing.setdefault(alert["labels"]["alertname"], []).append(alert)
        return firing

    def _get(self, what: str, **parameters: str) -> Any:  # noqa: ANN401 - JSON
        asked = urllib.parse.urlencode(parameters)
        url = f"http://127.0.0.1:{self._port}/api/v1/{what}?{asked}"
        with urllib.request.urlopen(url, timeout=HANG_S) as answer:
            return json.load(answer)["data"]
