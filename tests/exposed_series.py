"""The time series that a dashboard, a rule or an autoscaler may name."""

from k8s.monitoring import rules
from service.telemetry.metrics import Metrics


def exposed() -> set[str]:
    """Every series name of the service, and every recorded one."""
    names = set(rules.recordings())
    for family in Metrics().registry.collect():
        endings = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}
        names |= {family.name + ending for ending in endings.get(family.type, [""])}
    return names
