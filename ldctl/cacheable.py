"""Which runs can learn from a teacher's cache, what it has to hold for them, and whether a given one does."""

from pathlib import Path
from typing import get_args

from ldctl import checkpoint
from ldctl.boxes import PAD_MULTIPLE
from ldctl.classes import ClassMatch
from ldctl.data import DataSpec
from ldctl.data.teacher_cache import CachedRegion, CacheHeader, TeacherCache, open_cache
from ldctl.distill import KD, LD, BCKDBox, BinaryKD, PredictionTerm
from ldctl.distillation import DistillationSpec
from ldctl.errors import CheckpointError, DataError, SpecError
from ldctl.models.detector import STRIDES
from ldctl.samples import Dataset
from ldctl.schema import Spec
from ldctl.spec import DistillSpec
from ldctl.toml_text import literal

Terms = tuple[type[Spec], ...]
READS_EDGES: Terms = (LD, BCKDBox)
READS_CLASSES: Terms = (KD, BinaryKD, BCKDBox)


def default_terms() -> list[dict[str, object]]:
    """Return the terms of a run without a preset, each where a cache can tell something."""
    return [
        {"kind": term.kind, **term.model_dump(exclude_defaults=True)}
        | ({"region": "main"} if term.region not in get_args(CachedRegion) else {})
        for term in DistillationSpec().terms
    ]


def check_recipe(spec: DistillSpec) -> None:
    """Refuse a run that asks a teacher for more than a cache can hold; needs no file.

    Raises:
        SpecError: Names what it asks for, and what works instead.
    """
    fault = _fault_of_views(spec)
    if fault is None and spec.assistant:
        fault = "assistant: a cache holds what one teacher says: distil the assistant alone, and then cache that"
    for index, term in enumerate(spec.distill.terms):
        is_on_logits = isinstance(term, PredictionTerm)
        if fault is None and not (is_on_logits and term.region in get_args(CachedRegion)):
            mend = f"pass --set distill.terms.{index}.region=main" if is_on_logits else "leave the term out"
            fault = (
                f'distill.terms.{index}: "{term.kind}" looks at more than what the teacher says in the main region and '
                f"the VLR, which is what a cache holds: {mend}, or pass --preset ld-full or ld-main (small-ld-full or "
                "small-ld-main for small data)"
            )
    if fault:
        raise SpecError(fault)


def _fault_of_views(spec: DistillSpec) -> str | None:
    """Return why a cache cannot hold all views of the images, and what to change; none where it can."""
    data, (low, high) = spec.data, spec.data.short_side
    if low != high:
        return (
            f"data.short_side [{low}, {high}] is a range, which gives an image more views than a cache can hold: "
            f"pass --set data.short_side=[{high},{high}]"
        )
    if not data.canvas:
        return (
            "data.canvas is false, so that what a teacher says of an image depends on the others of its batch: "
            "pass --set data.canvas=true"
        )
    if spec.teacher.scale != 1:
        return f"teacher.scale {spec.teacher.scale:g} does not go with a cache: pass --set teacher.scale=1"
    if data.unlabelled is not None:
        return (
            "data.unlabelled: where to look in images without annotations only a teacher can say: pass --teacher FILE "
            "instead of a cache, or leave it out"
        )
    return None


def open_matching(spec: DistillSpec) -> TeacherCache:
    """Open the cache of a run, before any data is read.

    Raises:
        SpecError: The run asks for more than a cache can hold, or for something else than this one holds.
        CheckpointError: The cache is missing or damaged, or numbers locations in another way.
    """
    assert spec.teacher.cache is not None, "asked for where there is one"
    check_recipe(spec)
    path = Path(spec.teacher.cache)
    cache = open_cache(path)
    teacher = Path(spec.teacher.path or "")
    if teacher.is_file() and checkpoint.sha256(teacher) != cache.header.teacher_sha256:
        raise SpecError(
            f"{path}: is not of {teacher}: leave out --teacher, or make a cache of it with `ldctl teacher cache`"
        )
    differs = {key: value for key, value in _built_for(cache.header, spec).items() if value[0] != value[1]}
    if differs:
        said = "; ".join(f"{key} {literal(held)}, not {literal(asked)}" for key, (held, asked) in differs.items())
        mend = " ".join(f"--set {key}={literal(held).replace(' ', '')}" for key, (held, _) in differs.items())
        raise SpecError(f"{path}: was made for {said}: pass {mend}, or make another with `ldctl teacher cache`")
    if cache.header.num_locations != num_locations(spec):  # all that these follow from is the same
        raise CheckpointError(
            f"{path}: has {cache.header.num_locations} locations in a view, and this ldctl {num_locations(spec)}: make "
            "another with `ldctl teacher cache`"
        )
    for index, term in enumerate(spec.distill.terms):
        lacking = [
            name for name, reads, held in _told(cache.header) if isinstance(term, reads) and term.region not in held
        ]
        if lacking:
            raise SpecError(
                f'{path}: tells no {" and ".join(lacking)} in the region of distill.terms.{index} ("{term.kind}", '
                f'"{term.region}"), since it was made for a recipe that needs none: make another with '
                "`ldctl teacher cache` and this recipe, or leave the term out"
            )
    return cache


