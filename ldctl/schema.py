"""The base of every schema: closed, frozen and strict."""

from pydantic import BaseModel, ConfigDict


class Spec(BaseModel):
    """A part of a run spec.

    Unknown keys are refused (a typo must not train for a day), values are not coerced (`"0.01"` is no float),
    numbers are finite, and nothing changes after validation, so that the text that a checkpoint embeds is what ran.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
