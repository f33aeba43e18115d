"""Guards for clients of the SDKs ``anthropic`` and ``openai``: refuse every call that could exceed the cap.

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
from ktrdr_budget.metering.guards.metered_transport import (
    AsyncMeteredTransport,
    MeteredTransport,
    SyncMeteredTransport,
)
from ktrdr_budget.metering.guards.openai import OpenAIDialect
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
_REQUIRED_ATTRIBUTES = ("request", "copy", "with_options", "_client")
_WEBSOCKET_METHODS = ("_websocket_query_params", "_configure_realtime", "_configure_realtime_with_api_key")
"""Methods that the SDK ``openai`` calls before it opens a WebSocket."""


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
    """Guard a client: reserve the worst case of each call before the call is sent, and commit the reported usage.

    Args:
        client: a client of the SDK ``anthropic`` or ``openai``. The same object is returned; copies by ``copy()`` and
            ``with_options()`` are guarded too.
        limiter: an :class:`AsyncBudgetLimiter` for an async client, a :class:`BudgetLimiter` for a sync client.
        budgets: the budgets charged by each call.
        pricer: the source of prices; by default as for :class:`~ktrdr_budget.metering.meter.Meter`.
        provider: the provider's name in the price list; needed if the client's ``base_url`` belongs to another provider
            (``openrouter``, …).
        max_output_tokens: the output limit that the guard adds to requests that set none. If ``None``, the model's
            published output limit is reserved for such a request, or else the model's context window. If neither is
            known, the request is refused.
        max_input_tokens: an upper bound of input that the request only refers to: documents, files, and stored
            conversations. If ``None``, requests with such input are refused.
        unseen_output_tokens: if a stream breaks off, the tokens charged for output that was produced but not received.
        allow_unmetered: whether to send calls that cannot be metered; by default they are refused. Such calls are
            recorded only if they report usage.

    Raises:
        InvalidArgument: the client cannot be guarded, or does not match the limiter.
        UnknownBudget: the limiter has no such budget.

    Calls of the guarded client raise, before anything is sent:
        BudgetExceeded: the worst case does not fit.
        UnknownPrice: the model has no price.
        UnmeteredCall: the call cannot be bounded, or its endpoint is not metered.
        StoreUnavailable: the store did not reply within the deadline.
    """
    default_provider, dialect, is_async = _supported(client)
    if is_async != isinstance(limiter, AsyncBudgetLimiter):
        needed = "an AsyncBudgetLimiter" if is_async else "a BudgetLimiter"
        raise InvalidArgument(f"{type(client).__name__} needs {needed}, not {type(limiter).__name__}")
    options = GuardOptions(
        Meter(limiter, budgets, pricer),
        default_provider if provider is None else provider,
        max_output_tokens,
        max_input_tokens,
        unseen_output_tokens,
        allow_unmetered,
    )
    return cast(Client, _install(client, dialect(), options, is_async))


def _supported(client: object) -> tuple[str, type[Any], bool]:
    """Return the client's default provider, its dialect, and whether the client is async."""
    kinds = [f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(client).__mro__]
    known = [kind for kind in kinds if kind in _SUPPORTED]
    # The SDKs derive clients of other platforms (Bedrock, Vertex, …) from these, with other APIs.
    subclass_of_sdk = known and any(
        kind.startswith(("anthropic.", "openai.")) for kind in kinds[: kinds.index(known[0])]
    )
    if not known or subclass_of_sdk or getattr(client, "_provider", None) is not None:
        raise InvalidArgument(f"{type(client).__name__} cannot be guarded; supported clients: {', '.join(_SUPPORTED)}")
    missing = [name for name in _REQUIRED_ATTRIBUTES if not hasattr(client, name)]
    if missing:
        raise InvalidArgument(f"this version of the SDK cannot be guarded: its client has no {', '.join(missing)}")
    if "request" in vars(client):
        raise InvalidArgument("this client is already guarded")
    return _SUPPORTED[known[0]]


def _install(client: Any, dialect: Dialect, options: GuardOptions, is_async: bool) -> Any:
    """Put a transport between the client and its HTTP client, and run each call of the client through the transport."""
    if "X509" in type(getattr(client, "_workload_identity_auth", None)).__name__:
        # Such a client sends its requests by an HTTP client that is not `client._client`.
        raise InvalidArgument("a client that authenticates by X.509 certificates cannot be guarded")
    inner = client._client
    while isinstance(inner, MeteredTransport):  # shared with a guarded client
        inner = inner.inner
    transport_class = AsyncMeteredTransport if is_async else SyncMeteredTransport
    transport: MeteredTransport = transport_class(inner, dialect, options)
    request, copy = client.request, client.copy

    if is_async:

        @functools.wraps(request)
        async def guarded_request(*arguments: Any, **named: Any) -> Any:
            return await transport.call(request, *arguments, **named)

    else:

        @functools.wraps(request)
        def guarded_request(*arguments: Any, **named: Any) -> Any:
            return transport.call(request, *arguments, **named)

    @functools.wraps(copy)
    def guarded_copy(*arguments: Any, **named: Any) -> Any:
        if named.get("http_client") is None:
            named["http_client"] = transport.inner
        return _install(copy(*arguments, **named), dialect, options, is_async)

    def refuse_websocket(*_: object, **__: object) -> Any:
        raise UnmeteredCall("WebSockets are not metered: guard(allow_unmetered=True) lets them through unmetered")

    vars(client).update(_client=transport, request=guarded_request, copy=guarded_copy, with_options=guarded_copy)
    if not options.allow_unmetered:
        names = _WEBSOCKET_METHODS if type(client).__module__.startswith("openai") else ()
        vars(client).update(dict.fromkeys(names, refuse_websocket))
    return client
