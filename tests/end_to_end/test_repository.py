"""Models come and go while the service runs: by requests of Triton's client, and by SIGHUP."""

import json
import os
import re
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager
from http.client import HTTPConnection
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from numpy.typing import NDArray
from tritonclient.http import (  # type: ignore[import-untyped] # it ships no types
    InferenceServerClient,
    InferInput,
)
from tritonclient.utils import InferenceServerException  # type: ignore[import-untyped]

from tests.bundles import BROKEN, change_a_file, publish
from tests.conftest import PATIENCE, children, events, run, service, wait_for

Json = dict[str, Any]
Matrix = NDArray[np.float32]  # [B, C]
Break = Callable[[Path], None]


class Repository:
    """A models folder, a service of it, and the answers of its models.

    There are two kinds of bundle, which answer the same ten digits clearly differently.
    """

    def __init__(
        self,
        models: Path,
        sources: dict[str, Path],
        rows: list[Any],
        client: httpx.Client,
        triton: InferenceServerClient,
        answers: dict[str, Matrix],
    ) -> None:
        self.models = models
        self.sources = sources
        self.rows = rows
        self.client = client
        self.triton = triton
        self.answers = answers
        self.pid = int(client.headers["x-test-pid"])

    def publish(self, source: str, name: str, version: int, **change: object) -> Path:
        """Put a copy of a bundle into the models folder."""
        place = self.models / name / str(version)
        publish(self.sources[source], place, **change)
        return place

    def ask(self, name: str | None = None, version: int | None = None) -> httpx.Response:
        body = {"inputs": self.rows, "model": name, "version": version}
        return self.client.post("/predict", json=body)

    def answered_by(self, answer: httpx.Response) -> tuple[str, int]:
        """Return which bundle has answered, and the version that the answer names."""
        assert answer.status_code == 200, answer.text
        document = answer.json()
        return self.bundle_of(document["probabilities"]), document["version"]

    def bundle_of(self, probabilities: object) -> str:
        """Return the bundle that gives these probabilities."""
        found = np.asarray(probabilities)
        distance = {source: np.abs(found - answer).max() for source, answer in self.answers.items()}
        nearest = min(distance, key=lambda source: distance[source])
        # Another batch size rounds differently.
        assert distance[nearest] < 1e-5
        return nearest

    def index(self) -> dict[tuple[str, int], tuple[str, str]]:
        """Return the state of each version and its reason."""
        return {
            (entry["name"], int(entry["version"])): (entry["state"], entry["reason"])
            for entry in self.triton.get_model_repository_index()
            if entry["name"] != ALWAYS_REFUSED
        }

    def ready(self) -> dict[str, list[int]]:
        """Return the served versions of each model, as the service lists them."""
        answer = self.client.get("/health/ready")
        assert self.triton.is_server_ready() == (answer.status_code == 200)
        if answer.status_code == 503:
            assert answer.json()["detail"] == "no model is served"
            return {}
        models: dict[str, list[int]] = answer.json()["models"]
        return models

    def refused(self, name: str) -> str:
        """Load a model, which must be refused; return the reason."""
        with pytest.raises(InferenceServerException) as caught:
            self.triton.load_model(name)
        assert caught.value.status() == "400"
        says: str = caught.value.message()
        return says

    def clear(self) -> None:
        """Leave only digits, version 1, and the bundle that is always refused in the folder."""
        for entry in self.models.iterdir():
            shutil.rmtree(entry)
        self.publish("digits", "digits", 1)
        broken(self.publish("digits", ALWAYS_REFUSED, 1))
        self.triton.load_model("digits")

    def hang_up(self) -> None:
        """Send SIGHUP, and wait until the reload is over."""
        before = self.refusals()
        os.kill(self.pid, signal.SIGHUP)
        deadline = time.monotonic() + PATIENCE
        while self.refusals() == before:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        # A request that changes models waits for the change under way.
        assert self.client.post("/v2/repository/models/none/load").status_code == 404

    def refusals(self) -> float:
        """Return how often the bundle that is always refused was."""
        return self.loads().get((ALWAYS_REFUSED, "refused"), 0)

    def loads(self) -> dict[tuple[str, str], float]:
        """Return how often versions were loaded or refused, by model and outcome."""
        metric = r'dropserve_model_loads_total{model="(.*)",outcome="(.*)"} (\S+)'
        found = re.findall(metric, self.client.get("/metrics").text)
        return {(model, outcome): float(number) for model, outcome, number in found}


