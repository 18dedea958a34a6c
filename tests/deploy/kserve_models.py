"""Check an InferenceService against the models that KServe publishes for Python.

KServe's package requires versions that conflict with this project's, so it is installed apart and
never imported: the declarations of its models are read from their source. These do not include
Kubernetes' own types. `check` yields the places of such values, and `pod` turns the pod's fields
into a Pod, for which Kubernetes publishes a schema.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ENVIRONMENT = Path(__file__).parents[2] / "build" / "clients" / "kserve"
LIST = re.compile(r"list\[(\w+)\]")
DICT = re.compile(r"dict\(str, (\w+)\)")
# KServe's own types are V1beta1... and V1alpha1...
KUBERNETES = re.compile(r"V1[A-Z]\w+")
PLAIN: dict[str, type] = {"str": str, "int": int, "bool": bool}
# The message by which a model shows that a field is required.
REQUIRED = re.compile(r"Invalid value for `(\w+)`, must not be `None`")


@dataclass(frozen=True)
class Model:
    """Types of an object's fields, by their names in JSON, and which of them are required."""

    types: dict[str, str]
    required: frozenset[str]


def read(name: str) -> Model | None:
    """Return the model of a name, or None if KServe publishes none."""
    folder = next(ENVIRONMENT.glob("lib/python*/site-packages/kserve/models"), None)
    if folder is None:
        raise FileNotFoundError("KServe's models are missing: make build/clients/kserve/installed")
    published = (folder / "__init__.py").read_text()
    found = re.search(rf"^from kserve\.models\.(\w+) import {name}$", published, re.MULTILINE)
    if not found:
        return None
    text = (folder / f"{found[1]}.py").read_text()
    declared = {
        target.id: ast.literal_eval(statement.value)
        for part in ast.parse(text).body
        if isinstance(part, ast.ClassDef)
        for statement in part.body
        if isinstance(statement, ast.Assign)
        for target in statement.targets
        if isinstance(target, ast.Name)
    }
    names: dict[str, str] = declared["attribute_map"]
    types: dict[str, str] = declared["openapi_types"]
    return Model(
        {names[field]: declared_type for field, declared_type in types.items()},
        frozenset(names[field] for field in REQUIRED.findall(text)),
    )


def check(value: object, declared: str, where: str) -> Iterator[str]:
    """Check a value; yield the paths of values whose types are Kubernetes' own.

    Raises
    ------
    ValueError
        If a field is unknown, missing, or not of the declared type.
    """
    if isinstance(value, list) and (found := LIST.fullmatch(declared)):
        for item in value:
            yield from check(item, found[1], where)
    elif isinstance(value, dict) and (found := DICT.fullmatch(declared)):
        for item in value.values():
            yield from check(item, found[1], where)
    elif isinstance(value, dict) and (model := read(declared)):
        if wrong := (value.keys() - model.types) | (model.required - value.keys()):
            raise ValueError(f"{where}: unknown or missing: {', '.join(sorted(wrong))}")
        for name, field in value.items():
            yield from check(field, model.types[name], f"{where}.{name}")
    elif KUBERNETES.fullmatch(declared):
        yield where
    # Not isinstance, for which a bool is an int.
    elif type(value) is not PLAIN.get(declared):
        raise ValueError(f"{where}: {value!r} is not of the type {declared}")


def pod(service: dict[str, Any]) -> dict[str, Any]:
    """Return the Pod described by the predictor of an InferenceService."""
    fields = read("V1beta1PodSpec")
    assert fields
    predictor = service["spec"]["predictor"]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": service["metadata"],
        "spec": {name: value for name, value in predictor.items() if name in fields.types},
    }
