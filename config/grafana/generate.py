"""Write the Grafana dashboards beside this file: ``python config/grafana/generate.py``.

Dashboards are in Grafana's classic JSON model, which every version imports; the ``cellOptions`` of
their tables came with LEAST_VERSION. They ask for metrics, not for recorded series, so that they
need no rules; alerts and verdicts show where rules are loaded.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Json = dict[str, Any]

HERE = Path(__file__).resolve().parent
WIDTH = 24
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
LEAST_VERSION = "9.5"
FLEET_UID, LISTENER_UID = "dtrace-exporter-fleet", "dtrace-exporter-listener"

EXPORTER = 'job=~"$job",instance=~"$instance"'
SESSIONS = f'{EXPORTER},host=~"$host"'
PLACES = f'{SESSIONS},zone=~"$zone",netns=~"$netns",jail=~"$jail"'
LISTENERS = f'{PLACES},listener=~"$listener",port=~"$port"'
LISTENER = f'{LISTENERS},address=~"$address"'
OWN_SESSIONS = f'{SESSIONS},session=~"port-$port|all"'
IDENTITY = "instance, host, zone, netns, jail, address, port, listener"
OWNER = "program, unit, container, fmri, netns_name"
NAME = "{{instance}} {{host}} {{zone}}{{netns}}{{jail}} {{address}}:{{port}} {{listener}}"

GREEN, YELLOW, ORANGE, RED, BLUE = "green", "yellow", "orange", "red", "blue"
FULLNESS = [(None, GREEN), (0.5, YELLOW), (0.8, ORANGE), (1, RED)]
NONE_IS_GOOD = [(None, GREEN), (1e-9, RED)]
PLAIN = [(None, BLUE)]
STATES = [(1, "pending"), (2, "firing")]
NO_DTRACE = "No data. Only DTrace has it: see the panel Source"
"""What a panel shows instead of nothing whose series only DTrace has."""
VERDICTS = {"enough": GREEN, "backlog_too_small": YELLOW, "application_too_slow": RED}
NO_VERDICT = "No verdict: idle, undecided, less than ten minutes of data, no DTrace, or no rules"


# What is asked for.


def metric(name: str, labels: str, more: str = "") -> str:
    """Return the selector of one of a listener's metrics."""
    return f"dtrace_tcp_listen_{name}{{{labels}{',' + more if more else ''}}}"


def rate(name: str, labels: str, more: str = "") -> str:
    """Return a counter's increase per second."""
    return f"rate({metric(name, labels, more)}[$__rate_interval])"


def buckets(name: str, labels: str) -> str:
    """Return a histogram's increases, for a heat map or a quantile."""
    return f"sum by (le) (increase({metric(f'{name}_bucket', labels)}[$__rate_interval]))"


def used(labels: str) -> str:
    """Return how full Q is; 1 is full."""
    return f"{metric('q_length', labels)} / {metric('q_capacity', labels)}"


def q0_limit(labels: str) -> str:
    """Return the limit of Q0, which on Linux is Qmax."""
    linux = metric("q_limit", labels, 'zone=""')
    return f"({metric('q0_limit', labels)} or clamp_min({linux}, 1))"


def above(labels: str, bound: str) -> str:
    """Return the share of the SYNs that found Q fuller than a bound of the histogram."""
    within = f'le="{bound}"'
    below = f"sum without (le) ({rate('q_saturation_ratio_bucket', labels, within)})"
    return f"1 - {below} / ({rate('q_saturation_ratio_count', labels)} > 0)"


def mean_q(labels: str) -> str:
    """Return how many wait in Q on average: the seconds waited in a second, by Little's law."""
    return rate("accept_wait_seconds_sum", labels)


def quantile(which: float, labels: str, name: str = "accept_wait_seconds") -> str:
    """Return a quantile of a histogram, over all listeners that the labels select."""
    return f"histogram_quantile({which}, sum by (le) ({rate(f'{name}_bucket', labels)}))"


def firing(labels: str) -> str:
    """Return since when each firing alert's condition holds, in milliseconds since 1970."""
    state = f'ALERTS{{{labels},alertname=~"(Tcp|DTrace).*",alertstate="firing"}}'
    since = f"last_over_time(ALERTS_FOR_STATE{{{labels}}}[$__rate_interval])"
    return f"1000 * ({since} and ignoring (alertstate) {state})"


def alert_states(labels: str) -> str:
    """Return 1 for each alert that is pending and 2 for each that fires."""
    states = (f'{value} * ALERTS{{{labels},alertstate="{state}"}}' for value, state in STATES)
    return f"sum without (alertstate) ({' or '.join(states)})"


