"""The JSON Schema of schedule files, made from the classes that read them."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from pydantic import BaseModel, TypeAdapter

from fewstep.space.masked import MaskedSchedule
from fewstep.space.noise import EDM, RectifiedFlow, VPCosine, VPDiscrete, VPLinear
from fewstep.space.particles import ParticleSchedule
from fewstep.space.program import Program
from fewstep.space.schedule import FORMAT, VERSION, OdeSchedule

NOISES = (VPLinear, VPCosine, VPDiscrete, EDM, RectifiedFlow)
_NUMBERS = {"type": "array", "items": {"type": "number"}}
_ROWS = {"type": "array", "items": _NUMBERS, "minItems": 1}
_OPTIONAL = ("g", "guidance", "network")


def schema() -> dict[str, Any]:
    """The schema of every kind of schedule file, JSON Schema draft 2020-12.

    It says what a file may hold. What it cannot say, `load_schedule` checks as well: that times
    decrease, that steps have the history they ask for, and that a program is what the steps
    compile to.
    """
    definitions: dict[str, Any] = {noise.type: _noise(noise) for noise in NOISES}
    definitions["noise"] = {"oneOf": [_ref(noise.type) for noise in NOISES]}
    definitions["program"] = _program()
    kinds = []
    for name, cls in (("ode", OdeSchedule), ("masked", MaskedSchedule)):
        kinds.append(_file(name, cls, definitions))
    kinds.append(_file("particles", ParticleSchedule, definitions))
    only = {"noise": _ref("noise"), "program": _ref("program"), **_free()}
    only |= {"start": {"type": "number"}, "end": {"type": "number"}}
    kinds.append(_object(_head("ode") | only, required=(*_head("ode"), "noise", "program")))
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "fewstep schedule file",
        "description": "A solver schedule: choices for people, and the program for samplers.",
        "anyOf": kinds,
        "$defs": definitions,
    }


def _file(kind: str, cls: type[BaseModel], definitions: dict[str, Any]) -> dict[str, Any]:
    """The file form of one class: its fields, a head, and for ODE schedules the program."""
    made = cls.model_json_schema(ref_template="#/$defs/{model}")
    definitions.update(made.pop("$defs", {}))
    properties = made["properties"] | _head(kind) | _free()
    if kind != "masked":  # masked schedules have a masking schedule of their own
        properties["noise"] = _ref("noise")
    if kind == "ode":
        properties["program"] = _ref("program")
    required = {"format", "version", "kind", *made.get("required", ())}
    return _object(properties, required=sorted(required))


def _object(properties: dict[str, Any], required: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


def _head(kind: str) -> dict[str, Any]:
    return {
        "format": {"const": FORMAT},
        "version": {"const": VERSION},
        "kind": {"const": kind},
        "nfe": {"type": "integer", "minimum": 1, "description": "Network calls."},
    }


def _free() -> dict[str, Any]:
    return {
        "options": {"type": "object", "description": "Named options of the executor."},
        "provenance": {"type": "object", "description": "Where the schedule comes from."},
    }


def _noise(cls: type[Any]) -> dict[str, Any]:
    made = TypeAdapter(cls).json_schema()
    properties = {"type": {"const": cls.type}, **made["properties"]}
    return _object(properties, required=["type"])


def _program() -> dict[str, Any]:
    """Rows of numbers, a row per network call; b is lower triangular, in ragged rows."""
    names = [field.name for field in fields(Program)]
    properties: dict[str, Any] = dict.fromkeys(names, _NUMBERS)
    properties["init"] = {**_NUMBERS, "minItems": 2, "maxItems": 2}
    properties["b"] = _ROWS
    properties["guidance"] = {"anyOf": [_NUMBERS, {"type": "null"}]}
    names_of = {"type": "array", "items": {"type": "string"}}
    properties["network"] = {
        **names_of,
        "description": 'Asked at each call; "" is the model\'s own.',
    }
    return _object(properties, required=[name for name in names if name not in _OPTIONAL])


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/$defs/{name}"}
