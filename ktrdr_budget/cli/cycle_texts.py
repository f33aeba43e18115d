"""Text forms of research cycles.

All functions read a document of the service. If the document has an unexpected shape, they raise ``LookupError``,
``TypeError``, ``ValueError`` or ``ArithmeticError``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any

from ktrdr_budget.cli.output import SEPARATOR, amount_text, can_show, cents, fields, one_line, paint

__all__ = ["CYCLE_COLUMNS", "cycle_row", "ending", "has_ended", "milestones", "picture", "status_text"]

Cycle = Mapping[str, Any]

PHASES = ("designing", "training", "backtesting", "assessing")
GATE_OF_PHASE = {"training": "training", "backtesting": "backtest"}
FIGURES_OF_PHASE = {
    "designing": (),
    "training": (("accuracy", "accuracy"), ("final_loss", "final loss")),
    "backtesting": (
        ("win_rate", "win rate"),
        ("max_drawdown", "drawdown"),
        ("sharpe_ratio", "Sharpe"),
        ("trades", "trades"),
    ),
    "assessing": (("verdict", "verdict"),),
}
CYCLE_COLUMNS = ("OPERATION", "STARTED AT", "STATUS", ">TIME", ">SPEND", ">TOKENS", "GATES", "STRATEGY")


def has_ended(cycle: Cycle) -> bool:
    """Whether the cycle has ended."""
    return cycle["outcome"] is not None


# --- Status ---------------------------------------------------------------------------------------


def status_text(status: Mapping[str, Any]) -> str:
    """Format the active cycles, and the result of the cycle that ended last."""
    lines = ["Agent Status", SEPARATOR, f"Status: {one_line(status['status'])}"]
    if "capacity" in status:  # absent in replies of an earlier version
        lines += [_remaining(status["budget"]), _capacity(status["capacity"])]
    blocks = ["\n".join(lines)]
    blocks += [fields(_active_fields(cycle)) for cycle in status["active_cycles"]]
    last = status["last_cycle"]
    blocks.append(f"Last Cycle: {'none' if last is None else f'{_name(last)} {ending(last)}'}")
    return "\n\n".join(blocks) if status["active_cycles"] else "\n".join(blocks)


def _remaining(budget: Mapping[str, Any] | None) -> str:
    if budget is None:
        return "Budget: unknown"
    if budget["remaining"] is None:
        return "Budget: unlimited"
    return f"Budget: {cents(budget['remaining'])} of {cents(budget['daily_limit'])} remaining"


def _capacity(capacity: Mapping[str, Any] | None) -> str:
    if capacity is None:
        return "Capacity: unknown"
    if capacity["limit"] is None:
        return f"Capacity: unlimited, {int(capacity['active'])} running"
    return f"Capacity: {int(capacity['free'])}/{int(capacity['limit'])} cycles free"


def _active_fields(cycle: Cycle) -> Iterator[tuple[str, str]]:
    yield "Cycle", cycle["operation_id"]
    yield "Phase", str(cycle["phase"]) + (", being cancelled" if cycle["status"] == "cancelling" else "")
    if cycle["strategy_name"] is not None:
        yield "Strategy", cycle["strategy_name"]
    if cycle.get("model"):
        yield "Model", cycle["model"]
    if cycle.get("brief"):
        yield "Brief", cycle["brief"]
    yield "Time", _duration(cycle["elapsed_seconds"])
    yield "Spend", _spend(cycle)
    yield "Tokens", ", ".join(f"{phase} {int(count)}" for phase, count in cycle["tokens"].items())
    for gate in cycle["gates"]:
        yield f"{str(gate['gate']).capitalize()} Gate", _gate(gate)
    yield "Replica", cycle["replica"]


# --- Rows -----------------------------------------------------------------------------------------


def cycle_row(cycle: Cycle) -> list[str]:
    """Return a table row for :data:`CYCLE_COLUMNS`."""
    text = cycle["status"]
    if cycle["status"] in ("running", "cancelling"):
        text = f"{text} ({cycle['phase']})"
    elif cycle["reason"] not in (None, cycle["status"]):
        text = f"{text} ({cycle['reason']})"
    gates = ", ".join(f"{gate['gate']} {_result(gate)}" for gate in cycle["gates"])
    time = _duration(cycle["elapsed_seconds"])
    money = amount_text(cycle["spend"])
    return [
        _name(cycle),
        cycle["started_at"],
        text,
        time,
        money,
        str(_tokens(cycle)),
        gates,
        cycle["strategy_name"] or "",
    ]


# --- Progress of one cycle ------------------------------------------------------------------------


def milestones(cycle: Cycle) -> Iterator[str]:
    """Yield one line for each event of the cycle so far. The line of an event never changes."""
    for phase in PHASES[: PHASES.index(cycle["phase"]) + 1]:
        yield phase
        if facts := _facts(cycle, phase):
            yield f"{phase}: {facts}"
        for gate in _gates(cycle, phase):
            yield f"{phase}: gate {_gate(gate)}"


def picture(cycle: Cycle) -> str:
    """Format the four phases as lines, with the progress and the spend of the cycle."""
    done, here, failed, open_ = "✓▸✗·" if can_show("✓▸✗·") else "+>x."
    at = PHASES.index(cycle["phase"])
    lines = [f"Cycle {_name(cycle)}: {one_line(cycle['status'])}, {_duration(cycle['elapsed_seconds'])}"]
    for index, phase in enumerate(PHASES):
        mark = paint(done, fg="green")
        if index > at:
            mark = open_
        elif index == at and not has_ended(cycle):
            mark = paint(here, fg="cyan")
        elif index == at and cycle["outcome"] != "completed":
            mark = paint(failed, fg="red")
        gates = ["gate failed" for gate in _gates(cycle, phase) if _stops(gate)]
        facts = _facts(cycle, phase) if index <= at else ""
        lines.append(f"  {mark} {phase:<12} {', '.join(filter(None, [facts, *gates]))}".rstrip())
    lines.append(f"Spend: {_spend(cycle)}, {_tokens(cycle)} tokens")
    return "\n".join(lines)


def ending(cycle: Cycle) -> str:
    """Describe the end of a cycle: ``failed after 4.2 s, $0.0312 (gate_failed: …)``."""
    text = f"{cycle['outcome']} after {_duration(cycle['elapsed_seconds'])}, {amount_text(cycle['spend'])}"
    why = [one_line(word) for word in (cycle["reason"], _failed_gate(cycle), cycle["error"]) if word]
    return one_line(text) + (f" ({': '.join(dict.fromkeys(why))})" if why and why != [cycle["outcome"]] else "")


def _failed_gate(cycle: Cycle) -> str:
    """Return the reason of the failed gate. If the cycle has an error, return nothing: the error has the reason."""
    failed = [gate for gate in cycle["gates"] if _stops(gate)]
    return str(failed[-1]["reason"]) if failed and not cycle["error"] else ""


# --- Parts ----------------------------------------------------------------------------------------


def _name(cycle: Cycle) -> str:
    return one_line(cycle["operation_id"])


def _spend(cycle: Cycle) -> str:
    return f"{amount_text(cycle['spend'])} of {amount_text(cycle['estimate'])} estimated"


def _tokens(cycle: Cycle) -> int:
    return sum(int(count) for count in cycle["tokens"].values())


def _gates(cycle: Cycle, phase: str) -> list[Mapping[str, Any]]:
    return [gate for gate in cycle["gates"] if gate["gate"] == GATE_OF_PHASE.get(phase)]


def _stops(gate: Mapping[str, Any]) -> bool:
    return not gate["passed"] and not gate.get("bypassed")


def _result(gate: Mapping[str, Any]) -> str:
    return ("pass" if gate["passed"] else "fail") + (" (bypassed)" if gate.get("bypassed") else "")


def _gate(gate: Mapping[str, Any]) -> str:
    text = ("passed" if gate["passed"] else "failed") + (" (bypassed)" if gate.get("bypassed") else "")
    return one_line(f"{text}: {gate['reason']}" if gate["reason"] else text)


def _facts(cycle: Cycle, phase: str) -> str:
    """Return the results of a phase: ``accuracy 0.53, final loss 0.69``."""
    results = cycle["results"]
    facts = [
        f"{words} {_figure(results[name])}" for name, words in FIGURES_OF_PHASE[phase] if results.get(name) is not None
    ]
    if phase == "designing" and cycle["strategy_name"] is not None:
        facts.insert(0, one_line(cycle["strategy_name"]))
    return ", ".join(facts)


def _figure(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, Decimal) else one_line(value)


def _duration(seconds: Any) -> str:
    """Format seconds: ``4.2 s``, ``2 min 05 s``, ``1 h 02 min``."""
    seconds = Decimal(seconds)
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
