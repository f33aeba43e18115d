"""Resolution of names and scopes to budgets."""

from __future__ import annotations

import re

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ktrdr_budget import Budget, InvalidArgument, InvalidScope, UnknownBudget
from ktrdr_budget.definitions import Catalog, check_scope, common_name, parse_scope, scope_text

DESIGN = [
    Budget("user:{user}", "1.00"),
    Budget("user:{user}/rpm", 60, unit="requests", period="hour"),
    Budget("team:{team}", {"day": "5.00", "month": "50.00"}),
    Budget("user:alice", "5.00"),
    Budget("gpt-5", "20.00", when={"model": ["gpt-5", "gpt-5-*"]}),
    Budget("everything", "500.00", when={}),
    Budget("agent", "5.00"),
]


def names(catalog: Catalog, **scope: str) -> list[str]:
    return [instance.budget.name for instance in catalog.applying(scope)]


# -- scopes ------------------------------------------------------------------------------------------------------------


def test_the_text_of_a_scope_is_sorted_by_field_and_parses_to_the_same_scope():
    scope = {"user": "alice", "team": "a/b:c@d-e_f.g"}
    assert scope_text(scope) == "team=a/b:c@d-e_f.g,user=alice"
    assert parse_scope(scope_text(scope)) == scope
    assert list(check_scope(scope)) == ["team", "user"]
    assert (scope_text({}), parse_scope("")) == ("", {})


@pytest.mark.parametrize("text", ["user", "user=", "=alice", "user=a,", "user=a,user=b", "user=a b", "User=a", "a=b=c"])
def test_a_malformed_text_of_a_scope_is_rejected(text):
    with pytest.raises(InvalidScope):
        parse_scope(text)


@pytest.mark.parametrize(
    "scope",
    [
        None,
        [("user", "alice")],
        {"User": "a"},
        {"1a": "a"},
        {"a" * 33: "a"},
        {7: "a"},
        {7: "a", "user": "a"},
        {"user": ""},
        {"user": "a" * 97},
        {"user": "a b"},
        {"user": "a,b"},
        {"user": "é"},
        {"user": "a\n"},
        {"user": None},
        {"user": 7},
        {"user": ["a"]},
        {f"f{number}": "a" for number in range(17)},
    ],
)
def test_an_invalid_scope_is_rejected(scope):
    with pytest.raises(InvalidScope):
        check_scope(scope)
    with pytest.raises(InvalidScope):
        Catalog(DESIGN).applying(scope)


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "template", "member", "definition", "limit"),
    [
        ("agent", "", "", "agent", 5),
        ("everything", "", "", "everything", 500),
        ("user:bob", "user:{user}", "bob", "user:{user}", 1),
        ("user:alice", "user:{user}", "alice", "user:alice", 5),
        ("user:a/b", "user:{user}", "a/b", "user:{user}", 1),
        ("user:bob/rpm", "user:{user}/rpm", "bob/rpm", "user:{user}/rpm", 60),
        ("user:a/b/rpm", "user:{user}", "a/b/rpm", "user:{user}", 1),
        ("team:quant/day", "team:{team}/day", "quant/day", "team:{team}/day", 5),
        ("team:quant/month", "team:{team}/month", "quant/month", "team:{team}/month", 50),
    ],
)
def test_a_name_resolves_to_the_exact_definition_or_to_the_template_with_the_most_literal_text(
    name, template, member, definition, limit
):
    instance = Catalog(DESIGN).instance(name)
    assert instance[1:] == (template, member, definition)
    assert (instance.budget.name, instance.budget.limit) == (name, limit)
    assert instance.budget.fields == ()


def test_an_instance_has_all_other_fields_of_its_template():
    template = Budget("a:{a}", 7, unit="tokens", period="month", timezone="Europe/Rome", retention="48h")
    instance = Catalog([template]).instance("a:x").budget
    assert instance == Budget("a:x", 7, unit="tokens", period="month", timezone="Europe/Rome", retention="48h")


