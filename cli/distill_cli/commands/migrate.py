"""`distill migrate`: manifests of release 0.2.0, rewritten."""

import bisect
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import yaml

from distill_api.manifest import read_manifests
from distill_api.pods import former_template
from distill_cli.failure import CommandFailed


@click.command()
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--write", is_flag=True, help="Write the file anew; by default the new manifest is printed.")
def migrate(file: Path, write: bool) -> int:
    """Rewrite a manifest of release 0.2.0: each role's template becomes pods as Kubernetes writes them.

    What is outside of templates stays as it is written, comments too.
    """
    text = file.read_text(encoding="utf-8")
    try:
        found = migrated_text(text)
    except yaml.YAMLError as error:
        raise CommandFailed(f"{file}: is not YAML: {' '.join(str(error).split())}") from None
    if write:
        aside = file.with_name(f".{file.name}.new")
        aside.write_text(found, encoding="utf-8")
        shutil.copymode(file, aside)
        aside.replace(file)
        click.echo(f"{file}: {'nothing to migrate' if found == text else 'migrated'}")
    else:
        click.echo(found, nl=False)
    return 0


def migrated_text(text: str) -> str:
    """Return the text of a file with each template of release 0.2.0 rewritten. Raises yaml.YAMLError."""
    objects = read_manifests(text)
    if not any(True for _ in former_template.templates(objects)):
        return text
    wanted = json.loads(json.dumps(objects))  # without anchors, so that each template is changed once
    for _, template in former_template.templates(wanted):
        _replace(template)
    if text.lstrip().startswith("{") and len(wanted) == 1:
        return json.dumps(wanted[0], indent=2) + "\n"
    edited = _edited(text)
    try:
        if read_manifests(edited) == wanted:
            return edited
    except yaml.YAMLError:
        pass  # an anchor of a template is used outside of it
    return yaml.safe_dump_all(wanted, sort_keys=False, width=120)


def _replace(template: dict[str, Any]) -> None:
    """Turn a template into pods, in place. Raises CommandFailed where it is partly written as pods already."""
    if {"metadata", "spec"} & template.keys():
        raise CommandFailed(
            "a template has fields of release 0.2.0 beside metadata or spec: write these fields as pods"
        )
    pods = former_template.as_pod(template)
    for field in former_template.FIELDS:
        template.pop(field, None)
    template.update(pods)


def _edited(text: str) -> str:
    """Return the text with each template replaced where it stands."""
    ends = sorted(t.end_mark.index for t in yaml.scan(text) if t.end_mark.index > t.start_mark.index)
    spans: dict[int, tuple[int, str]] = {}
    for document in yaml.compose_all(text, Loader=yaml.SafeLoader):
        for node in _template_nodes(document):
            start = node.start_mark.index
            end = ends[bisect.bisect_right(ends, node.end_mark.index) - 1]
            spans[start] = (end, _written(node, text[start:end]))
    for start in sorted(spans, reverse=True):
        end, new = spans[start]
        text = text[:start] + new + text[end:]
    return text


def _template_nodes(node: Any) -> Iterator[yaml.MappingNode]:
    """Yield the nodes of templates that have fields of release 0.2.0, whatever the kind of the object."""
    children = node.value if isinstance(node, yaml.CollectionNode) else []
    for child in children:
        key, value = child if isinstance(child, tuple) else (None, child)
        is_template = key is not None and key.value in ("template", "headTemplate")
        if is_template and isinstance(value, yaml.MappingNode) and _is_former(value):
            yield value
        else:
            yield from _template_nodes(value)


def _is_former(node: yaml.MappingNode) -> bool:
    keys = {key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)}
    return bool(keys) and keys <= set(former_template.FIELDS)


def _written(node: yaml.MappingNode, before: str) -> str:
    """Return the text of a template as pods, in the style in which it stands."""
    anchor = before.split()[0] if before.startswith("&") else ""
    template = yaml.SafeLoader("").construct_document(node)
    _replace(template)
    if node.flow_style:
        flow = yaml.dump(template, Dumper=_Dumper, sort_keys=False, width=10**9, default_flow_style=True).strip()
        return f"{anchor} {flow}".strip()
    column = " " * node.value[0][0].start_mark.column
    block = yaml.dump(template, Dumper=_Dumper, sort_keys=False, width=110, default_flow_style=None).rstrip()
    lines = f"\n{column}".join(block.splitlines())
    return f"{anchor}\n{column}{lines}" if anchor else lines


class _Dumper(yaml.SafeDumper):
    """A dumper that repeats equal values."""

    def ignore_aliases(self, data: Any) -> bool:
        return True