def verdicts(labels: str) -> str:
    """Return the number of the verdict on each listener, in the order of VERDICTS."""
    series = "listener:dtrace_tcp_listen_q:verdict10m"
    numbers = (
        f'{number} * {series}{{{labels},verdict="{verdict}"}}'
        for number, verdict in enumerate(VERDICTS, 1)
    )
    return f"sum without (verdict) ({' or '.join(numbers)})"


# What it looks like.


def targets(*queries: str | tuple[str, str], **options: Any) -> list[Json]:
    """Return a panel's queries, each with or without a legend."""
    pairs = [query if isinstance(query, tuple) else (query, "__auto") for query in queries]
    return [
        {
            "datasource": DATASOURCE,
            "refId": chr(ord("A") + number),
            "expr": expression,
            "legendFormat": legend,
            "editorMode": "code",
            "range": not options.get("instant", False),
            "instant": False,
            **options,
        }
        for number, (expression, legend) in enumerate(pairs)
    ]


def panel(
    kind: str,
    title: str,
    description: str,
    queries: list[Json],
    options: Json,
    *,
    unit: str = "short",
    steps: Sequence[tuple[float | None, str]] = PLAIN,
    custom: Json | None = None,
    overrides: list[Json] | None = None,
    **defaults: Any,
) -> Json:
    """Return a panel that has no place yet."""
    return {
        "type": kind,
        "title": title,
        "description": description,
        "datasource": DATASOURCE,
        "targets": queries,
        "options": options,
        "fieldConfig": {
            "defaults": {
                "unit": unit,
                "thresholds": {
                    "mode": "absolute",
                    "steps": [{"value": value, "color": color} for value, color in steps],
                },
                **({"custom": custom} if custom else {}),
                **defaults,
            },
            "overrides": overrides or [],
        },
    }


def override(name: str, *, regex: bool = False, **properties: Any) -> Json:
    """Return what differs for a field; ``__`` in a property's name stands for a dot."""
    return {
        "matcher": {"id": "byRegexp" if regex else "byName", "options": name},
        "properties": [
            {"id": key.replace("__", "."), "value": value} for key, value in properties.items()
        ],
    }


TOOLTIP = {"mode": "multi", "sort": "desc"}
LEGEND = {"showLegend": True, "displayMode": "list", "placement": "bottom", "calcs": []}


def graph(title: str, description: str, *queries: str | tuple[str, str], **config: Any) -> Json:
    """Return a panel of lines over time."""
    custom = {"lineWidth": 1, "fillOpacity": 10, "showPoints": "never", "spanNulls": False}
    custom |= config.pop("custom", {})
    options = {"legend": LEGEND, "tooltip": TOOLTIP}
    config = {"min": 0, **config}
    return panel(
        "timeseries", title, description, targets(*queries), options, custom=custom, **config
    )


def number(title: str, description: str, query: str, **config: Any) -> Json:
    """Return a panel of one number."""
    options = {
        "graphMode": "area",
        "colorMode": "value",
        "justifyMode": "auto",
        "textMode": "value",
        "wideLayout": True,
        "showPercentChange": False,
        "percentChangeColorMode": "standard",
        "orientation": "auto",
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
    }
    return panel("stat", title, description, targets(query), options, **config)


def heat_map(title: str, description: str, query: str, unit: str) -> Json:
    """Return a panel of a histogram over time, which only DTrace has."""
    options = {
        "calculate": False,
        "color": {
            "mode": "scheme",
            "scheme": "Turbo",
            "fill": "dark-orange",
            "scale": "exponential",
            "exponent": 0.5,
            "steps": 64,
            "reverse": False,
        },
        "cellGap": 1,
        "cellValues": {"unit": "short"},
        "exemplars": {"color": "rgba(255,0,255,0.7)"},
        "filterValues": {"le": 1e-9},
        "legend": {"show": True},
        "rowsFrame": {"layout": "auto"},
        "showValue": "never",
        "tooltip": {"mode": "single", "showColorScale": True, "yHistogram": True},
        "yAxis": {"axisPlacement": "left", "unit": unit, "reverse": False},
    }
    custom = {"hideFrom": {"legend": False, "tooltip": False, "viz": False}}
    return panel(
        "heatmap",
        title,
        description,
        targets((query, "{{le}}"), format="heatmap"),
        options,
        custom=custom,
        noValue=NO_DTRACE,
    )


