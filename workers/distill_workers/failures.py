"""How a trainer ends before its time: an exit code that the operator acts on, and a sentence for people."""

import errno

from distill_api.protocol import ExitCode, ExitReason


class Failure(Exception):
    """Ends the trainer. The message says what was wrong, where, what is allowed and what to do."""

    code = ExitCode.TEMPORARY
    reason = ExitReason.INTERNAL_ERROR


class ConfigurationError(Failure):
    """The job as written cannot run; trying again does not help."""

    code = ExitCode.CONFIGURATION
    reason = ExitReason.CONFIGURATION_ERROR


class PreflightFailed(ConfigurationError):
    """A check before the first step found teacher, student and engines not to fit together."""

    reason = ExitReason.PREFLIGHT_FAILED


class TeacherLost(Failure):
    """No teacher answered for longer than is waited."""

    reason = ExitReason.TEACHER_UNREACHABLE


class EnginesLost(Failure):
    """No engine came back for longer than is waited."""

    reason = ExitReason.ENGINES_LOST


class VolumeFull(Failure):
    """The output volume has no room for what must be kept: somebody makes some, and the next attempt goes on."""

    reason = ExitReason.VOLUME_FULL


def is_full(error: BaseException) -> bool:
    """Whether a write failed because the volume, or what a quota allows on it, is used up."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


class Stopped(Failure):
    """SIGTERM: the pod is wanted elsewhere."""

    reason = ExitReason.STOPPED


class Superseded(Failure):
    """A newer trainer has taken over the run folder: this one publishes nothing more, not even how it ended."""

    reason = ExitReason.STOPPED
