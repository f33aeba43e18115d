"""Outcomes of phases on spans. Spans leave the process, so they contain no text of a provider, a prompt or a reply.

Cancellations and denials are outcomes, not errors. A span records the type and the stack trace of an error. The span
has the message of the error only if this package wrote the message, or if the phase has called no language model. The
cycle's record in the store has the message in any case.
"""

from __future__ import annotations

from ktrdr_budget.telemetry.spans import Span, ending_of

__all__ = ["set_outcome"]

_OURS = "ktrdr_budget."
_PROVIDERS = ("anthropic", "openai")


def set_outcome(current: Span, error: BaseException | None, *, asked: bool) -> str:
    """Set the outcome of a phase on its span. Return the error text for the cycle's span, or an empty text.

    Args:
        error: the exception that ended the phase. ``None`` if the phase completed.
        asked: whether the phase has called a language model.
    """
    outcome = {"outcome": "completed"} if error is None else ending_of(error)
    if error is None or outcome:
        current.set_attributes(outcome)
        return ""
    guarded = asked or any(_is_of(link, *_PROVIDERS) for link in _chain(error))
    message = str(error) if not guarded or type(error).__module__.startswith(_OURS) else ""
    text = f"{type(error).__name__}: {message}" if message else type(error).__name__
    current.set_attribute("outcome", "failed")
    current.record_exception(error, message if guarded else None)
    current.fail(text)
    return text


def _is_of(error: BaseException, *packages: str) -> bool:
    return type(error).__module__.partition(".")[0] in packages


def _chain(error: BaseException) -> list[BaseException]:
    """Return the error, followed by all its causes and contexts."""
    found: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        link = waiting.pop()
        if link is not None and link not in found:
            found.append(link)
            waiting += [link.__cause__, link.__context__]
    return found
