"""An environment of the package verifiers: a program for a Python that has it, and imports nothing else of ours.

    python -P verifiers_program.py check NAME [--arguments JSON]    says nothing where the environment can be loaded
    python -P verifiers_program.py rows NAME [--evaluation] [-n N]  prints its data set, a row a line, for prompts.path
    python -P verifiers_program.py play NAME [--arguments JSON]     has one conversation, about the row on its input

What `play` talks to is what OpenAI's clients read of their variables; it prints the reward, as an agent does.
"""

import argparse
import asyncio
import json
import logging
import os
import sys
from typing import Any

ANSWERS_OF_THE_MODEL = ("EmptyModelResponseError", "InvalidModelResponseError")
"""Errors of verifiers that are the student's doing: no reason to make the conversation anew, and worth nothing."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["check", "rows", "play"])
    parser.add_argument("name")
    parser.add_argument("--arguments", type=json.loads, default={})
    parser.add_argument("--evaluation", action="store_true", help="the rows that are held out")
    parser.add_argument("-n", type=int, default=-1, help="rows at most")
    options = parser.parse_args()
    logging.disable(logging.ERROR)  # what is wrong is told once, at the end
    environment = load(options.name, options.arguments)
    if options.what == "play":
        print(json.dumps({"reward": asyncio.run(played(environment, json.load(sys.stdin)))}))
    elif options.what == "rows":
        for row in rows(environment, options.evaluation, options.n):
            print(json.dumps(row, ensure_ascii=False))


def load(name: str, arguments: dict[str, Any]) -> Any:
    """Return an environment. Ends the process with a sentence where that cannot be."""
    try:
        import verifiers
    except ImportError as error:
        sys.exit(f"{error}; python must be one that has the package verifiers")
    try:
        return verifiers.load_environment(name, **arguments)
    except Exception as error:
        cause = f" ({error.__cause__})" if error.__cause__ is not None else ""
        sys.exit(" ".join(f"{error}{cause}".split()))


def rows(environment: Any, evaluation: bool, most: int) -> list[dict[str, Any]]:
    """Return rows of an environment's data set, with the messages that a conversation begins with as `prompt`."""
    found = environment.get_eval_dataset(most) if evaluation else environment.get_dataset(most)
    return [{**row, "prompt": [plain(message) for message in row["prompt"]]} for row in found]


async def played(environment: Any, row: dict[str, Any]) -> float:
    """Have a conversation about a row, and return its reward. Ends the process with a sentence where there is none."""
    from verifiers.types import ClientConfig

    client = ClientConfig(
        client_type="openai_chat_completions",
        api_key_var="OPENAI_API_KEY",
        api_base_url=os.environ["OPENAI_BASE_URL"],
        max_retries=0,
    )
    # `task` is the name of the environment in older data sets, and the whole row in newer ones.
    asked = {name: value for name, value in row["metadata"].items() if name != "task"}
    asked |= {"prompt": row["messages"], "answer": row["answer"] or ""}
    asked.setdefault("example_id", 0)
    asked.setdefault("info", {})
    outcome = await environment.run_rollout(asked, client, os.environ["OPENAI_MODEL"], {})
    if error := outcome.get("error"):
        if error.get("error") in ANSWERS_OF_THE_MODEL:
            return 0.0
        sys.exit(" ".join(str(error.get("error_chain_str") or error).split()))
    return float(outcome["reward"])


def plain(message: Any) -> dict[str, Any]:
    """Return a message without the fields that it lacks: a table gives each row those of all."""
    return {name: value for name, value in dict(message).items() if value is not None}


if __name__ == "__main__":
    main()