def table(
    title: str, description: str, queries: list[Json], transformations: list[Json], **config: Any
) -> Json:
    """Return a panel of the newest values as a table."""
    options = {
        "showHeader": True,
        "frameIndex": 0,
        "cellHeight": "sm",
        "sortBy": config.pop("sort", []),
    }
    custom = {
        "align": "auto",
        "cellOptions": {"type": "auto"},
        "filterable": True,
        "inspect": False,
    }
    made = panel("table", title, description, queries, options, custom=custom, **config)
    return {**made, "transformations": transformations}


def timeline(title: str, description: str, *queries: str | tuple[str, str], **config: Any) -> Json:
    """Return a panel of states over time."""
    options = {
        "alignValue": "left",
        "legend": LEGEND,
        "mergeValues": True,
        "rowHeight": 0.9,
        "showValue": "never",
        "tooltip": {"mode": "single", "sort": "none"},
    }
    custom = {"fillOpacity": 80, "lineWidth": 0}
    return panel(
        "state-timeline", title, description, targets(*queries), options, custom=custom, **config
    )


def verdict_line(query: tuple[str, str]) -> Json:
    """Return the panel of the verdicts over time."""
    words = {
        str(number): {"text": verdict, "color": color, "index": number}
        for number, (verdict, color) in enumerate(VERDICTS.items(), 1)
    }
    made = timeline(
        "Verdict of ten minutes",
        "The backlog is enough; or it is too small for bursts that the application could accept; "
        "or no backlog helps, because the application is too slow. docs/runbooks.md says for each "
        "verdict what to do and what it is inferred from.",
        query,
        mappings=[{"type": "value", "options": words}],
        noValue=NO_VERDICT,
    )
    made["options"]["showValue"] = "auto"
    return made


def text(title: str, content: str) -> Json:
    """Return a panel of Markdown."""
    return {
        "type": "text",
        "title": title,
        "options": {"mode": "markdown", "content": content},
        "fieldConfig": {"defaults": {}, "overrides": []},
    }


def row(title: str) -> Json:
    """Return a heading."""
    return {"type": "row", "title": title, "collapsed": False, "panels": []}


def place(*lines: tuple[int, list[Json]]) -> list[Json]:
    """Give panels their places and numbers: lines of a height, each divided evenly."""
    placed: list[Json] = []
    top = 0
    for height, panels in lines:
        left = 0
        for before, each in enumerate(panels):
            width = (WIDTH - left) // (len(panels) - before)
            position = {"x": left, "y": top, "w": width, "h": height}
            placed.append({"id": len(placed) + 1, **each, "gridPos": position})
            left += width
        top += height
    return placed


# Variables and the whole.


def choice(
    name: str, label: str, query: str, *, several: bool = True, everything: bool = True
) -> Json:
    """Return a variable of a label's values."""
    current = {"text": "All", "value": "$__all"} if everything else {"text": "", "value": ""}
    return {
        "type": "query",
        "name": name,
        "label": label,
        "datasource": DATASOURCE,
        "query": {"qryType": 1, "query": query, "refId": f"{name}-variable"},
        "definition": query,
        "refresh": 2,
        "sort": 3,
        "multi": several,
        "includeAll": everything,
        **({"allValue": ".*"} if everything else {}),
        "current": current,
        "options": [],
        "regex": "",
        "hide": 0,
        "skipUrlSync": False,
    }


def variables(*, one_listener: bool) -> list[Json]:
    """Return the variables: in the listener's dashboard exporter and port are one of each."""
    source = {
        "type": "datasource",
        "name": "datasource",
        "label": "Data source",
        "query": "prometheus",
        "current": {"text": "default", "value": "default"},
        "options": [],
        "refresh": 1,
        "regex": "",
        "hide": 0,
        "multi": False,
        "includeAll": False,
        "skipUrlSync": False,
    }
    build = "dtrace_exporter_build_info"
    any_count = '__name__=~"dtrace_tcp_listen_(syns|drops)_total"'
    one: Json = {"several": False, "everything": False} if one_listener else {}
    host, place_ = f"{{{any_count},{EXPORTER}}}", f"{{{any_count},{SESSIONS}}}"
    name = f"{{{any_count},{PLACES}}}"
    port = f'{{{any_count},{PLACES},listener=~"$listener"}}'
    result = [
        source,
        choice("job", "Job", f"label_values({build}, job)"),
        choice("instance", "Exporter", f'label_values({build}{{job=~"$job"}}, instance)', **one),
        choice("host", "Host watched over ssh", f"label_values({host}, host)"),
        choice("zone", "Zone", f"label_values({place_}, zone)"),
        choice("netns", "Network namespace", f"label_values({place_}, netns)"),
        choice("jail", "Jail", f"label_values({place_}, jail)"),
        choice("listener", "Name", f"label_values({name}, listener)"),
        choice("port", "Port", f"label_values({port}, port)", **one),
    ]
    if one_listener:
        address = f"{{{any_count},{LISTENERS}}}"
        result.append(choice("address", "Address", f"label_values({address}, address)"))
    return result


