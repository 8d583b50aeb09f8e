"""`distill completion`: the script that lets a shell complete commands, options and the names of jobs."""

import click
from click.shell_completion import get_completion_class

VARIABLE = "_DISTILL_COMPLETE"
"""The environment variable by which a shell asks for completions instead of a run."""


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> int:
    """Print the script that lets SHELL complete commands, options and job names.

    \b
    bash:  echo 'eval "$(distill completion bash)"' >> ~/.bashrc
    zsh:   echo 'eval "$(distill completion zsh)"' >> ~/.zshrc
    fish:  distill completion fish > ~/.config/fish/completions/distill.fish

    kubectl's own completion completes `kubectl distill` too, where kubectl_complete-distill is on the PATH.
    """
    root = click.get_current_context().find_root().command
    completer = get_completion_class(shell)
    assert completer is not None
    click.echo(completer(root, {}, "distill", VARIABLE).source())
    return 0
