"""The reference of the HTTP API as one HTML page without scripts, made from the OpenAPI document.

FastAPI's own pages are scripts from other sites. Sphinx's and other renderers for Python need
scripts, or a documentation project; a template is enough for what this document contains.
"""

import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from logratio.serving.protocol import SCORES

_METHODS = ("get", "post", "put", "patch", "delete")
REQUIRED, OPTIONAL = "required", "optional"
_SCORE = Markup('The <a href="#scores">score</a>.')
_ADDRESS = "localhost:8000"
_KEY = '-H "Authorization: Bearer $LOGRATIO_API_KEY"'
Schema = Mapping[str, Any]


@dataclass(frozen=True)
class Field:
    """A field of an object, or a parameter.

    Attributes:
        name: The name.
        type: The type in words, with links to objects.
        default: JSON of the default, `REQUIRED` or `OPTIONAL`.
        meaning: The description.
        place: Where a parameter is: `query` or `path`.
    """

    name: str
    type: Markup
    default: str
    meaning: str
    place: str = ""


@dataclass(frozen=True)
class Object:
    """An object of requests or answers.

    Attributes:
        name: Its name, unique in the document.
        about: The description.
        fields: Its fields.
        is_sent: Whether requests have it; the others are parts of answers only.
        examples: Example values.
    """

    name: str
    about: str
    fields: Sequence[Field]
    is_sent: bool
    examples: Sequence[Any]


@dataclass(frozen=True)
class Example:
    """A request's JSON, and the command that sends it."""

    body: str
    command: str


@dataclass
class Route:
    """An operation, with every path that has the same.

    Attributes:
        anchor: The id of its place in the page.
        method: GET or POST.
        paths: The paths.
        summary: The title.
        about: The description.
        parameters: Parameters of query and path.
        takes: Objects that a request may be.
        answer: Type of the answer, with links.
        gives: Objects that an answer may be.
        examples: Example requests.
        errors: Statuses of errors.
    """

    anchor: str
    method: str
    paths: list[str]
    summary: str
    about: str
    parameters: Sequence[Field]
    takes: Sequence[Object]
    answer: Markup
    gives: Sequence[Object]
    examples: Sequence[Example]
    errors: Sequence[int]


@dataclass
class Group:
    """The routes with the same tag."""

    name: str
    about: str
    routes: list[Route] = field(default_factory=list)


