"""Completion of `kubectl distill`: kubectl calls `kubectl_complete-distill WORD...` and reads what it prints."""

import sys

from click.shell_completion import ShellComplete

from distill_cli.commands.completion import VARIABLE
from distill_cli.main import cli

NO_FILES = ":4"
"""kubectl's directive (cobra's ShellCompDirectiveNoFileComp): do not offer files."""


def for_kubectl() -> int:
    """`kubectl_complete-distill WORD...`, which kubectl calls: what the last word may become, then a directive."""
    *words, incomplete = sys.argv[1:] or [""]
    for item in ShellComplete(cli, {}, "distill", VARIABLE).get_completions(words, incomplete):
        print(f"{item.value}\t{item.help}" if item.help else item.value)
    print(NO_FILES)
    return 0
