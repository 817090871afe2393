"""Data sets that others published: one file each, a class of `datamodules.sources.base.Source`."""

from datamodules.sources.base import Parsed, Source
from datamodules.sources.cvbench import CVBench
from datamodules.sources.docvqa import DocVQA, InfographicVQA
from datamodules.sources.gqa import GQA
from datamodules.sources.hallusionbench import HallusionBench
from datamodules.sources.hrbench import HRBench
from datamodules.sources.mathvision import MathVision
from datamodules.sources.mathvista import MathVista
from datamodules.sources.mme import MME
from datamodules.sources.mme_realworld import MMERealWorld
from datamodules.sources.mmmu import MMMU
from datamodules.sources.mmvp import MMVP
from datamodules.sources.pope import POPE
from datamodules.sources.refcoco import RefCOCO
from datamodules.sources.scienceqa import ScienceQA
from datamodules.sources.textvqa import TextVQA
from datamodules.sources.visual_cot import VisualCoT
from datamodules.sources.vlir import VLIR
from datamodules.sources.vsr import VSR
from datamodules.sources.vstar import VStar

__all__ = [
    "GQA",
    "MME",
    "MMMU",
    "MMVP",
    "POPE",
    "VLIR",
    "VSR",
    "CVBench",
    "DocVQA",
    "HRBench",
    "HallusionBench",
    "InfographicVQA",
    "MMERealWorld",
    "MathVision",
    "MathVista",
    "Parsed",
    "RefCOCO",
    "ScienceQA",
    "Source",
    "TextVQA",
    "VStar",
    "VisualCoT",
]