class _Objects:
    """The objects of a document, by name: its components, and objects inside of operations."""

    def __init__(self, document: Schema) -> None:
        self._schemas: dict[str, Schema] = dict(document.get("components", {}).get("schemas", {}))
        self._found: dict[str, Object] = {}
        self._sent: set[str] = set()
        for _, _, operation in _operations(document):
            self._mark_sent(_schema_of(operation.get("requestBody", {})))

    def all(self) -> list[Object]:
        """Return every object, by name."""
        while missing := self._schemas.keys() - self._found.keys():
            for name in missing:
                self._object(name)
        return [self._found[name] for name in sorted(self._found)]

    def in_schema(self, schema: Schema) -> list[Object]:
        """Return the objects that a value of a schema may be or list, without those inside."""
        return [self._object(name) for name in self._names(schema)]

    def type_of(self, schema: Schema) -> Markup:
        """Return a schema's type in words."""
        if (name := self._name(schema)) is not None:
            return Markup('<a href="#object-{0}">{0}</a>').format(name)
        if alternatives := _alternatives(schema):
            return Markup(" or ").join(dict.fromkeys(map(self.type_of, alternatives)))
        if "enum" in schema or "const" in schema:
            values = schema.get("enum", [schema.get("const")])
            return Markup(" or ").join(Markup("<code>{}</code>").format(_json(it)) for it in values)
        if schema.get("type") == "array":
            return _with_part("list", self.type_of(schema.get("items") or {}))
        if isinstance(inner := schema.get("additionalProperties"), dict):
            return _with_part("object", self.type_of(inner))
        least = f" ≥ {schema['minimum']:g}" if "minimum" in schema else ""
        return escape(schema.get("type", "any value") + least)

    def fields(self, schema: Schema) -> list[Field]:
        """Return the fields of an object's schema."""
        required = schema.get("required", ())
        return [
            Field(name, self.type_of(part), _default(part, name in required), self._meaning(part))
            for name, part in schema.get("properties", {}).items()
        ]

    def _meaning(self, schema: Schema) -> str:
        """Return the description of a field, or else that of its object."""
        objects = [] if "description" in schema else self._names(schema)
        return _text(self._schemas[objects[0]]) if len(objects) == 1 else _text(schema)

    def _names(self, schema: Schema) -> list[str]:
        """Return the names of the objects that a value of a schema may be or list."""
        if (name := self._name(schema)) is not None:
            return [name]
        parts = [*_alternatives(schema), *([schema["items"]] if schema.get("items") else [])]
        return [name for part in parts for name in self._names(part)]

    def _name(self, schema: Schema) -> str | None:
        """Return the name of an object's schema, and remember an object without a reference."""
        if "$ref" in schema:
            return str(schema["$ref"]).rpartition("/")[2]
        if "properties" not in schema:
            return None
        name = re.sub(r"\W", "", str(schema.get("title", "Object")))
        self._schemas.setdefault(name, schema)
        return name

    def _mark_sent(self, part: Any) -> None:
        """Remember the objects of a request, and those inside of them."""
        if isinstance(part, dict):
            name = self._name(part)
            if name is not None and name not in self._sent:
                self._sent.add(name)
                self._mark_sent(self._schemas[name].get("properties"))
            self._mark_sent([inner for key, inner in part.items() if key != "examples"])
        elif isinstance(part, list):
            for inner in part:
                self._mark_sent(inner)

    def _object(self, name: str) -> Object:
        schema = self._schemas[name]
        if name not in self._found:
            self._found[name] = Object(
                name,
                _text(schema),
                self.fields(schema),
                name in self._sent,
                schema.get("examples", ()),
            )
        return self._found[name]


def reference_page(document: Schema, style: str, *, has_keys: bool) -> str:
    """Return the page.

    Args:
        document: The OpenAPI document.
        style: CSS of the other page, with its colours and fonts.
        has_keys: Whether requests need an API key.
    """
    objects = _Objects(document)
    groups = _groups(document, objects, has_keys=has_keys)
    template = files("logratio.serving").joinpath("api_reference.html").read_text(encoding="utf-8")
    # The template's text is escaped, except what is Markup already.
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"prose": _prose, "marked": _marked, "json": _indented}
    return environment.from_string(template).render(
        document=document,
        style=Markup(style),
        groups=groups,
        objects=objects.all(),
        errors=_errors(document, objects),
        has_keys=has_keys,
        score=SCORES,
        words=(REQUIRED, OPTIONAL),
    )


def _groups(document: Schema, objects: _Objects, *, has_keys: bool) -> list[Group]:
    """Return the routes by tag, in the order of the document's tags."""
    groups = {
        tag["name"]: Group(tag["name"], tag.get("description", ""))
        for tag in document.get("tags", ())
    }
    routes: dict[str, Route] = {}
    for path, method, operation in _operations(document):
        same = {key: value for key, value in operation.items() if key != "operationId"}
        known = _without_titles([method, same])
        if known in routes:
            routes[known].paths.append(path)
            continue
        routes[known] = _route(path, method, operation, objects, has_keys=has_keys)
        (tag, *_) = operation.get("tags") or ["Other"]
        groups.setdefault(tag, Group(tag, "")).routes.append(routes[known])
    return [group for group in groups.values() if group.routes]


def _operations(document: Schema) -> Iterator[tuple[str, str, Schema]]:
    for path, methods in document["paths"].items():
        for method in _METHODS:
            if method in methods:
                yield path, method, methods[method]


