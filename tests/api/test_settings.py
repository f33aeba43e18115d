"""The settings of the service, and the errors about them."""

from __future__ import annotations

import pickle
from decimal import Decimal
from pathlib import Path

import pytest

from ktrdr_budget import Budget
from ktrdr_budget.api import Settings, SettingsError, load_settings

from .support import BUDGETS


def of(environment: pytest.MonkeyPatch, **variables: str) -> Settings:
    for name, value in variables.items():
        environment.setenv(name, value)
    return load_settings()


def fault(environment: pytest.MonkeyPatch, **variables: str) -> str:
    with pytest.raises(SettingsError) as caught:
        of(environment, **variables)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_by_default_the_service_has_only_the_agent_budget_and_uses_an_embedded_server(environment):
    settings = load_settings()
    assert settings.budgets == (Budget("agent", "5.00"),)
    assert settings.store_url is None
    assert settings.store_shown == "embedded, data/budget"
    assert settings.tenant == "default"
    assert settings.agent_cycle_estimate == Decimal("0.15")
    assert (settings.timeout, settings.on_store_error, settings.auth) == (1.0, "deny", "keys")
    assert settings.use_keys == settings.admin_keys == ()


def test_every_setting_is_read_from_its_environment_variable(environment, budgets_file):
    settings = of(
        environment,
        AGENT_DAILY_BUDGET=" 7.50 ",
        AGENT_BUDGET_DIR="/srv/budget",
        AGENT_CYCLE_ESTIMATE="0.30",
        AGENT_BUDGET_TIMEZONE="Europe/Rome",
        KTRDR_REDIS_URL="rediss://me:secret@store.example:6380/1?ssl_cert_reqs=none",
        KTRDR_TENANT="quant",
        KTRDR_API_KEY="one, two",
        KTRDR_ADMIN_KEY="three",
        KTRDR_TIMEOUT="0.5",
        KTRDR_ON_STORE_ERROR="allow",
        KTRDR_DURABILITY="replica",
        KTRDR_RETENTION_DAYS="90",
        KTRDR_BUDGETS_FILE=str(budgets_file),
    )
    assert settings.budgets[0] == Budget("agent", "7.50", timezone="Europe/Rome")
    assert settings.agent_budget_dir == Path("/srv/budget")
    assert settings.agent_cycle_estimate == Decimal("0.30")
    assert settings.store_shown == "rediss://me:***@store.example:6380/1"
    assert settings.tenant == "quant"
    assert (settings.use_keys, settings.admin_keys) == (("one", "two"), ("three",))
    assert (settings.timeout, settings.on_store_error, settings.durability) == (0.5, "allow", "replica")
    assert settings.retention_days == 90
    assert [budget.name for budget in settings.budgets[1:]] == [
        "team/a:b@c", "team/holds", "cycles", "calls", "jobs", "free",
    ]  # fmt: skip
    assert settings.budgets[1] == Budget("team/a:b@c", "1.00", period="month", timezone="Europe/Rome")
    assert settings.budgets[2].limit == Decimal("2.50")
    assert settings.budgets[-1].limit is None


def test_the_prepaid_amount_of_a_lease_may_be_given_for_all_budgets_or_per_budget(environment, budgets_file):
    assert of(environment).lease_slabs is None
    scalar = of(environment, KTRDR_ON_STORE_ERROR="lease", KTRDR_LEASE_SLAB=" 0.5 ")
    assert scalar.lease_slabs == Decimal("0.50")
    named = {"KTRDR_BUDGETS_FILE": str(budgets_file), "KTRDR_ON_STORE_ERROR": "lease"}
    settings = of(environment, **named, KTRDR_LEASE_SLAB="agent=0.50, team/a:b@c = 0.10")
    assert settings.lease_slabs == {"agent": "0.50", "team/a:b@c": "0.10"}
    without_policy = fault(environment, KTRDR_ON_STORE_ERROR="deny", KTRDR_LEASE_SLAB="1")
    assert "KTRDR_LEASE_SLAB needs KTRDR_ON_STORE_ERROR=lease" in without_policy
    without_slab = fault(environment, KTRDR_ON_STORE_ERROR="lease", KTRDR_LEASE_SLAB="")
    assert "KTRDR_ON_STORE_ERROR=lease needs KTRDR_LEASE_SLAB" in without_slab
    assert "'other' is not a budget" in fault(environment, KTRDR_LEASE_SLAB="other=1")


def test_the_repr_and_the_text_of_the_settings_show_no_secret(environment):
    settings = of(
        environment, KTRDR_REDIS_URL="redis://:secret@store", KTRDR_API_KEY="secret-1", KTRDR_ADMIN_KEY="secret-2"
    )
    assert "secret" not in repr(settings) + str(settings) + settings.store_shown


