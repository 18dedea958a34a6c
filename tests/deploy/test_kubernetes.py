"""The objects of deploy/kubernetes are valid, and agree with the service."""

import copy
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import kubernetes_validate  # type: ignore[import-untyped] # it ships no types
import pytest
import yaml
from cloudcoil.models.prometheus_operator.v1 import ServiceMonitor
from pydantic import ValidationError
from pydantic_settings import CliApp

from dropserve.app.processes.worker import MARGIN_SECONDS
from dropserve.app.settings import Settings
from tests.conftest import ROOT, TRAINED, run, service
from tests.deploy import kserve_models

Object = dict[str, Any]
Rendered = dict[str, list[Object]]

KUBERNETES = ROOT / "deploy" / "kubernetes"
RELEASE = "1.37"
FOLDERS = sorted(file.parent.name for file in KUBERNETES.glob("*/kustomization.yaml"))
# Folders with a Deployment, and the objects that belong to it.
DEPLOYED = ["base", "gpu"]
PROBES = ("startupProbe", "livenessProbe", "readinessProbe")

every_folder = pytest.mark.parametrize("folder", FOLDERS)
every_deployment = pytest.mark.parametrize("folder", DEPLOYED)


def render(folder: Path) -> list[Object]:
    """Return the objects of a folder, rendered by kubectl."""
    kubectl = Path(sys.executable).with_name("kubectl")
    done = subprocess.run(
        [kubectl, "kustomize", folder], capture_output=True, text=True, timeout=60, check=False
    )
    # Standard error has warnings of deprecated fields.
    assert (done.returncode, done.stderr) == (0, "")
    return list(yaml.safe_load_all(done.stdout))


@pytest.fixture(scope="session")
def rendered() -> Rendered:
    return {folder: render(KUBERNETES / folder) for folder in FOLDERS}


