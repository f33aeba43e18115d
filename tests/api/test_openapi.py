"""The OpenAPI document matches the service."""

from __future__ import annotations

import re
from typing import Any

import jsonschema_rs
import pytest

from ktrdr_budget.api import Settings, create_app

from .support import V1, reserved

OPERATIONS = {
    ("get", "/agent/budget"),
    ("get", "/budgets"),
    ("get", "/budgets/{name}"),
    ("get", "/budgets/{name}/holds"),
    ("get", "/budgets/{name}/ledger"),
    ("post", "/agent/trigger"),
    ("get", "/agent/status"),
    ("get", "/agent/cycles"),
    ("delete", "/agent/cancel/{operation_id}"),
    ("put", "/budgets/{name}/limit"),
    ("delete", "/budgets/{name}/limit"),
    ("post", "/budgets/{name}/migrate"),
    ("get", "/changes"),
    ("post", "/keys"),
    ("get", "/keys"),
    ("delete", "/keys/{name}"),
    ("post", "/reservations"),
    ("get", "/reservations/{id}"),
    ("post", "/reservations/{id}/commit"),
    ("post", "/reservations/{id}/release"),
    ("post", "/reservations/{id}/extend"),
    ("post", "/reservations/{id}/grow"),
    ("post", "/spend"),
}


def document_of(**settings: Any) -> dict[str, Any]:
    return create_app(Settings(**settings)).openapi()


@pytest.fixture
def document() -> dict[str, Any]:
    return document_of(api_key="use-1", admin_key="admin-1")


def operations(document: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(method, path): operation for path, item in document["paths"].items() for method, operation in item.items()}


def validator(document: dict[str, Any], schema: dict[str, Any]) -> jsonschema_rs.Validator:
    return jsonschema_rs.validator_for({**schema, "components": document["components"]})


def test_every_operation_is_documented(document):
    assert operations(document).keys() == {(method, V1 + path) for method, path in OPERATIONS} | {
        ("get", "/livez"),
        ("get", "/readyz"),
        ("get", "/metrics"),
    }
    ids = [operation["operationId"] for operation in operations(document).values()]
    assert len(set(ids)) == len(ids)
    for operation in operations(document).values():
        assert operation["summary"]
        assert operation["description"]


def test_every_documented_error_response_is_a_problem_document(document):
    for (_, path), operation in operations(document).items():
        for status, response in operation["responses"].items():
            assert response["description"]
            media_types = set(response["content"])
            if int(status) >= 400:
                assert media_types == {"application/problem+json"}, (path, status)
                [content] = response["content"].values()
                assert content["schema"]["$ref"].endswith("Problem"), (path, status)
            elif path != "/metrics":
                assert media_types == {"application/json"}
        if path.startswith(V1):
            assert {"401", "403", "503"} <= operation["responses"].keys()


def test_the_required_key_of_each_operation_is_documented(document):
    for (method, path), operation in operations(document).items():
        if not path.startswith(V1):
            assert "security" not in operation
        elif path.endswith(("/limit", "/migrate", "/changes", "/keys", "/keys/{name}")):
            assert operation["security"] == [{"adminKey": []}], (method, path)
        else:
            assert operation["security"] == [{"useKey": []}, {"adminKey": []}]
    schemes = document["components"]["securitySchemes"]
    assert {name: (scheme["type"], scheme["scheme"]) for name, scheme in schemes.items()} == {
        "useKey": ("http", "bearer"),
        "adminKey": ("http", "bearer"),
    }


def test_the_openapi_document_requires_no_key_if_no_keys_are_configured():
    document = document_of()
    assert "securitySchemes" not in document["components"]
    assert not any("security" in operation for operation in operations(document).values())


def test_the_openapi_document_contains_no_secret():
    text = str(document_of(api_key="secret-1", admin_key="secret-2", redis_url="redis://:secret-3@store"))
    assert not re.search("secret-[123]", text)


def test_every_schema_is_a_shared_component_of_the_document(document):
    def inline(node: Any) -> bool:
        if isinstance(node, list):
            return any(map(inline, node))
        return isinstance(node, dict) and ("properties" in node or any(map(inline, node.values())))

    assert not inline(document["paths"])


def test_every_example_in_the_openapi_document_is_valid(document):
    found = 0
    for name, schema in document["components"]["schemas"].items():
        check = validator(document, {"$ref": f"#/components/schemas/{name}"})
        for example in schema.get("examples", ()):
            assert check.is_valid(example), (name, list(check.iter_errors(example)))
            found += 1
    assert found >= 9