def _without_titles(value: Any) -> str:
    """Return JSON of an operation without titles of schemas, which contain the path."""
    text = json.dumps(value, sort_keys=True)
    return re.sub(r'"title": "(?:[^"\\]|\\.)*"(, )?', "", text)


def _route(
    path: str, method: str, operation: Schema, objects: _Objects, *, has_keys: bool
) -> Route:
    asked = _schema_of(operation.get("requestBody", {}))
    answers = operation["responses"]
    answer = next((_schema_of(answers[it]) for it in answers if it.startswith("2")), {})
    takes = objects.in_schema(asked)
    return Route(
        anchor=f"route-{operation['operationId']}",
        method=method.upper(),
        paths=[path],
        summary=operation.get("summary", ""),
        about=_text(operation).removeprefix(SCORES),  # the page explains the score at its top
        parameters=_parameters(operation, objects),
        takes=takes,
        answer=objects.type_of(answer),
        gives=objects.in_schema(answer),
        examples=[*_examples(path, method, takes, has_keys=has_keys)],
        errors=[int(status) for status in answers if status[0] in "45"],
    )


def _parameters(operation: Schema, objects: _Objects) -> list[Field]:
    return [
        Field(
            given["name"],
            objects.type_of(given["schema"]),
            _default(given["schema"], given.get("required", False)),
            _text(given),
            given["in"],
        )
        for given in operation.get("parameters", ())
    ]


def _examples(
    path: str, method: str, takes: Iterable[Object], *, has_keys: bool
) -> Iterator[Example]:
    """Yield the command of each example request; parts of the path are variables of the shell."""
    address = _ADDRESS + re.sub(r"{(\w+)}", lambda hit: f"${hit[1].upper()}", path)
    command = f"curl -s {address}" + (f" {_KEY}" if has_keys else "")
    bodies = [body for one in takes for body in one.examples]
    if method == "get":
        yield Example("", command)
    for body in bodies:
        sent = shlex.quote(json.dumps(body, ensure_ascii=False))
        yield Example(
            _indented(body),
            f"{command} -H 'content-type: application/json' -d {sent}",
        )


def _errors(document: Schema, objects: _Objects) -> list[tuple[int, Markup, str]]:
    """Return the errors of all routes: status, types of the body, description."""
    found: dict[tuple[int, str], dict[Markup, None]] = {}
    for _, _, operation in _operations(document):
        for status, answer in operation["responses"].items():
            if status[0] in "45":
                key = (int(status), _text(answer))
                found.setdefault(key, {})[objects.type_of(_schema_of(answer))] = None
    return [
        (status, Markup(" or ").join(bodies), meaning)
        for (status, meaning), bodies in sorted(found.items())
    ]


def _schema_of(content: Schema) -> Schema:
    """Return the schema of a request's or an answer's JSON."""
    schema: Schema = content.get("content", {}).get("application/json", {}).get("schema", {})
    return schema


def _alternatives(schema: Schema) -> Sequence[Schema]:
    found: Sequence[Schema] = schema.get("anyOf") or schema.get("oneOf") or ()
    return found


def _with_part(whole: str, part: Markup) -> Markup:
    return Markup("{} of {}").format(whole, part)


def _default(schema: Schema, required: bool) -> str:
    if required:
        return REQUIRED
    # FastAPI leaves out a default that is null.
    has_null = {"type": "null"} in _alternatives(schema)
    return _json(schema.get("default")) if "default" in schema or has_null else OPTIONAL


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _indented(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2)


def _text(schema: Schema) -> str:
    return str(schema.get("description", ""))


def _marked(text: str) -> Markup:
    """Escape a description; names in backticks become code."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _prose(text: str) -> Markup:
    """Escape a description, and link to the explanation of the score instead of repeating it."""
    return _SCORE.join(map(_marked, text.split(SCORES)))
