"""The files under deploy/ and configs/: read by the tools that will run them, and true to the command line."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from taesd_stream.config import load_config
from taesd_stream_workers.start_checks import ROLES as START_ROLES
from taesd_stream_workers.start_checks import check_start

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
UNITS = sorted(path for path in (DEPLOY / "systemd").iterdir() if path.suffix in (".service", ".target"))
CLUSTER = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
ROLES = ("up", "broker", "worker", "streamer")


def tool(name: str) -> str:
    """A checker that pip or Debian has put beside us; the test is skipped where it is not."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}:/usr/bin:/bin")
    if found is None:
        pytest.skip(f"{name} is not here")
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda path: path.name)
def test_a_configuration_has_only_keys_that_exist(path: Path) -> None:
    """Every file in configs/ loads."""
    assert load_config(path).broker.bind.startswith("tcp://")


def test_units_are_what_systemd_takes(tmp_path: Path) -> None:
    """`systemd-analyze verify` has nothing to say of any unit, with our command where it is installed."""
    verify = tool("systemd-analyze")
    for unit in UNITS:
        installed = unit.read_text().replace("/opt/taesd-stream/bin/taesd-stream", "/bin/true")
        (tmp_path / unit.name).write_text(installed)
    names = [unit.name.replace("@.", "@cpu.") for unit in UNITS]  # in @cuda:0 it takes the colon for an alias
    assert len(names) == 5
    done = subprocess.run(
        [verify, "verify", "--man=no", *names],
        capture_output=True,
        text=True,
        check=False,
        env={"SYSTEMD_UNIT_PATH": f"{tmp_path}:"},
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_image_passes_its_linter() -> None:
    """hadolint finds nothing in the Dockerfile."""
    done = subprocess.run([tool("hadolint"), str(DEPLOY / "Dockerfile")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_compose_files_fit_their_schema() -> None:
    """check-jsonschema takes both Compose files for what the Compose specification describes."""
    files = [str(path) for path in sorted((DEPLOY / "compose").glob("*.yaml"))]
    check = tool("check-jsonschema")
    done = subprocess.run(
        [check, "--builtin-schema", "vendor.compose-spec", *files], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_manifests_fit_kubernetes() -> None:
    """kubernetes-validate, strict, takes every manifest that is Kubernetes' own."""
    validate = tool("kubernetes-validate")
    own = [str(path) for path in CLUSTER if path.name != "scaling.yaml"]  # KEDA's kinds are not in its schemas
    done = subprocess.run([validate, "--strict", "--quiet", *own], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_daemon_finds_its_keys_and_its_lists() -> None:
    """Both roles of the pod have the secret and both lists where `keys_folder` looks; the worker has its own folder."""
    folder = Path(load_config(ROOT / "configs" / "cluster.toml").security.keys_folder)
    parts = {"broker": ["server.key", "samplers", "workers"], "streamer": ["server.key", "samplers", "workers"]}
    for path in (DEPLOY / "kubernetes" / name for name in ("daemon.yaml", "workers.yaml")):
        pods = [one["spec"]["template"]["spec"] for one in documents(path) if "template" in one.get("spec", {})]
        for pod in pods:
            volumes = {volume["name"] for volume in pod["volumes"]} | {"data"}
            for container in pod["containers"]:
                mounts = {Path(one["mountPath"]): one for one in container["volumeMounts"]}
                assert volumes >= {one["name"] for one in mounts.values()}
                for part in parts.get(container["name"], [""]):
                    assert mounts[folder / part]["readOnly"] is True
                    assert mounts[folder / part].get("subPath", "") == (part if part == "server.key" else "")


def test_the_autoscaler_reads_what_the_daemon_tells() -> None:
    """KEDA's trigger names a deployment, a service and a port of these manifests, and the field of the route."""
    resources = {(one["kind"], one["metadata"]["name"]): one for path in CLUSTER for one in documents(path)}
    scaled = resources["ScaledObject", "taesd-stream-worker"]["spec"]
    assert ("Deployment", scaled["scaleTargetRef"]["name"]) in resources
    trigger = scaled["triggers"][0]
    assert ("TriggerAuthentication", trigger["authenticationRef"]["name"]) in resources
    found = re.fullmatch(r"http://(([a-z-]+)\.taesd-stream\.svc):(\d+)/api/v1/workers", trigger["metadata"]["url"])
    assert found is not None
    service = resources["Service", found[2]]["spec"]
    assert int(found[3]) in [port["port"] for port in service["ports"]]
    assert found[1] in load_config(ROOT / "configs" / "cluster.toml").web.hosts
    assert trigger["metadata"]["valueLocation"] == "desired_workers"


def test_units_make_the_folders_that_they_demand() -> None:
    """What must be there at the start is a state folder of every unit; and no unit that decodes loses its GPU."""
    config = load_config(ROOT / "configs" / "service.toml")
    services = [unit for unit in UNITS if unit.suffix == ".service"]
    assert services
    for unit in services:
        text = unit.read_text()
        found = re.search(r"^StateDirectory=(.*)$", text, re.M)
        assert found is not None
        assert config.weights_folder in [Path("/var/lib") / folder for folder in found[1].split()]
        assert "PrivateDevices=yes" in text or "ProtectClock=yes" not in text


def test_every_unit_starts_with_the_folders_that_it_makes(tmp_path: Path) -> None:
    """With a unit's state folders, and nothing else, its role's start finds nothing wrong with service.toml."""
    text = (ROOT / "configs" / "service.toml").read_text().replace("/var/lib", str(tmp_path))
    for unit in (unit for unit in UNITS if unit.suffix == ".service"):
        (role,) = re.findall(r"^ExecStart=\S+ (\w+)", unit.read_text(), re.M)
        (state,) = re.findall(r"^StateDirectory=(.*)$", unit.read_text(), re.M)
        folder = tmp_path / unit.name
        for name in state.split():
            (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / "config.toml").write_text(text.replace(str(tmp_path), str(folder)))
        config = load_config(folder / "config.toml", ["broker.bind=tcp://127.0.0.1:0", "web.bind=127.0.0.1:0"])
        check_start(config, START_ROLES if role == "up" else [role])


def test_the_recipe_makes_what_the_manifests_name() -> None:
    """Each secret, list and image of the manifests is made by a line of docs/running.md, under the same name."""
    document = (ROOT / "docs" / "running.md").read_text()
    made = set(re.findall(r"create (?:secret generic|configmap) ([\w-]+)", document))
    text = "".join(path.read_text() for path in CLUSTER)
    named = set(re.findall(r"(?:secretName|configMap: {name|token, name): ([\w-]+)", text))
    assert named == made
    assert set(re.findall(r"image: (\S+)", text)) <= set(re.findall(r"docker build .* -t (\S+)", document))


def test_a_mount_opens_no_secret() -> None:
    """The kubelet does not give the group the token that the streamer made, which it would refuse then."""
    pods = [
        one["spec"]["template"]["spec"]
        for one in documents(DEPLOY / "kubernetes" / "daemon.yaml")
        if "template" in one["spec"]
    ]
    assert [pod["securityContext"]["fsGroupChangePolicy"] for pod in pods] == ["OnRootMismatch"]


def test_the_recipe_is_a_shell_script() -> None:
    """bash reads the Slurm recipe, and it refuses to start without the broker's address."""
    recipe = str(DEPLOY / "slurm" / "workers.sbatch")
    assert subprocess.run(["bash", "-n", recipe], check=False).returncode == 0
    done = subprocess.run(["bash", recipe], capture_output=True, text=True, check=False, env={"PATH": "/usr/bin:/bin"})
    assert done.returncode != 0
    assert "BROKER: tcp://HOST:PORT of the daemon" in done.stderr


def documents(path: Path) -> list[Any]:
    """The documents of a YAML file."""
    return list(yaml.safe_load_all(path.read_text()))


def commands() -> list[list[str]]:
    """Every command of ours that a deploy file runs, as words."""
    found: list[list[str]] = []
    for unit in UNITS:
        lines = re.findall(r"^ExecStart=\S+/taesd-stream (.*)$", unit.read_text(), re.M)
        found += [shlex.split(line.replace("%i", "cpu")) for line in lines]
    for path in CLUSTER:
        for one in documents(path):
            for container in one.get("spec", {}).get("template", {}).get("spec", {}).get("containers", []):
                found.append(container["args"])
                probes = [container.get(f"{name}Probe", {}) for name in ("startup", "readiness", "liveness")]
                found += [probe["exec"]["command"][1:] for probe in probes if "exec" in probe]
    for service in documents(DEPLOY / "compose" / "compose.yaml")[0]["services"].values():
        found += [service["command"], service["healthcheck"]["test"][2:]]
    return found


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_is_one_of_ours(words: list[str]) -> None:
    """The command line knows the command and each of its options; its configuration is a file of configs/."""
    from typer.main import get_command

    from taesd_stream_workers.commands.command_line import app

    root: Any = get_command(app)
    command = root.commands[words[0]]
    context = command.make_context(words[0], [local(word) for word in words[1:]])
    assert words[0] in (*ROLES, "health")
    sets = context.params["sets"]
    assert load_config(context.params["config"], sets).broker.bind


def local(word: str) -> str:
    """A configuration file as it lies here."""
    installed = {"/etc/taesd-stream/config.toml": "service.toml"}
    name = installed.get(word) or (word.rpartition("/")[2] if word.startswith("/etc/taesd-stream/") else "")
    return str(ROOT / "configs" / name) if name else word
