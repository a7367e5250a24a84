"""Grafana's published schema, from its package grafana-foundation-sdk, and a check by it."""

from __future__ import annotations

import enum
import types
import typing
import warnings
from collections.abc import Iterator
from typing import Any

with warnings.catch_warnings():
    # It recommends the newer model, which only newer versions of Grafana can import.
    warnings.simplefilter("ignore", DeprecationWarning)
    from grafana_foundation_sdk.models import dashboard

from grafana_foundation_sdk.models import (
    common,
    heatmap,
    prometheus,
    stat,
    statetimeline,
    table,
    text,
    timeseries,
    units,
)

Dashboard = dashboard.Dashboard
PANELS: dict[str, tuple[type, type | None]] = {
    "heatmap": (heatmap.Options, heatmap.FieldConfig),
    "stat": (stat.Options, None),
    "state-timeline": (statetimeline.Options, statetimeline.FieldConfig),
    "table": (table.Options, common.TableFieldOptions),
    "text": (text.Options, None),
    "timeseries": (timeseries.Options, common.GraphFieldConfig),
}
"""From each type of panel to the types of its options and of its fields' configuration."""

UNITS = {value for name, value in vars(units).items() if name[0].isupper()}

# Constants that the package sets and that are optional in the schema.
_OPTIONAL = {"placement"}


def faults(value: Any, kind: Any, where: str = "dashboard") -> Iterator[str]:
    """Yield each difference between a value and the schema, with its place.

    Args:
        value: the parsed JSON.
        kind: its expected type; for an object one of the package's classes.
        where: the value's place, for the texts.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        wanted = [each for each in arguments if (each is type(None)) == (value is None)]
        if not wanted:
            yield f"{where}: is null"
            return
        if dashboard.Panel in wanted:
            row = isinstance(value, dict) and value.get("type") == "row"
            wanted = [dashboard.RowPanel if row else dashboard.Panel]
        found = [list(faults(value, each, where)) for each in wanted]
        yield from min(found, key=len)
    elif origin is list:
        if not isinstance(value, list):
            yield f"{where}: no list"
        else:
            for number, each in enumerate(value):
                yield from faults(each, arguments[0], f"{where}[{number}]")
    elif origin is dict:
        if not isinstance(value, dict):
            yield f"{where}: no object"
        else:
            for key, each in value.items():
                yield from faults(each, arguments[1], f"{where}.{key}")
    elif origin is typing.Literal:
        if value not in arguments:
            yield f"{where}: {value!r:.60} is none of {arguments}"
    elif kind in (object, Any):
        return
    elif issubclass(kind, enum.Enum):
        if value not in {each.value for each in kind}:
            yield f"{where}: {value!r:.60} is no {kind.__name__}"
    elif kind is float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            yield f"{where}: {value!r:.60} is no number"
    elif kind in (str, int, bool, type(None)):
        if type(value) is not kind:
            yield f"{where}: {value!r:.60} is no {kind.__name__}"
    elif not isinstance(value, dict):
        yield f"{where}: no object"
    else:
        yield from _object(value, kind, where)


def _object(value: dict[str, Any], kind: type, where: str) -> Iterator[str]:
    if kind.__name__ == "Dataquery":
        kind = prometheus.Dataquery
    hints = {_name(name): hint for name, hint in typing.get_type_hints(kind).items()}
    panel = kind is dashboard.Panel
    if panel and value.get("type") not in PANELS:
        yield f"{where}: {value.get('type')!r} is no type of panel that is known here"
        return
    for key, each in value.items():
        if panel and key == "options":
            yield from faults(each, PANELS[value["type"]][0], f"{where}.options")
        elif kind is dashboard.FieldConfig and key == "custom":
            continue
        elif key in hints:
            yield from faults(each, hints[key], f"{where}.{key}")
        else:
            yield f"{where}: {kind.__name__} has no {key}"
    for key, hint in hints.items():
        optional = type(None) in typing.get_args(hint)
        if not (optional or key in value or key in _OPTIONAL):
            yield f"{where}: {kind.__name__} lacks {key}"
    if panel:
        custom = value.get("fieldConfig", {}).get("defaults", {}).get("custom", {})
        of_kind = PANELS[value["type"]][1]
        for one in value.get("fieldConfig", {}).get("overrides", []):
            for each in one["properties"]:
                yield from _override(each, of_kind, f"{where}.fieldConfig.overrides")
        if of_kind is not None:
            yield from faults(custom, of_kind, f"{where}.fieldConfig.defaults.custom")
        elif custom:
            yield f"{where}: {value['type']} has no custom configuration of fields"


def _override(given: dict[str, Any], custom: type | None, where: str) -> Iterator[str]:
    """Yield the faults of a property that is overridden: ``unit``, or ``custom.lineStyle``."""
    name = given["id"].removeprefix("custom.")
    kind = dashboard.FieldConfig if name == given["id"] else custom
    hints = {_name(each): hint for each, hint in typing.get_type_hints(kind).items()}
    if name == "links":
        # Their form differs from that of a dashboard's links, which the package expects here.
        for each in given["value"]:
            if {*each} != {"title", "url", "targetBlank"}:
                yield f"{where}.links: {each} is no link of a field"
    elif name in hints:
        yield from faults(given["value"], hints[name], f"{where}.{name}")
    else:
        yield f"{where}: no {name}"


def _name(attribute: str) -> str:
    """Return the JSON name of an attribute of the package."""
    first, *rest = attribute.removesuffix("_val").split("_")
    return first + "".join(word.title() for word in rest)
