"""Shell completion: of commands and options by click, of job names by the cluster."""

import sys
from typing import Any

import click
from click.shell_completion import ShellComplete, get_completion_class

VARIABLE = "_DISTILL_COMPLETE"
"""Environment by which a shell asks for completions instead of a run."""
SECONDS = 3.0
"""A shell waits for the names no longer than this."""
NO_FILES = ":4"
"""kubectl's directive (cobra's ShellCompDirectiveNoFileComp): do not offer files."""


def job_names(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Jobs of the namespace; none where the cluster cannot be asked, as a shell has no place for an error."""
    try:
        from distill_cli.cluster import connect

        options: dict[str, Any] = ctx.params
        found = connect(options.get("namespace"), options.get("context"), options.get("kubeconfig"), seconds=SECONDS)
        return [name for job in found.jobs() if (name := job["metadata"]["name"]).startswith(incomplete)]
    except Exception:
        return []


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> int:
    """Print what makes SHELL complete commands, options and job names.

    \b
    bash:  echo 'eval "$(distill completion bash)"' >> ~/.bashrc
    zsh:   echo 'eval "$(distill completion zsh)"' >> ~/.zshrc
    fish:  distill completion fish > ~/.config/fish/completions/distill.fish

    kubectl's own completion completes `kubectl distill` too, where kubectl_complete-distill is on the PATH.
    """
    from distill_cli.main import cli

    made = get_completion_class(shell)
    assert made is not None
    click.echo(made(cli, {}, "distill", VARIABLE).source())
    return 0


def for_kubectl() -> int:
    """`kubectl_complete-distill WORD...`, which kubectl calls: what the last word may become, then a directive."""
    from distill_cli.main import cli

    *words, incomplete = sys.argv[1:] or [""]
    for item in ShellComplete(cli, {}, "distill", VARIABLE).get_completions(words, incomplete):
        print(f"{item.value}\t{item.help}" if item.help else item.value)
    print(NO_FILES)
    return 0
