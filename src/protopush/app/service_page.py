"""Page that says how the service is called, made of its OpenAPI description; it fetches nothing."""

from __future__ import annotations

from typing import Any

from protopush.report.build import environment


def page_of(description: dict[str, Any], address: str) -> str:
    """The page (HTML) for an OpenAPI description of a service that is called at an address."""
    template = environment("protopush.app").get_template("service.html.j2")
    return template.render(api=description, kind=kind_of, address=address)


def kind_of(schema: dict[str, Any]) -> str:
    """The type of a value in a few words.

    Example:
        >>> kind_of({"anyOf": [{"type": "array", "items": {"$ref": "#/components/schemas/Match"}}, {"type": "null"}]})
        'list of Match, or null'
    """
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if "anyOf" in schema:
        return ", or ".join(kind_of(one) for one in schema["anyOf"])
    if "enum" in schema:
        return " | ".join(map(str, schema["enum"]))
    if "const" in schema:
        return str(schema["const"])
    if "prefixItems" in schema:
        return f"[{', '.join(kind_of(one) for one in schema['prefixItems'])}]"
    if schema.get("type") == "array":
        return f"list of {kind_of(schema.get('items', {}))}"
    if "properties" in schema:
        return ", ".join(f"{name}: {kind_of(one)}" for name, one in schema["properties"].items())
    if isinstance(schema.get("additionalProperties"), dict):
        return f"object of {kind_of(schema['additionalProperties'])}"
    return "file" if schema.get("format") == "binary" else str(schema.get("type", "any"))
