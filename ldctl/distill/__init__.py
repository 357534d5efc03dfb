"""Distillation terms. To add one, write it in `logits.py` (or a file of its own) and name it in `Term`."""

from typing import Annotated

from pydantic import Field

from ldctl.distill.crosskd import CrossKDBox, CrossKDClass
from ldctl.distill.features import CWD, PKD, Imitation
from ldctl.distill.logits import KD, LD, BCKDBox, BinaryKD

PredictionTerm = LD | KD | BinaryKD | BCKDBox  # they look at nothing but both detectors' predictions in their region
Term = Annotated[PredictionTerm | CrossKDClass | CrossKDBox | Imitation | PKD | CWD, Field(discriminator="kind")]

__all__ = [
    "CWD",
    "KD",
    "LD",
    "PKD",
    "BCKDBox",
    "BinaryKD",
    "CrossKDBox",
    "CrossKDClass",
    "Imitation",
    "PredictionTerm",
    "Term",
]
