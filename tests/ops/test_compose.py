"""The compose file and the image, checked without a container engine."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from ktrdr_budget.agent.settings import AgentSettings
from ktrdr_budget.api.settings import Settings, load_settings
from ktrdr_budget.metering.prices import load_prices

from ..api.processes import serving
from ..conftest import free_port
from ..helpers.tools import compose
from .files import ALERTS, CADDYFILE, COMPOSE, DATASOURCES, DOCKERFILE, PROMETHEUS, PROVIDERS, ROOT, read_yaml

SERVICES: dict[str, Any] = read_yaml(COMPOSE)["services"]
BACKENDS = ("backend-1", "backend-2")
PUBLISHED = {"proxy": {8000}, "prometheus": {9090}, "grafana": {3000}, "jaeger": {16686, 4318}}
SECRET = re.compile(r"KEY|SECRET|TOKEN|PASSWORD")


def rendered(env_file: Path | None = None, **environment: str) -> dict[str, Any]:
    """Render the services with the compose tool, for a `.env` and an environment."""
    clean = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    given = [] if env_file is None else ["--env-file", str(env_file)]
    command = [*compose(), "--file", str(COMPOSE), *given, "config"]
    done = subprocess.run(
        command, env={**clean, **environment}, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout)["services"]


def variables(service: dict[str, Any]) -> dict[str, str | None]:
    """The environment of a service in the file; ``None`` for a name without a value."""
    environment = service.get("environment", {})
    if isinstance(environment, list):
        return {
            name: value if equals else None for name, equals, value in (word.partition("=") for word in environment)
        }
    return environment


def environment_of(service: dict[str, Any]) -> dict[str, str]:
    """The environment variables of a service that have a value."""
    return {name: str(value) for name, value in variables(service).items() if value is not None}


# -- the file ----------------------------------------------------------------------------------------------------------


def test_the_compose_file_matches_the_schema_of_the_compose_specification():
    words = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(COMPOSE)]
    checked = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_the_compose_file_has_all_services_of_the_stack():
    assert set(SERVICES) == {"redis", *BACKENDS, "proxy", "prometheus", "grafana", "jaeger"}
    assert SERVICES["backend-1"] == SERVICES["backend-2"]


def test_ports_are_published_on_loopback_only():
    published = {}
    for name, service in SERVICES.items():
        for port in service.get("ports", []):
            address, outside, inside = port.split(":")
            assert address == "127.0.0.1"
            assert outside == inside
            published.setdefault(name, set()).add(int(outside))
    assert published == PUBLISHED
    assert "network_mode" not in COMPOSE.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", SERVICES)
def test_each_service_has_a_pinned_image_and_automatic_restarts_and_no_extra_privileges(name):
    service = SERVICES[name]
    built = "build" in service
    assert built or re.fullmatch(r"[a-z/]+:v?\d+\.\d+\.\d+(-alpine)?", service["image"])
    assert service["restart"] == "unless-stopped"
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["mem_limit"]
    assert service["logging"]["options"]["max-size"]
    assert "privileged" not in service
    assert service.get("cap_add", []) == (["NET_BIND_SERVICE"] if name == "proxy" else [])


def test_the_compose_file_contains_no_secrets():
    for service in SERVICES.values():
        for name, value in variables(service).items():
            assert value is None or not SECRET.search(name), name
            assert not re.search(r"://[^/]*:[^/]*@", str(value)), name
        assert not any(SECRET.search(word) for word in service.get("build", {}).get("args", {}))


def test_the_store_persists_writes_and_evicts_nothing():
    words = SERVICES["redis"]["command"]
    options = dict(zip(words[1::2], words[2::2], strict=True))
    assert options["--appendonly"] == "yes"
    assert options["--maxmemory-policy"] == "noeviction"
    assert SERVICES["redis"]["volumes"] == ["redis-data:/data"]
    # Without -e, an error reply such as LOADING counts as success.
    assert SERVICES["redis"]["healthcheck"]["test"] == ["CMD", "redis-cli", "-e", "ping"]


@pytest.mark.parametrize("name", [name for name, service in SERVICES.items() if "build" not in service])
def test_every_service_with_a_ready_made_image_has_a_health_check(name):
    """The image contains the backend's own check."""
    check = SERVICES[name]["healthcheck"]
    assert check["test"][0] == "CMD"
    assert check.keys() >= {"interval", "timeout", "retries"}


