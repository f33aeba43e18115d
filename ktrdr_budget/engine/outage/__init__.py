"""Policies for calls that meet no store."""
