"""Which test images a network classifies correctly, stored with each result: rows are compared image by image."""

import base64
import dataclasses
import hashlib
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from lt_adv.evaluation.records import Records


@dataclasses.dataclass(frozen=True)
class Outcomes:
    """The outcomes of one evaluation.

    Attributes:
        images: digest of the images' indices; only outcomes on the same images are compared.
        label: int [n].
        correct: condition -> bool [n]: clean, each attack, and "worst", clean and under every attack.
    """

    images: str
    label: np.ndarray
    correct: Mapping[str, np.ndarray]

    @classmethod
    def of(cls, records: Records) -> "Outcomes":
        """Returns the outcomes of an evaluation."""
        digest = hashlib.sha256(records.index.astype("<i8").tobytes()).hexdigest()[:16]
        return cls(digest, records.label, {condition: records.correct(condition) for condition in records.conditions})

    def to_json(self) -> dict[str, Any]:
        """Returns the outcomes as JSON: the labels as compressed int32, the outcomes as bits, both in base64."""
        label = zlib.compress(self.label.astype("<i4").tobytes(), 9)
        return {
            "images": self.images,
            "label": base64.b64encode(label).decode(),
            "correct": {name: base64.b64encode(np.packbits(bits)).decode() for name, bits in self.correct.items()},
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Outcomes":
        """Inverse of `to_json`."""
        label = np.frombuffer(zlib.decompress(base64.b64decode(content["label"])), "<i4")
        bits = {name: np.frombuffer(base64.b64decode(text), np.uint8) for name, text in content["correct"].items()}
        correct = {name: np.unpackbits(packed, count=len(label)).astype(bool) for name, packed in bits.items()}
        return cls(content["images"], label, correct)