@pytest.fixture(scope="module")
def guarded(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client of a service with keys; it sends one in the same header as Prometheus."""
    file = tmp_path_factory.mktemp("keys") / "keys.json"
    made = run("app", "key", "new", "--scope", "predict", "--name", "me", "--file", str(file))
    with service(built / "models", DROPSERVE_API_KEYS_FILE=str(file)) as client:
        client.headers["authorization"] = f"Bearer {made.stdout.strip()}"
        yield client


def one(objects: list[Object], kind: str) -> Object:
    """Return the only object of a kind."""
    (found,) = [each for each in objects if each["kind"] == kind]
    return found


def pod_of(objects: list[Object]) -> Object:
    """Return the spec of the pods, from a Deployment or from KServe's predictor."""
    for each in objects:
        if each["kind"] == "Deployment":
            return dict(each["spec"]["template"]["spec"])
    return dict(one(objects, "InferenceService")["spec"]["predictor"])


def container_of(objects: list[Object]) -> Object:
    """Return the pods' only container."""
    (container,) = pod_of(objects)["containers"]
    return dict(container)


def settings_of(objects: list[Object]) -> Settings:
    """Return the settings that the service reads in the container."""
    with pytest.MonkeyPatch.context() as environment:
        for name in Settings.model_fields:
            environment.delenv(f"DROPSERVE_{name.upper()}", raising=False)
        for variable in container_of(objects)["env"]:
            environment.setenv(variable["name"], variable["value"])
        return CliApp.run(Settings, cli_args=[])


def check(thing: Object) -> None:
    """Raise ValueError or kubernetes_validate.ValidationError if an object violates its schema."""
    group = thing["apiVersion"].partition("/")[0]
    if group == "monitoring.coreos.com":
        # The model drops unknown fields.
        known = ServiceMonitor.model_validate(thing).model_dump(
            mode="json", by_alias=True, exclude_unset=True
        )
        if known != thing:
            raise ValueError(f"{thing} has unknown fields: only {known} is known")
    elif group == "serving.kserve.io":
        pod = kserve_models.pod(thing)
        of_kubernetes = set(kserve_models.check(thing, "V1beta1InferenceService", ""))
        in_pod = {".metadata"} | {f".spec.predictor.{name}" for name in pod["spec"]}
        if left := of_kubernetes - in_pod:
            raise ValueError(f"a pod has no {left}")
        check(pod)
    else:
        # Without this release's schema, it would use an older one's.
        assert kubernetes_validate.validate(thing, RELEASE, strict=True) == RELEASE


@every_folder
def test_everything_is_as_the_published_schemas_have_it(rendered: Rendered, folder: str) -> None:
    for thing in rendered[folder]:
        check(thing)


@pytest.mark.parametrize(
    ("folder", "kind", "path"),
    [
        ("base", "Deployment", ["spec", "template", "spec", "enableServiceLinks"]),
        ("base", "NetworkPolicy", ["spec", "policyTypes"]),
        ("gpu", "HorizontalPodAutoscaler", ["spec", "metrics", 0, "pods"]),
        ("base", "ServiceMonitor", ["spec", "endpoints", 0, "authorization", "credentials"]),
        ("base", "ServiceMonitor", ["spec", "endpoints", 0, "path"]),
        ("kserve", "InferenceService", ["spec", "predictor", "minReplicas"]),
        ("kserve", "InferenceService", ["spec", "predictor", "volumes"]),
        ("kserve", "InferenceService", ["spec", "predictor", "containers", 0, "readinessProbe"]),
        ("kserve", "InferenceService", ["metadata", "annotations"]),
    ],
)
def test_a_misspelled_field_is_refused(
    rendered: Rendered, folder: str, kind: str, path: list[str | int]
) -> None:
    thing = copy.deepcopy(one(rendered[folder], kind))
    at: Any = thing
    for step in path[:-1]:
        at = at[step]
    at[f"{path[-1]}x"] = at.pop(path[-1])
    with pytest.raises((ValueError, kubernetes_validate.ValidationError), match=f"{path[-1]}x"):
        check(thing)


def test_values_that_kserve_declares_otherwise_are_refused(rendered: Rendered) -> None:
    thing = copy.deepcopy(one(rendered["kserve"], "InferenceService"))
    thing["spec"]["predictor"]["minReplicas"] = "2"
    with pytest.raises(ValueError, match=r"predictor\.minReplicas: '2' is not of the type int"):
        check(thing)
    with pytest.raises(ValueError, match="missing: predictor"):
        list(kserve_models.check({}, "V1beta1InferenceServiceSpec", "spec"))


@every_folder
def test_every_variable_is_a_setting_with_a_value_that_it_takes(
    rendered: Rendered, folder: str
) -> None:
    container = container_of(rendered[folder])
    names = {variable["name"] for variable in container["env"]}
    taken = settings_of(rendered[folder]).model_fields_set
    assert {f"DROPSERVE_{name.upper()}" for name in taken} == names - {"PROTOCOL"}
    assert ("PROTOCOL" in names) == (folder == "kserve")
    assert "envFrom" not in container


@every_folder
def test_links_of_services_would_be_taken_for_settings_and_are_off(
    rendered: Rendered, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = one(rendered["base"], "Service")["metadata"]["name"]
    monkeypatch.setenv(f"{name.upper()}_PORT", "tcp://10.0.0.1:80")
    with pytest.raises(ValidationError, match="port"):
        CliApp.run(Settings, cli_args=[])
    assert pod_of(rendered[folder])["enableServiceLinks"] is False


@every_folder
def test_a_pod_asks_for_keys_that_it_can_read(rendered: Rendered, folder: str) -> None:
    settings = settings_of(rendered[folder])
    pod, container = pod_of(rendered[folder]), container_of(rendered[folder])
    (mount,), (volume,) = container["volumeMounts"], pod["volumes"]
    assert settings.api_keys_file == Path(mount["mountPath"]) / "keys.json"
    assert not settings.open
    assert mount == {"name": volume["name"], "mountPath": mount["mountPath"], "readOnly": True}
    # The file's owner is root, and its group is this one.
    assert pod["securityContext"]["fsGroup"] == pod["securityContext"]["runAsGroup"]
    assert volume["secret"]["defaultMode"] & 0o777 == 0o440


def test_the_commands_in_the_comments_make_the_secrets_that_are_used(rendered: Rendered) -> None:
    said = (KUBERNETES / "base" / "kustomization.yaml").read_text()
    made = re.findall(
        r"create secret generic (\S+) --from-(?:file|literal)=(\S+?)(?:=KEY)?\n", said
    )
    (endpoint,) = one(rendered["base"], "ServiceMonitor")["spec"]["endpoints"]
    credentials = endpoint["authorization"]["credentials"]
    for folder in FOLDERS:
        (volume,) = pod_of(rendered[folder])["volumes"]
        assert made == [
            (volume["secret"]["secretName"], "keys.json"),
            (credentials["name"], credentials["key"]),
        ]


@every_folder
def test_a_pod_is_restricted(rendered: Rendered, folder: str) -> None:
    pod, container = pod_of(rendered[folder]), container_of(rendered[folder])
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert not {"hostNetwork", "hostPID", "hostIPC", "initContainers"} & pod.keys()


@every_folder
def test_the_probes_ask_the_service_for_what_it_answers_without_a_key(
    rendered: Rendered, folder: str, guarded: httpx.Client
) -> None:
    container = container_of(rendered[folder])
    (port,) = container["ports"]
    assert port["containerPort"] == settings_of(rendered[folder]).port
    for probe in PROBES:
        asked = container[probe]["httpGet"]
        assert asked["port"] == port["name"]
        assert httpx.get(f"{guarded.base_url}{asked['path']}").status_code == 200, probe


def test_a_pod_that_serves_no_model_is_not_ready_and_yet_not_restarted(
    built: Path, rendered: Rendered
) -> None:
    with service(built / "models") as client:
        for name in TRAINED:
            assert client.post(f"/v2/repository/models/{name}/unload").status_code == 200
        for folder in FOLDERS:
            container = container_of(rendered[folder])
            statuses = [
                client.get(container[each]["httpGet"]["path"]).status_code for each in PROBES
            ]
            assert statuses == [200, 200, 503]


@every_folder
def test_a_pod_gets_the_time_that_its_service_takes_to_end(rendered: Rendered, folder: str) -> None:
    settings = settings_of(rendered[folder])
    takes = settings.drain_delay_seconds + settings.drain_seconds + MARGIN_SECONDS
    assert pod_of(rendered[folder])["terminationGracePeriodSeconds"] >= takes
    # Longer than Kubernetes takes to notice that a pod is not ready.
    probe = container_of(rendered[folder])["readinessProbe"]
    assert settings.drain_delay_seconds >= probe["periodSeconds"] * probe["failureThreshold"]


@every_folder
def test_a_container_says_what_it_needs_and_gets_no_less(rendered: Rendered, folder: str) -> None:
    resources = container_of(rendered[folder])["resources"]
    needs, most = resources["requests"], resources["limits"]
    assert needs.keys() == {"cpu", "memory"}
    assert int(needs["cpu"]) <= int(most["cpu"])
    assert in_bytes(needs["memory"]) <= in_bytes(most["memory"])
    devices = {name: most[name] for name in most.keys() - needs.keys()}
    assert devices == ({"nvidia.com/gpu": "1"} if folder == "gpu" else {})
    # Nodes with such devices have a taint of the same name.
    tolerations = pod_of(rendered[folder]).get("tolerations", [])
    assert [each["key"] for each in tolerations] == list(devices)


def in_bytes(quantity: str) -> int:
    """Convert an amount of memory to bytes."""
    return int(quantity[:-2]) << {"Mi": 20, "Gi": 30}[quantity[-2:]]


@every_folder
def test_the_image_is_one_that_the_dockerfile_makes(rendered: Rendered, folder: str) -> None:
    name, _, target = container_of(rendered[folder])["image"].partition(":")
    assert (name, target) == ("dropserve", "cuda" if folder == "gpu" else "cpu")
    assert re.search(rf"^FROM .+ AS {target}$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)


@every_deployment
def test_all_that_chooses_pods_chooses_these(rendered: Rendered, folder: str) -> None:
    objects = rendered[folder]
    deployment = one(objects, "Deployment")
    chosen = deployment["spec"]["template"]["metadata"]["labels"].items()
    (spread,) = pod_of(objects)["topologySpreadConstraints"]
    for labels in (
        deployment["spec"]["selector"]["matchLabels"],
        one(objects, "Service")["spec"]["selector"],
        one(objects, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        one(objects, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
        spread["labelSelector"]["matchLabels"],
    ):
        assert labels
        assert labels.items() <= chosen
    scaled = one(objects, "HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]
    assert scaled == {
        "apiVersion": deployment["apiVersion"],
        "kind": "Deployment",
        "name": deployment["metadata"]["name"],
    }


@every_deployment
def test_requests_come_to_the_port_of_the_container(rendered: Rendered, folder: str) -> None:
    (port,) = container_of(rendered[folder])["ports"]
    (served,) = one(rendered[folder], "Service")["spec"]["ports"]
    assert served["targetPort"] == port["name"]
    policy = one(rendered[folder], "NetworkPolicy")["spec"]
    (rule,) = policy["ingress"]
    assert rule["ports"] == [{"port": port["containerPort"]}]
    assert rule["from"] == [
        {"podSelector": {}},
        {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}},
    ]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert "egress" not in policy


def test_prometheus_finds_the_service_and_may_read_its_metrics(
    rendered: Rendered, guarded: httpx.Client
) -> None:
    monitor, served = (one(rendered["base"], kind) for kind in ("ServiceMonitor", "Service"))
    labels = monitor["spec"]["selector"]["matchLabels"]
    assert labels
    assert labels.items() <= served["metadata"]["labels"].items()
    (endpoint,), (port,) = monitor["spec"]["endpoints"], served["spec"]["ports"]
    assert endpoint["port"] == port["name"]
    assert guarded.headers["authorization"].startswith(f"{endpoint['authorization']['type']} ")
    assert guarded.get(endpoint["path"]).status_code == 200
    assert httpx.get(f"{guarded.base_url}{endpoint['path']}").status_code == 401


@every_deployment
def test_the_service_has_the_metric_that_pods_are_scaled_by(
    rendered: Rendered, folder: str, client: httpx.Client
) -> None:
    metrics = one(rendered[folder], "HorizontalPodAutoscaler")["spec"]["metrics"]
    (name,) = [each["pods"]["metric"]["name"] for each in metrics if each["type"] == "Pods"]
    # prometheus-adapter would offer a counter's rate, under another name.
    assert f"\n# TYPE {name} gauge\n{name} " in client.get("/metrics").text


@every_deployment
def test_pods_are_left_that_answer(rendered: Rendered, folder: str) -> None:
    objects = rendered[folder]
    scaler = one(objects, "HorizontalPodAutoscaler")["spec"]
    assert "replicas" not in one(objects, "Deployment")["spec"]
    assert scaler["minReplicas"] < scaler["maxReplicas"]
    # Even with the fewest pods, a node can be drained and an update proceeds.
    assert (
        1 <= one(objects, "PodDisruptionBudget")["spec"]["maxUnavailable"] < scaler["minReplicas"]
    )
    update = one(objects, "Deployment")["spec"]["strategy"]["rollingUpdate"]
    assert update["maxUnavailable"] < scaler["minReplicas"]
    # A surge pod without a free GPU would never start.
    expected = {"maxUnavailable": 1, "maxSurge": 0}
    assert (update == expected) == (folder == "gpu")
    assert update["maxUnavailable"] + update["maxSurge"] > 0


def test_kserves_clients_find_the_model_under_the_services_name(
    rendered: Rendered, guarded: httpx.Client
) -> None:
    name = one(rendered["kserve"], "InferenceService")["metadata"]["name"]
    environment = {each["name"]: each["value"] for each in container_of(rendered["kserve"])["env"]}
    model = f"/{environment['PROTOCOL']}/models/{name}"
    assert guarded.get(f"{model}/ready").status_code == 200
    (tensor,) = guarded.get(model).json()["inputs"]
    row = {"name": tensor["name"], "datatype": "FP32", "shape": [1, 64], "data": [0.0] * 64}
    answer = guarded.post(f"{model}/infer", json={"inputs": [row]})
    assert answer.status_code == 200
    assert answer.json()["model_name"] == name


def test_kserve_is_told_in_its_own_words(rendered: Rendered) -> None:
    """KServe's models accept any text here; its controller knows only some values."""
    thing = one(rendered["kserve"], "InferenceService")
    assert thing["metadata"]["annotations"] == {"serving.kserve.io/deploymentMode": "Standard"}
    assert container_of(rendered["kserve"])["name"] == "kserve-container"
    assert thing["spec"]["predictor"]["scaleMetric"] in ("cpu", "memory")