def test_a_request_body_is_required_only_if_at_least_one_field_is_required(document):
    required = {
        path.removeprefix(V1): operation["requestBody"].get("required", False)
        for (_, path), operation in operations(document).items()
        if "requestBody" in operation
    }
    assert required == {
        "/agent/trigger": False,
        "/budgets/{name}/limit": True,
        "/keys": True,
        "/reservations": True,
        "/reservations/{id}/commit": False,
        "/reservations/{id}/extend": False,
        "/reservations/{id}/grow": True,
        "/spend": True,
    }


async def test_the_responses_of_every_operation_match_the_openapi_document(client, document):
    """Call every operation once; the fuzzer calls them with many values."""
    hold = await reserved(client, {"agent": "0.15", "cycles": 1}, operation="research")
    path = f"/reservations/{hold['id']}"
    calls = [
        ("GET", "/agent/budget", "/agent/budget", None),
        ("GET", "/budgets", "/budgets", None),
        ("GET", "/budgets/agent", "/budgets/{name}", None),
        ("GET", "/budgets/agent/holds", "/budgets/{name}/holds", None),
        ("PUT", "/budgets/agent/limit", "/budgets/{name}/limit", {"limit": None, "until": "window"}),
        ("DELETE", "/budgets/agent/limit", "/budgets/{name}/limit", None),
        ("POST", "/budgets/agent/migrate", "/budgets/{name}/migrate", None),
        ("GET", "/changes", "/changes", None),
        ("POST", "/keys", "/keys", {"name": "ci", "scope": {"team": "quant"}, "expires": "90d"}),
        ("GET", "/keys", "/keys", None),
        ("DELETE", "/keys/ci", "/keys/{name}", None),
        ("GET", path, "/reservations/{id}", None),
        ("POST", f"{path}/extend", "/reservations/{id}/extend", {"accrued": 0.03}),
        ("POST", f"{path}/grow", "/reservations/{id}/grow", {"amounts": {"agent": 0.25}}),
        ("POST", f"{path}/grow", "/reservations/{id}/grow", {"amounts": {"agent": 9}}),
        ("POST", f"{path}/commit", "/reservations/{id}/commit", None),
        ("POST", f"{path}/release", "/reservations/{id}/release", None),
        ("POST", "/reservations", "/reservations", {"amounts": {"agent": 1}}),
        ("POST", "/reservations", "/reservations", {"amounts": {"agent": 9}}),
        ("POST", "/reservations", "/reservations", {}),
        ("POST", "/spend", "/spend", {"amounts": {"agent": 1}}),
        ("GET", "/budgets/agent/ledger", "/budgets/{name}/ledger", None),
        ("POST", "/agent/trigger", "/agent/trigger", {"operation_id": "op_a"}),
        ("POST", "/agent/trigger", "/agent/trigger", None),
        ("POST", "/agent/trigger", "/agent/trigger", {"operation_id": 1}),
        ("GET", "/agent/status", "/agent/status", None),
        ("DELETE", "/agent/cancel/op_a", "/agent/cancel/{operation_id}", None),
        ("DELETE", "/agent/cancel/op_a", "/agent/cancel/{operation_id}", None),
        ("DELETE", "/agent/cancel/op_b", "/agent/cancel/{operation_id}", None),
        ("GET", "/agent/status", "/agent/status", None),
        ("GET", "/agent/cycles", "/agent/cycles", None),
        ("POST", "/spend", "/spend", {"amounts": {"agent": 9}}),
        ("POST", "/agent/trigger", "/agent/trigger", None),
    ]
    for method, path, template, body in calls:
        response = await client.request(method, V1 + path, json=body)
        declared = document["paths"][V1 + template][method.lower()]["responses"][str(response.status_code)]
        schema = declared["content"][response.headers["content-type"]]["schema"]
        check = validator(document, schema)
        assert check.is_valid(response.json()), (method, path, list(check.iter_errors(response.json())))
        for name, header in declared.get("headers", {}).items():
            assert name in response.headers or not header.get("required"), (method, path, name)


async def test_the_service_serves_its_openapi_document(client):
    response = await client.get("/openapi.json")
    assert response.json()["info"]["title"] == "ktrdr-budget"
    assert (await client.get("/docs")).status_code == 200
