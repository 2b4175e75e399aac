"""matplotlib's SVG made fit to stand inside a page: no prologue, no namespaces, no styles that reach outside."""

from __future__ import annotations

import re
from xml.etree import ElementTree as ET

# matplotlib knows no custom properties, so it draws in placeholders that stand for the page's colours.
INK, QUIET, MARK, RULE = "#010101", "#010102", "#010103", "#010104"
WARM, SOFT, PAPER = "#010105", "#010106", "#010107"
_COLOURS = {
    INK: "currentColor",
    QUIET: "var(--quiet, #75808a)",
    MARK: "var(--mark, #2f86c8)",
    RULE: "var(--rule, #b8c0c6)",
    WARM: "var(--warm, #a85a00)",
    SOFT: "var(--soft, #8d99a3)",
    PAPER: "var(--panel, #ffffff)",
}
_REFERENCE = re.compile(r"#([A-Za-z][\w.-]*)")


def inline_svg(drawing: str, name: str, title: str, description: str) -> str:
    """The drawing as an element of a page, named for readers that do not see it.

    Args:
        drawing: A whole SVG document.
        name: Distinct in the page; all ids derive from it.
        title: What the drawing shows.
        description: Its content in words.
    """
    root = ET.fromstring(drawing)  # noqa: S314 (drawn by us, not read from anywhere)
    used = _used_ids(root)
    for parent in root.iter():
        for child in list(parent):
            if _local(child.tag) in ("metadata", "style"):  # its style would reach the whole page
                parent.remove(child)
    for element in root.iter():
        element.tag = _local(element.tag)
        element.text = (element.text or "").strip() if element.tag != "text" else element.text
        element.tail = None
        element.attrib = {
            _local(key): _colours(_links(value, name)) if key != "id" else f"{name}-{value}"
            for key, value in element.attrib.items()
            if key != "id" or value in used
        }
        if "style" in element.attrib:  # the page's font
            element.set("style", re.sub(r"\s*font-family:[^;]*;?", "", element.get("style", "")))
    root.attrib = {"viewBox": root.get("viewBox", "")}
    root.set("role", "img")
    root.set("aria-labelledby", f"{name}-title {name}-desc")
    for position, (tag, words) in enumerate((("title", title), ("desc", description))):
        told = ET.Element(tag, {"id": f"{name}-{tag}"})
        told.text = words
        root.insert(position, told)
    return ET.tostring(root, encoding="unicode")


def _used_ids(root: ET.Element) -> set[str]:
    values = (value for element in root.iter() for key, value in element.attrib.items() if key != "id")
    return {found for value in values if "#" in value for found in _REFERENCE.findall(value)}


def _links(value: str, name: str) -> str:
    """Links to other elements, under their ids in the page."""
    if value.startswith("#") or "url(#" in value:
        return re.sub(r"(^|url\()#", rf"\1#{name}-", value)
    return value


def _colours(value: str) -> str:
    for placeholder, colour in _COLOURS.items():
        value = value.replace(placeholder, colour)
    return value


def _local(tag: str) -> str:
    return tag.rpartition("}")[2]
