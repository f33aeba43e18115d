"""The HTTP service, as a complete app or as routes for an existing app.

:func:`create_app` makes the complete app. :func:`budget_router` makes the routes for an existing app.
:func:`hold_budget` makes a dependency that holds a budget while a route runs.

The package needs the extra ``server``: ``pip install 'ktrdr-budget[server]'``.
"""

try:
    import fastapi  # noqa: F401
    import prometheus_client  # noqa: F401
    import pydantic_settings  # noqa: F401
    import uvicorn  # noqa: F401
except ModuleNotFoundError as error:
    message = f"the HTTP service needs more packages: pip install 'ktrdr-budget[server]' ({error.name} is missing)"
    raise ModuleNotFoundError(message, name=error.name) from None

from ktrdr_budget.api.app import create_app
from ktrdr_budget.api.auth import Keys
from ktrdr_budget.api.dependencies import BudgetProblem, hold_budget
from ktrdr_budget.api.router import budget_router, probe_router
from ktrdr_budget.api.settings import Settings, SettingsError, load_settings

__all__ = [
    "BudgetProblem",
    "Keys",
    "Settings",
    "SettingsError",
    "budget_router",
    "create_app",
    "hold_budget",
    "load_settings",
    "probe_router",
]