def dashboard(uid: str, title: str, description: str, panels: list[Json], **more: Any) -> Json:
    """Return a whole dashboard."""
    alerts = f'ALERTS{{{more.pop("alerts")},alertname=~"(Tcp|DTrace).*",alertstate="firing"}}'
    return {
        "uid": uid,
        "title": title,
        "description": f"{description} For Grafana {LEAST_VERSION} or newer.",
        "tags": ["dtrace-exporter", "tcp"],
        "schemaVersion": 42,
        "editable": True,
        "graphTooltip": 1,
        "timezone": "browser",
        "time": {"from": "now-1h", "to": "now"},
        "refresh": "30s",
        "links": more["links"],
        "templating": {"list": more["variables"]},
        "annotations": {
            "list": [
                {
                    "name": "Alerts",
                    "datasource": DATASOURCE,
                    "enable": True,
                    "iconColor": RED,
                    "expr": alerts,
                    "titleFormat": "{{alertname}}",
                    "textFormat": NAME,
                    "step": "30s",
                }
            ]
        },
        "panels": panels,
    }


def link(title: str, uid: str) -> Json:
    """Return a link to the other dashboard that keeps time and variables."""
    return {
        "type": "link",
        "title": title,
        "url": f"/d/{uid}",
        "icon": "dashboard",
        "tooltip": "",
        "tags": [],
        "asDropdown": False,
        "targetBlank": False,
        "includeVars": True,
        "keepTime": True,
    }


def to_listener(*fields: str) -> list[Json]:
    """Return a cell's link to the listener of its row, by these fields."""
    chosen = "&".join(f"var-{name}=${{__data.fields.{name}}}" for name in fields)
    url = f"/d/{LISTENER_UID}?{chosen}&${{datasource:queryparam}}&${{__url_time_range}}"
    return [{"title": "This listener", "url": url, "targetBlank": False}]


# The dashboards.


def source() -> Json:
    """Return the panel of where the numbers come from, and why that is not DTrace."""
    return table(
        "Source",
        "Where the numbers come from. dtrace has all of them, sock_diag only Q0, Q, Qmax and "
        "drops, netstat only Q and Qmax. The reason says why it is not dtrace: not_found means no "
        "dtrace(1), systemtap another program of that name, configured a choice of the "
        "configuration; docs/metrics.md lists all. What to do: docs/getting-dtrace.md.",
        targets(f"dtrace_exporter_source_info{{{EXPORTER}}}", format="table", instant=True),
        [
            {
                "id": "organize",
                "options": {
                    "excludeByName": {"Time": True, "__name__": True, "job": True, "Value": True},
                    "renameByName": {},
                    "indexByName": {"instance": 0, "source": 1, "reason": 2},
                },
            }
        ],
        overrides=[
            override(
                "source",
                custom__cellOptions={"type": "color-text"},
                mappings=[
                    {"type": "value", "options": {"sock_diag": {"color": ORANGE, "index": 0}}}
                ],
            )
        ],
    )