@pytest.mark.parametrize("name", ["", "a b", "user:{user}", "x" * 129, None, 7, ["agent"]])
def test_an_invalid_name_is_rejected(name):
    with pytest.raises(InvalidArgument, match="budget name must match"):
        Catalog(DESIGN).instance(name)


@pytest.mark.parametrize("name", ["nope", "user:", "user", "user:" + "x" * 97, "team:a/b/day", "team:quant/week"])
def test_a_name_that_no_definition_matches_is_unknown(name):
    with pytest.raises(UnknownBudget):
        Catalog(DESIGN).instance(name)


def test_the_error_for_an_unknown_name_names_at_most_five_of_many_budgets():
    with pytest.raises(UnknownBudget) as caught:
        Catalog([Budget(f"budget:{number}", 1) for number in range(100)]).instance("budget:x")
    assert len(re.findall(r"budget:\d+", str(caught.value))) == 5


@pytest.mark.parametrize("line", ["team:{team}", "team:quant"])
def test_the_name_of_a_line_with_several_windows_is_unknown_and_the_error_names_the_windows(line):
    catalog = Catalog([Budget(line, {"day": 5, "month": 50}), Budget("{any}", 1)][: 1 if line == "team:quant" else 2])
    with pytest.raises(UnknownBudget, match="name one of: team:quant/day, team:quant/month$"):
        catalog.instance("team:quant")


def test_an_exception_for_one_window_leaves_the_other_window_to_the_template():
    catalog = Catalog([*DESIGN, Budget("team:quant", {"day": "9.00"})])
    assert catalog.instance("team:quant/day").definition == "team:quant/day"
    assert catalog.instance("team:quant/month").definition == "team:{team}/month"
    with pytest.raises(UnknownBudget, match="name one of: team:quant/day, team:quant/month$"):
        catalog.instance("team:quant")


def test_the_definitions_are_listed_by_name_with_each_window_by_its_own_name():
    assert list(Catalog(DESIGN).definitions) == [
        "user:{user}",
        "user:{user}/rpm",
        "team:{team}/day",
        "team:{team}/month",
        "user:alice",
        "gpt-5",
        "everything",
        "agent",
    ]


# -- what applies ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scope", "expected"),
    [
        ({}, ["everything"]),
        ({"user": "bob"}, ["user:bob/rpm", "user:bob", "everything"]),
        ({"team": "quant"}, ["team:quant/month", "team:quant/day", "everything"]),
        ({"model": "gpt-5"}, ["gpt-5", "everything"]),
        ({"model": "gpt-5-mini"}, ["gpt-5", "everything"]),
        ({"model": "gpt-5x"}, ["everything"]),
        ({"model": "GPT-5"}, ["everything"]),
        ({"color": "red"}, ["everything"]),
        (
            {"model": "gpt-5-a/b", "team": "quant", "user": "alice"},
            ["team:quant/month", "team:quant/day", "user:alice/rpm", "gpt-5", "user:alice", "everything"],
        ),
    ],
)
def test_a_budget_applies_if_the_scope_has_its_fields_and_matches_its_condition(scope, expected):
    assert names(Catalog(DESIGN), **scope) == expected


def test_budgets_that_depend_on_more_fields_come_first_then_more_literal_text_then_the_name():
    budgets = [
        Budget("a-very-long-name-of-everything", 1, when={}),
        Budget("b:{user}", 1),
        Budget("a:{user}", 1),
        Budget("long:{user}", 1),
        Budget("m:{user}", 1, when={"model": "*"}),
        Budget("{team}/u:{user}", 1),
    ]
    expected = ["t/u:x", "m:x", "long:x", "a:x", "b:x", "a-very-long-name-of-everything"]
    for order in (budgets, budgets[::-1]):
        assert names(Catalog(order), user="x", team="t", model="gpt") == expected


