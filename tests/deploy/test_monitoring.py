"""Dashboards and alerts query metrics that the service exposes."""

import json
import re
from collections.abc import Callable, Iterator
from itertools import product
from typing import NamedTuple

import httpx
import promql_parser as promql
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import ROOT

FOLDER = ROOT / "deploy" / "monitoring"
DASHBOARD = json.loads((FOLDER / "grafana/dashboards/dashboard.json").read_text())
DATASOURCES, PROVIDER, PROMETHEUS, RULES = (
    yaml.safe_load((FOLDER / name).read_text())
    for name in (
        "grafana/datasources/prometheus.yml",
        "grafana/dashboards/provider.yml",
        "prometheus/prometheus.yml",
        "prometheus/rules.yml",
    )
)
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES = COMPOSE["services"]
(JOB,) = PROMETHEUS["scrape_configs"]
ALERTS = [rule for group in RULES["groups"] for rule in group["rules"]]

Labels = dict[str, str]
Exposed = dict[str, list[Labels]]  # the labels of a name's samples


class Query(NamedTuple):
    """A query, and the text that uses the labels of its result."""

    expression: str
    text: str


# Grafana replaces this variable by a duration.
PANELS = {
    f"{panel['title']} {target['refId']}": Query(
        target["expr"].replace("$__rate_interval", "1m"), target.get("legendFormat", "")
    )
    for panel in DASHBOARD["panels"]
    for target in panel["targets"]
}
RULED = {rule["alert"]: Query(rule["expr"], rule["annotations"]["summary"]) for rule in ALERTS}
QUERIES = PANELS | RULED


@pytest.fixture(scope="module")
def exposed(client: httpx.Client, examples: Callable[[str], list[object]]) -> Exposed:
    """The series that Prometheus reads from a service after requests of several kinds."""
    question = {"model": "digits", "inputs": examples("digits")[:1]}
    assert client.post("/predict", json=question).status_code == 200
    assert client.post("/uncertainty", json=question | {"passes": 10}).status_code == 200
    assert client.post("/predict", json=question | {"inputs": []}).status_code == 422
    answer = client.get(JOB["metrics_path"])
    assert answer.status_code == 200
    of_target = {"instance": "api", "job": JOB["job_name"]}
    found: Exposed = {
        "up": [of_target],
        "ALERTS": [of_target | {"alertname": "", "alertstate": "firing", "severity": ""}],
    }
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample.labels | of_target)
    return found


def nodes(expression: promql.Expr) -> list[promql.Expr]:
    """Return an expression and all its parts."""
    found: list[promql.Expr] = []
    promql.walk(expression, found.append)
    return found


def selectors(expression: promql.Expr) -> list[promql.VectorSelector]:
    """Return the selectors of an expression."""
    return [node for node in nodes(expression) if isinstance(node, promql.VectorSelector)]


def groupings(expression: promql.Expr) -> Iterator[tuple[promql.Expr, list[str]]]:
    """Return the labels by which parts of an expression aggregate or match, with those parts."""
    for node in nodes(expression):
        if isinstance(node, promql.AggregateExpr) and node.modifier:
            yield node, node.modifier.labels
        if isinstance(node, promql.BinaryExpr) and node.modifier and node.modifier.matching:
            yield node, node.modifier.matching.labels


def fits(labels: Labels, matcher: promql.Matcher) -> bool:
    """Tell whether a matcher can select a sample; for a pattern, any value of the label will do."""
    value = labels.get(matcher.name)
    if matcher.op == promql.MatchOp.Equal:
        return value == matcher.value
    return value is not None and (matcher.op != promql.MatchOp.NotEqual or value != matcher.value)


def result_labels(expression: promql.Expr, exposed: Exposed) -> set[str]:
    """Return the names of the labels of an expression's result."""
    for node in nodes(expression):
        if isinstance(node, promql.AggregateExpr):
            return set(node.modifier.labels if node.modifier else [])
    name = selectors(expression)[0].name
    assert name
    return set(exposed[name][0])