def fleet() -> Json:
    """Return the dashboard of all listeners of all hosts: which one, and since when."""
    per_listener = f"by ({IDENTITY})"
    columns = {
        "Full": f"sum {per_listener} ({used(LISTENERS)})",
        "Q": f"sum {per_listener} ({metric('q_length', LISTENERS)})",
        "Qmax": f"sum {per_listener} ({metric('q_limit', LISTENERS)})",
        "SYN/s": f"sum {per_listener} ({rate('syns_total', LISTENERS)})",
        "Accepts/s": f"sum {per_listener} ({rate('accepts_total', LISTENERS)})",
        "Drops/s": f"sum {per_listener} ({rate('drops_total', LISTENERS)})",
        "Wait, 99 %": (
            f"histogram_quantile(0.99, sum by ({IDENTITY}, le) "
            f"({rate('accept_wait_seconds_bucket', LISTENERS)}))"
        ),
    }
    values = {f"Value #{chr(ord('A') + at)}": name for at, name in enumerate(columns)}
    whose = f"max by ({IDENTITY}, {OWNER}) ({metric('info', LISTENERS)})"
    listeners = table(
        "Listeners, fullest first",
        "Full is Q divided by what fits: Qmax + 1 on Linux, Qmax on Solaris and illumos, and half "
        "as many again and one on FreeBSD. A port or a place links to its dashboard. Owners are "
        "known only on the exporter's own host.",
        targets(*columns.values(), whose, format="table", instant=True),
        [
            {"id": "merge", "options": {}},
            {
                "id": "organize",
                "options": {
                    "excludeByName": {"Time": True, f"Value #{chr(ord('A') + len(columns))}": True},
                    "renameByName": values,
                    "indexByName": {},
                },
            },
        ],
        sort=[{"displayName": "Full", "desc": True}],
        overrides=[
            override(
                "Full",
                unit="percentunit",
                max=1,
                thresholds={
                    "mode": "absolute",
                    "steps": [{"value": value, "color": color} for value, color in FULLNESS],
                },
                custom__cellOptions={"type": "gauge", "mode": "basic"},
            ),
            override(".*/s", regex=True, unit="cps", decimals=2),
            override("Wait, 99 %", unit="s"),
            override("port", links=to_listener("instance", "address", "port")),
            override("zone", links=to_listener("instance", "zone", "address", "port")),
            override("netns", links=to_listener("instance", "netns", "address", "port")),
            override("jail", links=to_listener("instance", "jail", "address", "port")),
            override("host", links=to_listener("instance", "host", "address", "port")),
        ],
    )
    alerts = table(
        "Firing alerts, and since when",
        "Since is when the condition began. docs/runbooks.md says for each alert what to do.",
        targets(firing(EXPORTER), format="table", instant=True),
        [
            {
                "id": "organize",
                "options": {
                    "excludeByName": {"Time": True, "job": True, "__name__": True},
                    "renameByName": {"Value": "Since"},
                    "indexByName": {"alertname": 0, "Value": 1, "severity": 2},
                },
            }
        ],
        overrides=[override("Since", unit="dateTimeFromNow")],
        sort=[{"displayName": "Since", "desc": False}],
    )
    lost = f"increase(dtrace_session_lost_total{{{SESSIONS}}}[$__rate_interval])"
    refused = f"rate(dtrace_tcp_refused_total{{{SESSIONS}}}[$__rate_interval])"
    panels = place(
        (
            4,
            [
                number("Listeners", "Open listeners.", f"count({metric('q_limit', LISTENERS)})"),
                number(
                    "Fullest queue",
                    "The highest Q of all, divided by what fits.",
                    f"max({used(LISTENERS)})",
                    unit="percentunit",
                    steps=FULLNESS,
                ),
                number(
                    "SYNs",
                    "",
                    f"sum({rate('syns_total', LISTENERS)})",
                    unit="cps",
                    noValue=NO_DTRACE,
                ),
                number(
                    "Drops",
                    "Connections refused for lack of room, on all listeners.",
                    f"sum({rate('drops_total', LISTENERS)})",
                    unit="cps",
                    steps=NONE_IS_GOOD,
                ),
                number(
                    "Sessions down",
                    "Their listeners are not watched.",
                    f"count(dtrace_session_up{{{SESSIONS}}} == 0) or vector(0)",
                    steps=NONE_IS_GOOD,
                ),
                number(
                    "Data lost",
                    "What DTrace reported as lost in the time shown.",
                    f"sum(increase(dtrace_session_lost_total{{{SESSIONS}}}[$__range]))",
                    steps=NONE_IS_GOOD,
                    noValue=NO_DTRACE,
                ),
            ],
        ),
        (7, [alerts]),
        (9, [listeners]),
        (1, [row("Queues")]),
        (
            8,
            [
                timeline(
                    "Since when",
                    "The fifteen fullest. Green has room, orange is over 80 %, red is full.",
                    (f"topk(15, {used(LISTENERS)})", NAME),
                    unit="percentunit",
                    steps=FULLNESS,
                    color={"mode": "thresholds"},
                ),
                graph(
                    "Q against what fits",
                    "The ten fullest listeners.",
                    (f"topk(10, {used(LISTENERS)})", NAME),
                    unit="percentunit",
                ),
            ],
        ),
        (
            8,
            [
                heat_map(
                    "Saturation at each SYN",
                    "Q/Qmax as the SYNs of all listeners found it. It shows bursts that no gauge "
                    "shows.",
                    buckets("q_saturation_ratio", LISTENERS),
                    "percentunit",
                ),
                graph(
                    "Q0 against its limit",
                    "Half-open connections of the ten fullest. On Linux the limit is Qmax.",
                    (
                        f"topk(10, {metric('q0_length', LISTENERS)} / {q0_limit(LISTENERS)})",
                        NAME,
                    ),
                    unit="percentunit",
                ),
            ],
        ),
        (1, [row("Advice")]),
        (8, [verdict_line((verdicts(LISTENERS), NAME))]),
        (1, [row("Traffic")]),
        (
            8,
            [
                graph(
                    "SYNs",
                    "The ten busiest listeners.",
                    (f"topk(10, {rate('syns_total', LISTENERS)})", NAME),
                    unit="cps",
                    noValue=NO_DTRACE,
                ),
                graph(
                    "Accepts",
                    "The ten busiest listeners.",
                    (f"topk(10, {rate('accepts_total', LISTENERS)})", NAME),
                    unit="cps",
                    noValue=NO_DTRACE,
                ),
                graph(
                    "Drops by reason",
                    "q_full and q_full_ack: the application is too slow. q0_full and q0_evicted: "
                    "a SYN flood, or clients that do not answer.",
                    (
                        f"sum by ({IDENTITY}, reason) ({rate('drops_total', LISTENERS)}) > 0",
                        f"{{{{reason}}}}: {NAME}",
                    ),
                    unit="cps",
                    custom={"stacking": {"mode": "normal", "group": "A"}, "fillOpacity": 40},
                ),
                graph(
                    "Refused connections",
                    "SYNs to ports where nobody listens, on Linux. The ten ports with the most.",
                    (f"topk(10, {refused})", "{{instance}} {{host}} port {{port}}"),
                    unit="cps",
                    noValue=NO_DTRACE,
                ),
            ],
        ),
        (
            8,
            [
                heat_map(
                    "Accept wait",
                    "Time in Q of all connections, from the handshake's end to accept().",
                    buckets("accept_wait_seconds", LISTENERS),
                    "s",
                ),
                graph(
                    "Accept wait, quantiles",
                    "Over all listeners.",
                    *((quantile(which, LISTENERS), f"{which:.0%}") for which in (0.5, 0.9, 0.99)),
                    unit="s",
                    noValue=NO_DTRACE,
                ),
            ],
        ),
        (1, [row("Exporters")]),
        (
            7,
            [
                timeline(
                    "Sessions",
                    "Red is down.",
                    (f"dtrace_session_up{{{SESSIONS}}}", "{{instance}} {{host}} {{session}}"),
                    steps=[(None, RED), (1, GREEN)],
                    noValue=NO_DTRACE,
                    color={"mode": "thresholds"},
                ),
                graph(
                    "Data lost",
                    "By kind, as dtrace(1) reported it.",
                    (lost, "{{kind}}: {{instance}} {{host}} {{session}}"),
                    noValue=NO_DTRACE,
                ),
                graph(
                    "Scrapes",
                    "How long Prometheus waits for an exporter.",
                    (f"scrape_duration_seconds{{{EXPORTER}}}", "{{instance}}"),
                    unit="s",
                ),
            ],
        ),
        (
            7,
            [
                source(),
                graph(
                    "Refused because of a limit",
                    "Rows that were left out, by the limit of dtrace.limits that was reached. "
                    "Listeners may be missing.",
                    (
                        f"increase(dtrace_session_refused_total{{{SESSIONS}}}[$__rate_interval])",
                        "{{limit}}: {{instance}} {{host}} {{session}}",
                    ),
                    noValue=NO_DTRACE,
                ),
            ],
        ),
    )
    return dashboard(
        FLEET_UID,
        "TCP listen queues: fleet",
        "Every listener of every host that dtrace-exporter watches.",
        panels,
        alerts=EXPORTER,
        variables=variables(one_listener=False),
        links=[link("One listener", LISTENER_UID)],
    )


