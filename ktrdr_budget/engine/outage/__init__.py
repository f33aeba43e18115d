"""Outage policies: how calls end while the store is unreachable."""
