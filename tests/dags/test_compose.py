"""docker-compose.yaml: no container engine is at hand, so everything it names is checked."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[2]

#: The part of the compose specification that our file uses; anything else is a mistake here.
STRING_OR_LIST = {"oneOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
SERVICE = {
    "type": "object",
    "additionalProperties": False,
    "anyOf": [{"required": ["image"]}, {"required": ["build"]}],
    "properties": {
        "image": {"type": "string"},
        "build": {"type": "string"},
        "command": STRING_OR_LIST,
        "entrypoint": STRING_OR_LIST,
        "environment": {"type": "object", "additionalProperties": {"type": "string"}},
        "volumes": {"type": "array", "items": {"type": "string", "pattern": "^[^:]+(:[^:]+)+$"}},
        "ports": {"type": "array", "items": {"pattern": r"^127\.0\.0\.1:\d+:\d+$"}},
        "expose": {"type": "array", "items": {"type": "string", "pattern": r"^\d+$"}},
        "profiles": {"type": "array", "items": {"type": "string"}},
        "restart": {"enum": ["no", "always", "on-failure", "unless-stopped"]},
        "stop_grace_period": {"type": "string", "pattern": r"^\d+(s|m|h)$"},
        "healthcheck": {
            "type": "object",
            "additionalProperties": False,
            "required": ["test"],
            "properties": {
                "test": {"type": "array", "items": {"type": "string"}, "minItems": 2},
                "retries": {"type": "integer", "minimum": 1},
                **{
                    name: {"type": "string", "pattern": r"^\d+(s|m)$"}
                    for name in ("interval", "timeout", "start_period")
                },
            },
        },
        "depends_on": {
            "type": "object",
            "additionalProperties": {
                "type": "object",
                "additionalProperties": False,
                "required": ["condition"],
                "properties": {
                    "condition": {
                        "enum": [
                            "service_started",
                            "service_healthy",
                            "service_completed_successfully",
                        ]
                    }
                },
            },
        },
    },
}
COMPOSE = {
    "type": "object",
    "additionalProperties": False,
    "required": ["services"],
    "patternProperties": {"^x-": {}},
    "properties": {
        "services": {"type": "object", "additionalProperties": SERVICE},
        "volumes": {"type": "object", "additionalProperties": {"type": "null"}},
    },
}


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yaml").read_text())
    return loaded


@pytest.fixture(scope="module")
def ours(compose: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Services of our own image, with one merged view of what each declares."""
    return {name: one for name, one in compose["services"].items() if "build" in one}


def test_it_is_of_the_specifications_form(compose: dict[str, Any]) -> None:
    jsonschema.validate(compose, COMPOSE)


def test_every_dependency_exists_and_can_meet_its_condition(compose: dict[str, Any]) -> None:
    services = compose["services"]
    for name, service in services.items():
        for needed, how in service.get("depends_on", {}).items():
            assert needed in services, f"{name} needs {needed}"
            if how["condition"] == "service_healthy":
                assert "healthcheck" in services[needed], f"{needed} has no health check"
            if how["condition"] == "service_completed_successfully":
                assert services[needed]["restart"] == "no", f"{needed} would be restarted"


def test_every_named_volume_is_declared_and_every_path_exists(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        for volume in service.get("volumes", []):
            source = volume.rsplit(":/", 1)[0]
            if source.startswith("./"):
                assert (ROOT / source).exists(), source
            elif not source.startswith("${"):
                assert source in compose["volumes"], source


def test_what_the_api_server_writes_is_on_a_volume_that_can_be_written(
    compose: dict[str, Any],
) -> None:
    server = compose["services"]["airflow-apiserver"]
    file = server["environment"]["AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE"]
    writable = [one.partition(":")[2] for one in server["volumes"] if not one.endswith(":ro")]
    assert any(Path(file).is_relative_to(path) for path in writable), file


def test_every_airflow_command_exists(ours: dict[str, dict[str, Any]]) -> None:
    from airflow.cli.cli_parser import airflow_commands

    known: dict[str, set[str]] = {
        command.name: {sub.name for sub in getattr(command, "subcommands", [])}
        for command in airflow_commands
    }
    known["celery"] = {"worker"}  # comes with the Celery provider of Airflow's own image
    for name, service in ours.items():
        if "entrypoint" in service:
            continue
        first, *rest = service["command"]
        assert first in known, f"{name}: airflow {first}"
        assert not rest or rest[0] in known[first], (
            f"{name}: airflow {' '.join(service['command'])}"
        )


def test_every_cellferry_command_exists(ours: dict[str, dict[str, Any]]) -> None:
    import click

    from cellferry.cli import main

    commands = [one["command"] for one in ours.values() if one.get("entrypoint") == ["cellferry"]]
    assert commands
    for words in commands:
        found: click.Command = main
        for word in words:
            assert isinstance(found, click.Group)
            assert word in found.commands, " ".join(words)
            found = found.commands[word]


def test_every_airflow_setting_exists(ours: dict[str, dict[str, Any]]) -> None:
    from airflow.configuration import conf

    # the Celery provider's own sections
    known = {("celery", "result_backend"), ("celery", "broker_url")}
    # settings of the auth manager that the file chooses
    for section, content in conf.configuration_description.items():
        known |= {(section, option) for option in content["options"]}
    for service in ours.values():
        for variable in service["environment"]:
            if match := re.fullmatch(r"AIRFLOW__(\w+?)__(\w+)", variable):
                found = (match[1].lower(), match[2].lower())
                assert found in known, variable


def test_no_secret_has_a_default(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        for variable, value in service.get("environment", {}).items():
            if re.search(r"(PASSWORD|SECRET|_KEY)$", variable):
                assert re.fullmatch(r"\$\{\w+:(\?.+|-)\}", value), f"{name}: {variable}"


def test_everything_the_dockerfile_copies_exists() -> None:
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    copied = [line.split()[2:-1] for line in lines if line.startswith("COPY")]
    assert copied
    for sources in copied:
        for source in sources:
            assert (ROOT / source).exists(), source


def test_the_image_is_of_the_locked_airflow() -> None:
    locked = re.search(
        r"^apache-airflow==(\S+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE
    )
    assert locked is not None
    assert f"FROM apache/airflow:{locked[1]}-" in (ROOT / "Dockerfile").read_text()
