"""Prices, meters and guards: keep the cost of language model calls below a cap.

The public names are importable from :mod:`ktrdr_budget`; the modules here implement them.
"""
