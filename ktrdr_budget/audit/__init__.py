"""The audit: it checks that every window of a live store adds up, and repairs the windows that do not."""

from ktrdr_budget.audit.audit import Auditor, Change, IndexChange, Repair, WindowReport, verify

__all__ = ["Auditor", "Change", "IndexChange", "Repair", "WindowReport", "verify"]
