"""RefCOCO, RefCOCO+ and RefCOCOg (arXiv 1608.00272, 1511.02283; Apache-2.0): where is what is referred to?"""

from __future__ import annotations

from datamodules.pictures import ImageFile
from datamodules.sources.base import Parsed, Source
from datamodules.sources.values import answer, box, identity, phrases
from datamodules.tables import Row
from datamodules.vlir.schema import required
from modules.trajectory import Region, Sample

QUESTION = "Please provide the bounding box coordinate of the region this sentence describes: {}"


class RefCOCO(Source):
    """Rows of lmms-lab/RefCOCO (RefCOCOplus, RefCOCOg), or of Visual-CoT's REC_*.jsonl.

    On the hub ``answer`` lists all expressions of a region, and each is a question of its own; ``bbox`` is corner,
    width and height. In the .jsonl ``expression`` is one, and ``bbox`` is two corners. Either way the box becomes the
    annotated region; there is no answer in words.
    """

    name = "refcoco"
    hub = "lmms-lab/RefCOCO"

    def parse(self, row: Row) -> list[Parsed]:
        """See `Source.parse`."""
        listed = "expression" not in row
        region = Region(box(required(row, "bbox"), "key `bbox`", "xywh" if listed else "xyxy"))
        expressions = phrases(row, "answer") if listed else (answer(row, "expression"),)
        image = self.image(row, "image" if listed else "img_path")
        meta = {"image_id": image.path} if isinstance(image, ImageFile) else {}
        return [
            Parsed(
                Sample(
                    id=f"{identity(row, 'question_id')}-{k}" if "question_id" in row and listed else "",
                    question=QUESTION.format(expression),
                    regions=(region,),
                    meta=meta | {"expression": expression},
                ),
                (image,),
            )
            for k, expression in enumerate(expressions)
        ]
