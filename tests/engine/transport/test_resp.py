"""RESP: commands are packed to the same bytes with hiredis and without it."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import pytest

from ktrdr_budget.engine.transport import resp


def module_without_hiredis(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setitem(sys.modules, "hiredis", None)  # its import fails
    spec = importlib.util.find_spec(resp.__name__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("words", "packed"),
    [
        (("PING",), b"*1\r\n$4\r\nPING\r\n"),
        (("WAIT", 1, 850), b"*3\r\n$4\r\nWAIT\r\n$1\r\n1\r\n$3\r\n850\r\n"),
        (("SET", "k", b"\x00\r\n"), b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$3\r\n\x00\r\n\r\n"),
        (("ECHO", ""), b"*2\r\n$4\r\nECHO\r\n$0\r\n\r\n"),
        (("ECHO", "€"), b"*2\r\n$4\r\nECHO\r\n$3\r\n\xe2\x82\xac\r\n"),
    ],
)
@pytest.mark.parametrize("hiredis", [True, False])
def test_each_word_of_a_command_is_packed_with_its_length_in_bytes(monkeypatch, hiredis, words, packed):
    module = resp if hiredis else module_without_hiredis(monkeypatch)
    assert module.pack(words) == packed


def test_without_hiredis_the_resp_module_has_no_reader(monkeypatch):
    assert resp.Reader is not None
    assert module_without_hiredis(monkeypatch).Reader is None