@pytest.mark.parametrize("query", QUERIES.values(), ids=QUERIES.keys())
def test_a_query_asks_for_what_is_exposed(query: Query, exposed: Exposed) -> None:
    expression = promql.parse(query.expression)
    for selector in selectors(expression):
        samples = exposed.get(selector.name or "", [])
        assert any(
            all(fits(labels, matcher) for matcher in selector.matchers.matchers)
            for labels in samples
        ), selector
    for part, by in groupings(expression):
        for selector in selectors(part):
            assert all(set(by) <= labels.keys() for labels in exposed[selector.name or ""])
    said = re.findall(r"(?:{{|\$labels\.)(\w+)", query.text)
    assert set(said) <= result_labels(expression, exposed)


def test_every_metric_of_the_service_is_on_the_dashboard(exposed: Exposed) -> None:
    shown = {
        selector.name
        for query in PANELS.values()
        for selector in selectors(promql.parse(query.expression))
    }
    own = {name for name in exposed if name.startswith("dropserve_")}
    parts = re.compile("_(bucket|count|sum)$")
    assert {parts.sub("", name) for name in own} == {
        parts.sub("", name or "") for name in shown if name in own
    }


def test_alerts_are_of_reasons_that_there_are() -> None:
    operations = (ROOT / "docs" / "operations.md").read_text()
    (row,) = [line for line in operations.splitlines() if "`dropserve_rejected_total`" in line]
    reasons = set(re.findall(r"`(\w+)`", row.rpartition("|")[0].rpartition("reason:")[2]))
    (named,) = re.findall('reason=~"(.*?)"', " ".join(rule["expr"] for rule in ALERTS))
    assert set(named.split("|")) <= reasons


def test_an_alert_has_a_severity_a_summary_and_no_field_that_prometheus_does_not_know() -> None:
    names = [rule["alert"] for rule in ALERTS]
    assert len(names) == len(set(names))
    for rule in ALERTS:
        assert rule.keys() <= {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"]["severity"] in ("critical", "warning")


def test_panels_have_ids_places_and_the_datasource_that_is_provisioned() -> None:
    (datasource,) = DATASOURCES["datasources"]
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        assert panel["datasource"] == {"type": datasource["type"], "uid": datasource["uid"]}
        at = panel["gridPos"]
        place = set(product(range(at["x"], at["x"] + at["w"]), range(at["y"], at["y"] + at["h"])))
        assert not place & taken
        assert at["x"] + at["w"] <= 24
        taken |= place


def test_prometheus_scrapes_the_services_at_their_port_with_the_key_that_it_gets() -> None:
    (lookup,) = JOB["dns_sd_configs"]
    assert lookup["names"] == ["api.", "api-cpu."]
    for name in lookup["names"]:
        (port,) = SERVICES[name.removesuffix(".")]["ports"]
        assert port.endswith(f":{lookup['port']}")
    (secret,) = SERVICES["prometheus"]["secrets"]
    assert JOB["authorization"] == {"credentials_file": f"/run/secrets/{secret}"}


def test_files_name_each_other_as_the_containers_see_them() -> None:
    prometheus = SERVICES["prometheus"]
    assert "./deploy/monitoring/prometheus:/etc/prometheus:ro" in prometheus["volumes"]
    assert "--config.file=/etc/prometheus/prometheus.yml" in prometheus["command"]
    for name in PROMETHEUS["rule_files"]:
        assert (FOLDER / "prometheus" / name).is_file()
    grafana = SERVICES["grafana"]
    assert grafana["volumes"] == ["./deploy/monitoring/grafana:/etc/grafana/provisioning:ro"]
    (provider,) = PROVIDER["providers"]
    folder = provider["options"]["path"]
    assert folder == "/etc/grafana/provisioning/dashboards"
    home = grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{folder}/dashboard.json"
    (datasource,) = DATASOURCES["datasources"]
    assert datasource["url"] == "http://prometheus:9090"


def test_grafana_knows_how_often_prometheus_scrapes() -> None:
    (datasource,) = DATASOURCES["datasources"]
    assert datasource["jsonData"]["timeInterval"] == PROMETHEUS["global"]["scrape_interval"]


def test_grafana_lets_people_look_and_nobody_in() -> None:
    environment = SERVICES["grafana"]["environment"]
    assert environment["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"
    assert environment["GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION"] == "true"
    assert environment["GF_AUTH_DISABLE_LOGIN_FORM"] == "true"
    assert environment["GF_AUTH_BASIC_ENABLED"] == "false"