def test_a_scope_to_which_nothing_applies_resolves_to_no_budget():
    assert Catalog([Budget("agent", 1), Budget("user:{user}", 1)]).applying({"team": "quant"}) == ()


def test_a_template_with_a_condition_applies_only_to_scopes_that_match_all_of_it():
    catalog = Catalog([Budget("user:{user}", 1, when={"model": ["gpt-*", "o3"], "tier": "free"})])
    assert names(catalog, user="bob", model="o3", tier="free") == ["user:bob"]
    assert names(catalog, user="bob", model="o3", tier="paid") == []
    assert names(catalog, user="bob", model="o3") == []


def test_an_exception_applies_where_its_template_applies():
    catalog = Catalog([Budget("user:{user}", 1, when={"model": "gpt-*"}), Budget("user:alice", 5)])
    (instance,) = catalog.applying({"user": "alice", "model": "gpt-5"})
    assert instance == catalog.instance("user:alice")
    assert (instance.budget.limit, instance.template, instance.definition) == (5, "user:{user}", "user:alice")
    assert names(catalog, user="alice", model="o3") == []
    assert names(catalog, model="gpt-5") == []


@pytest.mark.parametrize(("when", "models"), [({}, ["", "gpt-5", "o3"]), ({"model": "o*"}, ["o3"])])
def test_the_condition_of_an_exception_replaces_that_of_its_template_for_the_same_fields(when, models):
    catalog = Catalog([Budget("user:{user}", 1, when={"model": "gpt-*"}), Budget("user:alice", 5, when=when)])
    assert names(catalog, user="bob", model="o3") == []
    assert names(catalog, model="o3") == []
    for model in ("", "gpt-5", "o3"):
        scope = {"user": "alice", **({"model": model} if model else {})}
        assert names(catalog, **scope) == (["user:alice"] if model in models else [])


def test_a_missing_required_field_is_an_error_also_if_nothing_applies():
    catalog = Catalog(DESIGN, required_fields=["user", "team"])
    assert "user:bob" in names(catalog, user="bob", team="quant")
    for scope in ({}, {"user": "bob"}, {"color": "red", "team": "quant"}):
        with pytest.raises(InvalidScope, match="required: user, team"):
            catalog.applying(scope)


@pytest.mark.parametrize("fields", ["user", ["User"], [7]])
def test_an_invalid_required_field_is_a_definition_error(fields):
    with pytest.raises(InvalidArgument):
        Catalog(DESIGN, required_fields=fields)


@pytest.mark.parametrize(
    ("budgets", "scope"),
    [
        (["user:{user}", "user:{user}/rpm"], {"user": "alice/rpm"}),  # names the budget of alice's requests
        (["{a}/{b}"], {"a": "x/y", "b": "z"}),  # x, and y/z
        (["user:{user}/rpm"], {"user": "a/b"}),
        (["{any}", "user:{user}"], {"any": "user:bob"}),
        (["x" * 60 + "/{a}/{b}"], {"a": "a" * 40, "b": "b" * 40}),  # longer than 128 characters
    ],
)
def test_a_scope_whose_values_give_a_budget_another_meaning_is_rejected(budgets, scope):
    catalog = Catalog([Budget(name, 1) for name in budgets])
    with pytest.raises(InvalidScope):
        catalog.applying(scope)


def test_a_value_that_names_the_exception_of_another_template_is_rejected_whatever_that_exception_applies_to():
    budgets = [Budget("user:{user}", 1), Budget("user:{user}/rpm", 1), Budget("user:alice/rpm", 1, when={"model": "x"})]
    for model in ("x", "y"):
        with pytest.raises(InvalidScope):
            Catalog(budgets).applying({"user": "alice/rpm", "model": model})


def test_a_value_that_names_a_line_with_several_windows_is_rejected():
    catalog = Catalog([Budget("{any}", 1), Budget("team:{team}", {"day": 1, "month": 1})])
    with pytest.raises(InvalidScope):
        catalog.applying({"any": "team:quant"})


