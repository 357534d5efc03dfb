"""What keeps a set of named weights from fitting a network."""

from collections.abc import Mapping


def key_faults(given: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], owner: str) -> list[str]:
    """List the entries that are missing, unexpected or of another shape, one a line.

    Args:
        given: Shapes by name.
        expected: Shapes by name.
        owner: Whose shapes are expected, such as `the detector's`.
    """
    return [
        *(f"missing: {name} {list(shape)}" for name, shape in expected.items() if name not in given),
        *(f"unexpected: {name} {list(shape)}" for name, shape in given.items() if name not in expected),
        *(
            f"shape: {name} is {list(given[name])}, {owner} is {list(shape)}"
            for name, shape in expected.items()
            if name in given and tuple(given[name]) != tuple(shape)
        ),
    ]
