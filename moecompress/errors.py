"""The one exception that a user sees: a message without a traceback, exit code 2."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend. The message says what failed, what was expected, what was found, and the remedy."""

    def __init__(self, what: str, *, expected: object = None, got: object = None, remedy: str | None = None):
        self.what, self.expected, self.got, self.remedy = what, expected, got, remedy
        lines = [what]
        if expected is not None:
            lines.append(f"  expected: {expected}")
        if got is not None:
            lines.append(f"  got:      {got}")
        if remedy is not None:
            lines.append(f"  remedy:   {remedy}")
        super().__init__("\n".join(lines))
