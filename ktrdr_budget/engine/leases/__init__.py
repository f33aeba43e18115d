"""Prepaid chunks that one process spends by itself."""