def test_of_two_templates_that_give_one_name_the_one_with_more_literal_text_gives_the_budget():
    catalog = Catalog([Budget("{provider}/{model}", 1), Budget("openai/{model}", 2)])
    assert [each.definition for each in catalog.applying({"provider": "openai", "model": "o3"})] == ["openai/{model}"]
    assert names(catalog, provider="other", model="o3") == ["other/o3", "openai/o3"]


@pytest.mark.parametrize("options", [{"unit": "tokens"}, {"period": "month"}, {"when": {"tier": "free"}}])
def test_two_templates_that_give_one_name_must_both_apply_and_agree(options):
    catalog = Catalog([Budget("{provider}/{model}", 1), Budget("openai/{model}", 2, **options)])
    with pytest.raises(InvalidScope):
        catalog.applying({"provider": "openai", "model": "o3"})


def test_equal_scopes_resolve_to_the_same_cached_budgets_in_any_order_of_fields():
    catalog = Catalog(DESIGN)
    first = catalog.applying({"user": "alice", "team": "quant"})
    assert catalog.applying({"team": "quant", "user": "alice"}) is first
    assert catalog.applying_key((("team", "quant"), ("user", "alice"))) is first


def test_the_caches_are_bounded_and_what_they_dropped_resolves_again():
    catalog = Catalog([Budget("user:{user}", 1)], cache_max=2)
    first = catalog.applying({"user": "0"})
    for number in range(1, 5):
        catalog.applying({"user": str(number)})
    again = catalog.applying({"user": "0"})
    assert again == first
    assert again is not first


# -- definition errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budgets", "words"),
    [
        ([Budget("a", 1), Budget("a", 2)], "'a' is given twice"),
        ([Budget("a:{x}", 1), Budget("a:{x}", 2)], "'a:{x}' is given twice"),
        ([Budget("a", {"day": 1}), Budget("a", {"month": 1})], "'a' is given twice, with windows a/day, a/month"),
        ([Budget("a", 1), Budget("a", {"day": 1, "month": 2})], "'a' is given twice, with windows a/day, a/month"),
        ([Budget("a", {"day": 1}), Budget("a/day", 1)], "'a/day' is given twice, once as a window of 'a'"),
        ([Budget("a/day", {"month": 1}), Budget("a", {"day": 1})], "'a/day' is given twice, once as a window of 'a'"),
        ([Budget("a:{x}", 1), Budget("a:{y}", 1)], "both match 'a:0'"),
        ([Budget("a:{x}", {"day": 1}), Budget("a:{y}", {"month": 1})], "both match 'a:0'"),
        ([Budget("a:{x}", {"day": 1}), Budget("a:{y}", 1)], "both match 'a:0'"),
        ([Budget("a{x}", 1), Budget("{x}b", 1)], "both match 'a0b'"),
        ([Budget("a/{x}", 1), Budget("{x}/a", 1)], "both match 'a/a'"),
        ([Budget("a:{x}", 1), Budget("a:b", 1, unit="tokens")], "its unit is 'tokens', not 'usd'"),
        ([Budget("a:{x}", 1), Budget("a:b", 1, period="month")], "its period is 'month', not 'day'"),
        (
            [Budget("a:{x}", 1, unit="n", period="ever"), Budget("a:b", 1, unit="n", kind="slots")],
            "its kind is 'slots', not 'spend'",
        ),
        (
            [Budget("team:{team}", {"day": 1, "month": 1}), Budget("team:quant", 1)],
            "define one of: team:quant/day, team:quant/month$",
        ),
        ([Budget("a:{x}", {"day": 1}), Budget("a:b", {"week": 1})], "'a:b' has a limit by week; a:{x} has only day"),
        ([Budget("a:{x}", 1), Budget("a:b", {"day": 1})], "'a:b' has a limit by day; a:{x} has a single limit"),
        (["agent"], "as a list of Budget"),
        (Budget("a", 1), "as a list of Budget"),
    ],
)
def test_contradictory_definitions_are_rejected_with_the_cause(budgets, words):
    with pytest.raises(InvalidArgument, match=words.replace("{", r"\{")):
        Catalog(budgets)
    if isinstance(budgets, list):
        with pytest.raises(InvalidArgument):
            Catalog(budgets[::-1])


