"""Visual Spatial Reasoning (arXiv 2205.00363; Apache-2.0): is what a caption says about a photograph true?"""

from __future__ import annotations

from datamodules.sources.base import Parsed, Source
from datamodules.sources.values import whole
from datamodules.tables import Row
from datamodules.vlir.schema import Invalid, required, text
from modules.trajectory import Sample

FOLDERS = ("images", "trainval2017")


class VSR(Source):
    """Rows of cambridgeltl/vsr_random or vsr_zeroshot, or of their .jsonl: ``caption`` and ``label``, 0 or 1.

    ``image`` is a name of COCO's, of a file below `root` (in ``images`` or ``trainval2017`` if there is such a folder).
    The rows have no id.
    """

    name = "vsr"
    hub = "cambridgeltl/vsr_random"

    def parse(self, row: Row) -> Parsed:
        """See `Source.parse`."""
        label = required(row, "label")
        true = int(label) if isinstance(label, bool) else whole(label, "key `label`")
        if true not in (0, 1):
            raise Invalid(f"key `label`: expected 0 or 1, found {true}")
        sample = Sample(
            id="",
            question=f'Is this statement about the image true: "{text(row, "caption").strip()}"? Answer yes or no.',
            answers=("yes" if true else "no",),
            answer_kind="yesno",
            meta={key: row[key] for key in ("relation", "subj", "obj") if row.get(key)},
        )
        image = row.get("image")
        picture = self.file(image, *FOLDERS) if isinstance(image, str) and image else self.image(row, "image")
        return Parsed(sample, (picture,))
