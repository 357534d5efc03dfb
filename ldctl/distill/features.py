"""Distillation terms on whole maps: imitation of pyramid features, PKD, and CWD.

Features are compared as they are. Where the student's maps are narrower or wider than the teacher's, a 1x1 convolution
that learns beside the student makes them alike before they arrive here.
"""

from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from ldctl.distill.logits import sum_of_level_means
from ldctl.fused import softened_kl
from ldctl.schema import Spec
from ldctl.types import Dense, Normalizer, Pair, Where

STD_FLOOR = 1e-6  # Source: PKD's released code


class Imitation(Spec):
    """Feature imitation: the student's pyramid maps become the teacher's, in a region.

    The classic methods differ in the region: `"all"` is FitNets, `"inside_gt"` the inside of objects' boxes, `"main"`
    the positives, `"finegrained"` Fine-Grained imitation, `"gi"` general instances; DeFeat is two terms, `"inside_gt"`
    and `"outside_gt"`, each averaged over its own locations.

    Attributes:
        region: Where; its weights are not used.
        weight: Factor. Source: 2 in the released LD code, where DeFeat's background weighs twice as much.
    """

    kind: Literal["imitation"] = "imitation"
    region: Literal["all", "inside_gt", "outside_gt", "main", "finegrained", "gi"] = "gi"
    weight: float = Field(default=2.0, gt=0)

    @property
    def name(self) -> str:
        """Return what logs call the loss."""
        return f"imitation/{self.region}"

    def __call__(self, pair: Pair, where: Where, norm: Normalizer) -> Float[Tensor, ""]:
        """Return the squared difference, averaged over channels and each level's rows, summed over levels.

        Normalized by: see `sum_of_level_means`.

        Differs from the released code: that gives 0 on levels without positives, whatever the region holds there.
        """
        where = of_cells(where, pair.student.locations.num_priors)
        student = cell_features(pair.student)[where.row].float()
        teacher = cell_features(pair.teacher)[where.row].float()
        return self.weight * sum_of_level_means(feature_distance(student, teacher), where, norm)


def feature_distance(student: Float[Tensor, "N D"], teacher: Float[Tensor, "N D"]) -> Float[Tensor, " N"]:
    """Return the mean squared difference over channels; the teacher gets no gradient.

    Returns:
        Values >= 0; zero where both rows are equal.

    Normalized by: the channels `D`.

    Source: FitNets (ICLR 2015, arXiv:1412.6550), hint loss.

    Differs from the paper: not halved, as in the released LD code, whose weight is used here.
    """
    return (student - teacher.detach()).square().mean(dim=-1)


class PKD(Spec):
    """Pearson knowledge distillation: each channel of the pyramid's maps correlates with the teacher's.

    Blind to scale and offset of the features, so teachers of any kind serve.

    Attributes:
        weight: Factor. Source: 10 for one-stage teachers, 6 beside CrossKD.
    """

    kind: Literal["pkd"] = "pkd"
    region: Literal["all"] = "all"
    weight: float = Field(default=10.0, gt=0)

    @property
    def name(self) -> str:
        """Return what logs call the loss."""
        return "pkd/features"

    def __call__(self, pair: Pair, _where: Where, _norm: Normalizer) -> Float[Tensor, ""]:
        """Return the sum over levels, padding included.

        Normalized by: the elements of each level's map; channels are standardised over the rank's own images.
        """
        levels = zip(level_maps(pair.student, "features"), level_maps(pair.teacher, "features"), strict=True)
        return self.weight * torch.stack([pearson_distance(student, teacher) for student, teacher in levels]).sum()


def pearson_distance(student: Float[Tensor, "B D L"], teacher: Float[Tensor, "B D L"]) -> Float[Tensor, ""]:
    """Return half the mean squared difference of maps that are standardised per channel, over images and locations.

    This is one minus the mean correlation of the channels, but for the unbiased standard deviation.

    Returns:
        In [0, 2]; zero where each channel of the student is a rising linear function of the teacher's.

    Normalized by: the number of elements.

    Source: PKD (NeurIPS 2022, arXiv:2207.02039), eq. 4.
    """
    return (standardized(student) - standardized(teacher.detach())).square().mean() / 2


def standardized(maps: Float[Tensor, "B D L"]) -> Float[Tensor, "B D L"]:
    """Return maps whose channels have mean 0 and standard deviation 1 over images and locations."""
    mean = maps.mean(dim=(0, 2), keepdim=True)
    # a map of one location in one image has no deviation
    deviation = maps.std(dim=(0, 2), keepdim=True, correction=1 if maps.shape[0] * maps.shape[2] > 1 else 0)
    return (maps - mean) / (deviation + STD_FLOOR)


class CWD(Spec):
    """Channel-wise distillation: where a channel is active, as a distribution over the locations of a level.

    Attributes:
        on: Maps to compare: the pyramid's `"features"`, or the class logits (`"cls"`).
        weight: Factor. Source: 10 in the published RetinaNet configuration.
        temperature: Softens both distributions.
    """

    kind: Literal["cwd"] = "cwd"
    region: Literal["all"] = "all"
    on: Literal["features", "cls"] = "features"
    weight: float = Field(default=10.0, gt=0)
    temperature: float = Field(default=1.0, gt=0)

    @property
    def name(self) -> str:
        """Return what logs call the loss."""
        return f"cwd/{self.on}"

    def __call__(self, pair: Pair, _where: Where, _norm: Normalizer) -> Float[Tensor, ""]:
        """Return the sum over levels of `T^2 * KL(teacher, student)`, padding included.

        Normalized by: images and channels of each level's map.

        Source: CWD (ICCV 2021, arXiv:2011.13256), eq. 4.
        """
        levels = zip(level_maps(pair.student, self.on), level_maps(pair.teacher, self.on), strict=True)
        divergences = [softened_kl(student, teacher, self.temperature).mean() for student, teacher in levels]
        return self.weight * self.temperature**2 * torch.stack(divergences).sum()


def of_cells(where: Where, num_priors: int) -> Where:
    """Return the cells of the maps that hold a location of the region, each once; rows count cells then.

    Synchronises with the host where cells have several locations, and not all are in the region.

    Args:
        where: Locations.
        num_priors: Locations of each cell.
    """
    if num_priors == 1:
        return where
    first: Tensor | slice
    row: Tensor | slice
    if isinstance(where.row, slice):
        row, first = where.row, slice(None, None, num_priors)  # all of a cell or none are valid
    else:
        cell = where.row // num_priors
        first = cell.diff(prepend=cell.new_full((1,), -1)).nonzero().squeeze(1)  # rows ascend; synchronises
        row = cell[first]
    return replace(where, row=row, weight=where.weight[first], level=where.level[first], image=where.image[first])


def cell_features(dense: Dense) -> Float[Tensor, "N D"]:
    """Return the pyramid's features, a row for each cell of each image, in the order of `Where.row`."""
    return torch.cat([each.flatten(2) for each in dense.features], dim=2).transpose(1, 2).flatten(0, 1)


def level_maps(dense: Dense, on: Literal["features", "cls"]) -> list[Float[Tensor, "B D _"]]:
    """Return the maps of each level as float32, their rows and columns in one axis."""
    if on == "features":
        return [each.flatten(2).float() for each in dense.features]
    levels = torch.split(dense.cls, list(dense.locations.level_sizes), dim=1)
    num_channels = dense.locations.num_priors * dense.cls.shape[-1]  # each prior box has its own
    return [each.reshape(len(each), -1, num_channels).transpose(1, 2).float() for each in levels]