def test_an_exception_may_have_another_timezone_than_its_template():
    catalog = Catalog([Budget("a:{x}", 1), Budget("a:b", 1, timezone="Europe/Rome")])
    assert catalog.instance("a:b").budget.timezone == "Europe/Rome"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a:{x}", "b:{x}"),
        ("{x}:a", "{x}:b"),
        ("a/{x}/b", "a/{x}:b"),
        ("a/{x}/b", "{x}/ab"),
        ("{x}/a", "{x}/b/c"),
        ("a/{x}", "ab{x}/c"),
    ],
)
def test_templates_without_a_common_name_are_accepted(one, other):
    assert common_name(one, other) is None
    Catalog([Budget(one, 1), Budget(other, 1)])


# -- properties --------------------------------------------------------------------------------------------------------

LITERALS = st.sampled_from(["", "a", "b", "ab", "a/", "/b", "/a/", "a/b"])  # few, so that names often meet
VALUES = st.sampled_from(["a", "b", "0", "ab", "a/b", "b/0"])
FIELDS = ("f", "g", "h")


@st.composite
def templates(draw):
    name = draw(LITERALS)
    for number, field in enumerate(draw(st.permutations(FIELDS))[: draw(st.integers(1, 2))]):
        name += (draw(LITERALS) + "/" if number else "") + f"{{{field}}}"
    return name + draw(LITERALS)


NAMES = st.text("ab0/", min_size=1, max_size=9)
LIMITS = st.sampled_from([1, 1, 1, {"day": 1, "month": 2}])
CONDITIONS = st.sampled_from([None, None, None, {}, {"f": "a*"}, {"g": ["*b", "0"]}, {"h": "*/*"}])


@st.composite
def definitions(draw):
    """Templates, exceptions of their subjects, and other budgets."""
    names = draw(st.lists(templates(), min_size=2, max_size=4, unique=True))
    for name in draw(st.lists(st.sampled_from(names), max_size=2)):
        names.append(name.format(**{field: draw(VALUES) for field in FIELDS}))
    names += draw(st.lists(NAMES, max_size=1))
    return [Budget(name, draw(LIMITS), when=draw(CONDITIONS)) for name in dict.fromkeys(names)]


BUDGETS = definitions()
SCOPES = st.fixed_dictionaries({"f": VALUES, "g": VALUES}, optional={"h": VALUES})


def literal_length(template: str) -> int:
    return len(re.sub(r"\{\w+\}", "", template))


def accepted(budgets: list[Budget]) -> Catalog:
    try:
        return Catalog(budgets)
    except InvalidArgument:
        assume(False)
        raise


def expression_of(template: str) -> re.Pattern[str]:
    """A regular expression of the template, made independently of the package."""
    words = re.split(r"(\{\w+\})", template)
    last = len(words) - 1 - (words[-1] == "")
    return re.compile(
        "".join(
            ("(.+)" if number == last else "([^/]+)") if "{" in word else re.escape(word)
            for number, word in enumerate(words)
        )
    )


@given(templates(), templates(), st.lists(NAMES, max_size=30))
@settings(max_examples=1000)
def test_templates_have_a_common_name_exactly_if_the_check_finds_one(one, other, tried):
    matches = [expression_of(each).fullmatch for each in (one, other)]
    found = common_name(one, other)
    if found is not None:
        assert all(match(found) for match in matches)
    else:
        # Names that are likely to match: those that make one template the other's values.
        tried += [re.sub(r"\{\w\}", value, each) for each in (one, other) for value in ("a", "b", "ab", "a/b", "b/a")]
        assert not any(all(match(name) for match in matches) for name in tried)


