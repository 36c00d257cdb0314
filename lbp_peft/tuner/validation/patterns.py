"""Checks the regular expressions in a configuration.

A configuration may come from somebody else's file, and Python's `re` has no time limit: a single expression with nested
repetition can keep a program busy for years.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Iterator
from typing import Any

try:  # the parser of `re` is the only one that reads an expression exactly as `re` does
    from re import _constants as constants  # type: ignore[attr-defined]
    from re import _parser as parser  # type: ignore[attr-defined]
except ImportError:  # Python 3.10
    import sre_constants as constants
    import sre_parse as parser

# The expressions in which PEFT embeds those of a configuration.
IN_RANK_PATTERN = r"(.*\.)?({})$"
IN_LAYERS_PATTERN = r"(?:^|.*?\.){}\.(?P<idx>\d+)\."

_MAX_LENGTH = 100_000
_NAME_LENGTH = 60  # of a module, roughly
_MAX_STEPS = 1_000_000  # for one name; a name takes about ten milliseconds then
_REPEATS = {constants.MAX_REPEAT, constants.MIN_REPEAT, getattr(constants, "POSSESSIVE_REPEAT", None)}


def check_pattern(field: str, pattern: object, template: str = "{}") -> None:
    """Refuse values that are not regular expressions, and expressions that could take forever to match.

    Args:
        field: The field that holds the expression, for the message.
        pattern: The expression.
        template: PEFT's own expression, in which "{}" stands for this one.

    Raises:
        ValueError: `pattern` is not a string, is empty, is not a valid expression, or repeats a part that itself has
            variable length.
    """
    if not isinstance(pattern, str) or not pattern:
        raise ValueError(f"{field} must be a regular expression, got {show(pattern)}.")
    if len(pattern) > _MAX_LENGTH:
        raise ValueError(f"{field} has {len(pattern)} characters; {_MAX_LENGTH} are the most.")
    try:
        tree = parser.parse(pattern)
        re.compile(template.replace("{}", pattern))
        ignores_case = bool(tree.state.flags & re.IGNORECASE) or _ignores_case(tree)
        slow = _num_steps(tree, False, ignores_case) > _MAX_STEPS
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{field} is not a valid regular expression ({error}), got {show(pattern)}.") from error
    if slow:
        raise ValueError(
            f"{field} is a regular expression that could take forever to match, since it repeats or strings together "
            f"parts of variable length, got {show(pattern)}. Write it without nested repetition."
        )


def show(value: object) -> str:
    """A value as text for a message, shortened if it is long."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 200
    return short.repr(value)


def _num_steps(tree: Any, repeated: bool, ignores_case: bool) -> float:
    """Roughly the number of steps that matching a part of an expression may take; infinite if it is more than allowed.

    Steps multiply along parts that leave a choice, and with those of the expressions inside these parts. A literal
    character in between ends that: it occurs few times in a name.

    Args:
        tree: The parsed part.
        repeated: Whether the part is inside a repetition, where each choice multiplies with itself.
        ignores_case: Whether any part of the expression does. Which characters a literal matches is not known then.
    """
    items = list(_items(tree))
    steps: float = 1
    most: float = 1
    for index, (kind, value) in enumerate(items):
        if kind is constants.LITERAL:
            steps = 1
            continue
        choices = _num_choices(kind, value)
        ends = items[(index + 1) % len(items)]
        if repeated and choices > 1 and (ignores_case or not _ends_at(kind, value, ends)):
            return math.inf
        again = repeated or (kind in _REPEATS and value[1] > 1)
        steps *= choices * max((_num_steps(part, again, ignores_case) for part in _parts(value)), default=1)
        most = max(most, steps)
        if most > _MAX_STEPS:
            return math.inf
    return most


def _ignores_case(tree: Any) -> bool:
    """Whether a group in an expression has the flag, as in (?i:...)."""
    return any(
        (kind is constants.SUBPATTERN and bool(value[1] & re.IGNORECASE)) or any(map(_ignores_case, _parts(value)))
        for kind, value in tree
    )


def _items(tree: Any) -> Iterator[tuple[Any, Any]]:
    """The parts of a sequence, including those in plain groups."""
    for kind, value in tree:
        if kind is constants.SUBPATTERN:
            yield from _items(value[-1])
        else:
            yield kind, value


def _num_choices(kind: Any, value: Any) -> int:
    if kind is constants.BRANCH:
        return len(value[1])
    if kind in _REPEATS:
        return int(min(value[1], _NAME_LENGTH + value[0]) - value[0]) + 1
    return 1


def _ends_at(kind: Any, value: Any, item: tuple[Any, Any]) -> bool:
    """Whether a repetition of single characters can end in one way only, at a literal that it does not match."""
    if kind not in _REPEATS or item[0] is not constants.LITERAL:
        return False
    body = list(_items(value[2]))
    return len(body) == 1 and not _may_match(body[0], chr(item[1]))


def _may_match(item: tuple[Any, Any], character: str) -> bool:
    """Whether a part of an expression may match a character; True if that is not known."""
    kind, value = item
    if kind is constants.LITERAL:
        return bool(chr(value) == character)
    if kind is constants.NOT_LITERAL:
        return bool(chr(value) != character)
    if kind is constants.RANGE:
        return bool(value[0] <= ord(character) <= value[1])
    if kind is constants.CATEGORY and value in (constants.CATEGORY_WORD, constants.CATEGORY_DIGIT):
        return character.isalnum() or character == "_"
    if kind is constants.IN:
        negated = value[0][0] is constants.NEGATE
        if negated and any(inner[0] is constants.CATEGORY for inner in value):
            return True
        return bool(negated != any(_may_match(inner, character) for inner in value[int(negated) :]))
    return True


def _parts(value: Any) -> Iterator[Any]:
    """The expressions inside one part of an expression."""
    if isinstance(value, parser.SubPattern):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _parts(item)
