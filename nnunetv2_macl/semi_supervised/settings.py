"""Settings of semi-supervised training."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

from nnunetv2_macl.errors import UserError
from nnunetv2_macl.semi_supervised.mixing import MIXINGS


@dataclass(frozen=True)
class SemiSettings:
    """Settings of the loss on the predictions of the teacher.

    Attributes:
        mixing: How labelled and unlabelled patches are combined: consistency or copy_paste.
        confidence: The loss ignores voxels to which the teacher gives a lower probability. 0 keeps all voxels.
        weight: Weight of the unlabelled loss after the ramp.
        ramp: Fraction of the training's steps over which the weight rises from about 0.
    """

    mixing: str = "consistency"
    confidence: float = 0.8
    weight: float = 1.0
    ramp: float = 0.3

    def check(self, source: str) -> None:
        """Raise UserError for a value that is out of range. The message calls the settings ``source``."""
        if self.mixing not in MIXINGS:
            raise UserError(f"{source}: mixing must be one of {', '.join(MIXINGS)}, got {self.mixing!r}.")
        for key, top in (("confidence", 1), ("weight", math.inf), ("ramp", 1)):
            value = getattr(self, key)
            if not 0 <= value <= top or math.isinf(value):
                limit = "0 or more" if math.isinf(top) else f"between 0 and {top}"
                raise UserError(f"{source}: {key} must be {limit}, got {value:g}.")

    def weight_at(self, progress: float) -> float:
        """Return the weight of the unlabelled loss.

        Args:
            progress: Fraction of the training's steps that are done, 0 to 1.

        Source: Laine and Aila, Temporal Ensembling, ICLR 2017, section 2.1.
        """
        if progress >= self.ramp:
            return self.weight
        return self.weight * math.exp(-5 * (1 - progress / self.ramp) ** 2)


def parse_semi_settings(texts: Iterable[str], source: str) -> SemiSettings:
    """Return settings from KEY=VALUE texts. Raises UserError, which names the key, if the key or its value is wrong."""
    types = {field.name: field.type for field in fields(SemiSettings)}
    values: dict[str, str | float] = {}
    for text in texts:
        key, _, value = text.partition("=")
        if key not in types:
            raise UserError(f"{source}: there is no setting {key!r}. The settings are: {', '.join(types)}.")
        try:
            values[key] = float(value) if types[key] == "float" else value
        except ValueError:
            raise UserError(f"{source}: {key} must be a number, got {value!r}.") from None
    settings = replace(SemiSettings(), **values)  # type: ignore[arg-type]
    settings.check(source)
    return settings
