"""A ComfyUI workflow that is written down as nodes with their inputs by name.

Places, sizes and links follow from that and from the node definitions of the running ComfyUI.
"""

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_WIDTH, _GAP, _SLOT, _WIDGET, _TITLE = 340, 60, 22, 28, 40
_TALL = {"SaveImage": 300, "PreviewImage": 300, "LoadImage": 300, "MarkdownNote": 360, "PreviewAny": 140}
_STATUS = 170  # room for the text that our nodes show
_LISTS = ("COMBO", "INT", "FLOAT", "STRING", "BOOLEAN")


@dataclass
class Node:
    number: int
    kind: str
    inputs: dict[str, Any]
    title: str | None
    definition: Mapping[str, Any]

    def __getitem__(self, output: int | str) -> "Output":
        if isinstance(output, str):
            output = self.definition["output_name"].index(output)
        return Output(self, output)


@dataclass(frozen=True)
class Output:
    node: Node
    slot: int

    @property
    def kind(self) -> str:
        return self.node.definition["output"][self.slot]


@dataclass
class Graph:
    """A workflow in the making."""

    known: Mapping[str, Any]  # the running ComfyUI's node definitions
    models: Mapping[str, tuple[str, str]] = field(default_factory=dict)  # name -> (folder, address) of downloads
    nodes: list[Node] = field(default_factory=list)
    note: str = ""

    def add(self, kind: str, title: str | None = None, **inputs) -> Node:
        """A node; inputs are values, outputs of other nodes, or nodes for their first output."""
        definition = self.known[kind]
        names = _names(definition)
        if wrong := inputs.keys() - names.keys():
            raise ValueError(f"{kind} has no inputs {sorted(wrong)}")
        links = {name: value[0] if isinstance(value, Node) else value for name, value in inputs.items()}
        self.nodes.append(Node(len(self.nodes) + 1, kind, links, title, definition))
        return self.nodes[-1]

    def json(self, name: str) -> dict:
        """The workflow as the page reads it."""
        links: list[list] = []
        nodes = [_place(node, links, self.models) for node in self.nodes]
        _lay_out(self.nodes, nodes)
        for _, source, output, _target, _slot, _ in links:
            nodes[source - 1]["outputs"][output].setdefault("links", None)
        for number, source, output, *_ in links:
            entry = nodes[source - 1]["outputs"][output]
            entry["links"] = [*(entry["links"] or []), number]
        height = _TALL["MarkdownNote"] + 16 * self.note.count("\n")
        nodes.append(
            {
                "id": len(nodes) + 1, "type": "MarkdownNote", "pos": [-_WIDTH - 2 * _GAP - 80, 0],
                "size": [_WIDTH + 80, height], "flags": {}, "order": len(nodes), "mode": 0, "inputs": [], "outputs": [],
                "properties": {}, "widgets_values": [self.note], "color": "#432", "bgcolor": "#653",
            }
        )  # fmt: skip
        return {
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"ternary-flux/{name}")),
            "revision": 0, "last_node_id": len(nodes), "last_link_id": len(links), "nodes": nodes, "links": links,
            "groups": [], "config": {}, "extra": {}, "version": 0.4,
        }  # fmt: skip

    def prompt(self) -> dict:
        """The workflow in API form."""
        return {
            str(node.number): {
                "class_type": node.kind,
                "inputs": {
                    name: [str(value.node.number), value.slot] if isinstance(value, Output) else value
                    for name, value in _values(node).items()
                },
            }
            for node in self.nodes
        }


def _names(definition: Mapping) -> dict[str, list]:
    return {**definition["input"].get("required", {}), **definition["input"].get("optional", {})}


def _is_widget(spec: list) -> bool:
    options = spec[1] if len(spec) > 1 else {}
    return (isinstance(spec[0], list) or spec[0] in _LISTS) and not options.get("forceInput")


def _values(node: Node) -> dict[str, Any]:
    """Every input of a node: links as they are, widgets with their defaults."""
    values = {}
    for name, spec in _names(node.definition).items():
        if name in node.inputs:
            values[name] = node.inputs[name]
        elif _is_widget(spec):
            values[name] = _default(spec)
    return values


def _default(spec: list):
    options = spec[1] if len(spec) > 1 else {}
    choices = spec[0] if isinstance(spec[0], list) else options.get("options", [""])
    return options.get("default", choices[0] if choices else "")


def _place(node: Node, links: list[list], known: Mapping[str, tuple[str, str]]) -> dict:
    """A node as the page reads it; appends its links."""
    inputs, values = [], []
    given = _values(node)
    for name, spec in _names(node.definition).items():
        options = spec[1] if len(spec) > 1 else {}
        kind = "COMBO" if isinstance(spec[0], list) else spec[0]
        entry: dict[str, Any] = {"name": name, "type": kind, "link": None}
        if _is_widget(spec):
            entry["widget"] = {"name": name}
            value = given[name]
            if isinstance(value, Output):  # what a list offers differs from one computer to the next
                value = "" if kind == "COMBO" else _default(spec)
            values.append(value)
            if options.get("control_after_generate") or name in ("seed", "noise_seed"):
                values.append("fixed")
            if options.get("image_upload"):
                values.append("image")
        if isinstance(source := given.get(name), Output):
            entry["link"] = len(links) + 1
            links.append([len(links) + 1, source.node.number, source.slot, node.number, len(inputs), source.kind])
        inputs.append(entry)
    outputs = [
        {"name": name, "type": kind, "links": None}
        for name, kind in zip(node.definition["output_name"], node.definition["output"], strict=True)
    ]
    properties: dict[str, Any] = {"Node name for S&R": node.kind}
    models = [value for value in values if isinstance(value, str) and value in known]
    if models:
        properties["models"] = [{"name": name, "url": known[name][1], "directory": known[name][0]} for name in models]
    placed = {
        "id": node.number, "type": node.kind, "pos": [0, 0], "size": [_WIDTH, _height(node, values)], "flags": {},
        "order": node.number - 1, "mode": 0, "inputs": inputs, "outputs": outputs, "properties": properties,
        "widgets_values": values,
    }  # fmt: skip
    return placed | ({"title": node.title} if node.title else {})


def _height(node: Node, values: list) -> int:
    slots = [spec for name, spec in _names(node.definition).items() if not _is_widget(spec)]
    rows = max(len(slots), len(node.definition["output"]))
    tall = sum(spec[1].get("multiline", False) for spec in _names(node.definition).values() if len(spec) > 1)
    height = _TITLE + _SLOT * rows + _WIDGET * len(values) + 90 * tall
    if node.definition["python_module"].startswith("custom_nodes"):
        height += _STATUS
    return height + _TALL.get(node.kind, 0)


def _lay_out(nodes: list[Node], placed: list[dict]) -> None:
    """Columns from the left to the right along the links, each node under the one before."""
    column: dict[int, int] = {}
    for node in nodes:
        sources = [value.node.number for value in node.inputs.values() if isinstance(value, Output)]
        column[node.number] = 1 + max((column[source] for source in sources), default=-1)
    for node in nodes:  # what has no source stands just before what it is for
        if column[node.number] == 0:
            users = [
                column[other.number]
                for other in nodes
                if any(isinstance(v, Output) and v.node is node for v in other.inputs.values())
            ]
            column[node.number] = 0 if "Load" in node.kind or not users else min(users) - 1
    bottom: dict[int, int] = {}
    for node, entry in zip(nodes, placed, strict=True):
        x = column[node.number]
        y = bottom.get(x, 0)
        entry["pos"] = [x * (_WIDTH + _GAP), y]
        bottom[x] = y + entry["size"][1] + _GAP