def _built_for(header: CacheHeader, spec: DistillSpec) -> dict[str, tuple[object, object]]:
    """Return the keys on which views and regions depend: what a cache was made for, and what a run asks for."""
    data, distill = spec.data, spec.distill
    has_flips = set(flips(data)) <= set(header.flips)
    # GFL's, GFLv2's and ATSS's heads have one rule
    head = spec.student.head.kind
    other = "gfl" if header.assignment == "atss" else header.assignment
    kind = head if spec.student.head.traits.assignment == header.assignment else other
    asked: dict[str, tuple[object, object]] = {
        "data.short_side": ([header.short_side] * 2, list(data.short_side)),
        "data.long_side": (header.long_side, data.long_side),
        "data.scaled_jpeg": (header.scaled_jpeg, data.scaled_jpeg),
        "data.flip": (data.flip if has_flips else float(header.flips[0]), data.flip),
        "student.head.kind": (kind, head),
    }
    if any(term.region == "vlr" for term in distill.terms):
        asked |= {"distill.vlr": (header.vlr, distill.vlr), "distill.gamma": (header.gamma, distill.gamma)}
    return asked


def _told(header: CacheHeader) -> tuple[tuple[str, Terms, tuple[CachedRegion, ...]], ...]:
    """Return for edges and classes what they are called, which terms read them, and where they are told."""
    return ("edges", READS_EDGES, header.edge_regions), ("classes", READS_CLASSES, header.cls_regions)


def check_data(cache: TeacherCache, match: ClassMatch, dataset: Dataset) -> None:
    """Refuse a cache of images of other names, sizes or boxes, or of other classes; nothing looks at their pixels.

    Raises:
        DataError: They are not the same.
    """
    if not match.is_complete:
        raise DataError(other_classes(cache.path, match))
    if cache.header.train_fingerprint != dataset.fingerprint:
        raise DataError(
            f"{cache.path}: is of other images or boxes than {dataset.name}: mend --data, or make a cache of these "
            "with `ldctl teacher cache`"
        )


def other_classes(path: Path, match: ClassMatch) -> str:
    """Say that a file's teacher has not the data's classes, and what to do about it."""
    return (
        f"{path}: the data has the classes {', '.join(match.student)}, the teacher {', '.join(match.teacher)}: a cache "
        "needs the same: pass --teacher FILE without --cache, or say which are the same with "
        "--set 'teacher.classes={...}'"
    )


def level_sizes(data: DataSpec, *, is_wide: bool = True) -> tuple[tuple[int, int], ...]:
    """Return rows and columns of each pyramid level on a canvas."""
    sides = [-(-side // PAD_MULTIPLE) * PAD_MULTIPLE for side in (data.short_side[1], data.long_side)]
    height, width = sides if is_wide else reversed(sides)
    return tuple((-(-height // stride), -(-width // stride)) for stride in STRIDES)


def num_locations(spec: DistillSpec) -> int:
    """Return how many locations a student has on a canvas, wide or tall."""
    cells = sum(height * width for height, width in level_sizes(spec.data))
    return cells * len(spec.student.head.prior_wh)


def regions_read(spec: DistillSpec, readers: Terms) -> tuple[CachedRegion, ...]:
    """Return the regions of those terms of a recipe that are among the readers."""
    regions = {term.region for term in spec.distill.terms if isinstance(term, readers)}
    return tuple(name for name in get_args(CachedRegion) if name in regions)


def flips(data: DataSpec) -> tuple[bool, ...]:
    """Return whether views are mirrored: never, always, or either."""
    return {0.0: (False,), 1.0: (True,)}.get(data.flip, (False, True))
