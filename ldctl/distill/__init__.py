"""Distillation terms. To add one, write it in `logits.py` (or a file of its own) and name it in `Term`."""

from typing import Annotated

from pydantic import Field

from ldctl.distill.logits import KD, LD, BinaryKD

Term = Annotated[LD | KD | BinaryKD, Field(discriminator="kind")]

__all__ = ["KD", "LD", "BinaryKD", "Term"]
