"""The command line: ``ktrdr`` (also installed as ``ktrdr-budget``).

``main`` is the whole command. The groups ``agent``, ``budget`` and ``key`` can be mounted in another Click command
line::

    from ktrdr_budget.cli import agent, budget, key

    your_group.add_command(agent)
    your_group.add_command(budget)
    your_group.add_command(key)

The URL of the service is ``KTRDR_API_URL`` or, if your group sets it, ``context.meta[API_URL]``. Each error is a
``click.ClickException``, which your command line reports with one of these exit codes:

===  ==============================================
0    success, also when an exhausted budget is shown
1    error: unknown hold, conflict, missing key, …
2    wrong usage: unknown option, invalid amount, …
3    denied by a budget
4    service or store unreachable
===  ==============================================
"""

from ktrdr_budget.cli.agent_commands import agent
from ktrdr_budget.cli.budget_commands import budget
from ktrdr_budget.cli.client import API_URL
from ktrdr_budget.cli.key_commands import key
from ktrdr_budget.cli.root import main

__all__ = ["API_URL", "agent", "budget", "key", "main"]
