"""The panels as a Grafana dashboard."""

import json
from itertools import count
from typing import Any

from grafana_foundation_sdk.builders import (
    common,
    dashboard,
    heatmap,
    prometheus,
    stat,
    timeseries,
)
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import (
    LegendDisplayMode,
    LegendPlacement,
    TooltipDisplayMode,
    VisibilityMode,
)
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DataSourceRef,
    VariableRefresh,
)
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from k8s.monitoring.panels import ROWS, Panel

UID = "tapt-serve"
SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
HEIGHT = 8


def render() -> str:
    """The dashboard's JSON, ready to be provisioned or imported."""
    board = (
        dashboard.Dashboard("tapt-serve")
        .uid(UID)
        .tags(["tapt-serve"])
        .timezone("browser")
        .refresh("10s")
        .time("now-30m", "now")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .annotations([])
        .with_variable(dashboard.DatasourceVariable("datasource").type("prometheus"))
        .with_variable(
            dashboard.QueryVariable("namespace")
            .datasource(SOURCE)
            .query("label_values(tapt_worker_up, namespace)")
            .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
            .include_all(True)
            # Everything, also what has no namespace because no Kubernetes gave it one.
            .all_value(".*")
        )
    )
    numbers = count(1)
    for title, panels in ROWS.items():
        board.with_row(dashboard.Row(title).id(next(numbers)))
        for panel in panels:
            board.with_panel(_build(panel).id(next(numbers)))
    text: str = json.dumps(board.build(), cls=JSONEncoder, indent=1)
    return text + "\n"


def _build(panel: Panel) -> Any:
    builder: Any = {"lines": _lines, "heatmap": _heatmap, "number": _number}[panel.kind]()
    builder.title(panel.title).description(panel.what).unit(panel.unit).datasource(SOURCE)
    builder.span(panel.width).height(HEIGHT)
    if panel.most is not None:
        builder.max(panel.most)
    for letter, query in zip("ABCDEF", panel.queries, strict=False):
        target = prometheus.Dataquery().expr(query.expr).legend_format(query.legend)
        target.ref_id(letter).datasource(SOURCE).range()
        if panel.kind == "heatmap":
            target.format(PromQueryFormat.HEATMAP)
        builder.with_target(target)
    return builder


def _lines() -> timeseries.Panel:
    return (
        timeseries.Panel()
        .min(0)
        .fill_opacity(8)
        .show_points(VisibilityMode.NEVER)
        .legend(
            common.VizLegendOptions()
            .display_mode(LegendDisplayMode.LIST)
            .placement(LegendPlacement.BOTTOM)
            .show_legend(True)
        )
        .tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI))
    )


def _heatmap() -> heatmap.Panel:
    # The series are a histogram's buckets already.
    return heatmap.Panel().calculate(False).y_axis(heatmap.YAxisConfig().unit("s"))


def _number() -> stat.Panel:
    return stat.Panel().min(0)
