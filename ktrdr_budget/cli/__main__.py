"""``python -m ktrdr_budget.cli``."""

from ktrdr_budget.cli.root import main

if __name__ == "__main__":
    main(prog_name="ktrdr")
