"""Names that every room shares: where the project lies, the label without loss, ranges of numbers in settings."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

ROOT = Path(__file__).resolve().parents[2]  # of the checkout, where scripts/, recipes/ and slurm/ lie
IGNORE_INDEX = -100  # a label without loss, as torch's cross_entropy has it

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
