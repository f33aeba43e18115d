"""The phases of a research cycle, as a protocol that a backend can implement.

A cycle has four phases. A gate follows the training, and a second gate follows the backtest. Each phase returns a
frozen record. To add fields, a backend may subclass the record.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from ktrdr_budget.agent.llm import Completion

__all__ = [
    "PHASES",
    "Assessment",
    "Backtest",
    "Design",
    "KnowsStrategies",
    "Phase",
    "PhaseContext",
    "Research",
    "Training",
]

Phase = Literal["designing", "training", "backtesting", "assessing"]
PHASES: tuple[Phase, ...] = ("designing", "training", "backtesting", "assessing")


@dataclass(frozen=True)
class Design:
    """A strategy to evaluate."""

    strategy_name: str
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Training:
    """The result of training."""

    accuracy: float
    """Fraction of correct predictions on data outside the training set, 0 to 1."""
    initial_loss: float
    final_loss: float
    model: Any = None
    """The trained model. The cycle passes the model to the backtest, and does not read it."""

    @property
    def loss_decrease(self) -> float:
        """The decrease of the loss, as a fraction of the initial loss. If the loss rose, the result is negative."""
        return (self.initial_loss - self.final_loss) / self.initial_loss if self.initial_loss else 0.0


@dataclass(frozen=True)
class Backtest:
    """The result of a backtest."""

    win_rate: float
    """Fraction of profitable trades, 0 to 1."""
    max_drawdown: float
    """Largest fall of the equity from a peak, as a fraction of that peak, 0 to 1."""
    sharpe_ratio: float
    """Annualised."""
    trades: int


@dataclass(frozen=True)
class Assessment:
    """The final assessment."""

    verdict: str
    """``promising``, ``mediocre`` or ``poor``."""
    summary: str


class PhaseContext(Protocol):
    """The part of a cycle that its phases may use."""

    @property
    def operation_id(self) -> str:
        """The cycle's id."""
        ...

    @property
    def brief(self) -> str | None:
        """The instructions for the design, or ``None`` if the trigger has none."""
        ...

    @property
    def cancelled(self) -> bool:
        """Whether the cycle must stop. Loops in threads check this, because ``CancelledError`` stops no thread."""
        ...

    async def ask(self, prompt: str, *, system: str = "", max_tokens: int = 1024) -> Completion:
        """Send a prompt to the language model. The cycle's hold covers the maximum cost, and accrues the actual cost.

        Raises:
            BudgetExceeded: the call needs more than the rest of the cycle's hold, and the budget has no room.
        """
        ...


class Research(Protocol):
    """The four phases of a cycle.

    If a phase raises an exception, the cycle fails. If the cycle is cancelled, ``CancelledError`` is raised in the
    current phase.
    """

    async def design(self, context: PhaseContext) -> Design:
        """Choose a strategy, with the language model."""
        ...

    async def train(self, context: PhaseContext, design: Design) -> Training:
        """Fit a model."""
        ...

    async def backtest(self, context: PhaseContext, design: Design, training: Training) -> Backtest:
        """Trade the strategy on historical data."""
        ...

    async def assess(self, context: PhaseContext, design: Design, training: Training, backtest: Backtest) -> Assessment:
        """Assess the results, with the language model."""
        ...


@runtime_checkable
class KnowsStrategies(Protocol):
    """Research that has finished strategies. A trigger can select a strategy by name."""

    def known_design(self, strategy: str) -> Design:
        """Return the design of a strategy. The cycle then skips the phase ``designing``.

        Raises:
            InvalidArgument: the strategy is unknown. The message lists the known strategies.
        """
        ...
