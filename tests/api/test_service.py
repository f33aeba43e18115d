"""The shared parts of a service: who may use a route, and the estimate of a cycle."""

from __future__ import annotations

from decimal import Decimal

import pytest
from fastapi import Request
from fastapi.params import Security

from ktrdr_budget import AsyncBudgetLimiter, Budget
from ktrdr_budget.api.auth import Keys
from ktrdr_budget.api.problems import HTTPProblem
from ktrdr_budget.api.route import BUDGETS
from ktrdr_budget.api.service import BudgetService
from ktrdr_budget.errors import InvalidAmount

LIMITER = AsyncBudgetLimiter("redis://store", [Budget("agent", "5.00")])
KEYS = Keys(["use-key"], ["admin-key"])


def request(key: str = "") -> Request:
    headers = [(b"authorization", f"Bearer {key}".encode())] if key else []
    return Request({"type": "http", "method": "GET", "headers": headers, "client": ("127.0.0.1", 1)})


@pytest.mark.parametrize(("keys", "documented"), [(Keys(), False), (KEYS, True)])
def test_the_openapi_document_requires_a_key_only_if_the_service_has_keys(keys, documented):
    service = BudgetService(LIMITER, keys, "0.15")
    assert [isinstance(each, Security) for each in (service.use, service.admin)] == [documented] * 2


async def test_an_admin_operation_needs_the_admin_key():
    service = BudgetService(LIMITER, KEYS, "0.15")
    assert not (await service.caller(request("use-key"))).admin
    assert (await service.admin_caller(request("admin-key"))).admin
    with pytest.raises(HTTPProblem):
        await service.admin_caller(request("use-key"))


@pytest.mark.parametrize("admin", [False, True])
async def test_the_budgets_are_in_the_request_scope_even_if_a_request_without_a_key_is_refused(admin):
    service, received = BudgetService(LIMITER, KEYS, "0.15"), request()
    with pytest.raises(HTTPProblem):
        await (service.admin_caller if admin else service.caller)(received)
    assert received.scope[BUDGETS] == LIMITER.budgets


def test_the_estimate_of_a_cycle_must_be_positive():
    assert BudgetService(LIMITER, KEYS, "0.150").cycle_estimate == Decimal("0.15")
    with pytest.raises(InvalidAmount):
        BudgetService(LIMITER, KEYS, 0)
