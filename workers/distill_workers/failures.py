"""The errors that end a trainer: each has an exit code and a reason for the operator, and a message for people."""

import errno

from distill_api.protocol import ExitCode, ExitReason


class Failure(Exception):
    """Raised to end the trainer. The message says what was wrong, where, what is allowed and what to do."""

    code = ExitCode.TEMPORARY
    reason = ExitReason.INTERNAL_ERROR


class ConfigurationError(Failure):
    """Raised when the job as written cannot run, so that another attempt would not help."""

    code = ExitCode.CONFIGURATION
    reason = ExitReason.CONFIGURATION_ERROR


class PreflightFailed(ConfigurationError):
    """Raised when a check before the first step finds that teacher, student and engines do not fit together."""

    reason = ExitReason.PREFLIGHT_FAILED


class PromptError(ConfigurationError, ValueError):
    """Raised for prompts that cannot be read; names file, line, field, the value and what is allowed."""


class TeacherLost(Failure):
    """Raised when no teacher has answered for longer than the trainer waits."""

    reason = ExitReason.TEACHER_UNREACHABLE


class EnginesLost(Failure):
    """Raised when no engine has served for longer than the trainer waits."""

    reason = ExitReason.ENGINES_LOST


class VolumeFull(Failure):
    """Raised when the output volume is full: somebody makes room, and the next attempt goes on."""

    reason = ExitReason.VOLUME_FULL


def is_full(error: BaseException) -> bool:
    """Return whether a write failed because the volume, or a quota on it, is used up."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


class Stopped(Failure):
    """Raised after SIGTERM: the pod must end."""

    reason = ExitReason.STOPPED


class Superseded(Failure):
    """A newer trainer has taken over the run folder: this one publishes nothing more, not even how it ended."""

    reason = ExitReason.STOPPED