def placeholders(template: str) -> list[str]:
    return re.findall(r"\{(\w+)\}", template)


@given(templates(), st.fixed_dictionaries(dict.fromkeys(FIELDS, VALUES)))
@settings(max_examples=400)
def test_a_template_gives_a_scope_a_budget_exactly_if_the_name_has_the_values_of_the_scope(template, scope):
    name = template.format(**scope)
    parsed = expression_of(template).fullmatch(name)
    if parsed is not None and parsed.groups() == tuple(scope[field] for field in placeholders(template)):
        assert names(Catalog([Budget(template, 1)]), **scope) == [name]
    else:
        with pytest.raises(InvalidScope):
            Catalog([Budget(template, 1)]).applying(scope)


@given(BUDGETS, st.lists(NAMES, max_size=20), st.fixed_dictionaries(dict.fromkeys(FIELDS, VALUES)))
@settings(max_examples=400)
def test_no_two_templates_of_an_accepted_catalog_tie_for_a_name_and_the_longest_wins(budgets, tried, scope):
    catalog = accepted(budgets)
    lines = {budget.name for budget in budgets if budget.has_windows}
    known = [each for each in {*catalog.definitions, *lines} if "{" in each]
    for name in [*tried, *(each.format(**scope) for each in known)]:
        matching = sorted((each for each in known if expression_of(each).fullmatch(name)), key=literal_length)
        assert len({literal_length(each) for each in matching}) == len(matching)
        if name in catalog.definitions or (matching and matching[-1] not in lines):
            instance = catalog.instance(name)
            assert instance.template == (matching[-1] if matching else "")
            assert instance.definition == (name if name in catalog.definitions else instance.template)
        else:
            with pytest.raises(UnknownBudget):
                catalog.instance(name)


@given(BUDGETS, SCOPES)
@settings(max_examples=400)
def test_each_budget_that_applies_resolves_by_its_name_to_the_same_budget(budgets, scope):
    catalog = accepted(budgets)
    try:
        found = catalog.applying(scope)
    except InvalidScope:
        return
    assert len({instance.budget.name for instance in found}) == len(found)
    for instance in found:
        name, template = instance.budget.name, instance.template
        assert catalog.instance(name) == instance
        if not template:
            continue
        assert name == template[: template.index("{")] + instance.member
        parsed = expression_of(template).fullmatch(name)
        assert parsed is not None and parsed.groups() == tuple(scope[each] for each in placeholders(template))
        others = [each for each in catalog.definitions if "{" in each and expression_of(each).fullmatch(name)]
        assert max(others, key=literal_length) == template


@given(BUDGETS, SCOPES)
@settings(max_examples=400)
def test_each_template_whose_fields_and_condition_match_gives_the_scope_its_budget_or_the_scope_is_rejected(
    budgets, scope
):
    lines = [budget for budget in budgets if budget.is_template]
    catalog = accepted(lines)
    expected = set()
    for template, budget in catalog.definitions.items():
        expressions = {"f": "a.*", "g": ".*b|0", "h": ".*/.*"}  # those of CONDITIONS
        if set(budget.fields) <= set(scope) and all(
            field in scope and re.fullmatch(expressions[field], scope[field]) for field in budget.when or ()
        ):
            expected.add(template.format(**scope))
    try:
        found = catalog.applying(scope)
    except InvalidScope:
        matches = [expression_of(each).fullmatch for each in {*catalog.definitions, *(line.name for line in lines)}]
        shared = any(sum(match(name) is not None for match in matches) > 1 for name in expected)
        assert shared or (expected and any("/" in value for value in scope.values()))
        return
    assert {instance.budget.name for instance in found} == expected
