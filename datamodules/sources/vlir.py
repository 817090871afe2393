"""VLIR rows (docs/data.md) as a source, so that they can be mixed with others."""

from __future__ import annotations

from datamodules.sources.base import Parsed, Source
from datamodules.tables import Row
from datamodules.vlir.reader import question


class VLIR(Source):
    """The project's own form, JSON lines or parquet; `Sample.source` is what each row says."""

    name = "vlir"

    def parse(self, row: Row) -> Parsed:
        """See `Source.parse`."""
        return Parsed(*question(row, self.root, columns=not self.is_text))