def whose() -> Json:
    """Return the panel of whose a listener is, and what its listen() has asked for."""
    return table(
        "Owner",
        "The programs that have the listener open, its unit or container, and the name of its "
        "network namespace, if the exporter runs on that host. Asked for is the backlog that it "
        "passed to listen(), if DTrace saw that; Qmax is what it got.",
        targets(
            f"max by ({IDENTITY}, {OWNER}) ({metric('info', LISTENER)})",
            f"max by ({IDENTITY}) ({metric('q_limit', LISTENER)})",
            f"max by ({IDENTITY}) ({metric('backlog_requested', LISTENER)})",
            format="table",
            instant=True,
        ),
        [
            {"id": "merge", "options": {}},
            {
                "id": "organize",
                "options": {
                    "excludeByName": {"Time": True, "instance": True, "Value #A": True},
                    "renameByName": {"Value #B": "Qmax", "Value #C": "Asked for"},
                    "indexByName": {},
                },
            },
        ],
    )


WHAT_TO_DO = """\
**If Q stays above zero, add workers or accept faster.** A longer queue only makes clients wait
longer; raise Qmax for bursts.

| what you see | what it is | what to do |
|---|---|---|
| Q and SYNs rise, accepts do not | more load | add workers |
| Q rises, accepts fall | the application is slow or stuck | take a stack trace, then restart it |
| Q stays at 0, saturation has cells near 1 | bursts | raise Qmax; add jitter in the clients |
| drops `q_full`, `q_full_ack` | Q is full | do the above soon |
| Q0 rises, completions do not | a SYN flood, or lost ACKs | use SYN cookies, filters, a longer Q0 |
| no data at all | the session is down | read the exporter's page `/` and its log |
| no SYNs, accepts and waits | no DTrace: see the panel Source | read docs/getting-dtrace.md |

docs/runbooks.md has more, under the name of each alert.
"""


