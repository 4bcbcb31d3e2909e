"""One HTML file that shows what a compression did and what it cost, to be opened in any browser, without a network."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from moecompress.errors import UserError

__all__ = ["write_report"]


def write_report(folder: Path, evaluations: Sequence[Path] = (), output: Path | None = None) -> Path:
    """Write the report of a compressed ``folder`` and return its path (default: ``folder``.html, beside the folder).

    ``evaluations``: files that `moecompress evaluate -o` wrote, of this folder or of others to compare it with.
    UserError if the folder or a file is not what it should be, or matplotlib or jinja2 is missing.
    """
    missing = [name for name in ("matplotlib", "jinja2") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"A report needs {' and '.join(missing)}", remedy="pip install 'moecompress[report]'")
    from moecompress.report import page
    from moecompress.report.records import read_records

    records = read_records(folder, evaluations)
    folder = folder.resolve()
    output = folder.with_name(f"{folder.name}.html") if output is None else output
    output.write_text(page.render(records), encoding="utf-8")
    return output
