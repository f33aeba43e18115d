"""How a phase that raised is told on spans, which leave the process: no words of a provider, of a prompt or an answer.

A cancellation and a denial are outcomes. An error is told by its type, by where it was raised, and by its words where
those can only be ours, or of a phase that has asked no language model. The record of the cycle has them in any case.
"""

from __future__ import annotations

from ktrdr_budget.telemetry.spans import Span, ending_of

__all__ = ["set_outcome"]

_OURS = "ktrdr_budget."
_PROVIDERS = ("anthropic", "openai")


def set_outcome(current: Span, error: BaseException | None, *, asked: bool) -> str:
    """Says on the span of a phase how it ended; returns what the cycle's own span may say of it, empty if nothing.

    Args:
        asked: whether the phase has asked a language model.
    """
    ending = {"outcome": "completed"} if error is None else ending_of(error)
    if error is None or ending:
        current.set_attributes(ending)
        return ""
    guarded = asked or any(_is_of(link, *_PROVIDERS) for link in _chain(error))
    words = str(error) if not guarded or type(error).__module__.startswith(_OURS) else ""
    told = f"{type(error).__name__}: {words}" if words else type(error).__name__
    current.set_attribute("outcome", "failed")
    current.record_exception(error, words if guarded else None)
    current.fail(told)
    return told


def _is_of(error: BaseException, *packages: str) -> bool:
    return type(error).__module__.partition(".")[0] in packages


def _chain(error: BaseException) -> list[BaseException]:
    """The error, and what led to it."""
    found: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        link = waiting.pop()
        if link is not None and link not in found:
            found.append(link)
            waiting += [link.__cause__, link.__context__]
    return found
