"""What a research cycle consists of: a small protocol that a backend implements for itself.

A cycle goes through four phases, with a gate after training and one after backtesting. Each phase is told by a frozen
record; a backend's own records may hold more, as subclasses do.
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
    """A strategy to try."""

    strategy_name: str
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Training:
    """How a model learned."""

    accuracy: float
    """Share of right predictions on data that the model was not fitted to, 0 to 1."""
    initial_loss: float
    final_loss: float
    model: Any = None
    """Whatever backtesting needs."""

    @property
    def loss_decrease(self) -> float:
        """The part of the first loss that training took away; negative if it rose."""
        return (self.initial_loss - self.final_loss) / self.initial_loss if self.initial_loss else 0.0


@dataclass(frozen=True)
class Backtest:
    """How a strategy would have traded."""

    win_rate: float
    """Share of trades with a profit, 0 to 1."""
    max_drawdown: float
    """The deepest fall from a peak of the equity, as a part of that peak, 0 to 1."""
    sharpe_ratio: float
    """Annualised."""
    trades: int


@dataclass(frozen=True)
class Assessment:
    """What is thought of it in the end."""

    verdict: str
    """``promising``, ``mediocre`` or ``poor``."""
    summary: str


class PhaseContext(Protocol):
    """What a phase may ask of its cycle."""

    @property
    def operation_id(self) -> str:
        """The cycle's id."""
        ...

    @property
    def brief(self) -> str | None:
        """What the trigger asks the design to follow, in words; ``None`` if it asks nothing."""
        ...

    @property
    def cancelled(self) -> bool:
        """Whether somebody asked the cycle to stop: for loops in threads, which a cancellation does not reach."""
        ...

    async def ask(self, prompt: str, *, system: str = "", max_tokens: int = 1024) -> Completion:
        """Asks the language model. What it costs is reserved before, and accrued on the cycle's hold as it happens.

        Raises:
            BudgetExceeded: the cycle needs more than it has reserved, and there is no more.
        """
        ...


class Research(Protocol):
    """The four phases. A phase that raises fails the cycle; cancellation reaches it as ``CancelledError``."""

    async def design(self, context: PhaseContext) -> Design:
        """Chooses a strategy (asks the language model)."""
        ...

    async def train(self, context: PhaseContext, design: Design) -> Training:
        """Fits a model."""
        ...

    async def backtest(self, context: PhaseContext, design: Design, training: Training) -> Backtest:
        """Trades it on the past."""
        ...

    async def assess(self, context: PhaseContext, design: Design, training: Training, backtest: Backtest) -> Assessment:
        """Judges it (asks the language model)."""
        ...


@runtime_checkable
class KnowsStrategies(Protocol):
    """A research with strategies that are designed already, which a trigger can ask for by name."""

    def known_design(self, strategy: str) -> Design:
        """The design of this strategy. A cycle that is given one has no phase ``designing``.

        Raises:
            InvalidArgument: there is no such strategy; the message says which there are.
        """
        ...
