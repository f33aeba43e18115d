"""Scopes, and the budgets that apply to them.

A scope maps fields to values: ``user=alice``, ``team=quant``. A :class:`Catalog` holds the definitions of budgets. It
resolves names to budgets, and scopes to all budgets that apply. Nothing here does I/O.

**One meaning for a name.** A name has at most one parse by a template, because a segment between two ``/`` has at most
one placeholder. Of several templates that match a name, the one with the longest literal text is meant, so templates
with equally long literal text must match no common name. Whether they do is decided segment by segment
(:func:`common_name`). Lengths are left out of account there: a pair whose common names are all too long is rejected,
too.

**No silent gap.** A budget that applies to a scope is charged, or the scope is rejected. It is rejected if the budget's
name, made of the scope's values, is too long or means another budget.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import islice
from typing import NamedTuple

from ktrdr_budget.errors import InvalidArgument, InvalidScope, UnknownBudget, shown, unknown_budget
from ktrdr_budget.models import FIELD, Budget, check_field, check_name, split_name

__all__ = ["SCOPE_FIELDS_MAX", "Catalog", "Instance", "check_scope", "common_name", "parse_scope", "scope_text"]

SCOPE_FIELDS_MAX = 16
"""The records of a hold and of a ledger entry contain the scope, so its size is bounded."""
_VALUE = re.compile(r"[A-Za-z0-9._:/@-]{1,96}", re.ASCII)
_NAME_LENGTH_MAX = 128

ScopeItems = tuple[tuple[str, str], ...]
"""A scope as a key: its fields and values, sorted by field."""


class Instance(NamedTuple):
    """A budget with a concrete name, and the definition that it comes from."""

    budget: Budget
    """The budget under its own name, without placeholders."""
    template: str
    """The template that matches the name, also if an exact definition replaces it. Empty: no template matches."""
    member: str
    """The name after the first literal of the template: ``alice`` of ``user:{user}``. Empty without a template."""
    definition: str
    """The name of the definition that gives the limit: the exact definition, else the template."""


# -- scopes ------------------------------------------------------------------------------------------------------------


def check_scope(fields: Mapping[str, str]) -> dict[str, str]:
    """Return the scope sorted by field.

    Raises:
        InvalidScope: a field does not match ``[a-z][a-z0-9_]{0,31}``, a value does not match
            ``[A-Za-z0-9._:/@-]{1,96}``, or there are more than 16 fields.
    """
    if not isinstance(fields, Mapping):
        raise InvalidScope(f"a scope must be a mapping of fields to values, not {shown(fields)}")
    if len(fields) > SCOPE_FIELDS_MAX:
        raise InvalidScope(f"a scope has at most {SCOPE_FIELDS_MAX} fields, not {len(fields)}")
    for field, value in fields.items():
        if not isinstance(field, str) or not FIELD.fullmatch(field):
            raise InvalidScope(f"a field of a scope must match {FIELD.pattern}, not {shown(field)}")
        if not isinstance(value, str) or not _VALUE.fullmatch(value):
            raise InvalidScope(f"{field} of a scope must match {_VALUE.pattern}, not {shown(value)}")
    return dict(sorted(fields.items()))


def scope_text(fields: Mapping[str, str]) -> str:
    """Format a valid scope, sorted by field: ``team=quant,user=alice``. Empty for no fields."""
    return ",".join([f"{field}={value}" for field, value in sorted(fields.items())])


def parse_scope(text: str) -> dict[str, str]:
    """Parse the text of a scope.

    Raises:
        InvalidScope: the text is not in the form of :func:`scope_text`, or names a field twice.
    """
    fields: dict[str, str] = {}
    for word in text.split(",") if text else ():
        field, _, value = word.partition("=")
        if field in fields:
            raise InvalidScope(f"field {field!r} of a scope is given twice")
        fields[field] = value
    return check_scope(fields)


# -- templates ---------------------------------------------------------------------------------------------------------


class _Template:
    """A name with placeholders: it matches names, and makes names of scopes."""

    def __init__(self, name: str) -> None:
        literals, self.fields = split_name(name)
        self.name = name
        self.prefix, self.suffix = literals[0], literals[-1]
        self.literal_length = sum(map(len, literals))
        placeholders = ["([^/]{1,96})"] * len(self.fields)
        if not literals[-1]:
            placeholders[-1] = "(.{1,96})"
        words = [re.escape(literals[0])]
        for placeholder, literal in zip(placeholders, literals[1:], strict=True):
            words += placeholder, re.escape(literal)
        self._match = re.compile("".join(words)).fullmatch

    def matches(self, name: str) -> bool:
        return name.startswith(self.prefix) and self._match(name) is not None

    def name_in(self, scope: Mapping[str, str]) -> str:
        return self.name.format_map(scope)

    def is_inverse(self, name: str, scope: Mapping[str, str]) -> bool:
        """Whether the template finds the values of the scope in the name."""
        found = self._match(name)
        return found is not None and found.groups() == tuple(scope[field] for field in self.fields)


def common_name(one: str, other: str) -> str | None:
    """Return a name that both templates match, or ``None`` if there is none.

    A placeholder at the end of a template also stands for further segments. Any other segment of a template matches
    exactly one segment of a name.
    """
    if one.count("/") > other.count("/"):
        one, other = other, one
    shorter, longer = list(_segments(one)), list(_segments(other))
    rest: list[str] = []
    if len(shorter) < len(longer):
        if not one.endswith("}"):
            return None
        rest = [_common_segment(segment, segment) or "" for segment in longer[len(shorter) :]]
        # The last placeholder of the shorter template continues into the rest, so only its literal must fit.
        text, after = longer[len(shorter) - 1]
        start = shorter.pop()[0]
        if after is None and not text.startswith(start):
            return None
        common = text if after is None else _common_segment((start, ""), (text, after))
        if common is None:
            return None
        rest.insert(0, common)
    segments: list[str] = []
    for left, right in zip(shorter, longer, strict=False):
        segment = _common_segment(left, right)
        if segment is None:
            return None
        segments.append(segment)
    return "/".join(segments + rest)


def _segments(template: str) -> Iterator[tuple[str, str | None]]:
    """The segments of a template: the texts before and after the placeholder, or a text and ``None``."""
    for segment in template.split("/"):
        before, brace, after = segment.partition("{")
        yield before, after.partition("}")[2] if brace else None


def _common_segment(left: tuple[str, str | None], right: tuple[str, str | None]) -> str | None:
    (left_start, left_end), (right_start, right_end) = left, right
    if left_end is None and right_end is None:
        return left_start if left_start == right_start else None
    if left_end is None:
        return _common_segment(right, left)
    start = max(left_start, right_start, key=len)
    if right_end is None:
        fits = len(right_start) > len(left_start) + len(left_end)
        return start if fits and start.startswith(left_start) and start.endswith(left_end) else None
    end = max(left_end, right_end, key=len)
    fits = start.startswith(left_start) and start.startswith(right_start)
    return f"{start}0{end}" if fits and end.endswith(left_end) and end.endswith(right_end) else None


# -- the catalog -------------------------------------------------------------------------------------------------------

_Condition = Callable[[Mapping[str, str]], bool]


class _Rule:
    """A budget or template that applies to scopes by itself."""

    def __init__(self, budget: Budget, template: _Template | None) -> None:
        self.budget = budget
        self.template = template
        self.fields = template.fields if template else ()
        self.condition = _condition(budget)
        self.exceptions: dict[str, _Condition] = {}
        """The conditions of exact definitions that have a ``when`` of their own, by name."""

    @property
    def rank(self) -> tuple[int, int, str]:
        """The place in the order of budgets that apply: more fields first, then more literal text, then by name."""
        literal = self.template.literal_length if self.template else len(self.budget.name)
        return -len({*self.fields, *(self.budget.when or ())}), -literal, self.budget.name

    def name_in(self, scope: Mapping[str, str]) -> str | None:
        """The name of the budget that applies to a scope; ``None`` if none does."""
        for field in self.fields:
            if field not in scope:
                return None
        name = self.template.name_in(scope) if self.template else self.budget.name
        return name if self.exceptions.get(name, self.condition)(scope) else None


def _condition(budget: Budget) -> _Condition:
    """Whether the fields of a scope match the patterns of ``when``."""
    matchers = []
    for field, patterns in (budget.when or {}).items():
        expression = "|".join(fnmatch.translate(pattern) for pattern in patterns)
        matchers.append((field, re.compile(expression).match))
    return lambda scope: all(field in scope and match(scope[field]) for field, match in matchers)


class Catalog:
    """The definitions of budgets; resolves names and scopes.

    An exact definition wins over a template that matches its name. It replaces the template for that subject: it
    applies to the same scopes, unless it has a ``when`` of its own, which then replaces the ``when`` of the template.

    Args:
        budgets: the definitions. A line with several windows defines one budget for each.
        required_fields: fields that every scope must have.
        cache_max: how many names and how many scopes are kept resolved.

    Raises:
        InvalidArgument: a name is given twice, two templates tie, or an exact definition contradicts the template that
            matches its name.
    """

    def __init__(
        self, budgets: Iterable[Budget], *, required_fields: Sequence[str] = (), cache_max: int = 10_000
    ) -> None:
        if isinstance(required_fields, str):
            raise InvalidArgument(f"required_fields must be a list of fields, not {shown(required_fields)}")
        self.required_fields = tuple(check_field(field) for field in required_fields)
        lines = _check_lines(budgets)
        self.definitions: Mapping[str, Budget] = _expand(lines)
        """The definitions by name, templates by their name with placeholders; each window by its own name."""
        self._bare = {line.name: line.windows for line in lines if line.has_windows}
        """Lines with several windows, by the name that alone is not a budget."""
        names = [name for name in (*self.definitions, *self._bare) if "{" in name]
        self._templates = sorted(map(_Template, names), key=lambda each: (-each.literal_length, each.prefix))
        """Also the bare names of lines with several windows, so that such a name means no other template."""
        _check_ties(self._templates)
        self._check_lines_with_windows()
        self._rules = self._make_rules()
        self._instance = lru_cache(cache_max)(self._find_instance)
        self.applying_key: Callable[[ScopeItems], tuple[Instance, ...]] = lru_cache(cache_max)(self._find_applying)
        """As :meth:`applying`, for a scope that is already a key: its items, sorted by field."""

    # -- resolution ----------------------------------------------------------------------------------------------------

    def instance(self, name: str) -> Instance:
        """Return the budget of this name: the exact definition, else that of the template with the most literal text.

        Raises:
            InvalidArgument: the name is invalid.
            UnknownBudget: no definition has or matches the name, or the name stands for several windows.
        """
        return self._instance(name if isinstance(name, str) else check_name(name, "budget name"))

    def applying(self, scope: Mapping[str, str]) -> tuple[Instance, ...]:
        """Return all budgets that apply to a scope, the most specific first.

        Budgets that depend on more fields come first (placeholders, and fields of ``when``), then those with more
        literal text, then by name of the definition. If two templates give the same name, the one with the longer
        literal text gives the budget.

        Raises:
            InvalidScope: a field or value is invalid, a required field is missing, or a budget's name is longer than
                128 characters or does not mean the same template and values.
        """
        try:
            return self.applying_key(tuple(sorted(scope.items())))
        except (AttributeError, TypeError):
            check_scope(scope)  # values that cannot be sorted or hashed are invalid
            raise

    def _find_instance(self, name: str) -> Instance:
        check_name(name, "budget name")
        exact, template = self.definitions.get(name), self._template_of(name)
        line = name if template is None else template.name
        if line in self._bare:
            raise UnknownBudget(f"budget {name!r} has several windows; name one of: {self._windows_of(name, line)}")
        if template is None:
            if exact is None:
                raise unknown_budget(name, self.definitions)
            return Instance(exact, "", "", name)
        member = name[len(template.prefix) :]
        if exact is not None:
            return Instance(exact, line, member, name)
        return Instance(replace(self.definitions[line], name=name), line, member, line)

    def _template_of(self, name: str) -> _Template | None:
        for template in self._templates:
            if template.matches(name):
                return template
        return None

    def _windows_of(self, name: str, line: str) -> str:
        return ", ".join(f"{name}/{window.period}" for window in self._bare[line])

    def _find_applying(self, items: ScopeItems) -> tuple[Instance, ...]:
        scope = check_scope(dict(items))
        for field in self.required_fields:
            if field not in scope:
                raise InvalidScope(f"the scope has no {field}; required: {', '.join(self.required_fields)}")
        names = {
            definition: name for definition, rule in self._rules.items() if (name := rule.name_in(scope)) is not None
        }
        found = (self._apply(definition, names, scope) for definition in names)
        return tuple(instance for instance in found if instance is not None)

    def _apply(self, definition: str, names: Mapping[str, str], scope: Mapping[str, str]) -> Instance | None:
        """The budget that a definition gives a scope; ``None`` if a template with more literal text gives it.

        Args:
            names: the names of the budgets that apply, by definition.
        """
        name, template = names[definition], self._rules[definition].template
        if template is None:
            return self.instance(name)
        if len(name) > _NAME_LENGTH_MAX:
            raise InvalidScope(f"budget {shown(name)} of {definition} is longer than {_NAME_LENGTH_MAX} characters")
        if template.is_inverse(name, scope) and (winner := self._template_of(name)) is not None:
            if winner is template:
                return self.instance(name)
            if names.get(winner.name) == name and not self._difference(definition, winner.name):
                return None
        raise InvalidScope(f"the scope gives {definition} the name {name!r}, which does not mean these values")

    # -- definitions ---------------------------------------------------------------------------------------------------

    def _make_rules(self) -> dict[str, _Rule]:
        """The rules by the name of their definition, most specific first."""
        templates = {template.name: template for template in self._templates}
        rules: dict[str, _Rule] = {}
        for name, budget in self.definitions.items():
            if budget.is_template:
                rules[name] = _Rule(budget, templates[name])
        for name, budget in self.definitions.items():
            template = None if budget.is_template else self._template_of(name)
            if template is not None:
                self._check_exception(name, template.name)
                if budget.when is not None:
                    rules[template.name].exceptions[name] = _condition(budget)
            elif budget.when is not None and not budget.is_template:
                rules[name] = _Rule(budget, None)
        return dict(sorted(rules.items(), key=lambda item: item[1].rank))

    def _check_exception(self, name: str, template: str) -> None:
        if template in self._bare:
            windows = self._windows_of(name, template)
            raise InvalidArgument(f"budget {name!r} has several windows by {template}; define one of: {windows}")
        if difference := self._difference(name, template):
            raise InvalidArgument(f"budget {name!r} replaces {template} for one subject, but {difference}")

    def _difference(self, one: str, other: str) -> str:
        """The difference of two definitions in the fields that must agree for one subject; empty if they agree."""
        for field in ("unit", "kind", "period"):
            mine, wanted = getattr(self.definitions[one], field), getattr(self.definitions[other], field)
            if mine != wanted:
                return f"its {field} is {mine!r}, not {wanted!r}"
        return ""

    def _check_lines_with_windows(self) -> None:
        """Check that the windows of an exact line replace those of the template that matches its bare name."""
        for name, windows in self._bare.items():
            template = None if "{" in name else self._template_of(name)
            if template is None:
                continue
            periods = [window.period for window in self._bare.get(template.name, ())]
            for window in windows:
                if window.period not in periods:
                    known = f"only {', '.join(periods)}" if periods else "a single limit"
                    raise InvalidArgument(
                        f"budget {name!r} has a limit by {window.period}; {template.name} has {known}"
                    )


def _check_lines(budgets: Iterable[Budget]) -> list[Budget]:
    lines: list[Budget] = list(budgets) if isinstance(budgets, Iterable) else [None]
    for line in lines:
        if not isinstance(line, Budget):
            raise InvalidArgument(f"budgets are given as a list of Budget, not as {shown(budgets)}")
    return lines


def _expand(lines: Sequence[Budget]) -> dict[str, Budget]:
    """The budgets of all lines by name.

    Raises:
        InvalidArgument: a name is given twice, also as the name of a line with several windows.
    """
    given: dict[str, Budget] = {}
    for line in lines:
        twice = given.setdefault(line.name, line)
        if twice is not line:
            windows = ", ".join(window.name for each in (twice, line) if each.has_windows for window in each.windows)
            raise InvalidArgument(
                f"budget {line.name!r} is given twice" + (f", with windows {windows}" if windows else "")
            )
    definitions: dict[str, Budget] = {}
    for line in lines:
        for budget in line.windows:
            if line.has_windows and budget.name in given:
                raise InvalidArgument(f"budget {budget.name!r} is given twice, once as a window of {line.name!r}")
            definitions[budget.name] = budget
    return definitions


def _check_ties(templates: Sequence[_Template]) -> None:
    """Check that no two templates with equally long literal text match a common name.

    Args:
        templates: sorted by the length of the literal text, then by prefix. So the templates that begin with a prefix
            follow each other, and the check stays fast for many templates.

    Raises:
        InvalidArgument: two templates tie.
    """
    for number, one in enumerate(templates):
        for other in islice(templates, number + 1, None):
            if other.literal_length != one.literal_length or not other.prefix.startswith(one.prefix):
                break
            if not (one.suffix.endswith(other.suffix) or other.suffix.endswith(one.suffix)):
                continue
            if (name := common_name(one.name, other.name)) is not None:
                raise InvalidArgument(
                    f"budgets {one.name!r} and {other.name!r} have equally long literal text and both match {name!r}"
                )
