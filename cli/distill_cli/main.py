"""The tree of all commands, and the one place where errors become sentences and exit codes."""

import sys
from pathlib import Path

import click

from distill_api.job import InvalidManifest
from distill_cli.commands import (
    compare,
    completion,
    doctor,
    grade,
    jobs,
    local,
    logs,
    manifests,
    migrate,
    prompts,
    results,
    samples,
    watch,
)
from distill_cli.failure import EXIT_CODES, FAILED, INTERRUPTED, USAGE, CommandFailed, missing

COMMANDS = (
    local.run,
    manifests.validate,
    migrate.migrate,
    prompts.prompts,
    manifests.submit,
    jobs.list_jobs,
    watch.watch,
    logs.logs,
    samples.samples,
    results.report,
    compare.compare,
    local.evaluate,
    grade.grade,
    results.export,
    jobs.suspend,
    jobs.resume,
    doctor.doctor,
    completion.completion,
)
EPILOG = "\b\nExit codes:\n" + "\n".join(f"  {code:>3}  {text}" for code, text in EXIT_CODES.items())


class InOrder(click.Group):
    """A group whose help lists commands in the order in which a user meets them, not by the alphabet."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=InOrder, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.pass_context
def cli(ctx: click.Context, debug: bool) -> None:
    """On-policy distillation, on this machine and on Kubernetes."""
    ctx.ensure_object(dict)["debug"] = debug


for command in COMMANDS:
    cli.add_command(command)


def program() -> str:
    """Return the name that the user called the program by; a kubectl plugin is called by kubectl."""
    return "kubectl distill" if Path(sys.argv[0]).name.startswith("kubectl-") else "distill"


def main(argv: list[str] | None = None) -> int:
    """Run the command of `argv`, by default of sys.argv. Return its exit code."""
    context: dict[str, bool] = {"debug": False}
    arguments = sys.argv[1:] if argv is None else argv
    try:
        code = cli.main(
            args=arguments,
            prog_name=program(),
            complete_var=completion.VARIABLE,
            standalone_mode=False,
            obj=context,
        )
        return int(code or 0)
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except click.ClickException as error:
        error.show()
        return USAGE
    except InvalidManifest as error:
        for problem in error.problems:
            say(problem)
    except CommandFailed as error:
        _trace(context)
        say(str(error))
        return error.code
    except ModuleNotFoundError as error:
        _trace(context)
        named = next((a for a in arguments if a in cli.commands), "this command")
        say(missing(error, f"{program()} {named}"))
    except (ValueError, OSError) as error:
        _trace(context)
        say(str(error))
    except Exception as error:
        _trace(context)
        say(f"unexpected {type(error).__name__}: {error}; `--debug` before the command shows where")
    return FAILED


def say(sentence: str) -> None:
    """Print a sentence to standard error, with the program's name before it."""
    print(f"distill: {sentence}", file=sys.stderr)


def _trace(context: dict[str, bool]) -> None:
    if context["debug"]:
        import traceback

        traceback.print_exc()
