"""/docs: the OpenAPI document as a page, made here: nothing is loaded from elsewhere, no script is run."""

from __future__ import annotations

from html import escape
from typing import Any, Final

POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"
_STYLE: Final = """
:root{color-scheme:light dark} body{font:15px/1.5 system-ui;max-width:60rem;margin:2rem auto;padding:0 1rem}
h2{font:600 1rem ui-monospace,monospace;margin:2rem 0 0} code,pre{font:13px ui-monospace,monospace}
pre{overflow-x:auto;padding:.5rem;border:1px solid #8884;border-radius:6px} table{border-collapse:collapse}
td,th{text-align:left;vertical-align:top;padding:.1rem 1rem .1rem 0;overflow-wrap:anywhere} h2{overflow-wrap:anywhere}
td:first-child{overflow-wrap:normal} h2 b{display:inline-block;min-width:4.5rem}
"""


def docs_page(openapi: dict[str, Any]) -> str:
    """The page. openapi: as FastAPI makes it."""
    info = openapi["info"]
    operations = "".join(
        _operation(method, path, operation)
        for path, methods in openapi["paths"].items()
        for method, operation in methods.items()
    )
    models = "".join(_model(name, model) for name, model in openapi["components"]["schemas"].items())
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(info["title"])}: HTTP</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style>'
        f"<h1>{escape(info['title'])} {escape(info['version'])}: HTTP interface</h1>"
        "<p>Every error is <code>{&quot;code&quot;, &quot;text&quot;}</code>. For programs: "
        '<a href="/openapi.json">/openapi.json</a>.</p>'
        f"<main>{operations}</main><h1>What the answers hold</h1>{models}</html>"
    )


def _operation(method: str, path: str, operation: dict[str, Any]) -> str:
    rows = [
        (f"{one['name']} ({one['in']})", _type(one["schema"]), one.get("description", ""))
        for one in operation.get("parameters", ())
    ]
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
    rows += [("body", _type(body), "JSON")] if body else []
    answer = operation["responses"].get("200", {}).get("content", {})
    rows += [("answer", _type(content.get("schema", {})), kind) for kind, content in answer.items()]
    text = escape(operation.get("description", ""))
    return f"<h2><b>{method.upper()}</b> {escape(path)}</h2><p>{text}</p>{_table(rows)}"


def _model(name: str, model: dict[str, Any]) -> str:
    rows = [(key, _type(field), field.get("description", "")) for key, field in model.get("properties", {}).items()]
    return f'<h2 id="{escape(name)}">{escape(name)}</h2><p>{escape(model.get("description", ""))}</p>{_table(rows)}'


def _table(rows: list[tuple[str, str, str]]) -> str:
    """name, type (HTML), meaning."""
    cells = (f"<tr><td><code>{escape(a)}</code><td>{kind}<td>{escape(text)}" for a, kind, text in rows)
    return f"<table>{''.join(cells)}</table>"


def _type(schema: dict[str, Any]) -> str:
    """A schema in a word or two, as HTML; models as links."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f'<a href="#{name}">{name}</a>'
    if "anyOf" in schema:
        return " or ".join(_type(one) for one in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return ", ".join(escape(str(one)) for one in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    return escape(str(schema.get("format") or schema.get("type") or ""))
