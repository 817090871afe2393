"""Where questions come from: one file a kind of source, all of them handing on `SampleBatch`."""

from datamodules.cards import CardsDataModule, CardSplit
from datamodules.module import VLIRDataModule
from datamodules.vlir.authors import AuthorsDataModule
from datamodules.vlir.schema import DataError

__all__ = ["AuthorsDataModule", "CardSplit", "CardsDataModule", "DataError", "VLIRDataModule"]
