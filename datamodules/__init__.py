"""Where questions come from: one file a kind of source, all of them handing on `SampleBatch`."""

from datamodules.asked import AskedDataModule
from datamodules.cards import CardsDataModule, CardSplit
from datamodules.module import VLIRDataModule
from datamodules.sources import Source
from datamodules.sources.module import SourcesDataModule, Weighted
from datamodules.vlir.authors import AuthorsDataModule
from datamodules.vlir.schema import DataError

__all__ = [
    "AskedDataModule",
    "AuthorsDataModule",
    "CardSplit",
    "CardsDataModule",
    "DataError",
    "Source",
    "SourcesDataModule",
    "VLIRDataModule",
    "Weighted",
]
