"""A terminal for tests: a stream that keeps what a person would see on a terminal that wraps, scrolls and is resized.
It supports the few escape sequences that a live block needs, and refuses all others."""

from __future__ import annotations

import io
import os
import re

import pytest

_PART = re.compile(r"\x1b\[(\d*)([A-Za-z])|(\r)|(\n)|([^\x00-\x1f\x7f]+)|(.)", re.DOTALL)


class Terminal(io.StringIO):
    """Write to it, then read `screen()`. `getvalue()` has every byte.

    Args:
        columns: Its width. `resize` changes it.
        rows: Its height. Rows that scroll out are kept in `scrolled`.
    """

    def __init__(self, columns: int = 80, rows: int = 24) -> None:
        super().__init__()
        self.columns, self.rows = columns, rows
        # Each row, and whether the next row continues it.
        self._rows: list[tuple[str, bool]] = [("", False)]
        self._y = self._x = 0
        self.scrolled: list[str] = []

    def isatty(self) -> bool:
        return True

    def resize(self, columns: int, rows: int) -> None:
        """Resize like terminals that reflow their text. The cursor stays on its character."""
        lines: list[str] = []
        begin, cursor, going_on = 0, (0, 0), False
        for number, (text, wraps) in enumerate(self._rows):
            if not going_on:
                lines.append("")
            begin = len(lines[-1])
            lines[-1] += text.ljust(self.columns) if wraps else text
            if number == self._y:
                cursor = (len(lines) - 1, begin + self._x)
            going_on = wraps
        self.columns, self.rows = columns, rows
        self._rows, self._y = [], 0
        for number, line in enumerate(lines):
            pieces = [line[i : i + columns] for i in range(0, len(line), columns)] or [""]
            if number == cursor[0]:
                self._y, self._x = len(self._rows) + cursor[1] // columns, cursor[1] % columns
                pieces += [""] * (cursor[1] // columns + 1 - len(pieces))
            self._rows += [(piece, i < len(pieces) - 1) for i, piece in enumerate(pieces)]
        self._scroll()

    def screen(self) -> list[str]:
        """Return the visible rows, without empty ones at the end."""
        rows = [text.rstrip() for text, _ in self._rows]
        while rows and not rows[-1]:
            rows.pop()
        return rows

    def write(self, text: str) -> int:
        for count, command, left, down, plain, other in _PART.findall(text):
            if plain:
                self._print(plain)
            elif left:
                self._x = 0
            elif down:
                self._x, self._y = 0, self._y + 1
                self._reach()
            elif command == "A":
                self._y = max(0, self._y - int(count or 1))
            elif command == "K" and count in ("", "0"):
                self._rows[self._y] = (self._rows[self._y][0][: self._x], False)
            elif command == "J" and count in ("", "0"):
                del self._rows[self._y + 1 :]
                self._rows[self._y] = (self._rows[self._y][0][: self._x], False)
            else:
                raise AssertionError(f"a sequence that this terminal does not know: {count}{command}{other!r}")
        return super().write(text)

    def _print(self, text: str) -> None:
        for character in text:
            if self._x == self.columns:
                self._rows[self._y] = (self._rows[self._y][0], True)
                self._x, self._y = 0, self._y + 1
                self._reach()
            row, wraps = self._rows[self._y]
            self._rows[self._y] = (row[: self._x].ljust(self._x) + character + row[self._x + 1 :], wraps)
            self._x += 1

    def _reach(self) -> None:
        while len(self._rows) <= self._y:
            self._rows.append(("", False))
        self._scroll()

    def _scroll(self) -> None:
        while len(self._rows) > self.rows:
            self.scrolled.append(self._rows.pop(0)[0].rstrip())
            self._y -= 1


def attach(monkeypatch: pytest.MonkeyPatch, terminal: Terminal) -> None:
    """Make the system report this terminal's size, and a capable terminal type."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(terminal, "fileno", lambda: 99)
    monkeypatch.setattr(os, "get_terminal_size", lambda fd: os.terminal_size((terminal.columns, terminal.rows)))
