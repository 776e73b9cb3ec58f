"""Reads a metrics page as Prometheus does, and objects to what a strict tool objects to."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

Labels = tuple[tuple[str, str], ...]


@dataclass
class Family:
    """Everything that a page says under one name."""

    name: str
    kind: str
    help: str
    samples: dict[tuple[str, Labels], float] = field(default_factory=dict)

    def one(self, **labels: str) -> float:
        """The value of the one sample with exactly these labels."""
        (found,) = [value for (_, have), value in self.samples.items() if dict(have) == labels]
        return found

    def some(self, **labels: str) -> list[float]:
        """The values of all samples that have these labels, whatever others they have."""
        return [
            value
            for (_, have), value in self.samples.items()
            if labels.items() <= dict(have).items()
        ]

    @property
    def label_names(self) -> set[str]:
        """The names of all labels below this name."""
        return {name for _, labels in self.samples for name, _ in labels}


def read(text: str) -> dict[str, Family]:
    """Each family of a page of ours by its name; AssertionError where Prometheus would object.

    The library's parser takes more than Prometheus does, so the rest is checked here.
    """
    assert text.endswith("\n")
    families: dict[str, Family] = {}
    for metric in text_string_to_metric_families(text):
        family = _family(metric)
        assert family.name not in families, f"in two places: {family.name}"
        families[family.name] = family
    for keyword in ("HELP", "TYPE"):
        named = re.findall(rf"^# {keyword} (\S+) ", text, re.MULTILINE)
        assert named == list(families), f"not one {keyword} each: {named}"
    return families


def value(text: str, name: str, **labels: str) -> float | None:
    """The value of one sample of a page of ours, None where it is not there."""
    for family in read(text).values():
        for (sample, have), found in family.samples.items():
            if sample == name and dict(have) == labels:
                return found
    return None


def samples_of(text: str, name: str) -> Iterator[tuple[dict[str, str], float]]:
    """The labels and value of each sample of one name; the rest of the page may be anything."""
    lines = [line for line in text.split("\n") if re.match(rf"{name}[{{ ]", line)]
    for metric in text_string_to_metric_families("".join(f"{line}\n" for line in lines)):
        for sample in metric.samples:
            yield sample.labels, sample.value


def _family(metric: Metric) -> Family:
    # The parser speaks OpenMetrics, where a counter's name has no suffix.
    name = f"{metric.name}_total" if metric.type == "counter" else metric.name
    assert metric.type in ("counter", "gauge", "histogram"), f"{name} is {metric.type}"
    assert (metric.type == "counter") == name.endswith("_total"), name
    assert metric.documentation.strip(), f"no help: {name}"
    family = Family(name, metric.type, metric.documentation)
    for sample in metric.samples:
        key = sample.name, tuple(sorted(sample.labels.items()))
        assert key not in family.samples, f"twice: {key}"
        assert sample.timestamp is None, f"with a time of its own: {key}"
        family.samples[key] = float(sample.value)
    if family.kind == "histogram":
        _check_histogram(family)
    return family


def _check_histogram(family: Family) -> None:
    """Only for one without labels: there is no other."""
    buckets = [
        (float(dict(labels)["le"]), count)
        for (sample, labels), count in family.samples.items()
        if sample == f"{family.name}_bucket"
    ]
    assert buckets == sorted(buckets)
    assert all(a[1] <= b[1] for a, b in itertools.pairwise(buckets)), "not cumulative"
    assert math.isinf(buckets[-1][0])
    assert family.samples[f"{family.name}_count", ()] == buckets[-1][1]
    # Where values may be negative their sum is no counter, and is left out (OpenMetrics).
    assert ((f"{family.name}_sum", ()) in family.samples) == (buckets[0][0] >= 0)
