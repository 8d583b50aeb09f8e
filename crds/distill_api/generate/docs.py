"""The API reference, generated from the models: `python -m distill_api.generate.docs FILE` writes it."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distill_api.base import API_VERSION, KIND, Model
from distill_api.generate.crd import JOB, TEACHER, Definition, structural_node, write_atomically
from distill_api.job import NAME_RULES
from distill_api.rules import INT_OR_STRING, LIST_MAP_KEYS, VALIDATIONS
from distill_api.status import ConditionType, Reason

Schema = dict[str, Any]

_HEAD = f"""# API reference: {KIND}

Made from `crds/distill_api` by `make crds`; do not edit. `apiVersion: {API_VERSION}`, `kind: {KIND}`,
short name `djob`, category `distillation`. Whole manifests: the folder `examples/`.

`metadata.name` {"; it ".join(rule.message for rule in NAME_RULES)}.

A field that is not *required* may be left out. Those marked ↻ may change while the job exists; everything else in the
spec is immutable.
"""

_TEACHER = """# API reference: Teacher

`apiVersion` as above, `kind: Teacher`, short name `dteacher`: a served model that several DistillationJobs of its
namespace learn from, by `spec.teacher.ref`. The same rules for its name; those marked ↻ may change.
"""


def reference() -> str:
    """Return the whole reference, as Markdown."""
    jobs = [section for model in (JOB.spec, JOB.status) for section in _sections(model, set())]
    met = {"RoleTemplate", "PodMetadata", "Resources", "Condition"}
    shared = [section for model in (TEACHER.spec, TEACHER.status) for section in _sections(model, met)]
    return "\n".join([_HEAD, *jobs, _columns(JOB), _TEACHER, *shared, _columns(TEACHER), _conditions_and_reasons()])


def _sections(model: type[Model], described: set[str]) -> Iterator[str]:
    """Yield a section for each model that is not described yet, in the order of the fields that refer to them."""
    schema = model.model_json_schema(by_alias=True)
    definitions: dict[str, Schema] = schema.get("$defs", {})
    waiting, met = [(model.__name__, schema)], {model.__name__, *described}
    while waiting:
        name, node = waiting.pop(0)
        yield _section(name, node, definitions)
        targets = [t for t in map(_target, node["properties"].values()) if t and "properties" in definitions[t]]
        fresh = [t for t in dict.fromkeys(targets) if t not in met]
        met.update(fresh)
        waiting = [(t, definitions[t]) for t in fresh] + waiting


def _target(node: Schema) -> str | None:
    """Return the name of the model that is the type of a field or of the items of its list."""
    for inner in (node, node.get("items", {}), *node.get("anyOf", [])):
        if "$ref" in inner:
            return str(inner["$ref"].removeprefix("#/$defs/"))
    return None


def _section(name: str, schema: Schema, definitions: dict[str, Schema]) -> str:
    fields: dict[str, Schema] = schema["properties"]
    has_immutable = any(_is_immutable(node) for node in fields.values())
    lines = [f"## {name}", "", schema.get("description", ""), ""]
    lines += [f"- Rule: {rule['message']}." for rule in schema.get(VALIDATIONS, [])]
    lines += [""] if VALIDATIONS in schema else []
    lines += ["| field | type | default | allowed | meaning |", "|---|---|---|---|---|"]
    for field, raw in fields.items():
        node, target = structural_node(raw, definitions), _target(raw)
        is_model = target is not None and "properties" in definitions[target]
        default = "*required*" if field in schema.get("required", []) else _default(node)
        mark = " ↻" if has_immutable and not _is_immutable(raw) and not is_model else ""
        kind = f"[{target}](#{target.lower()})" if target and is_model else _type(node)
        kind += " list" if is_model and "items" in node else ""
        cells = (f"`{field}`{mark}", kind, default, _allowed(node, is_model), node.get("description", ""))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _is_immutable(node: Schema) -> bool:
    return any("oldSelf" in rule["rule"] for rule in node.get(VALIDATIONS, []))


def _type(node: Schema) -> str:
    if INT_OR_STRING in node:
        return "quantity"
    if "items" in node:
        return f"{_type(node['items'])} list"
    if "additionalProperties" in node:
        return f"map to {_type(node['additionalProperties'])}"
    return str(node["type"])


def _default(node: Schema) -> str:
    default = node.get("default")
    if default is None or default == {} or default == [] or "properties" in node:
        return ""
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


def _allowed(node: Schema, is_model: bool) -> str:
    found: list[str] = []
    if "enum" in node:
        return ", ".join(f"`{value}`" for value in node["enum"])
    if "minimum" in node:
        found.append(f"{'>' if node.get('exclusiveMinimum') else '≥'} {node['minimum']}")
    if "maximum" in node:
        found.append(f"{'<' if node.get('exclusiveMaximum') else '≤'} {node['maximum']}")
    if "maxLength" in node:
        found.append(
            f"{node['minLength']} to {node['maxLength']} characters"
            if "minLength" in node
            else f"at most {node['maxLength']} characters"
        )
    for bound in ("maxItems", "maxProperties"):
        if bound in node:
            found.append(f"at most {node[bound]}")
    if LIST_MAP_KEYS in node:
        found.append(f"each {node[LIST_MAP_KEYS][0]} once")
    if not is_model:
        found += [r["message"] for r in node.get(VALIDATIONS, []) if "oldSelf" not in r["rule"]]
    return ", ".join(found)


def _columns(of: Definition) -> str:
    rows = [
        f"| {c['name']}{' (wide)' if 'priority' in c else ''} | {c['description']} | `{c['jsonPath']}` |"
        for c in of.columns
    ]
    head = [f"## Columns of `kubectl get {of.short_name}`", "", "| column | meaning | from |", "|---|---|---|"]
    return "\n".join([*head, *rows]) + "\n"


def _conditions_and_reasons() -> str:
    conditions = ", ".join(f"`{c}`" for c in ConditionType)
    reasons = ", ".join(f"`{r}`" for r in dict.fromkeys(Reason))
    return f"## Conditions and reasons\n\nConditions: {conditions}.\n\nReasons: {reasons}.\n"


if __name__ == "__main__":
    write_atomically(Path(sys.argv[1]), reference())