def broken(place: Path) -> None:
    (place / "manifest.json").write_text("{}")


# Each reload refuses it, which the metrics count: so a test learns of the reload.
ALWAYS_REFUSED = "always-refused"
READY, NOT_LOADED = ("READY", ""), ("UNAVAILABLE", "not loaded")
Serve = Callable[..., AbstractContextManager[Repository]]


@pytest.fixture(scope="module")
def serve(
    built: Path,
    tmp_path_factory: pytest.TempPathFactory,
    client: httpx.Client,
    examples: Callable[[str], list[Any]],
) -> Serve:
    """Start a service of a folder that holds digits."""
    rows = examples("digits")
    sources = {name: built / "models" / name / "1" for name in ("digits", "double")}
    answers = {}
    for name in sources:
        answer = client.post("/predict", json={"inputs": rows, "model": name}).json()
        answers[name] = np.array(answer["probabilities"], np.float32)
    assert np.abs(answers["digits"] - answers["double"]).max() > 0.01

    @contextmanager
    def serve(**environment: str) -> Iterator[Repository]:
        models = tmp_path_factory.mktemp("repository") / "models"
        models.mkdir()
        publish(sources["digits"], models / "digits" / "1")
        with service(models, **environment) as client:
            url = f"{client.base_url.host}:{client.base_url.port}"
            with InferenceServerClient(url) as triton:
                yield Repository(models, sources, rows, client, triton, answers)

    return serve


@pytest.fixture(scope="module")
def single(serve: Serve) -> Iterator[Repository]:
    """A service of one process."""
    with serve() as served:
        yield served


@pytest.fixture
def served(single: Repository) -> Repository:
    """The service of one process, with nothing but digits, version 1."""
    single.clear()
    single.hang_up()
    assert single.ready() == {"digits": [1]}
    return single


@pytest.fixture(scope="module")
def double(serve: Serve) -> Iterator[Repository]:
    """A service of two workers, both ready."""
    with serve(DROPSERVE_WORKERS="2") as served:
        wait_for(lambda: len(children(served.pid)) == 2)
        of_each_worker(served, 2)
        yield served


@pytest.fixture
def pair(double: Repository) -> Repository:
    """The service of two workers, with nothing but digits, version 1."""
    double.clear()
    assert list(of_each_worker(double, 2).values()) == [{(200, 1)}] * 2
    return double


def test_a_new_version_is_served_once_it_is_loaded_and_older_ones_by_number(
    served: Repository,
) -> None:
    assert served.index() == {("digits", 1): READY}
    served.publish("double", "digits", 2)
    served.publish("double", "more", 1)
    assert served.index() == {
        ("digits", 1): READY,
        ("digits", 2): NOT_LOADED,
        ("more", 1): NOT_LOADED,
    }
    assert served.answered_by(served.ask()) == ("digits", 1)
    assert served.ask("digits", 2).status_code == 404
    assert not served.triton.is_model_ready("digits", "2")

    served.triton.load_model("digits")
    assert served.index()["digits", 2] == READY
    # What was not asked for is as it was.
    assert served.index()["more", 1] == NOT_LOADED
    assert served.ready() == {"digits": [1, 2]}
    assert served.answered_by(served.ask("digits")) == ("double", 2)
    assert served.answered_by(served.ask("digits", 2)) == ("double", 2)
    assert served.answered_by(served.ask("digits", 1)) == ("digits", 1)

    served.triton.load_model("more")
    assert served.answered_by(served.ask("more")) == ("double", 1)
    assert served.ready() == {"digits": [1, 2], "more": [1]}


def test_the_newest_version_is_the_one_of_the_largest_number(served: Repository) -> None:
    for version in (10, 9):
        served.publish("double", "digits", version)
        served.triton.load_model("digits")
        assert served.answered_by(served.ask()) == ("double", 10)
    assert served.ready() == {"digits": [1, 9, 10]}


def test_the_protocol_follows_what_is_loaded(served: Repository) -> None:
    x = np.array([[range(64)]], np.float32).reshape(1, 64)
    tensor = InferInput("x", [1, 64], "FP32").set_data_from_numpy(x)
    for version in (1, 2):
        for name in ("digits", "digits.mc"):
            said = served.triton.get_model_metadata(name)
            assert said["versions"] == [str(number) for number in range(1, version + 1)]
            answer = served.triton.infer(name, [tensor]).get_response()
            assert answer["model_version"] == str(version)
            assert served.triton.is_model_ready(name, "2") == (version == 2)
        served.publish("double", "digits", 2)
        served.triton.load_model("digits")


