"""The base classes with which a method declares its recipe keys."""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

AUTO: Literal["auto"] = "auto"

Auto = Literal["auto"]
Fraction = Annotated[float, Field(ge=0, le=1)]
NotNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


def _smaller_first(factors: list[float]) -> list[float]:
    if factors[0] > factors[1]:
        raise ValueError("a list with the smaller factor first")
    return factors


_Factor = TypeVar("_Factor", bound=float)
FactorRange = Annotated[list[_Factor], Field(min_length=2, max_length=2), AfterValidator(_smaller_first)]


class MethodConfig(BaseModel):
    """The recipe keys of a method.

    Each key has a type, a range and a description. The reference of the recipe keys in the documentation is generated from them.
    A recipe with an unknown key, or with a value of the wrong type or out of range, is rejected with an error that names the key.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class SpatialViewKeys(MethodConfig):
    """The recipe keys of methods with random spatial views of a patch."""

    mirroring: bool = Field(True, description="whether to mirror spatial views at random")
    rotation: Annotated[float, Field(ge=0, le=180)] = Field(180.0, description="largest in-plane angle, degrees")
    scaling: FactorRange[Positive] = Field(
        [0.7, 1.3], description="smallest and largest scaling factor; the smaller one comes first"
    )
    translation: Fraction = Field(0.1, description="largest shift, as a fraction of the patch's edge")


class ImageViewKeys(SpatialViewKeys):
    """The recipe keys of methods with random spatial and intensity views of a patch."""

    intensity: Annotated[float, Field(ge=0, le=2)] = Field(
        1.0, description="strength of random gamma, contrast, brightness, bias field, noise and blur; `0` disables them"
    )


class HeadKey(MethodConfig):
    """The recipe key of methods whose heads have a published and a light form."""

    head: Literal["published", "light"] = Field(
        "published",
        description="`published`: the layers of the method's paper; `light`: PCL's projection head, two linear layers as wide as "
        "the map that they read",
    )


class BranchKeys(MethodConfig):
    """The recipe keys that select the map of a second branch."""

    auxiliary_stage: Count | Literal["auto", "bottleneck"] = Field(
        AUTO, description="e, the encoder stage at which the auxiliary dense map is read"
    )
    scale: Count | Annotated[list[Count], Field(min_length=2, max_length=3)] | Auto = Field(
        AUTO,
        description="s, the factor by which the dominant branch downsamples the patch: the largest axis' factor, or one per axis",
    )
