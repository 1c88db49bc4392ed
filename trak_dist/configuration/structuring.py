"""Mappings from outside to frozen dataclasses and back: strict, and with all that is bad at once.

cattrs walks through them, `field_checks` says what a field may hold, and here cattrs' exception
groups become one line for each bad field, with its dotted key.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, get_args, get_type_hints

from cattrs import BaseValidationError, Converter, ForbiddenExtraKeysError
from cattrs.cols import homogenous_tuple_structure_factory, is_mapping, is_sequence
from cattrs.errors import AttributeValidationNote, IterableValidationNote
from cattrs.gen import make_dict_structure_fn, override

from trak_dist.configuration.field_checks import (
    Misfit,
    check_limits,
    is_list,
    mapping,
    names_or_numbers,
    scalar,
)
from trak_dist.errors import ConfigError, TrakDistError

Kind = TypeVar("Kind")
Hook = Callable[[Any, Any], Any]
converter = Converter(forbid_extra_keys=True, detailed_validation=True)


def structure(kind: type[Kind], raw: Mapping[str, Any], what: str) -> Kind:
    """`raw` as an instance of the dataclass `kind`.

    Raises
    ------
    ConfigError
        `what`, and each bad field in a line.
    """
    found, bad = attempt(kind, raw)
    if found is None:
        raise ConfigError("\n  ".join([what, *bad]))
    return found


def attempt(kind: type[Kind], raw: Mapping[str, Any]) -> tuple[Kind | None, list[str]]:
    """`raw` as an instance of the dataclass `kind`; or None, and a line for each bad field."""
    try:
        return converter.structure(raw, kind), []
    except BaseValidationError as error:
        return None, list(_lines(error, ()))


def unstructure(value: Any) -> dict[str, Any]:
    """The mapping that `structure` makes the dataclass `value` of."""
    plain: dict[str, Any] = converter.unstructure(value)
    return plain


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """A hint that names the valid key nearest to `name`, or lists all of them."""
    valid = sorted(valid)
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"valid: {', '.join(valid)}"


def _lines(error: Exception, path: tuple[str, ...]) -> Iterator[str]:
    key = ".".join(path)
    match error:
        case BaseValidationError():
            for inner in error.exceptions:
                yield from _lines(inner, (*path, *_place(inner)))
        case ForbiddenExtraKeysError():
            valid = [field.name for field in fields(error.cl)]
            for name in sorted(map(str, error.extra_fields)):
                yield f"{'.'.join((*path, name))}: unknown; {did_you_mean(name, valid)}"
        case KeyError():
            yield f"{key}: missing"
        case Misfit():
            yield f"{key}: {error}"
        case TrakDistError():  # of the dataclass itself
            yield f"{key}: {error.what}" if key else error.what
        case _:
            raise error  # a defect, not a bad field


def _place(error: Exception) -> Iterator[str]:
    """The field, or the place in a list, at which cattrs met `error`; nothing for the whole."""
    for note in getattr(error, "__notes__", ()):
        if isinstance(note, AttributeValidationNote):
            yield note.name
        elif isinstance(note, IterableValidationNote):
            yield str(note.index)


@converter.register_structure_hook_factory(is_dataclass)
def _section(kind: Any, _: Converter) -> Hook:
    hints = get_type_hints(kind)
    limited = {
        field.name: override(struct_hook=_limited(hints[field.name], field.metadata))
        for field in fields(kind)
        if field.metadata
    }
    build = make_dict_structure_fn(kind, converter, **limited)  # type: ignore[arg-type]

    def section(raw: Any, _: Any) -> Any:
        if not isinstance(raw, Mapping):
            raise Misfit(f"{raw!r} is not a section of settings")
        return build(raw, kind)

    return section


def _limited(hint: Any, limits: Mapping[str, Any]) -> Hook:
    structured = converter.get_structure_hook(hint)

    def within_limits(raw: Any, _: Any) -> Any:
        value = structured(raw, hint)
        check_limits(raw, hint, limits)
        return value

    return within_limits


@converter.register_structure_hook_factory(is_sequence)
def _list(hint: Any, _: Converter) -> Hook:
    kind = get_args(hint)[0]
    if kind in (int, str):
        return names_or_numbers
    of_lists = is_sequence(kind)
    structured = homogenous_tuple_structure_factory(hint, converter)

    def several(raw: Any, _: Any) -> Any:
        if not is_list(raw) or (of_lists and not all(map(is_list, raw))):
            raise Misfit(f"{raw!r} is not a list of {'lists' if of_lists else 'sections'}")
        return structured(raw, hint)

    return several


def _is_optional_text(hint: Any) -> bool:
    return bool(hint == str | None)


# A text that is missing is an empty one where it is stored.
converter.register_structure_hook_func(_is_optional_text, lambda raw, _: scalar(raw, str) or None)
converter.register_unstructure_hook_func(_is_optional_text, lambda text: text or "")
for _kind in (bool, int, float, str):
    converter.register_structure_hook(_kind, scalar)
converter.register_structure_hook_func(is_mapping, mapping)
