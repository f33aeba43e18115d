"""Guards for the clients of the SDKs ``anthropic`` and ``openai``: no call is sent that could break the cap.

::

    client = guard(AsyncAnthropic(), limiter, budgets=["agent"])
    await client.messages.create(...)       # raises BudgetExceeded before anything is sent
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, TypeVar, cast

from ktrdr_budget.errors import InvalidArgument, UnmeteredCall
from ktrdr_budget.limiter import AsyncBudgetLimiter
from ktrdr_budget.metering.guards.anthropic import AnthropicDialect
from ktrdr_budget.metering.guards.bounds import GuardOptions
from ktrdr_budget.metering.guards.dialect import Dialect
from ktrdr_budget.metering.guards.openai import OpenAIDialect
from ktrdr_budget.metering.guards.taps import AsyncTap, SyncTap, Tap
from ktrdr_budget.metering.meter import Meter
from ktrdr_budget.metering.prices import Pricer
from ktrdr_budget.sync import BudgetLimiter

__all__ = ["UnmeteredCall", "guard"]

Client = TypeVar("Client")

_SUPPORTED: dict[str, tuple[str, type[Any], bool]] = {
    "anthropic.Anthropic": ("anthropic", AnthropicDialect, False),
    "anthropic.AsyncAnthropic": ("anthropic", AnthropicDialect, True),
    "openai.OpenAI": ("openai", OpenAIDialect, False),
    "openai.AsyncOpenAI": ("openai", OpenAIDialect, True),
    "openai.AzureOpenAI": ("azure", OpenAIDialect, False),
    "openai.AsyncAzureOpenAI": ("azure", OpenAIDialect, True),
}
_NEEDED = ("request", "copy", "with_options", "_client")
_SOCKETS = ("_websocket_query_params", "_configure_realtime", "_configure_realtime_with_api_key")
"""What the SDK ``openai`` calls before it opens a WebSocket."""


def guard(
    client: Client,
    limiter: AsyncBudgetLimiter | BudgetLimiter,
    budgets: Sequence[str] = ("agent",),
    *,
    pricer: Pricer | None = None,
    provider: str | None = None,
    max_output_tokens: int | None = None,
    max_input_tokens: int | None = None,
    unseen_output_tokens: int = 256,
    allow_unmetered: bool = False,
) -> Client:
    """Makes a client reserve the worst case of each call before it is sent, and commit what the provider reports.

    Args:
        client: of the SDK ``anthropic`` or ``openai``. The same object is returned; so are guarded copies by its
            ``copy()`` and ``with_options()``.
        limiter: an :class:`AsyncBudgetLimiter` for an async client, a :class:`BudgetLimiter` for another.
        budgets: what each call is charged to.
        pricer: what calls cost; by default as for :class:`~ktrdr_budget.metering.meter.Meter`.
        provider: as the price list names it; needed if the client talks to another than its SDK's (``openrouter``, …).
        max_output_tokens: the limit of output, sent with requests that tell none. Without it such a request reserves
            what the model answers at most as published, or what it can handle at all, if the price list knows that; and
            is refused otherwise.
        max_input_tokens: added to the input's bound for what a request does not show: documents, files, and
            conversations that the provider stores. Without it such requests are refused.
        unseen_output_tokens: what a provider may have made beyond what arrived when a stream breaks off.
        allow_unmetered: lets calls through that cannot be metered: unrecorded if they report no usage at all.

    Raises:
        InvalidArgument: the client cannot be guarded, or does not fit the limiter.
        UnknownBudget: the limiter was not given such a budget.

    Calls then raise, before anything is sent:
        BudgetExceeded: there is no room for the worst case.
        UnknownPrice: there is no price for the model.
        UnmeteredCall: the call cannot be bounded, or is not metered.
        StoreUnavailable: the store gave no answer within the deadline.
    """
    named, dialect, is_async = _supported(client)
    if is_async != isinstance(limiter, AsyncBudgetLimiter):
        needed = "an AsyncBudgetLimiter" if is_async else "a BudgetLimiter"
        raise InvalidArgument(f"{type(client).__name__} needs {needed}, not {type(limiter).__name__}")
    for name, count in (("max_output_tokens", max_output_tokens), ("max_input_tokens", max_input_tokens)):
        if count is not None and (type(count) is not int or count < 1):
            raise InvalidArgument(f"{name} must be a whole number above 0, not {count!r}")
    if provider is not None and (not isinstance(provider, str) or not provider):
        raise InvalidArgument(f"provider must be a name of the price list, not {provider!r}")
    if type(allow_unmetered) is not bool:
        raise InvalidArgument(f"allow_unmetered must be True or False, not {allow_unmetered!r}")
    if type(unseen_output_tokens) is not int or unseen_output_tokens < 0:
        raise InvalidArgument(f"unseen_output_tokens must be a whole number, not {unseen_output_tokens!r}")
    options = GuardOptions(
        Meter(limiter, budgets, pricer),
        provider or named,
        max_output_tokens,
        max_input_tokens,
        unseen_output_tokens,
        allow_unmetered,
    )
    return cast(Client, _install(client, dialect(), options, is_async))


def _supported(client: object) -> tuple[str, type[Any], bool]:
    """Provider, dialect, and whether it is async."""
    kinds = [f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(client).__mro__]
    known = [kind for kind in kinds if kind in _SUPPORTED]
    # Other clients of the SDKs (Bedrock, Vertex, …) derive from these, and speak otherwise.
    own = (
        [kind for kind in kinds[: kinds.index(known[0])] if kind.startswith(("anthropic.", "openai."))] if known else []
    )
    if not known or own or getattr(client, "_provider", None) is not None:
        raise InvalidArgument(
            f"{type(client).__name__} cannot be guarded; there are guards for: {', '.join(_SUPPORTED)}"
        )
    missing = [name for name in _NEEDED if not hasattr(client, name)]
    if missing:
        raise InvalidArgument(f"this version of the SDK cannot be guarded: its client has no {', '.join(missing)}")
    if "request" in vars(client):
        raise InvalidArgument("this client is guarded already; guard an unguarded one")
    return _SUPPORTED[known[0]]


def _install(client: Any, dialect: Dialect, options: GuardOptions, is_async: bool) -> Any:
    """Puts a tap between the client and its HTTP client, and around each of its calls."""
    if "X509" in type(getattr(client, "_workload_identity_auth", None)).__name__:
        # It sends by a transport of its own, past any tap.
        raise InvalidArgument("a client that authenticates by X.509 certificates cannot be guarded")
    inner = client._client
    while isinstance(inner, Tap):  # it shares the HTTP client of a guarded one
        inner = inner.inner
    tap: Tap = (AsyncTap if is_async else SyncTap)(inner, dialect, options)
    request, copy = client.request, client.copy

    if is_async:

        @functools.wraps(request)
        async def guarded_request(*arguments: Any, **named: Any) -> Any:
            return await tap.calling(request, *arguments, **named)

    else:

        @functools.wraps(request)
        def guarded_request(*arguments: Any, **named: Any) -> Any:
            return tap.calling(request, *arguments, **named)

    @functools.wraps(copy)
    def guarded_copy(*arguments: Any, **named: Any) -> Any:
        if named.get("http_client") is None:
            named["http_client"] = tap.inner
        return _install(copy(*arguments, **named), dialect, options, is_async)

    def no_socket(*_: object, **__: object) -> Any:
        raise UnmeteredCall("WebSockets are not metered: guard(allow_unmetered=True) lets them through unmetered")

    vars(client).update(_client=tap, request=guarded_request, copy=guarded_copy, with_options=guarded_copy)
    if not options.allow_unmetered:
        vars(client).update({name: no_socket for name in _SOCKETS if type(client).__module__.startswith("openai")})
    return client
