"""The files in deploy/ and what docs/deploy.md says: no container engine runs here, so they are read and judged."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import click
import pytest
import typer
import yaml

from foedus.cli import app
from foedus.dashboard import ALARMS
from foedus.deploy.home import Settings, SiloSettings

ROOT = Path(__file__).parent.parent
DEPLOY, DOCS = ROOT / "deploy", ROOT / "docs/deploy.md"
UNITS = sorted(DEPLOY.glob("*.service"))
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVICES = COMPOSE["services"]
VERIFIER = shutil.which("systemd-analyze")
DOCKERFILE = (
    "ARG FROM RUN CMD LABEL EXPOSE ENV ADD COPY ENTRYPOINT VOLUME USER WORKDIR ONBUILD STOPSIGNAL HEALTHCHECK SHELL"
).split()
KEYS = set(
    "image build user working_dir read_only cap_drop security_opt tmpfs init restart stop_grace_period healthcheck"
    " logging profiles command environment secrets ports volumes deploy".split()
)
"""Of the Compose specification, those that are used here."""


# Commands


def parsed(words: list[str]) -> click.Command:
    """The command that these words name. Fails for a command, an option or an argument that there is not."""
    command, context = typer.main.get_command(app), None
    name = "foedus"
    while isinstance(command, click.Group):
        context = click.Context(command, parent=context, info_name=name)
        name, command, words = command.resolve_command(context, words)
        assert command is not None
    if "--help" not in words:
        command.make_context(name, list(words), parent=context)
    return command


def commands(text: str) -> list[list[str]]:
    """Every command line of Foedus on a page, in blocks and in sentences."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    sentences = re.findall(r"`(foedus [^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()] + sentences
    return [found for line in lines for found in calls(line)]


def calls(line: str) -> list[list[str]]:
    """The calls of `foedus` in a line of shell."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    found: list[list[str]] = []
    inside, before = False, ""
    for word in lexer:
        if set(word) <= set("();<>|&"):
            inside = False
        elif word.endswith("/bin/foedus") or (word == "foedus" and not inside and before != "-u"):
            found.append([])
            inside = True
        elif inside:
            found[-1].append(word)
        before = word
    return [words for words in found if words]  # the account of that name is no call


def test_every_command_in_the_manual_exists():
    found = commands(DOCS.read_text())
    assert len(found) > 30
    for words in found:
        try:
            parsed(words)
        except click.UsageError as error:
            pytest.fail(f"foedus {shlex.join(words)}: {error.format_message()}")


def test_the_manual_says_what_to_do_about_every_alarm():
    page = DOCS.read_text().partition("## When an alarm fires")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `([a-z-]+)` \|", page, re.MULTILINE)) == set(ALARMS)


def test_the_manual_names_only_files_that_are_there():
    text = DOCS.read_text()
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (DOCS.parent / target).exists(), target
    for unit in re.findall(r"(?<![\w/])deploy/[\w@.-]+", text):
        if not unit.endswith((".env", ".md", "vault-key")):
            assert (ROOT / unit).exists(), unit


def test_the_ports_in_the_files_are_those_that_homes_begin_with():
    assert Settings("f", "127.0.0.1:9443").dashboard.endswith(":8800")
    assert SiloSettings("s").dashboard.endswith(":8801")
    assert [port.split(":")[-1] for port in SERVICES["coordinator"]["ports"]] == ["9443", "8800"]


# Compose


@pytest.mark.parametrize("name", SERVICES)
def test_a_container_has_a_read_only_root_no_privileges_and_limits(name):
    service = SERVICES[name]
    assert set(service) <= KEYS
    assert service["read_only"] is True and service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    user, group = service["user"].split(":")
    assert int(user) > 0 and int(group) > 0
    assert all({"noexec", "nosuid", "nodev"} <= set(mount.split(":")[1].split(",")) for mount in service["tmpfs"])
    assert set(service["deploy"]["resources"]["limits"]) == {"cpus", "memory", "pids"}
    assert service["restart"] == "unless-stopped" and service["init"] is True
    assert service["logging"]["options"] == {"max-size": "10m", "max-file": "5"}


@pytest.mark.parametrize("name", SERVICES)
def test_a_container_is_healthy_when_its_dashboard_answers(name):
    check = SERVICES[name]["healthcheck"]
    assert check["test"][0] == "CMD" and "/healthz" in check["test"][-1]
    compile(check["test"][-1], "healthcheck", "exec")
    inner = check["test"][-1].partition("127.0.0.1:")[2].partition("/")[0]
    assert any(port.endswith(f":{inner}") for port in SERVICES[name]["ports"])


@pytest.mark.parametrize("name", SERVICES)
def test_a_container_runs_a_command_that_exists_as_one_party(name):
    parsed([re.sub(r"\$\{\w+:-(.*?)\}", r"\1", word) for word in SERVICES[name]["command"]])
    assert SERVICES[name]["profiles"] == [name]


def test_secrets_are_files_and_dashboards_are_for_the_host_alone():
    given = {name for service in SERVICES.values() for name in service["secrets"]}
    assert given == set(COMPOSE["secrets"]) and all(set(secret) == {"file"} for secret in COMPOSE["secrets"].values())
    for service in SERVICES.values():
        assert not any(re.search(r"KEY$|TOKEN|PASSWORD", name) for name in service["environment"])
        assert all(port.startswith("127.0.0.1:") for port in service["ports"] if port.endswith(":8800"))
    assert SERVICES["silo"]["ports"] == ["127.0.0.1:8801:8800"]  # nobody connects to a silo


def test_data_are_mounted_read_only_and_volumes_are_declared():
    mounts = {mount["target"]: mount for mount in SERVICES["silo"]["volumes"] if isinstance(mount, dict)}
    assert mounts["/data"]["read_only"] is True
    assert SERVICES["silo"]["command"][-1].startswith("/data/")
    named = [mount.split(":")[0] for s in SERVICES.values() for mount in s["volumes"] if isinstance(mount, str)]
    assert set(named) == set(COMPOSE["volumes"])
    assert {"/home/foedus"} <= {m["target"] for m in SERVICES["coordinator"]["volumes"] if isinstance(m, dict)}


# The image


def steps() -> list[tuple[str, str]]:
    text = re.sub(r"(?m)^#.*\n", "", (DEPLOY / "Dockerfile").read_text()).replace("\\\n", " ")
    return [tuple(line.split(None, 1)) for line in text.splitlines() if line.strip()]


def test_the_image_is_pinned_and_its_last_user_is_nobody_special():
    done = steps()
    assert {name for name, _ in done} <= set(DOCKERFILE) and "ADD" not in dict(done)
    version = dict(line.split("=") for name, line in done if name == "ARG")["PYTHON"]
    assert re.fullmatch(r"3\.1[12]-slim-\w+", version)
    assert all(line.startswith("python:${PYTHON}") for name, line in done if name == "FROM")
    assert [line for name, line in done if name == "USER"][-1] == "10001:10001" == SERVICES["silo"]["user"]
    assert [json.loads(line) for name, line in done if name in ("ENTRYPOINT", "CMD")] == [["foedus"], ["--help"]]


def test_the_image_is_built_of_what_is_there_and_not_ignored():
    kept = {line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"}
    copied = {
        source for name, line in steps() if name == "COPY" and "--from" not in line for source in line.split()[:-1]
    }
    assert copied == kept and all((ROOT / source).exists() for source in copied)


def test_extras_that_the_image_installs_exist():
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    text = (DEPLOY / "Dockerfile").read_text()
    asked = {extra for found in re.findall(r'"\.\[([\w,]+)\]"', text) for extra in found.split(",")}
    assert asked and asked <= set(extras)


# systemd


def directives(unit: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in unit.read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            name, value = line.split("=", 1)
            found.setdefault(name, []).append(value)
    return found


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_a_unit_may_do_little(unit):
    said = directives(unit)
    assert said["User"] == ["foedus"] and said["UMask"] == ["0077"]
    assert said["ProtectSystem"] == ["strict"] and said["CapabilityBoundingSet"] == [""]
    for name in ("NoNewPrivileges", "PrivateTmp", "PrivateDevices", "ProtectHome", "RestrictNamespaces"):
        assert said[name] == ["yes"]
    assert said["Restart"] == ["always"] and {"MemoryMax", "TasksMax", "CPUQuota"} <= set(said)
    parsed(shlex.split(said["ExecStart"][0])[1:])


@pytest.mark.skipif(VERIFIER is None, reason="there is no systemd here")
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_systemd_knows_every_directive_and_finds_a_unit_well_guarded(unit, tmp_path):
    made = tmp_path / unit.name.replace("@.", "@hospital-a.")
    made.write_text(unit.read_text().replace("/opt/foedus/bin/foedus", "/bin/true"))
    said = subprocess.run([VERIFIER, "verify", made], capture_output=True, text=True, check=False)
    assert (said.returncode, said.stderr) == (0, "")
    judged = subprocess.run(
        [VERIFIER, "security", "--offline=true", "--threshold=20", made], capture_output=True, text=True, check=False
    )
    assert judged.returncode == 0, judged.stdout[-300:]  # an exposure of at most 2.0 of 10