def test_the_index_lists_only_served_versions_on_request(served: Repository) -> None:
    served.publish("double", "digits", 2)
    answer = served.client.post("/v2/repository/index", json={"ready": True})
    assert answer.json() == [{"name": "digits", "version": "1", "state": "READY", "reason": ""}]


@pytest.mark.parametrize("breaks", BROKEN, ids=lambda breaks: breaks.__name__)
def test_a_broken_version_is_refused_with_its_reason_and_the_old_one_serves_on(
    served: Repository, breaks: Break
) -> None:
    breaks(served.publish("double", "digits", 2))
    says = served.refused("digits")
    start = "refused digits version 2: "
    assert says.startswith(start + BROKEN[breaks])
    assert served.index() == {
        ("digits", 1): READY,
        ("digits", 2): ("UNAVAILABLE", says.removeprefix(start)),
    }
    assert served.answered_by(served.ask()) == ("digits", 1)
    assert served.ask("digits", 2).status_code == 404
    # A second time.
    assert served.refused("digits") == says

    served.publish("double", "digits", 2)
    served.triton.load_model("digits")
    assert served.index()["digits", 2] == READY
    assert served.answered_by(served.ask()) == ("double", 2)


def test_a_good_version_is_served_though_another_is_broken(served: Repository) -> None:
    (served.publish("double", "digits", 2) / "predict.onnx").unlink()
    served.publish("double", "digits", 3)
    reason = "predict.onnx cannot be read: No such file or directory"
    assert served.refused("digits") == f"refused digits version 2: {reason}"
    assert served.index() == {
        ("digits", 1): READY,
        ("digits", 2): ("UNAVAILABLE", reason),
        ("digits", 3): READY,
    }
    assert served.answered_by(served.ask()) == ("double", 3)


def test_a_bundle_replaced_under_its_number_is_taken_as_new(served: Repository) -> None:
    served.publish("double", "digits", 1)
    assert served.answered_by(served.ask()) == ("digits", 1)
    served.triton.load_model("digits")
    assert served.answered_by(served.ask()) == ("double", 1)


@pytest.mark.parametrize("breaks", BROKEN, ids=lambda breaks: breaks.__name__)
def test_a_broken_bundle_does_not_replace_the_one_that_is_served_under_its_number(
    served: Repository, breaks: Break
) -> None:
    breaks(served.publish("double", "digits", 1, preprocessing="another"))
    served.publish("double", "digits", 2)
    says = served.refused("digits")
    state, reason = served.index()["digits", 1]
    assert state == "READY"
    assert says == f"refused digits version 1: {reason}"
    assert reason.startswith(BROKEN[breaks])
    assert served.ready() == {"digits": [1, 2]}
    assert served.answered_by(served.ask("digits", 1)) == ("digits", 1)


def test_an_unloaded_model_is_gone_until_it_is_loaded_again(served: Repository) -> None:
    served.publish("double", "more", 1)
    served.triton.load_model("more")
    served.triton.unload_model("digits")
    gone = "no model 'digits'; served are: more"
    answer = served.ask("digits")
    assert (answer.status_code, answer.json()["detail"]) == (404, gone)
    infer = served.client.post("/v2/models/digits/infer", json={})
    assert (infer.status_code, infer.json()) == (404, {"error": gone})
    for name in ("digits", "digits.mc"):
        assert not served.triton.is_model_ready(name)
        assert not served.triton.is_model_ready(name, "1")
    assert served.index() == {("digits", 1): NOT_LOADED, ("more", 1): READY}
    assert served.ready() == {"more": [1]}
    with pytest.raises(InferenceServerException, match=gone):
        served.triton.unload_model("digits")

    served.triton.load_model("digits")
    assert served.ready() == {"digits": [1], "more": [1]}
    assert served.answered_by(served.ask("digits")) == ("digits", 1)