def test_settings_can_be_pickled(environment, budgets_file):
    settings = of(environment, KTRDR_API_KEY="one", KTRDR_BUDGETS_FILE=str(budgets_file))
    again = pickle.loads(pickle.dumps(settings))
    assert again == settings
    assert (again.budgets, again.use_keys) == (settings.budgets, ("one",))


def test_an_empty_environment_variable_counts_as_unset(environment):
    settings = of(environment, AGENT_DAILY_BUDGET="", KTRDR_API_KEY="", KTRDR_BUDGETS_FILE="")
    assert settings.budgets[0].limit == 5
    assert settings.use_keys == ()


def test_the_daily_budget_can_be_set_by_either_of_two_environment_variables(environment):
    assert of(environment, KTRDR_AGENT_DAILY_BUDGET="3").budgets[0].limit == 3
    assert of(environment, AGENT_DAILY_BUDGET="4").budgets[0].limit == 4


@pytest.mark.parametrize(
    ("text", "limit"), [("unlimited", None), ("Unlimited", None), ("0", 0), ("0.000000001", Decimal("1e-9"))]
)
def test_a_daily_budget_may_be_unlimited_or_zero(environment, text, limit):
    assert of(environment, AGENT_DAILY_BUDGET=text).budgets[0].limit == limit


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("AGENT_DAILY_BUDGET", "much", "not an amount"),
        ("AGENT_DAILY_BUDGET", "-1", "negative"),
        ("AGENT_CYCLE_ESTIMATE", "0", "more than 0"),
        ("AGENT_CYCLE_ESTIMATE", "x", "not an amount"),
        ("AGENT_BUDGET_TIMEZONE", "Mars/Olympus", "unknown timezone: 'Mars/Olympus'; use an IANA name such as"),
        ("KTRDR_REDIS_URL", "http://store", "redis://"),
        ("KTRDR_TENANT", "a b", "must match"),
        ("KTRDR_TIMEOUT", "soon", "number"),
        ("KTRDR_TIMEOUT", "0", "greater than 0"),
        ("KTRDR_ON_STORE_ERROR", "hope", "'deny', 'allow' or 'lease'"),
        ("KTRDR_LEASE_SLAB", "agent", "not an amount"),
        ("KTRDR_LEASE_SLAB", "agent=0", "more than 0"),
        ("KTRDR_LEASE_SLAB", "agent=1,2", "name=amount"),
        ("KTRDR_AUTH", "maybe", "'keys' or 'none'"),
        ("KTRDR_API_KEY", "two words", "one word"),
        ("KTRDR_API_KEY", ",", "one word"),
        ("KTRDR_ADMIN_KEY", "k\u00e9y", "one word"),
        ("KTRDR_BUDGETS_FILE", "/nowhere/budgets.toml", "No such file"),
        ("KTRDR_BUDGETS_FILE", "/", "directory"),
    ],
)
def test_the_error_for_an_invalid_setting_starts_with_the_variable_name(environment, name, value, words):
    message = fault(environment, **{name: value})
    assert message.startswith(f"{name}: ")
    assert words in message


@pytest.mark.parametrize(
    "url", ["http://me:secret@store", "me:secret@store", "redis://me:secret@[::1", "redis://me:secret\u2100@store"]
)
def test_the_error_for_an_invalid_store_url_shows_no_secret(environment, url):
    assert "secret" not in fault(environment, KTRDR_REDIS_URL=url)


def test_keys_are_refused_if_auth_is_none_or_if_a_use_key_equals_the_admin_key(environment):
    assert "must differ" in fault(environment, KTRDR_API_KEY="one,two", KTRDR_ADMIN_KEY="two")
    assert "KTRDR_AUTH" in fault(environment, KTRDR_ADMIN_KEY="three", KTRDR_AUTH="none")