def test_grafana_has_60_seconds_to_start_and_the_health_check_of_jaeger_reads_the_status_page():
    assert SERVICES["grafana"]["healthcheck"]["start_period"] == "60s"
    assert SERVICES["jaeger"]["healthcheck"]["test"][-1] == "http://127.0.0.1:13133/status"


def test_the_proxy_can_write_to_its_directories():
    """A tmpfs over a directory of the image has that directory's owner and mode by default."""
    user, group = SERVICES["proxy"]["user"].split(":")
    assert set(SERVICES["proxy"]["tmpfs"]) == {
        "/tmp", *(f"{path}:uid={user},gid={group},mode=0700" for path in ("/data", "/config")),
    }  # fmt: skip


def test_the_replicas_wait_for_the_store_and_the_proxy_waits_for_the_replicas():
    for name in BACKENDS:
        assert SERVICES[name]["depends_on"] == {"redis": {"condition": "service_healthy"}}
    assert SERVICES["proxy"]["depends_on"] == {name: {"condition": "service_healthy"} for name in BACKENDS}


def test_all_volumes_are_declared_and_all_mounted_files_exist():
    declared, used = set(read_yaml(COMPOSE)["volumes"]), set()
    for service in SERVICES.values():
        for volume in service.get("volumes", []):
            source, target, *mode = volume.split(":")
            assert target.startswith("/")
            if source.startswith("."):
                assert (ROOT / source).exists(), source
                assert mode == ["ro"]
            else:
                used.add(source)
    assert used == declared == {"redis-data", "prometheus-data", "grafana-data"}


