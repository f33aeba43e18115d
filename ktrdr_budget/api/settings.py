"""The settings of the service: environment variables, and a file with further budgets."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import AliasChoices, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from ktrdr_budget import environment
from ktrdr_budget.definitions import Catalog
from ktrdr_budget.engine.replica.state import MAX_BUDGETS, MAX_HOLDS, RETENTION_DAYS, RETENTION_DAYS_MIN
from ktrdr_budget.engine.transport.urls import check_url, mask_url
from ktrdr_budget.environment import AGENT, CYCLE_ESTIMATE_DEFAULT, DAILY_BUDGET_DEFAULT, DATA_DIR_DEFAULT, parse_limit
from ktrdr_budget.errors import InvalidArgument
from ktrdr_budget.models import Budget, check_name
from ktrdr_budget.money import AmountIn, from_units, to_units
from ktrdr_budget.periods import timezone_of

__all__ = ["AGENT", "Settings", "SettingsError", "load_settings"]

_BUDGET_FIELDS = ("name", "limit", "unit", "period", "timezone", "kind", "when", "retention")
_KEY = re.compile(r"[\x21-\x2b\x2d-\x7e]{1,4096}", re.ASCII)  # one word of a header, without a comma


class SettingsError(ValueError):
    """A setting is invalid. The message is one line that names the setting and shows no secret."""


class Settings(BaseSettings):
    """The settings of the service. Each field is read from an environment variable.

    The variable of a field has the name of the field, in capitals. The variables of ``redis_url``, ``tenant``,
    ``api_key``, ``admin_key``, ``auth``, ``timeout``, ``on_store_error``, ``lease_slab``, ``durability``,
    ``max_holds``, ``max_budgets``, ``retention_days`` and ``budgets_file`` also have the prefix ``KTRDR_``.
    ``AGENT_DAILY_BUDGET`` is accepted with and without this prefix.
    """

    model_config = SettingsConfigDict(
        env_prefix="KTRDR_",
        env_ignore_empty=True,
        extra="ignore",
        frozen=True,
        populate_by_name=True,
        hide_input_in_errors=True,
    )

    agent_daily_budget: Decimal | None = Field(
        default=DAILY_BUDGET_DEFAULT, validation_alias=AliasChoices("AGENT_DAILY_BUDGET", "KTRDR_AGENT_DAILY_BUDGET")
    )
    """The agent's daily limit in dollars; ``None`` (``unlimited``) means no limit, and 0 denies every reservation."""
    agent_budget_dir: Path = Field(default=Path(DATA_DIR_DEFAULT), validation_alias="AGENT_BUDGET_DIR")
    """The data directory of the embedded server."""
    agent_cycle_estimate: Decimal = Field(default=CYCLE_ESTIMATE_DEFAULT, validation_alias="AGENT_CYCLE_ESTIMATE")
    """The expected cost of a research cycle, in dollars."""
    agent_budget_timezone: str = Field(default="UTC", validation_alias="AGENT_BUDGET_TIMEZONE")
    """The timezone of the agent's day."""
    redis_url: SecretStr | None = None
    """The URL of the store; ``None`` selects the embedded server."""
    tenant: str = "default"
    api_key: SecretStr | None = None
    """Keys that may use budgets, separated by commas."""
    admin_key: SecretStr | None = None
    """Keys that may do everything, separated by commas."""
    auth: Literal["keys", "none"] = "keys"
    """``none``: the service needs no keys and may listen on any address."""
    timeout: float = Field(default=1.0, gt=0, le=3600)
    """The deadline of each call to the store, in seconds."""
    on_store_error: Literal["deny", "allow", "lease"] = "deny"
    """The policy while the store is unreachable.

    ``deny`` refuses requests. ``allow`` admits requests unchecked, and records them later. ``lease`` admits requests
    from prepaid leases.
    """
    lease_slab: str | None = None
    """The prepaid chunk of a lease: an amount for every budget in dollars, or ``name=amount`` pairs, as ``a=1,b=2``."""
    durability: Literal["memory", "replica", "disk"] = "memory"
    """Where the store must have a write before the service replies: in memory, on a replica, or on the disk."""
    max_holds: int = Field(default=MAX_HOLDS, ge=1)
    """The maximum number of open and unconfirmed holds of the tenant."""
    max_budgets: int = Field(default=MAX_BUDGETS, ge=1)
    """The maximum number of budgets of the tenant."""
    retention_days: int = Field(default=RETENTION_DAYS, ge=RETENTION_DAYS_MIN, le=3650)
    """Days for which the store keeps ended windows and their ledgers."""
    budgets_file: Path | None = None
    """TOML with further budgets: tables ``[[budgets]]`` with the fields of ``Budget``; a limit may be ``"unlimited"``,
    or a table of limits by period.
    The agent's budget must not be in the file, because ``agent_daily_budget`` is the only source of its limit."""

    # -- fields --------------------------------------------------------------------------------------------------------

    @field_validator("agent_daily_budget", mode="before")
    @classmethod
    def _limit(cls, value: Any) -> Any:
        return parse_limit(value) if isinstance(value, str) else _usd_limit(value)

    @field_validator("agent_cycle_estimate", mode="before")
    @classmethod
    def _estimate(cls, value: Any) -> Any:
        return from_units(to_units(value.strip() if isinstance(value, str) else value, positive=True))

    @field_validator("agent_budget_timezone", mode="after")
    @classmethod
    def _timezone(cls, value: str) -> str:
        timezone_of(value)
        return value

    @field_validator("redis_url", mode="after")
    @classmethod
    def _url(cls, value: SecretStr | None) -> SecretStr | None:
        try:
            if value is not None:
                check_url(value.get_secret_value())
        except InvalidArgument:
            raise
        except ValueError:
            raise ValueError("not a URL") from None  # the parser's message may contain the password
        return value

    @field_validator("tenant", mode="after")
    @classmethod
    def _tenant(cls, value: str) -> str:
        return check_name(value, "tenant")

    @field_validator("api_key", "admin_key", mode="after")
    @classmethod
    def _keys(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not all(_KEY.fullmatch(key) for key in _split(value) or ("",)):
            raise ValueError("a key must be one word of printable ASCII characters; separate several keys by commas")
        return value

    @field_validator("lease_slab", mode="after")
    @classmethod
    def _slab(cls, value: str | None) -> str | None:
        _slabs(value or "")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        if self.on_store_error == "lease" and self.lease_slab is None:
            raise ValueError("KTRDR_ON_STORE_ERROR=lease needs KTRDR_LEASE_SLAB, the prepaid amount, such as 0.50")
        if self.on_store_error != "lease" and self.lease_slab is not None:
            raise ValueError("KTRDR_LEASE_SLAB needs KTRDR_ON_STORE_ERROR=lease")
        if self.auth == "none" and (self.use_keys or self.admin_keys):
            raise ValueError("KTRDR_AUTH is 'none', but keys are set: unset KTRDR_AUTH or the keys")
        if set(self.use_keys) & set(self.admin_keys):
            raise ValueError("KTRDR_API_KEY and KTRDR_ADMIN_KEY must differ")
        return self

    # -- derived values -----------------------------------------------------------------------------------------------

    @property
    def use_keys(self) -> tuple[str, ...]:
        """The keys that may use budgets."""
        return _split(self.api_key)

    @property
    def admin_keys(self) -> tuple[str, ...]:
        """The keys that may do everything."""
        return _split(self.admin_key)

    @property
    def lease_slabs(self) -> AmountIn | Mapping[str, AmountIn] | None:
        """The prepaid amount for each budget in dollars, or a mapping of names to amounts.

        ``None`` unless the policy is ``lease``.
        """
        return None if self.lease_slab is None else _slabs(self.lease_slab)

    @property
    def store_url(self) -> str | None:
        """The store's URL with its secrets; ``None`` if the store is the embedded server."""
        return None if self.redis_url is None else self.redis_url.get_secret_value()

    @property
    def store_shown(self) -> str:
        """The store's URL without secrets, or the data directory of the embedded server."""
        url = self.store_url
        return f"embedded, {self.agent_budget_dir}" if url is None else mask_url(url)

    @cached_property
    def budgets(self) -> tuple[Budget, ...]:
        """The agent's budget, then the budgets of the file.

        Raises:
            SettingsError: the file or an entry is invalid.
        """
        agent = Budget(AGENT, self.agent_daily_budget, timezone=self.agent_budget_timezone)
        if self.budgets_file is None:
            return (agent,)
        budgets = (agent, *_read_budgets(self.budgets_file))
        try:
            Catalog(budgets)
        except InvalidArgument as error:
            raise SettingsError(f"KTRDR_BUDGETS_FILE: {self.budgets_file}: {error}") from None
        return budgets


def load_settings() -> Settings:
    """Read the settings from the environment, and the budgets.

    Raises:
        SettingsError: a setting or a budget is invalid.
    """
    try:
        environment.check_names()
        environment.store_url()  # an empty variable is an error, not the embedded server
        settings = Settings()
    except InvalidArgument as error:
        raise SettingsError(str(error)) from None
    except ValidationError as error:
        raise SettingsError(_one_line(error)) from None
    # Read the file now, so that its errors appear at the start.
    spendable = [budget.name for budget in settings.budgets if budget.kind == "spend"]
    slabs = settings.lease_slabs
    for name in slabs if isinstance(slabs, Mapping) else ():
        if name not in spendable:
            raise SettingsError(
                f"KTRDR_LEASE_SLAB: {name!r} is not a budget of kind 'spend'; those are: {', '.join(spendable)}"
            )
    return settings


def _one_line(error: ValidationError) -> str:
    """The first error, with the name of the environment variable. The value is left out: it may be a secret."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    text = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:
        return text
    name = str(first["loc"][0])
    variable = name if name.isupper() else f"KTRDR_{name.upper()}"
    return f"{variable}: {text}"


def _slabs(text: str) -> AmountIn | Mapping[str, AmountIn] | None:
    """Parse an amount in dollars, or ``name=amount`` pairs separated by commas; ``None`` for an empty text."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    if len(words) == 1 and "=" not in words[0]:
        return from_units(to_units(words[0], positive=True))
    slabs: dict[str, AmountIn] = {}
    for word in words:
        name, equals, amount = word.rpartition("=")
        if not equals:
            raise InvalidArgument(f"must be an amount, or name=amount pairs separated by commas, not {word!r}")
        to_units(amount.strip(), positive=True)
        slabs[check_name(name.strip(), "budget name")] = amount.strip()
    return slabs or None


def _usd_limit(value: Any) -> Any:
    return None if value is None else from_units(to_units(value, round_down=True))


def _split(keys: SecretStr | None) -> tuple[str, ...]:
    if keys is None:
        return ()
    return tuple(key for key in (word.strip() for word in keys.get_secret_value().split(",")) if key)


# -- the file of further budgets ---------------------------------------------------------------------------------------


def _read_budgets(path: Path) -> list[Budget]:
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"), parse_float=Decimal)
    except OSError as error:
        raise SettingsError(f"KTRDR_BUDGETS_FILE: {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise SettingsError(f"KTRDR_BUDGETS_FILE: {path}: not a text in UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"KTRDR_BUDGETS_FILE: {path}: not TOML: {error}") from None
    entries = document.pop("budgets", [])
    if document or not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        unknown = f", not {', '.join(map(repr, document))}" if document else ""
        raise SettingsError(f"KTRDR_BUDGETS_FILE: {path}: the file must contain only tables named [[budgets]]{unknown}")
    budgets: list[Budget] = []
    names = {AGENT}
    for number, entry in enumerate(entries, 1):
        where = f"{path}: budget {number}" + (f" ({entry['name']})" if isinstance(entry.get("name"), str) else "")
        try:
            budget = _budget(entry)
        except InvalidArgument as error:
            raise SettingsError(f"KTRDR_BUDGETS_FILE: {where}: {error}") from None
        if budget.name in names:
            instead = "is set by AGENT_DAILY_BUDGET" if budget.name == AGENT else "is given twice"
            raise SettingsError(f"KTRDR_BUDGETS_FILE: {where}: {budget.name!r} {instead}")
        names.add(budget.name)
        budgets.append(budget)
    return budgets


def _budget(entry: dict[str, Any]) -> Budget:
    for field in entry:
        if field not in _BUDGET_FIELDS:
            raise InvalidArgument(f"unknown field {field!r}; the fields are {', '.join(_BUDGET_FIELDS)}")
    for field in ("name", "limit"):
        if field not in entry:
            raise InvalidArgument(f"{field} is missing" + (" ('unlimited' is allowed)" if field == "limit" else ""))
    limit = entry["limit"]
    if isinstance(limit, dict):
        limit = {period: _read_limit(each) for period, each in limit.items()}
    return Budget(**{**entry, "limit": _read_limit(limit)})


def _read_limit(limit: Any) -> Any:
    return None if isinstance(limit, str) and limit.strip().lower() == "unlimited" else limit