# -- the file of budgets -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name = ", "not TOML"),
        ("x = 1", "not 'x'"),
        ("budgets = 3", "[[budgets]]"),
        ("budgets = [1]", "[[budgets]]"),
        ("[[budgets]]\nlimit = 1", "budget 1: name is missing"),
        ('[[budgets]]\nname = "a"', "budget 1 (a): limit is missing"),
        ('[[budgets]]\nname = "a b"\nlimit = 1', "budget name must match"),
        ("[[budgets]]\nname = 7\nlimit = 1", "budget name must match"),
        ('[[budgets]]\nname = "a"\nlimit = true', "not an amount"),
        ('[[budgets]]\nname = "a"\nlimit = "lots"', "not an amount"),
        ('[[budgets]]\nname = "a"\nlimit = [1]', "not an amount"),
        ('[[budgets]]\nname = "a"\nlimit = 1.5\nunit = "calls"', "whole number"),
        ('[[budgets]]\nname = "a"\nlimit = 1\nperiod = "year"', "period must be one of"),
        ('[[budgets]]\nname = "a"\nlimit = 1\nperiod = 7', "period must be one of"),
        ('[[budgets]]\nname = "a"\nlimit = 1\ntimezone = "Mars"', "unknown timezone"),
        ('[[budgets]]\nname = "a"\nlimit = 1\ntimezone = 7', "unknown timezone"),
        ('[[budgets]]\nname = "a"\nlimit = 1\nkind = "hope"', "kind must be"),
        ('[[budgets]]\nname = "a"\nlimit = 1\nunit = "a b"', "unit must match"),
        ('[[budgets]]\nname = "a"\nlimit = 1\nlimits = 2', "unknown field 'limits'"),
        ('[[budgets]]\nname = "a"\nlimit = 1\n[[budgets]]\nname = "a"\nlimit = 2', "budget 2 (a): 'a' is given twice"),
        ('[[budgets]]\nname = "agent"\nlimit = 1', "'agent' is set by AGENT_DAILY_BUDGET"),
        ('[[budgets]]\nname = "agent"\nlimit = {day = 1}', "'agent' is set by AGENT_DAILY_BUDGET"),
        ('[[budgets]]\nname = "a{b}{c}"\nlimit = 1', "must have a '/' between them"),
        ('[[budgets]]\nname = "a"\nlimit = {fortnight = 1}', "period must be one of"),
        ('[[budgets]]\nname = "a"\nlimit = {}', "must have an entry"),
        ('[[budgets]]\nname = "a"\nlimit = {day = {day = 1}}', "not an amount"),
        ('[[budgets]]\nname = "a"\nlimit = 1\nwhen = "model"', "when must be a mapping"),
        ('[[budgets]]\nname = "a"\nlimit = 1\nwhen = {model = 5}', "when: 'model' needs a pattern"),
        ('[[budgets]]\nname = "a"\nlimit = 1\nretention = 35', "retention must be"),
        ('[[budgets]]\nname = "a{b}"\nlimit = 1\n[[budgets]]\nname = "a{c}"\nlimit = 1', "both match 'a0'"),
        ('[[budgets]]\nname = "{b}"\nlimit = 1\nunit = "tokens"', "'agent' replaces {b}"),
    ],
)
def test_an_error_in_the_budgets_file_is_reported_with_the_file_path_and_the_cause(environment, tmp_path, text, words):
    path = tmp_path / "budgets.toml"
    path.write_text(text)
    message = fault(environment, KTRDR_BUDGETS_FILE=str(path))
    assert message.startswith(f"KTRDR_BUDGETS_FILE: {path}: ")
    assert words in message


def test_a_binary_budgets_file_is_refused(environment, tmp_path):
    path = tmp_path / "budgets.toml"
    path.write_bytes(b"\xff")
    assert "not a text in UTF-8" in fault(environment, KTRDR_BUDGETS_FILE=str(path))


def test_an_empty_budgets_file_adds_no_budget(environment, tmp_path):
    path = tmp_path / "budgets.toml"
    path.write_text("# none yet\n")
    assert len(of(environment, KTRDR_BUDGETS_FILE=str(path)).budgets) == 1


def test_the_budgets_file_may_define_templates_windows_conditions_and_retention(environment, tmp_path):
    path = tmp_path / "budgets.toml"
    path.write_text(
        """
        [[budgets]]
        name = "team:{team}"
        limit = {day = "5.00", month = "unlimited"}
        retention = "48h"

        [[budgets]]
        name = "gpt-5"
        limit = 20
        when = {model = ["gpt-5", "gpt-5-*"]}

        [[budgets]]
        name = "everything"
        limit = "unlimited"
        when = {}
        """,
        encoding="utf-8",
    )
    assert of(environment, KTRDR_BUDGETS_FILE=str(path)).budgets[1:] == (
        Budget("team:{team}", {"day": "5.00", "month": None}, retention="48h"),
        Budget("gpt-5", "20.00", when={"model": ["gpt-5", "gpt-5-*"]}),
        Budget("everything", None, when={}),
    )


def test_a_number_in_the_budgets_file_keeps_its_exact_value(environment, tmp_path):
    path = tmp_path / "budgets.toml"
    path.write_text(BUDGETS.replace("2.50", "0.300000001"))
    assert of(environment, KTRDR_BUDGETS_FILE=str(path)).budgets[2].limit == Decimal("0.300000001")