def test_grafana_shows_a_read_only_dashboard_without_a_login():
    environment = SERVICES["grafana"]["environment"]
    assert environment["GF_AUTH_ANONYMOUS_ENABLED"] == "true"
    assert environment["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"
    assert environment["GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION"] == "true"
    assert environment["GF_AUTH_DISABLE_LOGIN_FORM"] == "true"


# -- connections -------------------------------------------------------------------------------------------------------


def mounted(name: str) -> dict[str, Path]:
    """The mounted files of this repository, by path in the service."""
    volumes = (volume.split(":") for volume in SERVICES[name].get("volumes", []))
    return {words[1]: ROOT / words[0] for words in volumes if words[0].startswith(".")}


def test_prometheus_scrapes_each_replica_directly():
    jobs = {job["job_name"]: job["static_configs"] for job in read_yaml(PROMETHEUS)["scrape_configs"]}
    assert jobs["ktrdr-backend"] == [{"targets": [f"{name}:8000" for name in BACKENDS]}]


def test_prometheus_finds_its_configuration_and_its_alert_rules_in_the_mounted_files():
    files = mounted("prometheus")
    assert files["/etc/prometheus/prometheus.yml"] == PROMETHEUS
    assert read_yaml(PROMETHEUS)["rule_files"] == ["alerts.yml"]
    assert files["/etc/prometheus/alerts.yml"] == ALERTS
    assert "--config.file=/etc/prometheus/prometheus.yml" in SERVICES["prometheus"]["command"]


def test_grafana_finds_its_datasources_and_its_dashboard_in_the_mounted_files():
    files = mounted("grafana")
    assert files["/etc/grafana/provisioning"] / "datasources" == DATASOURCES.parent
    assert files["/etc/grafana/provisioning"] / "dashboards" == PROVIDERS.parent
    (provider,) = read_yaml(PROVIDERS)["providers"]
    home = Path(SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert home.parent == Path(provider["options"]["path"])
    assert (files[str(home.parent)] / home.name).exists()
    for source in read_yaml(DATASOURCES)["datasources"]:
        url = urlsplit(source["url"])
        assert url.port in PUBLISHED[url.hostname]


def test_the_proxy_forwards_to_both_replicas():
    assert SERVICES["proxy"]["environment"]["BACKENDS"].split() == [f"{name}:8000" for name in BACKENDS]
    assert "{$BACKENDS:backend-1:8000 backend-2:8000}" in CADDYFILE.read_text(encoding="utf-8")
    assert mounted("proxy")["/etc/caddy/Caddyfile"] == CADDYFILE


def test_the_replicas_send_traces_to_jaeger():
    url = urlsplit(environment_of(rendered()["backend-1"])["OTEL_EXPORTER_OTLP_ENDPOINT"])
    assert (url.scheme, url.hostname) == ("http", "jaeger")
    assert url.port in PUBLISHED["jaeger"]
    assert SERVICES["jaeger"]["environment"]["JAEGER_LISTEN_HOST"] == "0.0.0.0"


# -- settings ----------------------------------------------------------------------------------------------------------


TABLE = re.findall(r"^\| `([A-Z_]+)` \|", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
DEFAULTS = {
    "KTRDR_REDIS_URL": "redis://redis:6379/0",
    "OTEL_EXPORTER_OTLP_ENDPOINT": "http://jaeger:4318",
    "OTEL_SERVICE_NAME": "ktrdr-backend",
}


def test_the_compose_tool_accepts_the_compose_file():
    assert set(rendered()) == set(SERVICES)


def test_each_variable_of_the_readme_reaches_both_replicas(tmp_path):
    assert len(TABLE) > 20
    given = {name: f"value-of-{number}" for number, name in enumerate(TABLE)}
    env_file = tmp_path / "env"
    env_file.write_text("".join(f"{name}={value}\n" for name, value in given.items()))
    for services in (rendered(env_file), rendered(**given)):
        for name in BACKENDS:
            passed = environment_of(services[name])
            assert {variable: passed.get(variable) for variable in TABLE} == given


@pytest.mark.parametrize("content", ["", "".join(f"{name}=\n" for name in DEFAULTS)], ids=["empty", "emptied"])
def test_if_the_env_file_sets_no_value_the_replicas_get_only_the_default_variables(tmp_path, content):
    env_file = tmp_path / "env"
    env_file.write_text(content)
    for services in (rendered(env_file), rendered()):
        for name in BACKENDS:
            assert environment_of(services[name]) == DEFAULTS


def test_the_compose_file_changes_no_default_setting_except_the_store_url(monkeypatch):
    for name in [*os.environ]:
        if re.match(r"(KTRDR|AGENT|TRAINING|BACKTEST)_", name):
            monkeypatch.delenv(name)
    own, own_agent = load_settings(), AgentSettings.from_environment({})
    given = environment_of(rendered()["backend-1"])
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    settings = load_settings()
    differing = {name for name in Settings.model_fields if getattr(settings, name) != getattr(own, name)}
    assert differing == {"redis_url"}
    assert settings.store_url == "redis://redis:6379/0"
    assert AgentSettings.from_environment(given) == own_agent


@pytest.mark.parametrize(
    ("given", "auth"),
    [
        ({}, "none"),
        ({"KTRDR_API_KEY": "", "KTRDR_AUTH": ""}, "none"),
        ({"KTRDR_API_KEY": "use-1"}, None),
        ({"KTRDR_ADMIN_KEY": "admin-1"}, None),
        ({"KTRDR_AUTH": "keys"}, "keys"),
    ],
)
def test_replicas_require_a_key_only_if_keys_are_set(tmp_path, monkeypatch, given, auth):
    """Run the container's command with a program that prints its arguments."""
    program = tmp_path / "ktrdr"
    program.write_text('#!/bin/sh\necho "$*"\nenv\n')
    program.chmod(0o755)
    [word, option, script] = SERVICES["backend-1"]["command"]
    script = script.replace("$$", "$")
    done = subprocess.run(
        [word, option, script],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", **given},
        capture_output=True,
        text=True,
        check=True,
    )
    words, *lines = done.stdout.splitlines()
    assert words == " ".join(json.loads(dict(instructions())["CMD"])[1:])  # the same as in the image
    started = dict(line.split("=", 1) for line in lines if line.startswith("KTRDR_"))
    assert started.get("KTRDR_AUTH") == auth
    for name in [*os.environ]:
        if name.startswith("KTRDR_"):
            monkeypatch.delenv(name)
    for name, value in started.items():
        monkeypatch.setenv(name, value)
    settings = load_settings()
    assert (settings.auth == "none") is (auth == "none")


def test_the_mounted_budget_and_price_files_are_valid(monkeypatch):
    files = mounted("backend-1")["/etc/ktrdr"]
    monkeypatch.setenv("KTRDR_BUDGETS_FILE", str(files / "budgets.toml"))
    assert [budget.name for budget in load_settings().budgets] == ["agent", "team:quant"]
    assert [price.model for price in load_prices(files / "prices.toml")] == ["road-runner"]


def test_the_backend_reads_each_variable_set_in_the_compose_file():
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "ktrdr_budget").rglob("*.py"))
    prefixed = {f"KTRDR_{name.upper()}" for name in Settings.model_fields}
    for name in variables(SERVICES["backend-1"]):
        if not name.startswith(("OTEL_", "ANTHROPIC_", "OPENAI_")):  # read by libraries
            assert name in prefixed or re.search(rf"\b{name}\b", source), name


# -- the image ---------------------------------------------------------------------------------------------------------


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"\\\n", " ", DOCKERFILE.read_text(encoding="utf-8"))
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line and line[0] not in "# "]


