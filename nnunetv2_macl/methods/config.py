"""The building blocks of recipes: how a method declares its own keys."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

AUTO: Literal["auto"] = "auto"

Auto = Literal["auto"]
Fraction = Annotated[float, Field(ge=0, le=1)]
NotNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


class MethodConfig(BaseModel):
    """The recipe keys of a method.

    Each key has a type, a range and a description, and the reference of the recipes in the documentation is made from them.
    A recipe that holds another key, or a value of another type or out of range, is refused by name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class SpatialViewKeys(MethodConfig):
    """The recipe keys of methods that show random spatial views of a patch."""

    mirroring: bool = Field(True, description="whether spatial views are mirrored at random")
    rotation: Annotated[float, Field(ge=0, le=180)] = Field(180.0, description="largest angle in the plane, degrees")
    scaling: Annotated[list[Positive], Field(min_length=2, max_length=2)] = Field(
        [0.7, 1.3], description="smallest and largest scaling factor; the smaller one comes first"
    )
    translation: Fraction = Field(0.1, description="largest shift, as a fraction of the patch's edge")

    @field_validator("scaling")
    @classmethod
    def _smaller_first(cls, scaling: list[float]) -> list[float]:
        if scaling[0] > scaling[1]:
            raise ValueError("a list with the smaller factor first")
        return scaling


class ImageViewKeys(SpatialViewKeys):
    """The recipe keys of methods that show random views of a patch, changed in space and in intensity."""

    intensity: Annotated[float, Field(ge=0, le=2)] = Field(
        1.0, description="strength of random gamma, contrast, brightness, bias field, noise and blur; `0`: none"
    )


class HeadKey(MethodConfig):
    """The recipe key of methods whose heads have a published and a light form."""

    head: Literal["published", "light"] = Field(
        "published",
        description="`published` has the layers of the method's paper; `light` has the projection head of PCL, two linear layers "
        "as wide as the map that they read",
    )


class BranchKeys(MethodConfig):
    """The recipe keys that say where in the network a second branch is read."""

    auxiliary_stage: Count | Literal["auto", "bottleneck"] = Field(
        AUTO, description="e, the encoder stage at which the auxiliary dense map is read"
    )
    scale: Count | Annotated[list[Count], Field(min_length=2, max_length=3)] | Auto = Field(
        AUTO,
        description="s, how much smaller the dominant branch sees the patch: for the largest axis, or one value per axis",
    )