def listener() -> Json:
    """Return the dashboard of one listener: what happens, and what to do."""
    mean = (
        f"sum({rate('accept_wait_seconds_sum', LISTENER)})"
        f" / sum({rate('accept_wait_seconds_count', LISTENER)})"
    )
    dashed = {"fill": "dash", "dash": [8, 8]}
    limit = {"custom__lineStyle": dashed, "custom__fillOpacity": 0}
    own = f"{{{OWN_SESSIONS}}}"
    session = "{{host}} {{session}}"
    panels = place(
        (
            4,
            [
                number("Q", "Waiting for accept().", f"max({metric('q_length', LISTENER)})"),
                number("Qmax", "", f"max({metric('q_limit', LISTENER)})"),
                number(
                    "Full",
                    "Q divided by what fits: Qmax + 1 on Linux, half as many again and one on "
                    "FreeBSD, Qmax elsewhere.",
                    f"max({used(LISTENER)})",
                    unit="percentunit",
                    steps=FULLNESS,
                ),
                number(
                    "SYNs",
                    "",
                    f"sum({rate('syns_total', LISTENER)})",
                    unit="cps",
                    noValue=NO_DTRACE,
                ),
                number(
                    "Drops",
                    "",
                    f"sum({rate('drops_total', LISTENER)})",
                    unit="cps",
                    steps=NONE_IS_GOOD,
                ),
                number(
                    "Wait, 99 %",
                    "99 % of the connections are accepted within this time.",
                    quantile(0.99, LISTENER),
                    unit="s",
                    steps=[(None, GREEN), (0.1, YELLOW), (1, RED)],
                    noValue=NO_DTRACE,
                ),
            ],
        ),
        (4, [whose()]),
        (
            9,
            [
                graph(
                    "Q against Qmax",
                    "At the line `fits` the next connection is dropped.",
                    (metric("q_length", LISTENER), "Q {{address}}"),
                    (metric("q_limit", LISTENER), "Qmax {{address}}"),
                    (metric("q_capacity", LISTENER), "fits {{address}}"),
                    overrides=[override("(Qmax|fits) .*", regex=True, **limit)],
                ),
                heat_map(
                    "Saturation at each SYN",
                    "Q/Qmax as each SYN found it. It shows bursts between two scrapes.",
                    buckets("q_saturation_ratio", LISTENER),
                    "percentunit",
                ),
            ],
        ),
        (
            9,
            [
                graph(
                    "SYNs, handshakes, accepts",
                    "More handshakes than accepts fill Q. Retransmitted SYNs count again.",
                    (f"sum({rate('syns_total', LISTENER)})", "SYNs"),
                    (f"sum({rate('established_total', LISTENER)})", "handshakes completed"),
                    (f"sum({rate('accepts_total', LISTENER)})", "accepts"),
                    unit="cps",
                    noValue=NO_DTRACE,
                ),
                graph(
                    "Drops by reason",
                    "q_full: a SYN while Q was full. q_full_ack: a final ACK while Q was full. "
                    "q0_full: a SYN while Q0 was full. q0_evicted: a half-open connection, to make "
                    "room for a new one.",
                    (f"sum by (reason) ({rate('drops_total', LISTENER)})", "{{reason}}"),
                    unit="cps",
                    custom={"stacking": {"mode": "normal", "group": "A"}, "fillOpacity": 40},
                ),
            ],
        ),
        (
            9,
            [
                heat_map(
                    "Accept wait",
                    "Time in Q, from the handshake's end to accept().",
                    buckets("accept_wait_seconds", LISTENER),
                    "s",
                ),
                graph(
                    "Accept wait, quantiles",
                    "Interpolated between bounds; each bound is four times the one before.",
                    *((quantile(which, LISTENER), f"{which:.0%}") for which in (0.5, 0.9, 0.99)),
                    (mean, "mean"),
                    unit="s",
                    noValue=NO_DTRACE,
                ),
            ],
        ),
        (
            9,
            [
                heat_map(
                    "Handshake",
                    "Time from the SYN-ACK to the final ACK, on Linux: the way to the client and "
                    "back. It needs `dtrace: {handshake: true}`.",
                    buckets("handshake_seconds", LISTENER),
                    "s",
                ),
                graph(
                    "Handshake, quantiles",
                    "Interpolated between bounds; each bound is four times the one before.",
                    *(
                        (quantile(which, LISTENER, "handshake_seconds"), f"{which:.0%}")
                        for which in (0.5, 0.9, 0.99)
                    ),
                    unit="s",
                    noValue=NO_DTRACE,
                ),
            ],
        ),
        (
            8,
            [
                graph(
                    "Q0, half-open connections",
                    "On Linux the limit is Qmax; beyond it SYN cookies take over.",
                    (metric("q0_length", LISTENER), "Q0 {{address}}"),
                    (q0_limit(LISTENER), "limit {{address}}"),
                    overrides=[override("limit .*", regex=True, **limit)],
                ),
                timeline(
                    "Alerts",
                    "Orange is pending, red fires.",
                    (alert_states(LISTENER), "{{alertname}} {{reason}}"),
                    steps=[(None, ORANGE), (2, RED)],
                    color={"mode": "thresholds"},
                ),
                text("What to do", WHAT_TO_DO),
            ],
        ),
        (1, [row("Advice")]),
        (
            8,
            [
                verdict_line((verdicts(LISTENER), "{{address}} {{zone}}{{netns}}")),
                graph(
                    "Q on average",
                    "Computed from the time that connections waited. If it is far below what fits "
                    "while some are refused, there are bursts: a longer backlog helps. If it is "
                    "near, the application is too slow.",
                    (mean_q(LISTENER), "on average {{address}}"),
                    noValue=NO_DTRACE,
                ),
                graph(
                    "SYNs that found Q over 90 % full",
                    "As a share of all SYNs, from the saturation histogram.",
                    (above(LISTENER, "0.9"), "{{address}}"),
                    unit="percentunit",
                    noValue=NO_DTRACE,
                ),
            ],
        ),
        (1, [row("The session that watches it")]),
        (
            7,
            [
                timeline(
                    "Session",
                    "Red is down.",
                    (f"dtrace_session_up{own}", session),
                    steps=[(None, RED), (1, GREEN)],
                    noValue=NO_DTRACE,
                    color={"mode": "thresholds"},
                ),
                graph(
                    "Lost, faults, restarts, left out",
                    "All of these should be 0.",
                    (
                        f"increase(dtrace_session_lost_total{own}[$__rate_interval])",
                        f"lost: {{{{kind}}}} {session}",
                    ),
                    (
                        f"increase(dtrace_session_probe_errors_total{own}[$__rate_interval])",
                        f"faults {session}",
                    ),
                    (
                        f"increase(dtrace_session_bad_rows_total{own}[$__rate_interval])",
                        f"bad rows {session}",
                    ),
                    (
                        f"increase(dtrace_session_restarts_total{own}[$__rate_interval])",
                        f"restarts {session}",
                    ),
                    (
                        f"increase(dtrace_session_refused_total{own}[$__rate_interval])",
                        f"left out: {{{{limit}}}} {session}",
                    ),
                    noValue=NO_DTRACE,
                ),
                table(
                    "Parts of the program",
                    "1 for each optional part that this kernel could enable. A missing part costs "
                    "only its own series.",
                    targets(f"dtrace_session_feature_enabled{own}", format="table", instant=True),
                    [
                        {
                            "id": "organize",
                            "options": {
                                "excludeByName": {
                                    "Time": True,
                                    "__name__": True,
                                    "instance": True,
                                    "job": True,
                                },
                                "renameByName": {"Value": "enabled"},
                                "indexByName": {},
                            },
                        }
                    ],
                    noValue=NO_DTRACE,
                ),
                source(),
            ],
        ),
    )
    return dashboard(
        LISTENER_UID,
        "TCP listen queues: listener",
        "One listener: its queues, what fills them, and what to do.",
        panels,
        alerts=LISTENER,
        variables=variables(one_listener=True),
        links=[link("All listeners", FLEET_UID)],
    )


DASHBOARDS = {"fleet.json": fleet, "listener.json": listener}


def render(name: str) -> str:
    """Return the text of one of the files."""
    return json.dumps(DASHBOARDS[name](), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for file in DASHBOARDS:
        (HERE / file).write_text(render(file), encoding="utf-8")