def copied() -> list[str]:
    """The files that are copied into the image from this repository, not from another build stage."""
    words = [rest.split() for name, rest in instructions() if name == "COPY" and "--from" not in rest]
    return [source for sources in words for source in sources[:-1]]


def test_the_image_has_a_pinned_base_and_a_user_without_root_rights_and_a_health_check():
    bases = {rest.split()[0] for name, rest in instructions() if name == "FROM"}
    assert len(bases) == 1
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", bases.pop())
    assert [rest for name, rest in instructions() if name == "USER"] == ["10001:10001"]
    names = [name for name, _ in instructions()]
    assert names.index("USER") < names.index("CMD")
    assert "/readyz" in dict(instructions())["HEALTHCHECK"]


def test_the_build_context_contains_exactly_the_files_copied_into_the_image():
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    assert {line[1:] for line in rules if line.startswith("!")} == set(copied())


def test_the_wheel_can_be_built_from_the_files_copied_into_the_image(tmp_path):
    for name in copied():
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    words = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(tmp_path / "out"),
        str(tmp_path),
    ]
    subprocess.run(words, check=True, capture_output=True, timeout=100)
    (wheel,) = (tmp_path / "out").iterdir()
    names = zipfile.ZipFile(wheel).namelist()
    assert "ktrdr_budget/api/app.py" in names
    assert any(name.startswith("ktrdr_budget/lua/") for name in names)


@pytest.mark.slow
def test_the_health_check_fails_if_the_service_is_not_ready(server):
    (program,) = re.findall(r'CMD \["python", "-c", "(.+)"\]', DOCKERFILE.read_text(encoding="utf-8"))

    def check(port: int) -> int:
        words = [sys.executable, "-c", program.replace(":8000/", f":{port}/")]
        return subprocess.run(words, capture_output=True, timeout=60, check=False).returncode

    assert check(free_port()) == 1
    with serving(KTRDR_REDIS_URL=server.url) as service:
        assert check(service.port) == 0
    with serving(KTRDR_REDIS_URL=f"{server.url}.gone", KTRDR_TIMEOUT="0.5") as service:
        assert check(service.port) == 1
