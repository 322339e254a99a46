"""`python -m k8s.monitoring` writes the dashboard and the rules wherever they are read.

The alerts' runbook links are paths in this repository; `--runbook URL` makes them links.
"""

import argparse
from pathlib import Path

import yaml

from k8s.monitoring import dashboard, rules

ROOT = Path(__file__).parents[2]
MADE = "# Made by `python -m k8s.monitoring`; change k8s/monitoring/rules.py instead.\n"


def files() -> dict[Path, str]:
    """Every generated file and its content."""
    board = dashboard.render()
    groups = rules.groups()
    operator = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "tapt-serve"},
        "spec": {"groups": groups},
    }
    return {
        ROOT / "docker/grafana/dashboards/tapt-serve.json": board,
        ROOT / "k8s/components/monitoring/tapt-serve.json": board,
        ROOT / "docker/prometheus/rules.yml": MADE + _yaml({"groups": groups}),
        ROOT / "k8s/components/monitoring/prometheus-rule.yaml": MADE + _yaml(operator),
    }


def _yaml(document: object) -> str:
    text: str = yaml.safe_dump(document, sort_keys=False, width=100)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m k8s.monitoring", description=__doc__)
    parser.add_argument("--runbook", default=rules.RUNBOOK, help="address of docs/runbook.md")
    rules.RUNBOOK = parser.parse_args().runbook
    for path, text in files().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


if __name__ == "__main__":
    main()
