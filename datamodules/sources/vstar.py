"""V* (arXiv 2312.14135; MIT): small things in large photographs."""

from __future__ import annotations

from datamodules.sources.base import Parsed
from datamodules.sources.benchmark import Benchmark, listed
from datamodules.sources.values import answer, box, identity, options
from datamodules.tables import Row
from datamodules.vlir.schema import Invalid, describe, expect, text
from modules.evaluation.common import letter_index
from modules.evaluation.common import options as read_options
from modules.trajectory import Region, Sample


class VStar(Benchmark):
    """Rows of craigwu/vstar_bench (test_questions.jsonl), or of the original files.

    Those are one object an image, here lines of one file: ``image``, ``question``, ``options`` (the first is right)
    and ``bbox``, a list of (x, y, width, height), which become the annotated regions. Their options are listed in the
    order in which ``index`` turns them.
    """

    name = "vstar"
    hub = "craigwu/vstar_bench"
    key = "question_id"

    def ask(self, row: Row) -> Parsed:
        """See `Benchmark.ask`."""
        return self._original(row) if "options" in row else self._listed(row)

    def _listed(self, row: Row) -> Parsed:
        asked = text(row, "text")
        choices, index = tuple(read_options(asked)), letter_index(text(row, "label"))
        if len(choices) < 2:
            raise Invalid(f'key `text`: expected options such as "(A) red", found {describe(asked)}')
        if index is None or index >= len(choices):
            raise Invalid(f"key `label`: expected the letter of one of {len(choices)} options, found {row['label']!r}")
        sample = Sample(identity(row, "question_id"), asked, answers=(text(row, "label"),), choices=choices)
        return Parsed(sample, (self.image(row, "image"),))

    def _original(self, row: Row) -> Parsed:
        choices = options(row, "options")
        boxes = expect(row.get("bbox", []), list, "key `bbox`", "a list of boxes")
        regions = tuple(Region(box(value, f"key `bbox[{k}]`", "xywh")) for k, value in enumerate(boxes))
        name = answer(row, "image")
        turn = sum(name.encode()) % len(choices)  # else the right option would always be A
        shown = (*choices[turn:], *choices[:turn])
        letter = chr(ord("A") + shown.index(choices[0]))
        asked = f"{text(row, 'question')}\n{listed(shown)}"
        meta = {"annotation": {**row, "text": asked, "label": letter}}
        sample = Sample(name, asked, answers=(letter,), choices=shown, regions=regions, meta=meta)
        return Parsed(sample, (self.image(row, "image"),))
