"""How the reward `math` grades the references of a public data set: `reward_math.py FILE [FILE ...]`.

FILE is a JSONL whose rows have a question (`problem` or `question`) and an `answer`, such as MATH-500's test.jsonl or
GSM8K's. Prints, of each: how many references score 1 for themselves in a box, how many questions score 1 as responses
to themselves (with the question known, and not), and the milliseconds of one grade, in one process.
"""

import json
import sys
import time
from pathlib import Path

from distill_workers.data.sample import Prompt
from distill_workers.rewards.math import grade_mathematically, mathematics_of


def measure(path: Path, verbose: bool) -> None:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    questions = [str(row.get("problem") or row["question"]) for row in rows]
    references = [str(row["answer"]) for row in rows]
    grade_mathematically(Prompt(0, [], "", "x+1"), r"\boxed{1+x}")  # the imports
    boxed = [rf"So the answer is $\boxed{{{mathematics_of(reference)}}}$." for reference in references]
    print(f"{path}: {len(rows)} rows")
    for name, known, responses in (
        ("reference in a box", questions, boxed),
        ("question repeated", questions, questions),
        ("question repeated, unknown to the reward", [""] * len(rows), questions),
    ):
        started, right = time.perf_counter(), 0
        for index, (question, reference, response) in enumerate(zip(known, references, responses, strict=True)):
            score = grade_mathematically(Prompt(index, [], question, reference), response).score
            right += score == 1.0
            if verbose and (score == 1.0) == (responses is questions):
                print(f"  row {index}: {reference!r} scores {score:g} for {response!r}")
        milliseconds = 1000 * (time.perf_counter() - started) / len(rows)
        print(f"  {name}: {right} of {len(rows)} score 1, {milliseconds:.2f} ms each")


if __name__ == "__main__":
    arguments = [a for a in sys.argv[1:] if a != "--rows"]
    for argument in arguments:
        measure(Path(argument), verbose="--rows" in sys.argv)
