"""Hold an InferenceService against the models that KServe publishes for Python.

KServe's package asks for versions of others that this project does not have. It is installed apart
and never imported: what its models declare is read from their text. Kubernetes' own types are not
among them; what is of such a type is named to the caller, who puts the pod's fields into a Pod, for
which there is a schema.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MODELS = Path(__file__).parents[2] / "build" / "kserve" / "kserve" / "models"
LIST = re.compile(r"list\[(\w+)\]")
DICT = re.compile(r"dict\(str, (\w+)\)")
# KServe's own are V1beta1... and V1alpha1...
KUBERNETES = re.compile(r"V1[A-Z]\w+")
PLAIN: dict[str, type] = {"str": str, "int": int, "bool": bool}
# How the models say that a field must be there.
REQUIRED = re.compile(r"Invalid value for `(\w+)`, must not be `None`")


@dataclass(frozen=True)
class Model:
    """What is declared of the fields of an object, by their names in JSON."""

    types: dict[str, str]
    required: frozenset[str]


def read(name: str) -> Model | None:
    """Return a model, or None if KServe publishes none of this name."""
    if not MODELS.exists():
        raise FileNotFoundError("KServe's models are not there: make build/kserve/installed")
    published = (MODELS / "__init__.py").read_text()
    found = re.search(rf"^from kserve\.models\.(\w+) import {name}$", published, re.MULTILINE)
    if not found:
        return None
    text = (MODELS / f"{found[1]}.py").read_text()
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
    """Go through a value; yield where there is one of a type of Kubernetes.

    Raises
    ------
    ValueError
        If a field is not known, is missing, or is not of the declared type.
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
    # Not isinstance: a bool is an int then.
    elif type(value) is not PLAIN.get(declared):
        raise ValueError(f"{where}: {value!r} is not of the type {declared}")


def pod(service: dict[str, Any]) -> dict[str, Any]:
    """Return the pod that the predictor of an InferenceService describes."""
    fields = read("V1beta1PodSpec")
    assert fields
    predictor = service["spec"]["predictor"]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": service["metadata"],
        "spec": {name: value for name, value in predictor.items() if name in fields.types},
    }
