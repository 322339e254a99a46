"""`python -m k8s.monitoring` writes the dashboard and the rules wherever they are read.

The alerts' runbook links are paths in this repository; `--runbook URL` makes them links.
`--namespace NAME` is for another namespace than that of `k8s/overlays`.
"""

import argparse
from pathlib import Path

import yaml

from k8s.monitoring import dashboard, rules

ROOT = Path(__file__).parents[2]
MADE = "# Made by `python -m k8s.monitoring`; change k8s/monitoring/rules.py instead.\n"
YOURS = "# yours: the namespace tapt-serve. For another, run it with `--namespace NAME`.\n"
NAMESPACE = "tapt-serve"
COMPOSE = "compose"  # the label that docker/prometheus/prometheus.yml gives to the replicas


def files(namespace: str = NAMESPACE) -> dict[Path, str]:
    """Every generated file and its content, for a deployment in this Kubernetes namespace."""
    board = dashboard.render()
    operator = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "tapt-serve"},
        "spec": {"groups": rules.groups(namespace)},
    }
    compose = {"groups": rules.groups(COMPOSE)}
    return {
        ROOT / "docker/grafana/dashboards/tapt-serve.json": board,
        ROOT / "k8s/components/monitoring/tapt-serve.json": board,
        ROOT / "docker/prometheus/rules.yml": MADE + _yaml(compose),
        ROOT / "k8s/components/monitoring/prometheus-rule.yaml": MADE + YOURS + _yaml(operator),
    }


def _yaml(document: object) -> str:
    text: str = yaml.safe_dump(document, sort_keys=False, width=100)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m k8s.monitoring", description=__doc__)
    parser.add_argument("--runbook", default=rules.RUNBOOK, help="address of docs/runbook.md")
    parser.add_argument("--namespace", default=NAMESPACE, help="Kubernetes namespace")
    options = parser.parse_args()
    rules.RUNBOOK = options.runbook
    for path, text in files(options.namespace).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


if __name__ == "__main__":
    main()
