"""What a student learns from its teacher: the terms, and which detectors and classes they can compare."""

from collections.abc import Callable, Iterable, Mapping
from typing import Literal

from pydantic import Field, model_validator

from ldctl.classes import ClassMatch
from ldctl.distill import CWD, KD, LD, PKD, BCKDBox, BinaryKD, CrossKDBox, CrossKDClass, Imitation, Term
from ldctl.errors import SpecError
from ldctl.models.heads import HeadSpec
from ldctl.regions import RegionSpec
from ldctl.toml_text import literal


class DistillationSpec(RegionSpec):
    """What the student learns from the teacher.

    Attributes:
        normalize: `"synced"` losses do not depend on how a batch is split over ranks and equal the released code's at
            its 8 ranks of 2 images; `"reference"` keeps the sums of the released code, which grow with the images per
            rank. Either way the `crosskd` terms align, and `pkd` standardises, a rank's maps by that rank's own images,
            as their code does.
        cut: Behind which layer of the head's towers, counted from the image side in student and teacher alike, the
            `crosskd` terms hand the student's maps to the teacher's head; 0 hands over the pyramid's. The other terms
            have no use for it. Source: 3 of 4 was best in the CrossKD paper.
        pseudo_score: In unlabelled images the teacher's detections above this score stand for objects, so that regions
            can be drawn around them. The default is this project's choice, not measured: QFL's scores, which are of
            class and overlap in one, stay below those of plain classifiers, of which Unbiased Teacher
            (arXiv:2102.09480) takes 0.7.
        terms: The distillation losses. The default is LD in the main region and the VLR, with class distillation of the
            sigmoids, which also works with a single class; the released code's softmax KD is in the `ld-*` presets.
    """

    normalize: Literal["synced", "reference"] = "synced"
    cut: int = Field(default=3, ge=0)
    pseudo_score: float = Field(default=0.3, gt=0, lt=1)
    terms: tuple[Term, ...] = Field(default=(LD(), LD(region="vlr", weight=0.0625), BinaryKD()), min_length=1)

    @model_validator(mode="after")
    def _check_names(self) -> "DistillationSpec":
        names = [term.name for term in self.terms]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two terms are called {', '.join(repeated)}: give each region to a term once")
        return self

    @property
    def compared_maps(self) -> tuple[str, ...]:
        """Return which maps of student and teacher the terms compare: `features`, `cls`, `edge`."""
        is_compared = {
            "features": any(
                isinstance(term, Imitation | PKD) or (isinstance(term, CWD) and term.on == "features")
                for term in self.terms
            ),
            "cls": any(isinstance(term, CrossKDClass) for term in self.terms),
            "edge": any(isinstance(term, CrossKDBox) for term in self.terms),
        }
        return tuple(name for name, is_wanted in is_compared.items() if is_wanted)

    @property
    def crossed_towers(self) -> tuple[str, ...]:
        """Return which towers' maps go from the student to the teacher's head: `cls`, `edge`."""
        return tuple(name for name in self.compared_maps if name in ("cls", "edge"))

    @property
    def tower_cut(self) -> int:
        """Return where to take the towers' maps; 0 if no term asks for them, for there they cost no memory."""
        return self.cut if self.crossed_towers else 0

    @property
    def compares_edges(self) -> bool:
        """Return whether a term compares the student's own edge distributions with the teacher's, bin by bin."""
        return any(isinstance(term, LD) for term in self.terms)

    def fault_of_pairs(self, heads: Mapping[str, HeadSpec]) -> str | None:
        """Return which terms compare location by location where heads have different numbers of them; none if none do.

        Args:
            heads: By whose they are; the first to teach comes first.
        """
        paired = [literal(term.kind) for term in self.terms if without_pairs(term) is not term]
        first, wanted = next(iter(heads.items()))
        other = next((name for name, head in heads.items() if len(head.prior_wh) != len(wanted.prior_wh)), None)
        if not paired or other is None:
            return None
        key = "assistant.model" if other == "assistant" else other
        return (
            f'the {first} has a head "{wanted.kind}", the {other} "{heads[other].kind}", and "retina" tells nine boxes '
            f"where the others tell one, so that {', '.join(dict.fromkeys(paired))} cannot pair them: "
            f"pass --set {key}.head.kind={wanted.kind}, or the nearest terms that work: "
            f"{self.instead(without_pairs, heads)}"
        )

    def instead(self, nearest: Callable[[Term], Term], heads: Mapping[str, HeadSpec]) -> str:
        """Return the options that put other terms in the place of some, with a cut that the heads' towers have.

        Args:
            nearest: Returns a term that can stay, and another in the place of one that cannot.
            heads: By whose they are.
        """
        replaced = {term.name: term for term in map(nearest, self.terms)}
        kept = {term.name: term for term in self.terms if nearest(term) is term}
        terms = (replaced | kept).values()
        options = f"--set 'distill.terms={in_toml(terms)}'"
        largest = min(head.num_convs for head in heads.values())
        is_crossed = any(isinstance(term, CrossKDBox | CrossKDClass) for term in terms)
        return f"{options} --set distill.cut={largest}" if is_crossed and self.cut > largest else options

    def check_classes(self, match: ClassMatch) -> None:
        """Refuse terms on classes where none is shared, and a softmax over a single one, which would always be zero.

        Raises:
            SpecError: Names the term, and what works instead.
        """
        for index, term in enumerate(self.terms):
            if not match.pairs and not is_class_free(term):
                left = [other for other in self.terms if is_class_free(other)] or [LD()]
                raise SpecError(
                    f'distill.terms.{index}: "{term.kind}" compares class scores, but the teacher knows none of the '
                    f"data's classes (the data has {', '.join(match.student)}; "
                    f"the teacher {', '.join(match.teacher)}): "
                    f"say which are the same with --set 'teacher.classes={{{literal(match.student[0])}=\"...\"}}', or "
                    f"keep to terms that do not look at classes with --set 'distill.terms={in_toml(left)}'"
                )
            if len(match.pairs) == 1 and isinstance(term, KD):
                raise SpecError(
                    f'distill.terms.{index}: "kd" takes a softmax over classes, which says nothing of a single class: '
                    f"use --set 'distill.terms.{index}={{kind=\"binary_kd\"}}' or leave the term out"
                )


def is_class_free(term: Term) -> bool:
    """Return whether a term and its region look at no class logits, so that student and teacher need share no class."""
    if isinstance(term, CWD):
        return term.on == "features"
    return isinstance(term, LD | PKD) or (isinstance(term, Imitation) and term.region != "gi")


def without_pairs(term: Term) -> Term:
    """Return the term if it does not compare student and teacher location by location, else the nearest that does not.

    Detectors whose maps have different numbers of locations in a cell can only be compared by such terms.
    """
    match term:
        case LD() | BCKDBox():
            return CrossKDBox()
        case KD() | BinaryKD() | CWD(on="cls"):
            return CrossKDClass()
        case Imitation(region="gi"):
            return term.model_copy(update={"region": "finegrained"})
        case _:
            return term


def without_edges(term: Term) -> Term:
    """Return the term if it does not compare edge distributions bin by bin, else the nearest that compares boxes.

    Detectors whose locations lie at different places of the image can only be compared by such terms.
    """
    return BCKDBox() if isinstance(term, LD) else term


def in_toml(terms: Iterable[Term]) -> str:
    """Return terms as `--set distill.terms=` takes them, without their defaults."""
    return literal([{"kind": term.kind, **term.model_dump(exclude_defaults=True)} for term in terms])
