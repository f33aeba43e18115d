"""What calls of language models cost, and guards that keep them below a cap.

The names that a program needs are in :mod:`ktrdr_budget`; what they are made of is in the modules here.
"""
