"""Files that a job names and that shape its curve: the tools of an environment, and the user's code.

Other tools make another run. Other code does not: to mend what an environment or a reward does wrong is a reason to go
on with a run. It is said.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from distill_api.spec.job_spec import Spec

TOOLS = "rollout.environment.tools"


def tools_of(spec: Spec) -> dict[str, str]:
    """Return a hash of the job's tools by the path of their field; empty without any, or where they cannot be read.

    The space between JSON's tokens does not count. The order of the fields does: the prompt has it.
    """
    path = _tools_path(spec)
    if path is None:
        return {}
    try:
        content = Path(path).expanduser().read_bytes()
    except OSError:
        return {}
    with contextlib.suppress(ValueError):  # environments/tools.py says what is wrong with it
        content = json.dumps(json.loads(content)).encode()
    return {TOOLS: _hash(content)}


def code_of(spec: Spec) -> dict[str, str]:
    """Return a hash of the file of each function and class of the user, and of an agent's script, by the path of its
    field.

    Of the module that is named alone, and not of what it imports. Nothing is imported. What is not found is left out.
    """
    files = {path: _source_file(name.partition(":")[0]) for path, name in _functions(spec)}
    environment = spec.rollout.environment
    if environment is not None and environment.agent is not None:
        scripts = (Path(part) for part in environment.agent.command if part.endswith(".py"))
        files["rollout.environment.agent.command"] = next(scripts, None)
    found = {}
    for path, file in files.items():
        if file is not None:
            with contextlib.suppress(OSError):
                found[path] = _hash(file.read_bytes())
    return found


def other_tools(there: Spec, here: Spec, known_there: Mapping[str, str], known_here: Mapping[str, str]) -> list[str]:
    """Return a part of a sentence where the tools of two jobs differ. `known_…` are what `tools_of` returned; tools
    whose content is unknown do not differ."""
    before, now = _tools_path(there), _tools_path(here)
    if (before is None) != (now is None):
        return [f"spec.{TOOLS} is {before or 'nothing'} there and {now or 'nothing'} here"]
    if TOOLS in known_there and TOOLS in known_here and known_there[TOOLS] != known_here[TOOLS]:
        return [f"spec.{TOOLS}: the tools in {now} are not those that the run began with"]
    return []


def other_code(there: Mapping[str, str], here: Mapping[str, str]) -> list[str]:
    """Return a note for each file of code that is not the one of the attempt before."""
    return [
        f"UserCode: spec.{path}: its file is not the one that the attempt before ran with; the run goes on with it"
        for path, found in here.items()
        if there.get(path, found) != found
    ]


def _tools_path(spec: Spec) -> str | None:
    environment = spec.rollout.environment
    return environment.tools if environment is not None else None


def _functions(spec: Spec) -> Iterator[tuple[str, str]]:
    """Yield path and name (`module:attribute`) of each field that names code of the user."""
    if spec.rollout.environment is not None and spec.rollout.environment.function is not None:
        yield "rollout.environment.function", spec.rollout.environment.function
    rewards = [("objective.reward", spec.objective.reward)]
    rewards += [(f"data.sources[{s.name}].reward", s.reward) for s in spec.data.sources if s.reward is not None]
    rewards += [(f"evaluation[{e.name}].reward", e.reward) for e in spec.evaluation]
    for path, reward in rewards:
        if reward.function is not None:
            yield f"{path}.function", reward.function


def _source_file(module: str) -> Path | None:
    """Return the file of a module, as Python would find it; None where that is no source file."""
    found: ModuleSpec | None = None
    places: list[str] | None = None
    try:
        for part in module.split("."):
            # By its last part: the finder looks up the parents of a whole name among what is imported, and a folder
            # without __init__.py in one that is not there would be a KeyError.
            found = PathFinder.find_spec(part, places)
            if found is None:
                return None
            places = list(found.submodule_search_locations or ())
        file = Path(found.origin) if found is not None and found.has_location and found.origin else None
        return file if file is not None and file.suffix == ".py" and file.is_file() else None
    except (ImportError, LookupError, OSError, ValueError):
        return None


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