def test_requests_under_way_are_answered_by_the_model_that_is_unloaded(served: Repository) -> None:
    body = {"inputs": (served.rows * 10)[:100], "passes": 5_000, "seed": 1}
    url = f"{served.client.base_url}/uncertainty"
    with ThreadPoolExecutor(1) as pool:
        under_way = pool.submit(httpx.post, url, json=body, timeout=60)
        wait_for(lambda: gauge(served.client, "dropserve_queue_rows") == 500_000)
        served.triton.unload_model("digits")
        assert served.client.post("/uncertainty", json=body).status_code == 404
        assert not under_way.done()
        answer = under_way.result()
    assert answer.status_code == 200
    assert len(answer.json()["mean"]) == 100
    served.triton.load_model("digits")
    assert served.client.post("/uncertainty", json=body).json() == answer.json()


def gauge(client: httpx.Client, name: str) -> float:
    found = re.search(rf"^{name} (\S+)$", client.get("/metrics").text, re.MULTILINE)
    assert found
    return float(found[1])


def test_without_a_model_the_service_is_alive_and_not_ready(served: Repository) -> None:
    served.triton.unload_model("digits")
    assert served.ready() == {}
    assert served.triton.is_server_live()
    assert served.client.get("/health/live").status_code == 200
    assert served.client.get("/v2/health/ready").json() == {"ready": False}
    answer = served.ask()
    assert (answer.status_code, answer.json()["detail"]) == (404, "no model is served")
    served.triton.load_model("digits")
    assert served.ready() == {"digits": [1]}
    assert served.answered_by(served.ask()) == ("digits", 1)


PATHS = [
    *("../digits", "..", ".", "/digits", "digits/1", "digits/", "digits/../digits", "models"),
    *("%2e%2e%2fdigits", "%2e%2e", "digits%2f1", "digits%2F..%2Fdigits", "digits%00", "%5c..%5c"),
    *(".staging-x", "outside", "..%2foutside", "digits%0a", "Digits", "digits.mc", "%ff", "none"),
    *("x" * 5000, "digits%2fmanifest.json", "%2e%2e%2foutside", "../models/digits"),
]


@pytest.mark.parametrize("call", ["load", "unload"])
def test_a_name_that_is_not_in_the_folder_is_a_404_and_never_a_path(
    served: Repository, call: str
) -> None:
    publish(served.sources["double"], served.models / "digits" / "2")
    # Good bundles, but in places that no name may lead to.
    for place in (served.models.parent / "outside", served.models / ".staging-x"):
        shutil.copytree(served.models / "digits" / "2", place / "2", dirs_exist_ok=True)
    before, loads = served.index(), served.loads()
    url = served.client.base_url
    # httpx would resolve dots in a path.
    with closing(HTTPConnection(url.host, url.port, timeout=30)) as connection:
        for name in PATHS:
            connection.request("POST", f"/v2/repository/models/{name}/{call}")
            answer = connection.getresponse()
            text = answer.read().decode()
            assert answer.status == 404, name
            assert json.loads(text).keys() == {"error"}
            assert len(text) < 400
            assert str(served.models.parent) not in text
    assert served.index() == before
    assert served.ready() == {"digits": [1]}
    assert served.loads() == loads


def test_a_load_that_brings_files_or_a_configuration_is_refused(served: Repository) -> None:
    with pytest.raises(InferenceServerException) as caught:
        served.triton.load_model("digits", config="{}")
    assert caught.value.status() == "400"
    assert caught.value.message() == (
        "parameters: none are allowed: models come from the models folder"
    )
    assert served.ready() == {"digits": [1]}
    # Triton's client sends this with every unload.
    body = {"parameters": {"unload_dependents": True}}
    answer = served.client.post("/v2/repository/models/digits/unload", json=body)
    assert answer.status_code == 200


@pytest.mark.parametrize("path", ["index", "models/digits/load", "models/digits/unload"])
def test_a_bad_body_of_a_repository_request_is_a_400(served: Repository, path: str) -> None:
    for text in ("[", "[]", '{"colour": 1}', '{"parameters": 1, "ready": 1}', '"x"'):
        answer = served.client.post(f"/v2/repository/{path}", content=text)
        assert answer.status_code == 400, text
        assert answer.json().keys() == {"error"}
    assert served.ready() == {"digits": [1]}


def test_a_version_that_is_gone_from_the_folder_is_dropped_by_the_next_load(
    served: Repository,
) -> None:
    served.publish("double", "digits", 2)
    served.triton.load_model("digits")
    shutil.rmtree(served.models / "digits" / "2")
    assert served.answered_by(served.ask()) == ("double", 2)
    served.triton.load_model("digits")
    assert served.ready() == {"digits": [1]}
    assert served.answered_by(served.ask()) == ("digits", 1)
    assert served.index() == {("digits", 1): READY}


