"""Checks a dashboard against the types of Grafana's own SDK.

The SDK reads a dashboard leniently: it drops unknown fields, and accepts values of any type. So there are two checks:
the dashboard is the same after a round trip through the SDK, and each value has the type that the SDK declares for it.
"""

from __future__ import annotations

import copy
import enum
import json
import types
import typing
from collections.abc import Iterator
from typing import Any

from grafana_foundation_sdk.cog import plugins, runtime
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import dashboard

plugins.register_default_plugins()

ANNOTATION_OF_PROMETHEUS = ("titleFormat", "textFormat", "tagKeys")
"""Fields of an annotation that Grafana's Prometheus datasource reads; the SDK has no types for them."""


def faults(document: dict[str, Any]) -> list[str]:
    """The faults of a dashboard by Grafana's schema, each with its path."""
    document = copy.deepcopy(document)
    found = []
    for number, annotation in enumerate(document["annotations"]["list"]):
        for name in ANNOTATION_OF_PROMETHEUS:
            path = f"dashboard.annotations.list[{number}].{name}"
            found += _mistyped(annotation.pop(name, ""), str, path)
    return [*found, *_read(document, dashboard.Dashboard, "dashboard")]


def _read(document: dict[str, Any], model: Any, path: str) -> Iterator[str]:
    try:
        parsed = model.from_json(document)
    except (AttributeError, KeyError, TypeError) as error:
        yield f"{path}: unreadable: {error!r}"
    else:
        yield from _lost(document, json.loads(JSONEncoder().encode(parsed)), path)
        yield from _mistyped(parsed, model, path)


def _lost(given: Any, rebuilt: Any, path: str) -> Iterator[str]:
    """The values that the round trip has lost or changed. The values that it has added are defaults, not faults."""
    if isinstance(given, dict) and isinstance(rebuilt, dict):
        for name, value in given.items():
            if name in rebuilt:
                yield from _lost(value, rebuilt[name], f"{path}.{name}")
            elif value is not None:
                yield f"{path}.{name}: unknown"
    elif isinstance(given, list) and isinstance(rebuilt, list) and len(given) == len(rebuilt):
        for number, (value, other) in enumerate(zip(given, rebuilt, strict=True)):
            yield from _lost(value, other, f"{path}[{number}]")
    elif given != rebuilt:
        yield f"{path}: {given!r} became {rebuilt!r}"


def _mistyped(value: Any, hint: Any, path: str) -> Iterator[str]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in (Any, object):
        if _is_model(value):  # options of a panel: their type is known by its plugin
            yield from _mistyped(value, type(value), path)
    elif origin in (typing.Union, types.UnionType):
        tried = [list(_mistyped(value, member, path)) for member in arguments]
        if all(tried):  # no type fits: report the deepest fault
            yield from max(tried, key=lambda found: len(found[0].partition(": ")[0]))
    elif origin is typing.Literal:
        if value not in arguments:
            yield f"{path}: {value!r} is none of {arguments}"
    elif origin is list:
        yield from _each(value, list, ((f"{path}[{n}]", v, arguments[0]) for n, v in _items(value)), path)
    elif origin is dict:
        yield from _each(value, dict, ((f"{path}.{n}", v, arguments[1]) for n, v in _items(value)), path)
    elif isinstance(hint, type) and issubclass(hint, enum.Enum):
        if value not in [member.value for member in hint]:
            yield f"{path}: {value!r} is none of {[member.value for member in hint]}"
    else:
        yield from _instance(value, hint, path)


def _items(value: Any) -> Iterator[tuple[Any, Any]]:
    yield from value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()


def _each(value: Any, kind: type, members: Iterator[tuple[str, Any, Any]], path: str) -> Iterator[str]:
    if not isinstance(value, kind):
        yield f"{path}: {value!r} is no {kind.__name__}"
    for place, member, hint in members:
        yield from _mistyped(member, hint, place)


def _instance(value: Any, hint: Any, path: str) -> Iterator[str]:
    kinds = (int, float) if hint is float else (hint,)
    if isinstance(value, dict) and hasattr(hint, "from_json"):  # not parsed by the SDK
        yield from _read(value, hint, path)
    elif not isinstance(value, kinds) or (isinstance(value, bool) and hint is not bool):
        yield f"{path}: {value!r} is no {hint.__name__}"
    elif isinstance(value, runtime.UnknownDataquery):
        yield f"{path}: a query of a datasource that is not known"
    elif _is_model(value):
        if isinstance(value, dashboard.Panel) and runtime.panelcfg_config(value.type_val) is None:
            yield f"{path}: a panel of a type that is not known, {value.type_val!r}"
        for name, member_hint in typing.get_type_hints(type(value)).items():
            yield from _mistyped(getattr(value, name), member_hint, f"{path}.{name}")


def _is_model(value: Any) -> bool:
    return type(value).__module__.startswith("grafana_foundation_sdk.models")
