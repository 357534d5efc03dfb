"""Pairing the classes of student and teacher by name."""

import pytest

from ldctl.classes import match_names
from ldctl.errors import SpecError

VOC = ("tvmonitor", "pottedplant", "dog")
COCO = ("dog", "potted plant", "tv", "Traffic_Light")


@pytest.mark.parametrize(
    ("student", "teacher", "named", "pairs"),
    [
        (("a", "b"), ("b", "a", "c"), {}, ((0, 1), (1, 0))),
        (VOC, COCO, {}, ((1, 1), (2, 0))),
        (VOC, COCO, {"tvmonitor": "tv"}, ((0, 2), (1, 1), (2, 0))),
        (("traffic light", "x"), COCO, {}, ((0, 3),)),
        # what is named wins over what is equal, and takes its class away
        (("a", "b"), ("a", "b"), {"a": "b"}, ((0, 1),)),
        (("a", "b"), ("a", "b"), {"a": "b", "b": "a"}, ((0, 1), (1, 0))),
        # alike to more than one name on either side: left alone, unless equal
        (("Cat", "cat"), ("cat",), {}, ((1, 0),)),
        (("Cat", "CAT"), ("cat",), {}, ()),
        (("cat",), ("Cat", "CAT"), {}, ()),
        (("cat",), ("Cat", "CAT", "cat"), {}, ((0, 2),)),
        (("a",), ("b",), {}, ()),
    ],
)
def test_pairs(
    student: tuple[str, ...], teacher: tuple[str, ...], named: dict[str, str], pairs: tuple[tuple[int, int], ...]
) -> None:
    assert match_names(student, teacher, named).pairs == pairs


def test_what_is_said() -> None:
    assert str(match_names(("a", "b"), ("b", "a"), {})) == ""
    assert str(match_names(VOC, COCO, {"tvmonitor": "tv"})) == (
        "classes: the teacher knows 3 of the data's 3: tvmonitor (its tv), pottedplant (its potted plant), dog"
    )
    assert str(match_names(("a", "b"), ("A", "c"), {})) == (
        "classes: the teacher knows 1 of the data's 2: a (its A); terms on classes leave out b"
    )
    assert str(match_names(("a", "b"), ("c",), {})) == (
        "classes: the teacher knows 0 of the data's 2: none; terms on classes leave out a, b"
    )


def test_a_complete_match_gives_the_teachers_order() -> None:
    match = match_names(("Dog", "cat", "cow"), ("cow", "dog", "cat"), {})
    assert match.is_complete
    assert match.in_teachers_order == ("cow", "Dog", "cat")
    assert not match_names(("cat",), ("cat", "dog"), {}).is_complete
    assert not match_names(("cat", "dog"), ("cat", "cow"), {}).is_complete


def test_names_of_no_class_are_refused() -> None:
    with pytest.raises(SpecError) as caught:
        match_names(("cat", "dog"), ("a", "b"), {"cow": "a", "cat": "b", "hen": "b"})
    assert str(caught.value) == (
        'teacher.classes: the data has no cow, hen: write student_name = "teacher\'s name", as the data spells it '
        "(cat, dog)"
    )
    with pytest.raises(SpecError) as caught:
        match_names(("cat", "dog"), ("a", "b"), {"cat": "c"})
    assert str(caught.value) == (
        'teacher.classes: the teacher has no c: write student_name = "teacher\'s name", as the teacher spells it (a, b)'
    )
