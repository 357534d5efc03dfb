"""What keeps a set of named weights from fitting a network."""

from collections.abc import Mapping

SHOWN = 20


def key_faults(
    given: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], owner: str, verdict: str
) -> str | None:
    """List the entries that are missing, unexpected or of another shape, one a line, under a line with their number.

    No more than `SHOWN` are listed; nothing is where all fit.

    Args:
        given: Shapes by name.
        expected: Shapes by name.
        owner: Whose shapes are expected, such as `the detector's`.
        verdict: What the first line says after the number of entries.
    """
    faults = [
        *(f"missing: {name} {list(shape)}" for name, shape in expected.items() if name not in given),
        *(f"unexpected: {name} {list(shape)}" for name, shape in given.items() if name not in expected),
        *(
            f"shape: {name} is {list(given[name])}, {owner} is {list(shape)}"
            for name, shape in expected.items()
            if name in given and tuple(given[name]) != tuple(shape)
        ),
    ]
    if not faults:
        return None
    rest = [f"and {len(faults) - SHOWN} more"] if len(faults) > SHOWN else []
    return "\n".join([f"{len(faults)} entries {verdict}", *faults[:SHOWN], *rest])
