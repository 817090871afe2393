"""One's own images and questions: a picture, a folder of them, or a file."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from datamodules.module import VLIRDataModule
from datamodules.pictures import ImageFile
from datamodules.tables import loads
from datamodules.vlir.reader import Record, read_text, require_records
from datamodules.vlir.schema import BadRow, DataError, Invalid, from_row
from modules.trajectory import Sample

SOURCE = "asked"


class AskedDataModule(VLIRDataModule):
    """Questions to predict on, without answers; ``train.py predict`` makes one of its command line.

    What is asked is no init argument: a configuration would read it as YAML, and interpolate what looks like it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.question = ""

    def ask(self, image: str = "", question: str = "", file: str = "", batch: int = 1) -> None:
        """Say what is asked.

        Args:
            image: an image file, or a folder of them (those in it, by name; not what is below it).
            question: what is asked of each.
            file: in place of both: JSON lines as in the VLIR form, of which ``question`` alone is required, and
                ``image`` where there is one; paths are relative to the file's folder and stay in it.
            batch: questions at once.

        Raises:
            ValueError: not exactly one of ``image`` with ``question``, and ``file``, or a batch of none.
        """
        if bool(image) == bool(file) or bool(image) != bool(question):
            raise ValueError("Expected an image (or a folder of them) and a question, or a file of both.")
        if batch < 1:
            raise ValueError(f"Expected `--at_once` to be at least 1, but got {batch}.")
        self.files["predict"] = [Path(image or file)]
        self.question, self.val_batch_size = question, batch

    def read_file(self, path: Path) -> tuple[list[Record], list[BadRow]]:
        """The questions about a picture or a folder, or those of a file.

        Raises:
            DataError: there is no such picture or folder, or nothing in it.
        """
        if not self.question:
            return read_questions(path)
        images = pictures(path)
        return [
            Record(
                Sample(image.name, self.question, source=SOURCE),
                (
                    ImageFile(image.resolve().parent, image.resolve().name),
                ),  # the user named it: a link may lead anywhere
                str(path),
                number,
            )
            for number, image in enumerate(images, start=1)
        ], []


def pictures(path: Path) -> list[Path]:
    """An image file, whatever its name; or the files in a folder that are named as images are, in order.

    Raises:
        DataError: there is nothing of that name, or no image in the folder.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"{path}: no such image or folder.")
    known = Image.registered_extensions()
    found = sorted(each for each in path.iterdir() if each.suffix.lower() in known and each.is_file())
    if not found:
        raise DataError(f"{path}: expected images in the folder, found none.")
    return found


def read_questions(path: Path) -> tuple[list[Record], list[BadRow]]:
    """The usable rows of a file of questions, and the others with the reason of each.

    Raises:
        DataError: the file cannot be read or has no usable row.
    """
    records: list[Record] = []
    bad: list[BadRow] = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = loads(line)
            if not isinstance(row, dict):
                raise Invalid("expected an object")
            defaults = {"id": f"{path.stem}-{number}", "answers": [], "source": SOURCE}
            defaults |= {} if "image" in row or "images" in row else {"images": []}
            sample, paths = from_row({**defaults, **row})
        except ValueError as error:  # not JSON, or Invalid
            bad.append(BadRow(str(path), number, str(error)))
        else:
            records.append(Record(sample, tuple(ImageFile(path.parent, each) for each in paths), str(path), number))
    require_records(path, records, bad, "one question a line")
    return records, bad
