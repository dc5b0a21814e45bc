"""Scrapes a registry as Prometheus would, and reads what it finds."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

Labels = dict[str, str]


class Scrape:
    """One scrape, parsed."""

    def __init__(self, text: str) -> None:
        self.families = list(text_string_to_metric_families(text))
        names = [family.name for family in self.families]
        assert len(set(names)) == len(names), "a family appears twice"
        samples = [sample for family in self.families for sample in family.samples]
        keys = [(sample.name, tuple(sorted(sample.labels.items()))) for sample in samples]
        assert len(set(keys)) == len(keys), "a series appears twice"
        self.samples = samples
        self.names = {sample.name for sample in samples}

    def values(self, name: str, **labels: str) -> list[float]:
        """The values of all series of a name that have these labels."""
        return [s.value for s in self.samples if s.name == name and labels.items() <= s.labels.items()]

    def value(self, name: str, **labels: str) -> float:
        """The value of the one series that has these labels."""
        (value,) = self.values(name, **labels)
        return value

    def label_values(self, label: str) -> set[str]:
        """All values of a label."""
        return {sample.labels[label] for sample in self.samples if label in sample.labels}


def scrape(registry: CollectorRegistry) -> Scrape:
    """Scrape a registry."""
    return Scrape(generate_latest(registry).decode())
