"""The entry point of kubectl's completion: kubectl runs `kubectl_complete-distill WORD...` and reads what it prints."""

import sys

from click.shell_completion import ShellComplete

from distill_cli.commands.completion import VARIABLE
from distill_cli.main import cli

NO_FILES = ":4"
"""The directive of kubectl (cobra's ShellCompDirectiveNoFileComp) not to offer files."""


def for_kubectl() -> int:
    """Print what the last argument may be completed to, a line each, then a directive. Return the exit code."""
    *arguments, incomplete = sys.argv[1:] or [""]
    for item in ShellComplete(cli, {}, "distill", VARIABLE).get_completions(arguments, incomplete):
        print(f"{item.value}\t{item.help}" if item.help else item.value)
    print(NO_FILES)
    return 0
