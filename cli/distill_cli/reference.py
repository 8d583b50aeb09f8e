"""The reference of the command line, generated from the commands: `python -m distill_cli.reference FILE` writes it."""

import inspect
import sys
from pathlib import Path

import click

from distill_cli.failure import EXIT_CODES
from distill_cli.main import cli

GUIDE = """# Command line: `distill`, `kubectl distill`

Made from `cli/distill_cli` by `make crds`; do not edit.

```
pip install 'distillation-operator[cli]'        # what speaks to a cluster
pip install 'distillation-operator[workers]'    # what runs, evaluates and exports on this machine
```

In this repository `make setup` makes both: `operator/.venv/bin/distill` and `workers/.venv/bin/distill`. A command
whose packages are missing says which of the two has them. With `kubectl-distill` on the PATH, every command is also one
of kubectl: `kubectl distill list`.

A job on a cluster, from its first check to its model:

```
distill doctor                                  # what this cluster lacks, and what to do about it
distill validate -f job.yaml                    # offline, what the API server would say
distill submit -f job.yaml --set spec.schedule.steps=10 --watch
distill list -A                                 # state, step, KL and reward of every job
distill logs arithmetic trainer -f
distill samples arithmetic                      # what the student writes, from its running trainer or its volume
distill suspend arithmetic                      # with a checkpoint; `distill resume arithmetic` goes on
distill report arithmetic --open                # one HTML file: curves, stage times, rollouts, configuration, versions
distill export arithmetic ./model               # the model, by a pod that reads the output volume
```

The same file without a cluster, and what to do with the folder that a run leaves (`spec.output.path/metadata.name`). A
name with a slash in it is such a folder, any other a job's on the cluster:

```
distill run -f job.yaml --volume /models=./models --volume /output=./runs
distill watch ./runs/arithmetic                 # from another terminal
distill samples ./runs/arithmetic               # what the student writes, coloured by where its teacher disagrees
distill report ./runs/arithmetic
distill compare ./runs/arithmetic ./runs/top-k --html comparison.html
distill evaluate --model ./runs/arithmetic/model -f job.yaml --volume /models=./models
distill export ./runs/arithmetic ./step-20 --step 20
```

## Output and errors

On a terminal tables, bars and colours; in a pipe plain lines, which `grep`, `cut` and `awk` can read. `-o json` is for
programs; `watch -o json` writes an object a line for each change. What was found goes to standard output; errors go to
standard error, one sentence each, with what to do. `distill --debug COMMAND` shows the traceback as well.

## Exit codes

| code | meaning |
|---|---|
"""

COMPLETION = """
## Completion

Commands, options and the names of jobs, in bash (4.4 or newer), zsh and fish: see [`completion`](#distill-completion).
"""


def reference() -> str:
    """Return the whole reference, as Markdown."""
    codes = "".join(f"| {code} | {text} |\n" for code, text in EXIT_CODES.items())
    return GUIDE + codes + COMPLETION + "".join(_section(name) for name in cli.commands)


def _section(name: str) -> str:
    command = cli.commands[name]
    context = click.Context(command, info_name=f"distill {name}")
    usage = " ".join(command.get_usage(context).removeprefix("Usage: ").split())
    rows = "".join(_row(parameter, context) for parameter in command.params if isinstance(parameter, click.Option))
    table = f"\n| option | what |\n|---|---|\n{rows}" if rows else ""
    return f"\n## `distill {name}`\n\n```\n{usage}\n```\n\n{_paragraphs(command.help or '')}{table}"


def _paragraphs(text: str) -> str:
    """Return a help text as Markdown; the paragraphs that click is told not to wrap become code."""
    parts = []
    for part in inspect.cleandoc(text).split("\n\n"):
        code = part.removeprefix("\b\n")
        parts.append(f"```\n{code}\n```" if code != part else part)
    return "\n\n".join(parts) + "\n"


def _row(option: click.Option, context: click.Context) -> str:
    record = option.get_help_record(context)
    assert record is not None
    names, text = (" ".join(part.split()).replace("|", "\\|") for part in record)
    return f"| `{names.replace(chr(92) + '|', '/')}` | {text} |\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(reference(), encoding="utf-8")
