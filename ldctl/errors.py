"""Everything that a user can get wrong, each with the exit code of the command."""

from typing import ClassVar


class LdctlError(Exception):
    """A fault that the user can mend: the message says what, where and what to do next.

    The command line prints the message on one line (a list of faults: one line each) and exits with
    `exit_code`; it never shows a traceback for these.
    """

    exit_code: ClassVar[int] = 1


class SpecError(LdctlError):
    """A run spec, preset or `--set` is wrong, or asks for a combination that cannot work."""

    exit_code = 3


class DataError(LdctlError):
    """A data set is missing, empty or unreadable."""

    exit_code = 4


class CheckpointError(LdctlError):
    """A weights file is missing, damaged, foreign, or does not fit the spec."""

    exit_code = 5


class ExportError(LdctlError):
    """An exported file does not give what the eager detector gives."""

    exit_code = 6


class OutputError(LdctlError):
    """An output path cannot be used: it is taken, not writable, or the disk is full."""

    exit_code = 7


class TrainingError(LdctlError):
    """Training cannot go on: a loss is not finite, or memory ran out."""

    exit_code = 8


class MissingError(LdctlError):
    """Something outside ldctl is missing: a device, a download, an optional package."""

    exit_code = 9


class Interrupted(LdctlError):
    """The user or the system asked to stop; what was learnt so far is saved."""

    exit_code = 130


class HungUp(Interrupted):
    """The terminal was closed (SIGHUP)."""

    exit_code = 129


class Unread(Interrupted):
    """What reads the output was closed (SIGPIPE), as after `| head`."""

    exit_code = 141


class Terminated(Interrupted):
    """The system asked to stop (SIGTERM)."""

    exit_code = 143
