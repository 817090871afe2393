"""Streams: every row once a pass over all shares, in another order each time, and resumed at the very next question."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Image, List, Value
from PIL import Image as Pillow

from datamodules import DataError, SourcesDataModule, Weighted
from datamodules.sources import VLIR, VSR, RefCOCO, Source, TextVQA
from datamodules.stream_loader import StreamLoader
from datamodules.streaming import MixedStream, Stream
from datamodules.vlir.parquet import write_parquet
from datamodules.vlir.schema import BadRow
from modules.trajectory import SampleBatch

ROWS = 23
TYPES = {"question_id": Value("int64"), "question": Value("string"), "image": Image(), "answers": List(Value("string"))}


def rows(first: int, count: int) -> list[dict[str, Any]]:
    return [
        {"question_id": k, "question": "What?", "image": Pillow.new("RGB", (4, 4), (k, 0, 0)), "answers": ["a"] * 10}
        for k in range(first, first + count)
    ]


@pytest.fixture(params=["one file", "three files", "lines"])
def source(request: pytest.FixtureRequest, tmp_path: Path, write_hub: Callable[..., Path]) -> Source:
    """23 questions, ids from 0."""
    if request.param == "lines":
        Pillow.new("RGB", (4, 4)).save(tmp_path / "a.png")
        listed = [row | {"image": "a.png"} for row in rows(0, ROWS)]
        path = tmp_path / "data.jsonl"
        path.write_text("\n".join(map(json.dumps, listed)))
        return TextVQA(str(path))
    if request.param == "one file":
        return TextVQA(str(write_hub(rows(0, ROWS), TYPES, "one/train.parquet")))
    for k, (first, count) in enumerate(((0, 8), (8, 8), (16, 7))):
        write_hub(rows(first, count), TYPES, f"three/train-0000{k}-of-00003.parquet")
    return TextVQA(str(tmp_path / "three"), split="train")


def ids(stream: Stream, count: int) -> list[int]:
    return [int(record.sample.id) for record in islice(stream.read(), count) if not isinstance(record, BadRow)]


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_all_shares_together_are_the_data_set(source: Source, parts: int) -> None:
    shares = [Stream(source, (part, parts), 4, "0") for part in range(parts)]
    passes: list[list[int]] = []
    for share in shares:
        found: list[int] = []
        for record in share.read():
            if share.place["pass"] == 1:  # the first question of the next pass
                break
            assert not isinstance(record, BadRow)
            found.append(int(record.sample.id))
        passes.append(found)
    assert sorted(chain(*passes)) == list(range(ROWS))
    assert max(map(len, passes)) - min(map(len, passes)) <= 1 or parts in (2, 3)  # files may differ in length


def test_passes_differ_and_depend_on_the_seed_alone(source: Source) -> None:
    first, again, other = (ids(Stream(source, (0, 1), 8, seed), 2 * ROWS) for seed in ("0", "0", "1"))
    assert first == again != other
    assert sorted(first[:ROWS]) == sorted(first[ROWS:]) == list(range(ROWS))
    assert first[:ROWS] != first[ROWS:]
    assert first[:ROWS] != sorted(first[:ROWS])


@pytest.mark.parametrize("parts", [1, 2])
def test_reading_goes_on_at_the_very_next_question(source: Source, parts: int) -> None:
    whole = ids(Stream(source, (0, parts), 5, "0"), 60)
    for stop in (1, 4, 5, 6, 12, 23, 24, 47):
        begun = Stream(source, (0, parts), 5, "0")
        assert ids(begun, stop) == whole[:stop]
        place = json.loads(json.dumps(begun.place))  # plain values, as a checkpoint keeps them
        assert ids(Stream(source, (0, parts), 5, "0", place), 60 - stop) == whole[stop:], stop


def test_images_come_with_the_rows(source: Source) -> None:
    for record in islice(Stream(source, (0, 1), 8, "0").read(), ROWS):
        assert not isinstance(record, BadRow)
        (image,) = record.images
        assert int(image.load()[0, 0, 0]) == (0 if source.is_text else int(record.sample.id))


def test_vlir_parquet_streams_with_its_images(write_rows: Callable[..., Path]) -> None:
    row = {"id": "1", "images": ["a.png", "b.png"], "question": "Which?", "answers": ["7"], "source": "cards"}
    path = write_rows([]).with_suffix(".parquet")
    write_parquet(path, [row], embed=path.parent)
    record = next(Stream(VLIR(str(path)), (0, 1), 4, "0").read())
    assert not isinstance(record, BadRow)
    assert [int(image.load()[0, 0, 0]) for image in record.images] == [0, 100]


def test_rows_of_several_questions_resume_between_them(tmp_path: Path, write_hub: Callable[..., Path]) -> None:
    picture = Pillow.new("RGB", (9, 9))
    listed = [
        {"image": picture, "answer": ["a", "b", "c"], "bbox": [1.0, 1.0, 2.0, 2.0], "question_id": str(k)}
        for k in (0, 1)
    ]
    types = {"image": Image(), "answer": List(Value("string")), "bbox": List(Value("float64"))}
    source = RefCOCO(str(write_hub(listed, types | {"question_id": Value("string")})))

    def named(stream: Stream, count: int) -> list[str]:
        return [record.sample.id for record in islice(stream.read(), count) if not isinstance(record, BadRow)]

    whole = named(Stream(source, (0, 1), 2, "0"), 12)
    assert len(set(whole[:6])) == 6
    for stop in range(1, 9):
        begun = Stream(source, (0, 1), 2, "0")
        named(begun, stop)
        assert named(Stream(source, (0, 1), 2, "0", dict(begun.place)), 12 - stop) == whole[stop:]


def test_draws_follow_the_weights(tmp_path: Path) -> None:
    sources = []
    for name in ("a", "b"):
        path = tmp_path / f"{name}.jsonl"
        path.write_text(
            "\n".join(json.dumps({"image": "x.png", "caption": f"{name}.", "label": k % 2}) for k in range(9))
        )
        sources.append(VSR(str(path)))
    streams = [Stream(source, (0, 1), 4, str(k)) for k, source in enumerate(sources)]
    mixed = MixedStream(streams, [3.0, 1.0], batch_size=50, seed="0")
    drawn = Counter(Path(record.file).stem for records, _, _ in islice(mixed.batches(), 40) for record in records)
    assert drawn.total() == 2000
    assert abs(drawn["a"] / 2000 - 0.75) < 4 * (0.75 * 0.25 / 2000) ** 0.5  # four standard deviations


def data(source: Source, workers: int) -> SourcesDataModule:
    return SourcesDataModule(
        train=[Weighted(source)], batch_size=3, num_workers=workers, stream=True, epoch_size=20, buffer=4
    )


def asked(batches: Iterator[SampleBatch]) -> list[list[str]]:
    return [[sample.id for sample in batch.samples] for batch in batches]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_resumes_with_the_very_next_batch(source: Source, workers: int) -> None:
    module = data(source, workers)
    module.setup("fit")
    loader = module.train_dataloader()
    assert isinstance(loader, StreamLoader)
    assert len(loader) == 7
    whole = asked(iter(loader)) + asked(iter(loader))  # two epochs
    assert len(whole) == 14
    assert all(len(batch) == 3 for batch in whole)
    assert len({name for batch in whole[:7] for name in batch}) >= 20 - workers  # shares are exhausted unevenly
    for stop in (1, 4, 7, 9):
        begun, rest = module.train_dataloader(), module.train_dataloader()
        first = begun.__iter__()
        seen = [next(first) for _ in range(min(stop, 7))]
        if stop > 7:
            second = begun.__iter__()
            seen += [next(second) for _ in range(stop - 7)]
        rest.load_state_dict(begun.state_dict())
        left = asked(iter(rest)) + (asked(iter(rest)) if stop < 7 else [])
        assert asked(iter(seen)) + left == whole, stop


def test_ranks_read_shares_of_their_own_and_a_checkpoint_knows_all(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = data(source, 0)

    def loader(rank: int) -> StreamLoader:
        single = stream.train_dataloader()
        assert isinstance(single, StreamLoader)
        return StreamLoader(single.open_stream, 20, 3, 0, rank, 2)

    ranks = [loader(0), loader(1)]
    assert [len(rank) for rank in ranks] == [4, 4]  # the same for all, or they would wait for each other
    whole = [asked(iter(rank)) for rank in ranks]
    assert not {name for batch in whole[0][:3] for name in batch} & {name for batch in whole[1][:3] for name in batch}
    begun = [loader(0), loader(1)]
    for rank in begun:
        next(iter(rank))

    def gathered(into: list[Any], own: Any) -> None:
        assert own is begun[0]._places
        into[:] = [rank._places for rank in begun]

    with monkeypatch.context() as two_processes:
        two_processes.setattr(torch.distributed, "is_initialized", lambda: True)
        two_processes.setattr(torch.distributed, "all_gather_object", gathered)
        state = begun[0].state_dict()  # the first rank's goes into the checkpoint
    for rank in (0, 1):
        rest = loader(rank)
        rest.load_state_dict(state)
        assert asked(iter(rest)) == whole[rank][1:]


def test_another_number_of_workers_says_so(source: Source, caplog: pytest.LogCaptureFixture) -> None:
    one, two = data(source, 0).train_dataloader(), data(source, 2).train_dataloader()
    next(iter(one))
    with caplog.at_level(logging.WARNING):
        two.load_state_dict(one.state_dict())
    assert "1 ranks of 1 workers, now there are 1 of 2" in caplog.text


def test_bad_rows_are_left_out_and_counted_once(tmp_path: Path) -> None:
    Pillow.new("RGB", (4, 4)).save(tmp_path / "a.png")
    good = {"image": "a.png", "caption": "A.", "label": 1}
    path = tmp_path / "v.jsonl"
    path.write_text("\n".join([json.dumps(good), "{", json.dumps(good | {"label": 7}), json.dumps(good)]))
    module = SourcesDataModule(train=[Weighted(VSR(str(path)))], batch_size=2, stream=True, epoch_size=12, buffer=8)
    module.setup("fit")
    for batch in module.train_dataloader():
        assert len(batch.samples) == 2
        module.transfer_batch_to_device(batch, torch.device("cpu"), 0)
    assert sorted(name.removeprefix(f"{path}:").partition(":")[0] for name in module.skipped) == ["2", "3"]


def test_a_stream_without_a_usable_row_ends(tmp_path: Path, source: Source) -> None:
    path = tmp_path / "v.jsonl"
    path.write_text('{"caption": "A.", "label": 1}\n' * 3)
    with pytest.raises(DataError, match=r"expected rows of VSR, found none usable \(row \d: key `image`: missing"):
        data(VSR(str(path)), 0).setup("fit")
    with pytest.raises(DataError, match="none usable"):  # fewer rows than shares
        next(Stream(source, (50, 100), 4, "0").read())
