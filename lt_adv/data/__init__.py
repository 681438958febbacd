"""Data sets as uint8 arrays, long-tailed subsets, batch sampling and augmentation."""

from lt_adv.data.dataset import Dataset, LongTailed, Split
from lt_adv.data.longtail import long_tailed
from lt_adv.data.sources import load

__all__ = ["Dataset", "LongTailed", "Split", "load", "long_tailed"]