def test_a_model_that_is_gone_from_the_folder_serves_on_until_sighup(served: Repository) -> None:
    served.publish("double", "more", 1)
    served.triton.load_model("more")
    shutil.rmtree(served.models / "more")
    with pytest.raises(InferenceServerException, match="no model 'more' to load"):
        served.triton.load_model("more")
    assert served.answered_by(served.ask("more")) == ("double", 1)
    served.hang_up()
    assert served.ready() == {"digits": [1]}


def test_an_empty_folder_changes_nothing(serve: Serve, capfd: pytest.CaptureFixture[str]) -> None:
    with serve() as served:
        # Its event loop runs, so it handles signals.
        assert served.ready() == {"digits": [1]}
        shutil.rmtree(served.models / "digits")
        os.kill(served.pid, signal.SIGHUP)
        with pytest.raises(InferenceServerException, match="to load; there are: none"):
            served.triton.load_model("digits")
        assert served.answered_by(served.ask()) == ("digits", 1)
        assert served.index() == {("digits", 1): READY}
    said = [each["message"] for each in events(capfd.readouterr().out)]
    assert f"not all was loaded: the models folder '{served.models}' holds no bundle" in said


def test_sighup_loads_new_versions_but_no_unloaded_model(served: Repository) -> None:
    served.publish("double", "more", 1)
    served.hang_up()
    assert served.ready() == {"digits": [1], "more": [1]}
    served.publish("double", "digits", 2)
    served.publish("digits", "more", 2)
    served.triton.unload_model("more")
    served.hang_up()
    assert served.ready() == {"digits": [1, 2]}
    assert served.answered_by(served.ask()) == ("double", 2)
    assert served.index()["more", 2] == NOT_LOADED
    served.triton.load_model("more")
    assert served.answered_by(served.ask("more")) == ("digits", 2)
    # From now on reloads include it again.
    served.publish("double", "more", 3)
    served.hang_up()
    assert served.answered_by(served.ask("more")) == ("double", 3)


def new_key(file: Path, scope: str) -> dict[str, str]:
    """Make a key and return it as a request header."""
    done = run("app", "key", "new", "--scope", scope, "--file", str(file))
    assert done.returncode == 0, done.stderr
    return {"authorization": f"Bearer {done.stdout.strip()}"}


