"""Manifests that nobody would write and somebody will: drawn from the CRD's schema, and from beyond it.

Each is a good manifest with one to four things changed: a field set to a value that its schema allows, or to one that
no schema foresaw; a field taken away, or given a name that does not exist; an entry of a list doubled; a wrong name.
"""

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from distill_api.generate.crd import crd
from distill_api.manifest import read_manifest

MANIFESTS = Path(__file__).resolve().parents[1] / "manifests" / "good"
SPEC = crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
Json = dict[str, Any]
Path_ = tuple[str | int, ...]

# Not "1e3": the models must take it for a number, as they cannot see whether the file had quotes around it.
TEXTS = (
    "", " ", "x", "x" * 300, "x" * 10_000, "é", "模型", "🦙", "a\u0000b", "a\nb", "\u202e", "../..", "$(id)",
    "{{ x }}", "null", "true", "1", "-1", "0x10", "1.5.5Gi", "1Gi ", "１", "٣", "Gi", "1e", "/", "/a:b", "a/b/c", "-a",
    "a-", "A_B",
)  # fmt: skip
NUMBERS = (0, -1, 1, 2**31, 2**63, -(2**63) - 1, 10**40, 0.1, -0.0, 1e-320, 1e308, 1.0, 3.7)
OTHERS = (None, True, False, [], {}, [None], [[]], {"": 1}, {"x": {"y": []}}, ["x", "x"], [{}], {"name": "x"})
QUANTITIES = ("0", "1", 2, "500m", "1.5Gi", "16Gi", "100000000E", "-1", "1e3", "+1", "Ki", 10**30, 1.5, True)
NAMES = ("job", "x", "a" * 40, "a" * 41, "a" * 64, "A", "1a", "a.b", "a-", "-", "é", "a_b", "")
CHANGES = ("allowed", "allowed", "allowed", "wild", "wild", "away", "unknown", "twice", "name")
UNKNOWN = ("replica", "Spec", "x", "", "$ref", "__proto__", "max_policy_lag", "é", "a.b", "x" * 300)


def valid(node: Json) -> st.SearchStrategy[Any]:
    """What the schema of one field allows; its rules may still refuse it."""
    if node.get("x-kubernetes-int-or-string"):
        return st.sampled_from(QUANTITIES)
    if "enum" in node:
        return st.sampled_from(node["enum"])
    kind = node.get("type")
    if kind == "boolean":
        return st.booleans()
    if kind == "integer":
        least, most = node.get("minimum", -(2**31)), node.get("maximum", 2**31)
        return st.sampled_from(sorted({int(least), int(least) + 1, int(most) - 1, int(most)})) | st.integers(
            least, most
        )
    if kind == "number":
        return st.floats(node.get("minimum", -1e9), node.get("maximum", 1e9), allow_nan=False)
    if kind == "string":
        most = min(node.get("maxLength", 40), 40)
        return st.text(st.sampled_from("abz019-._/:${} é"), min_size=min(node.get("minLength", 0), most), max_size=most)
    if kind == "array":
        return st.lists(valid(node["items"]), max_size=3)
    if "properties" in node:
        fields = {name: valid(inner) for name, inner in node["properties"].items()}
        needed = {name: fields.pop(name) for name in node.get("required", [])}
        return st.fixed_dictionaries(needed, optional=fields)
    values = valid(node["additionalProperties"]) if isinstance(node.get("additionalProperties"), dict) else WILD
    return st.dictionaries(st.sampled_from(("cpu", "memory", "a", "a/b", "", "é", "x" * 64)), values, max_size=3)


DEEP: Any = "x"
for _ in range(60):
    DEEP = {"a": [DEEP]}
WILD = st.sampled_from((*TEXTS, *NUMBERS, *OTHERS, DEEP))


def _fields(node: Json, path: Path_) -> list[tuple[Path_, Json]]:
    found = []
    for name, inner in node.get("properties", {}).items():
        found += [((*path, name), inner), *_fields(inner, (*path, name))]
        if "items" in inner:
            found += [((*path, name, 0), inner["items"]), *_fields(inner["items"], (*path, name, 0))]
    return found


FIELDS = [(path, valid(node)) for path, node in _fields(SPEC, ("spec",))]
LISTS = [path for path, node in _fields(SPEC, ("spec",)) if node.get("type") == "array"]


def runnable(path: Path) -> Json:
    """A good manifest, such that the cluster of the tests has what it wants."""
    made: Json = read_manifest(path.read_text())
    made["spec"] |= {"output": {"volume": {"claimName": "out"}}, "suspend": False}
    return made


GOOD = [runnable(path) for path in sorted(MANIFESTS.glob("*.yaml"))]


@st.composite
def manifests(draw: st.DrawFn) -> Json:
    made = copy.deepcopy(draw(st.sampled_from(GOOD)))
    for _ in range(draw(st.integers(1, 4))):
        change = draw(
            st.sampled_from(("allowed", "allowed", "allowed", "wild", "wild", "away", "unknown", "twice", "name"))
        )
        path, values = draw(st.sampled_from(FIELDS))
        if change == "allowed":
            put(made, path, draw(values))
        elif change == "wild":
            put(made, path, draw(WILD))
        elif change == "away":
            take(made, path)
        elif change == "unknown":
            put(made, (*path[:-1], draw(st.sampled_from(UNKNOWN))), draw(WILD))
        elif change == "twice":
            double(made, draw(st.sampled_from(LISTS)))
        else:
            made["metadata"]["name"] = draw(st.sampled_from(NAMES))
    return made


def put(made: Json, path: Path_, value: Any) -> None:
    """What is missing on the way is made, and what is in the way stays as it is."""
    node: Any = made
    value = copy.deepcopy(value)
    for part, after in pairwise(path):
        empty: Any = [] if isinstance(after, int) else {}
        if isinstance(part, int):
            if not node:
                node.append(empty)
            node = node[0]
        else:
            if node.get(part) is None:
                node[part] = empty
            node = node[part]
        if not isinstance(node, type(empty)):
            return
    if isinstance(path[-1], int):
        node[:1] = [value]
    else:
        node[path[-1]] = value


def take(made: Json, path: Path_) -> None:
    parent = at(made, path[:-1])
    if isinstance(parent, dict):
        parent.pop(path[-1], None)


def double(made: Json, path: Path_) -> None:
    found = at(made, path)
    if isinstance(found, list) and found:
        found.append(copy.deepcopy(found[0]))


def at(made: Any, path: Path_) -> Any:
    for part in path:
        try:
            made = made[part]
        except (KeyError, IndexError, TypeError):
            return None
    return made
