"""What every dashboard is made of: panels with queries, rows, and the variables data source, namespace and job."""

from dataclasses import dataclass, field

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, table, timeseries
from grafana_foundation_sdk.models import common as common_models
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

SOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")


@dataclass(frozen=True)
class Panel:
    """A panel of lines, unless `kind` says otherwise: `queries` by legend; "" shows the labels."""

    title: str
    description: str
    queries: dict[str, str]
    unit: str = "short"
    width: int = 8
    kind: str = "lines"
    """lines, stacked, stat or table (instant queries, joined by their labels; legends are the columns)."""
    needs: str = ""
    """What has to be there for an answer, besides a run: a GPU, an exporter, a fault. The description ends with it."""


@dataclass(frozen=True)
class Row:
    title: str
    panels: list[Panel]


@dataclass(frozen=True)
class Board:
    uid: str
    title: str
    description: str
    head: list[Panel]
    """Above the first row."""
    rows: list[Row]
    many: bool
    """Namespaces and jobs are chosen many at a time, all of them at first."""
    annotations: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Name: expression and colour."""

    @property
    def panels(self) -> list[Panel]:
        return [*self.head, *(panel for row in self.rows for panel in row.panels)]

    def build(self) -> dashboard.Dashboard:
        made = (
            dashboard.Dashboard(self.title)
            .uid(self.uid)
            .description(self.description)
            .tags(["distillation"])
            .timezone("browser")
            .editable()
            .refresh("10s")
            .time("now-3h", "now")
            .tooltip(models.DashboardCursorSync.CROSSHAIR)
            .variables(variables(self.many))
        )
        for name, (expression, colour) in self.annotations.items():
            made.annotation(
                dashboard.AnnotationQuery()
                .name(name)
                .datasource(SOURCE)
                .enable(True)
                .icon_color(colour)
                .expr(expression)
            )
        number = 0
        for panel in self.head:
            number += 1
            made.with_panel(drawn(panel, number))
        for row in self.rows:
            number += 1
            made.with_row(dashboard.Row(row.title).id(number))
            for panel in row.panels:
                number += 1
                made.with_panel(drawn(panel, number))
        return made


def variables(many: bool) -> list[dashboard.DatasourceVariable | dashboard.QueryVariable]:
    of_namespace = 'distill_job_info{namespace=~"$namespace"}' if many else 'distill_job_info{namespace="$namespace"}'
    asked = {"namespace": "label_values(distill_job_info, namespace)", "job": f"label_values({of_namespace}, name)"}
    found: list[dashboard.DatasourceVariable | dashboard.QueryVariable] = [
        dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus")
    ]
    for name, query in asked.items():
        one = (
            dashboard.QueryVariable(name)
            .label(name.capitalize())
            .datasource(SOURCE)
            .query({"query": query, "refId": name})
            .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
            .sort(models.VariableSort.ALPHABETICAL_ASC)
        )
        if many:
            everything = models.VariableOption(text="All", value="$__all", selected=True)
            one = one.multi(True).include_all(True).all_value(".*").current(everything)
        found.append(one)
    return found


def drawn(panel: Panel, number: int) -> stat.Panel | timeseries.Panel | table.Panel:
    made = {"lines": lines, "stacked": stacked, "stat": big_number, "table": rows_of}[panel.kind](panel)
    description = f"{panel.description} Needs {panel.needs}." if panel.needs else panel.description
    made.id(number).title(panel.title).description(description).datasource(SOURCE).unit(panel.unit)
    made.span(panel.width).height(4 if panel.kind == "stat" else 8)
    for letter, (legend, expression) in zip("ABCDEFGHIJKLMNOP", panel.queries.items(), strict=False):
        query = prometheus.Dataquery().expr(expression).ref_id(letter).datasource(SOURCE)
        if legend:
            query = query.legend_format(legend)
        if panel.kind == "table":
            query = query.instant().format(PromQueryFormat.TABLE)
        made.with_target(query)
    return made


def lines(panel: Panel) -> timeseries.Panel:
    legend = (
        common.VizLegendOptions()
        .show_legend(True)
        .placement(common_models.LegendPlacement.BOTTOM)
        .display_mode(common_models.LegendDisplayMode.LIST)
    )
    tooltip = common.VizTooltipOptions().mode(common_models.TooltipDisplayMode.MULTI)
    return timeseries.Panel().legend(legend).tooltip(tooltip).line_width(1).fill_opacity(8).span_nulls(True)


def stacked(panel: Panel) -> timeseries.Panel:
    together = common.StackingConfig().mode(common_models.StackingMode.NORMAL).group("A")
    return lines(panel).fill_opacity(60).stacking(together)


def big_number(panel: Panel) -> stat.Panel:
    newest = common.ReduceDataOptions().calcs(["lastNotNull"])
    return stat.Panel().reduce_options(newest).graph_mode(common_models.BigValueGraphMode.AREA)


def rows_of(panel: Panel) -> table.Panel:
    """One row for each set of labels; the value of the first query is column "Value #A", and is named as its legend."""
    names = {f"Value #{letter}": legend for letter, legend in zip("ABCDEFGHIJKLMNOP", panel.queries, strict=False)}
    merge = models.DataTransformerConfig(id_val="merge", options={})
    tidy = models.DataTransformerConfig(
        id_val="organize", options={"excludeByName": {"Time": True}, "indexByName": {}, "renameByName": names}
    )
    return table.Panel().transformations([merge, tidy]).filterable(True)
