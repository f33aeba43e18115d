"""The command line: ``ktrdr`` (also installed as ``ktrdr-budget``).

``main`` is the whole command. The groups ``agent`` and ``budget`` can be mounted in another Click command line::

    from ktrdr_budget.cli import agent, budget

    your_group.add_command(agent)
    your_group.add_command(budget)

There they find the service by ``KTRDR_API_URL``, or by what your group puts into ``context.meta[API_URL]``. What goes
wrong is a ``click.ClickException`` with the exit code of the table below, so that your own command line reports it.

===  ==============================================
0    done; also when a budget is shown as exhausted
1    an error, such as an unknown hold, a conflict or a missing key
2    a wrong call: unknown option, invalid amount, …
3    denied by a budget
4    the service or its store cannot be reached
===  ==============================================
"""

from ktrdr_budget.cli.agent_commands import agent
from ktrdr_budget.cli.budget_commands import budget
from ktrdr_budget.cli.client import API_URL
from ktrdr_budget.cli.root import main

__all__ = ["API_URL", "agent", "budget", "main"]