def test_sighup_reads_the_keys_again(serve: Serve, tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    old = new_key(file, "predict")
    body = {"inputs": [[0] * 64]}
    with serve(DROPSERVE_API_KEYS_FILE=str(file)) as served:

        def status(key: dict[str, str], route: str = "/predict") -> int:
            answered: int = served.client.post(route, json=body, headers=key).status_code
            return answered

        assert status({}) == 401
        assert status(old) == 200
        new = new_key(file, "predict,admin")
        assert status(new) == 401
        os.kill(served.pid, signal.SIGHUP)
        wait_for(lambda: status(new) == 200)
        assert status(old) == 200
        load = "/v2/repository/models/digits/load"
        assert served.client.post(load, headers=new).status_code == 200
        assert served.client.post(load, headers=old).status_code == 403
        assert served.client.post(load).status_code == 401

        keys = json.loads(file.read_text())
        file.write_text(json.dumps({"keys": keys["keys"][1:]}))
        os.kill(served.pid, signal.SIGHUP)
        wait_for(lambda: status(old) == 401)
        assert status(new) == 200

        # A bad file: the keys stay as they were, and no other is accepted.
        file.write_text("{")
        served.publish("double", "digits", 2)
        os.kill(served.pid, signal.SIGHUP)
        wait_for(lambda: served.client.get("/health/ready").json()["models"] == {"digits": [1, 2]})
        assert (status(new), status(old), status({})) == (200, 401, 401)


@pytest.mark.parametrize("content", ["", '{"keys": []}'])
def test_emptying_the_keys_file_revokes_every_key(
    serve: Serve, tmp_path: Path, capfd: pytest.CaptureFixture[str], content: str
) -> None:
    file = tmp_path / "keys.json"
    key = new_key(file, "predict,admin")
    with serve(DROPSERVE_API_KEYS_FILE=str(file), DROPSERVE_WORKERS="2") as served:
        wait_for(lambda: len(children(served.pid)) == 2)
        unkept = httpx.Limits(max_keepalive_connections=0)
        with httpx.Client(base_url=served.client.base_url, limits=unkept) as client:

            def workers_that(status: int) -> set[str]:
                """Return the workers of many requests, all of which must get this status."""
                body = {"inputs": [[0] * 64]}
                answers = [client.post("/predict", json=body, headers=key) for _ in range(20)]
                return {worker_of(a) for a in answers if a.status_code == status} - {
                    worker_of(a) for a in answers if a.status_code != status
                }

            wait_for(lambda: len(workers_that(200)) == 2)
            file.write_text(content)
            os.kill(served.pid, signal.SIGHUP)
            wait_for(lambda: len(workers_that(401)) == 2)
            # A worker that replaces another starts, and knows no key either.
            known = workers_that(401)
            os.kill(min(children(served.pid)), signal.SIGKILL)
            wait_for(lambda: bool(workers_that(401) - known))
            wait_for(lambda: len(children(served.pid)) == 2)
            assert not workers_that(200)
            assert client.get("/health/live").status_code == 200
    said = [each["message"] for each in events(capfd.readouterr().out)]
    assert said.count("all keys are revoked: the keys file holds none") >= 2


def test_a_keys_file_that_became_a_pipe_holds_nothing_up(
    serve: Serve, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "keys.json"
    key = new_key(file, "predict")
    with serve(DROPSERVE_API_KEYS_FILE=str(file)) as served:
        # Signals are heeded from the first answer on.
        assert served.ready() == {"digits": [1]}
        file.unlink()
        os.mkfifo(file)
        served.publish("double", "digits", 2)
        os.kill(served.pid, signal.SIGHUP)
        wait_for(lambda: served.client.get("/health/ready").json()["models"] == {"digits": [1, 2]})
        body = {"inputs": [[0] * 64]}
        assert served.client.post("/predict", json=body, headers=key).status_code == 200
        file.unlink()
        served.publish("double", "digits", 3)
        os.kill(served.pid, signal.SIGHUP)
        wait_for(lambda: 3 in served.client.get("/health/ready").json()["models"]["digits"])
        assert served.client.post("/predict", json=body, headers=key).status_code == 200
    said = [e["message"] for e in events(capfd.readouterr().out) if e["level"] == "error"]
    start = f"the keys stay as they were: the keys file '{file}'"
    assert said == [
        f"{start} is not a regular file",
        f"{start} cannot be read: No such file or directory",
    ]


def worker_of(answer: httpx.Response) -> str:
    """Return the beginning of the request's id, which identifies the worker that has answered."""
    return answer.headers["x-request-id"][:16]


def of_each_worker(
    served: Repository, workers: int, name: str = "digits", known: frozenset[str] = frozenset()
) -> dict[str, set[tuple[int, object]]]:
    """Send requests over new connections until enough workers have answered, and then 20 more.

    Returns the statuses and versions that each worker has answered; ``known`` workers do not count
    towards enough.
    """
    found: dict[str, set[tuple[int, object]]] = {}
    deadline = time.monotonic() + 30
    more = 20
    unkept = httpx.Limits(max_keepalive_connections=0)
    with httpx.Client(base_url=served.client.base_url, limits=unkept, timeout=30) as client:
        while more:
            answer = client.post("/predict", json={"inputs": served.rows, "model": name})
            version = answer.json().get("version")
            if answer.status_code == 200:
                served.bundle_of(answer.json()["probabilities"])
            found.setdefault(worker_of(answer), set()).add((answer.status_code, version))
            more -= len(found.keys() - known) >= workers
            assert time.monotonic() < deadline, found
    return found


def test_what_one_worker_loads_or_unloads_every_worker_does(
    pair: Repository,
) -> None:
    pair.publish("double", "digits", 2)
    for _ in range(3):
        pair.triton.load_model("digits")
        answers = of_each_worker(pair, 2)
        assert list(answers.values()) == [{(200, 2)}] * 2
        pair.triton.unload_model("digits")
        answers = of_each_worker(pair, 2)
        assert list(answers.values()) == [{(404, None)}] * 2


def test_every_worker_serves_the_good_versions_though_one_is_broken(pair: Repository) -> None:
    broken(pair.publish("double", "digits", 2))
    pair.publish("double", "digits", 3)
    assert pair.refused("digits").startswith("refused digits version 2: ")
    answers = of_each_worker(pair, 2)
    assert list(answers.values()) == [{(200, 3)}] * 2


def test_a_worker_that_is_replaced_serves_no_model_that_was_unloaded(serve: Serve) -> None:
    with serve(DROPSERVE_WORKERS="2") as pair:
        pair.publish("double", "more", 1)
        known = frozenset(of_each_worker(pair, 2))
        pair.triton.load_model("more")
        pair.triton.unload_model("digits")
        first, _ = children(pair.pid)
        os.kill(first, signal.SIGKILL)
        assert set.union(*of_each_worker(pair, 1, known=known).values()) == {(404, None)}
        assert set.union(*of_each_worker(pair, 1, "more", known).values()) == {(200, 1)}
        load = "/v2/repository/models/digits/load"
        assert httpx.post(f"{pair.client.base_url}{load}").status_code == 200
        assert set.union(*of_each_worker(pair, 2).values()) == {(200, 1)}


def test_sighup_reaches_every_worker(pair: Repository) -> None:
    pair.publish("double", "digits", 2)
    os.kill(pair.pid, signal.SIGHUP)
    wait_for(lambda: list(of_each_worker(pair, 2).values()) == [{(200, 2)}] * 2)


@pytest.mark.parametrize("workers", ["served", "pair"])
def test_no_request_is_lost_or_mixed_while_versions_come_and_go(
    request: pytest.FixtureRequest, workers: str
) -> None:
    served: Repository = request.getfixturevalue(workers)
    over = threading.Event()

    def keep_asking() -> Counter[tuple[str, int]]:
        """Count the answers by bundle and version."""
        seen: Counter[tuple[str, int]] = Counter()
        with httpx.Client(base_url=served.client.base_url, timeout=30) as client:
            while not over.is_set():
                seen[served.answered_by(client.post("/predict", json={"inputs": served.rows}))] += 1
        return seen

    with ThreadPoolExecutor(6) as pool:
        asking = [pool.submit(keep_asking) for _ in range(6)]
        try:
            for _ in range(6):
                served.publish("double", "digits", 2)
                served.triton.load_model("digits")
                assert served.answered_by(served.ask()) == ("double", 2)
                time.sleep(0.05)
                shutil.rmtree(served.models / "digits" / "2")
                served.triton.load_model("digits")
                assert served.answered_by(served.ask()) == ("digits", 1)
                time.sleep(0.05)
        finally:
            over.set()
        seen = [each.result() for each in asking]
    # Each version number had its own bundle, and both answered many times.
    assert sum(seen, Counter()).keys() == {("digits", 1), ("double", 2)}
    assert min(sum(seen, Counter()).values()) > 20


class Bundle(NamedTuple):
    """A bundle in the folder, or served."""

    source: str  # the bundle that it is a copy of
    mark: int  # unique, in its manifest
    fault: Break | None = None


MODELS = ("one", "two")
NAMES = st.sampled_from(MODELS)
VERSIONS = st.sampled_from([1, 2])
SOURCES = st.sampled_from(["digits", "double"])
FAULTS = st.sampled_from(list(BROKEN))
marks = count()


class AnyOrder(RuleBasedStateMachine):
    """Changes to a models folder and its service, and the versions that must be served then."""

    repository: Repository

    @initialize()
    def begin(self) -> None:
        self.disk: dict[str, dict[int, Bundle]] = {}
        self.served: dict[str, dict[int, Bundle]] = {}
        self.refused: dict[tuple[str, int], str] = {}
        self.unloaded: set[str] = set()
        self.repository.clear()
        self.repository.triton.unload_model("digits")
        shutil.rmtree(self.repository.models / "digits")
        # Whatever the last run has left.
        for name in MODELS:
            self.publish(name, 1, "digits")
            self.load(name)
        self.remove_version("two", 1)
        self.hang_up()
        self.it_is_as_it_must_be()

    def there(self) -> list[tuple[str, int]]:
        """List the versions in the folder."""
        return [(name, v) for name, versions in sorted(self.disk.items()) for v in sorted(versions)]

    def good(self) -> list[tuple[str, int]]:
        """List the versions in the folder that are not broken."""
        return [(name, v) for name, v in self.there() if not self.disk[name][v].fault]

    @rule(name=NAMES, version=VERSIONS, source=SOURCES)
    def publish(self, name: str, version: int, source: str) -> None:
        mark = next(marks)
        self.repository.publish(source, name, version, preprocessing=f"number {mark}")
        self.disk.setdefault(name, {})[version] = Bundle(source, mark)

    @rule(name=NAMES, version=VERSIONS, source=SOURCES, fault=FAULTS)
    def publish_broken(self, name: str, version: int, source: str, fault: Break) -> None:
        self.publish(name, version, source)
        self.break_version(name, version, fault)

    @precondition(lambda self: self.good())
    @rule(data=st.data(), fault=FAULTS)
    def break_a_file(self, data: st.DataObject, fault: Break) -> None:
        self.break_version(*data.draw(st.sampled_from(self.good())), fault)

    def break_version(self, name: str, version: int, fault: Break) -> None:
        fault(self.repository.models / name / str(version))
        self.disk[name][version] = self.disk[name][version]._replace(fault=fault)

    @precondition(lambda self: self.there())
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        self.remove_version(*data.draw(st.sampled_from(self.there())))

    def remove_version(self, name: str, version: int) -> None:
        del self.disk[name][version]
        shutil.rmtree(self.repository.models / name / str(version))

    @rule(name=NAMES)
    def load(self, name: str) -> None:
        answer = self.repository.client.post(f"/v2/repository/models/{name}/load")
        if not self.disk.get(name):
            assert answer.status_code == 404
            return
        self.unloaded.discard(name)
        self.renew(name)
        refused = [version for of, version in sorted(self.refused) if of == name]
        assert answer.status_code == (400 if refused else 200)
        if refused:
            said = re.findall(rf"refused {name} version (\d+): ", answer.json()["error"])
            assert said == [str(version) for version in refused]

    @rule(name=NAMES)
    def unload(self, name: str) -> None:
        answer = self.repository.client.post(f"/v2/repository/models/{name}/unload")
        assert answer.status_code == (200 if name in self.served else 404)
        if self.served.pop(name, None):
            self.unloaded.add(name)

    @rule()
    def hang_up(self) -> None:
        self.repository.hang_up()
        there = {name for name, versions in self.disk.items() if versions}
        for name in self.served.keys() - there:
            del self.served[name]
        for name in there - self.unloaded:
            self.renew(name)

    def renew(self, name: str) -> None:
        before, there = self.served.get(name, {}), self.disk[name]
        for key in [key for key in self.refused if key[0] == name and key[1] not in there]:
            del self.refused[key]
        found = {}
        for version, bundle in sorted(there.items()):
            old = before.get(version)
            # A served bundle is recognised by its manifest, and not read again.
            if old and old.mark == bundle.mark and bundle.fault in (None, change_a_file):
                found[version] = old
            elif not bundle.fault:
                found[version] = bundle
            else:
                self.refused[name, version] = BROKEN[bundle.fault]
                if old:
                    found[version] = old
                continue
            self.refused.pop((name, version), None)
        if found:
            self.served[name] = found

    def predict(self, name: str | None, version: int | None) -> None:
        answer = self.repository.ask(name, version)
        if name is None:
            if len(self.served) > 1:
                assert answer.status_code == 422
                return
            name = next(iter(self.served), "none")
        versions = self.served.get(name, {})
        wanted = max(versions, default=0) if version is None else version
        if wanted in versions:
            assert self.repository.answered_by(answer) == (versions[wanted].source, wanted)
        else:
            assert answer.status_code == 404

    @invariant()
    def it_is_as_it_must_be(self) -> None:
        ready = {name: list(versions) for name, versions in self.served.items()}
        assert self.repository.ready() == ready
        self.predict(None, None)
        for name in MODELS:
            for version in (None, 1, 2):
                self.predict(name, version)
        index = self.repository.index()
        assert index.keys() == {
            (name, version)
            for models in (self.disk, self.served)
            for name, versions in models.items()
            for version in versions
        }
        for (name, version), (state, reason) in index.items():
            served = version in self.served.get(name, {})
            assert state == ("READY" if served else "UNAVAILABLE")
            start = self.refused.get((name, version), "" if served else "not loaded")
            assert reason.startswith(start)
            assert bool(reason) == bool(start)


def test_after_any_sequence_of_changes_the_right_versions_are_served(served: Repository) -> None:
    class Machine(AnyOrder):
        repository = served

    run_state_machine_as_test(
        Machine,
        settings=settings(
            derandomize=True,
            deadline=None,
            max_examples=20,
            stateful_step_count=20,
            # Shrinking a failure would take minutes.
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )
