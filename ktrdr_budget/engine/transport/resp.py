"""Packing of commands and parsing of replies in RESP. If hiredis is installed, hiredis does both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["Reader", "pack"]


def _pack_in_python(words: tuple[Any, ...]) -> bytes:
    parts = [b"*%d\r\n" % len(words)]
    for word in words:
        data = word if type(word) is bytes else str(word).encode()
        parts.append(b"$%d\r\n%b\r\n" % (len(data), data))
    return b"".join(parts)


pack: Callable[[tuple[Any, ...]], bytes]
"""Pack a command, whose words are ``bytes``, ``str`` or ``int``."""
Reader: Any
"""The parser of hiredis; ``None`` if hiredis (the extra ``fast``) is not installed."""
try:
    from hiredis import Reader
    from hiredis import pack_command as pack
except ImportError:
    pack, Reader = _pack_in_python, None
