"""Shell completion: of commands and options by click, of job names by the cluster."""

from typing import Any

import click

VARIABLE = "_DISTILL_COMPLETE"
"""Environment by which a shell asks for completions instead of a run."""
SECONDS = 3.0
"""A shell waits for the names no longer than this."""


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
    """
    from click.shell_completion import get_completion_class

    from distill_cli.main import cli

    made = get_completion_class(shell)
    assert made is not None
    click.echo(made(cli, {}, "distill", VARIABLE).source())
    return 0
