"""Which of the data's classes a teacher knows: matched by name, or as a run spec pairs them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ldctl.errors import SpecError


@dataclass(frozen=True)
class ClassMatch:
    """The classes of a student and of its teacher, and those that they share.

    Attributes:
        student: Names of the student's classes, which are the data's.
        teacher: Names of the teacher's classes.
        pairs: Indices of shared classes, `(student, teacher)`, ascending; each class is in one pair at most.
    """

    student: tuple[str, ...]
    teacher: tuple[str, ...]
    pairs: tuple[tuple[int, int], ...]

    @property
    def is_complete(self) -> bool:
        """Return whether both have the same classes, though perhaps in another order or spelling."""
        return len(self.pairs) == len(self.student) == len(self.teacher)

    @property
    def in_teachers_order(self) -> tuple[str, ...]:
        """Return the student's names in the order of the teacher's; only where the match is complete."""
        assert self.is_complete, "each class has its place"
        return tuple(self.student[own] for own, _ in sorted(self.pairs, key=lambda pair: pair[1]))

    def __str__(self) -> str:
        """Say which classes the teacher knows and which not; nothing where both use the same names."""
        named = [(self.student[own], self.teacher[other]) for own, other in self.pairs]
        if self.is_complete and all(own == other for own, other in named):
            return ""
        known = ", ".join(own if own == other else f"{own} (its {other})" for own, other in named) or "none"
        shared = {own for own, _ in self.pairs}
        left = ", ".join(name for index, name in enumerate(self.student) if index not in shared)
        said = f"classes: the teacher knows {len(self.pairs)} of the data's {len(self.student)}: {known}"
        return f"{said}; terms on classes leave out {left}" if left else said


def match_names(student: Sequence[str], teacher: Sequence[str], named: Mapping[str, str]) -> ClassMatch:
    """Pair the classes of a student with its teacher's: first as `named` says, then by equal names, then alike ones.

    Names are alike that differ in upper and lower case, spaces and underscores only. They pair where just one of the
    student's names and just one of the teacher's are alike.

    Args:
        student: Distinct names.
        teacher: Distinct names.
        named: The teacher's name for some of the student's.

    Raises:
        SpecError: `named` holds a name that is no class.
    """
    for kind, names, known in (("data", named, student), ("teacher", named.values(), teacher)):
        if unknown := [name for name in names if name not in known]:
            raise SpecError(
                f'teacher.classes: the {kind} has no {", ".join(unknown)}: write student_name = "teacher\'s name", as '
                f"the {kind} spells it ({', '.join(known)})"
            )
    found = dict(named)
    taken = set(found.values())
    found |= {name: name for name in student if name not in found and name in teacher and name not in taken}
    taken = set(found.values())
    own_count, other_count = Counter(map(_plain, student)), Counter(map(_plain, teacher))
    by_plain = {_plain(name): name for name in teacher if other_count[_plain(name)] == 1 and name not in taken}
    for name in student:
        if name not in found and own_count[_plain(name)] == 1 and _plain(name) in by_plain:
            found[name] = by_plain[_plain(name)]
    pairs = tuple((index, teacher.index(found[name])) for index, name in enumerate(student) if name in found)
    return ClassMatch(tuple(student), tuple(teacher), pairs)


def _plain(name: str) -> str:
    """Return what alike names have in common."""
    return name.casefold().replace("_", "").replace(" ", "")
