"""A bundle that loads but cannot be run is refused with its reason, and all others are served."""

import os
import re
import signal
from pathlib import Path

import httpx
import pytest

from tests.bad_bundles import BAD, ODD, more_masks
from tests.bundles import publish
from tests.conftest import children, events, memory, service, wait_for

# The longest reason is that of a failed Reshape, with the C++ signature that onnxruntime quotes.
LONGEST_REASON = 500
# With two workers each bundle is tried three times, so not all of them are.
WITH_TWO_WORKERS = ("reshape", "reshape-of-64", "allocation", "more-rows", "passes", "no-labels")


def hang_up(client: httpx.Client) -> None:
    os.kill(int(client.headers["x-test-pid"]), signal.SIGHUP)


@pytest.mark.parametrize(("workers", "names"), [(1, tuple(BAD)), (2, WITH_TWO_WORKERS)])
def test_every_bad_bundle_is_refused_for_its_reason_and_the_others_are_served(
    built: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    workers: int,
    names: tuple[str, ...],
) -> None:
    digits = built / "models" / "digits" / "1"
    models = tmp_path / "models"
    models.mkdir()
    # One before and one behind all others in order.
    for name in ("0", *names, "zz"):
        publish(digits, models / name / "1")
    for name in names:
        BAD[name].spoil(models / name / "1")
    with service(models, DROPSERVE_WORKERS=str(workers)) as client:
        assert client.get("/health/ready").json()["models"] == {"0": [1], "zz": [1]}
        for name in names:
            answer = client.post(f"/v2/repository/models/{name}/load")
            assert answer.status_code == 400, (name, answer.text)
            start = f"refused {name} version 1: "
            reason = answer.json()["error"].removeprefix(start)
            assert re.search(BAD[name].says, reason), (name, reason)
            assert len(reason) <= LONGEST_REASON
            assert reason.isprintable()
            assert not re.search(r"(?<!\w)/\w+/", reason), reason
        publish(digits, models / "zzz" / "1")
        hang_up(client)
        served = {"0": [1], "zz": [1], "zzz": [1]}
        # Of as many requests as reach every worker.
        with httpx.Client(base_url=client.base_url, headers={"connection": "close"}) as new:
            for _ in range(10 * workers):
                wait_for(lambda: new.get("/health/ready").json()["models"] == served)
        assert len(children(int(client.headers["x-test-pid"]))) in (0, workers)
    lines = events(capfd.readouterr().out)
    assert not [line for line in lines if "trace" in line]
    said = {line["message"] for line in lines}
    for name in names:
        (refusal,) = [each for each in said if each.startswith(f"refused {name} version 1: ")]
        assert re.search(BAD[name].says, refusal)


@pytest.fixture(scope="module")
def odd(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with bundles that are odd, but can be served."""
    models = tmp_path_factory.mktemp("odd")
    for name, spoil in ODD.items():
        publish(built / "models" / "digits" / "1", models / name / "1")
        spoil(models / name / "1")
    return models


def test_odd_bundles_are_served_and_every_route_answers(odd: Path) -> None:
    with service(odd) as client:
        assert client.get("/health/ready").json()["models"].keys() == ODD.keys()
        body = {"inputs": [[0] * 64] * 3, "seed": 1, "passes": 25}
        for name in ODD:
            mine = body | {"model": name}
            del mine["seed"], mine["passes"]
            assert client.post("/predict", json=mine).status_code == 200
            for masks in ("independent", "stratified"):
                for change in ({}, {"tolerance": 0.1}, {"interval": 0.999, "coverage": 0.9}):
                    mine = body | {"model": name, "masks": masks} | change
                    for route in ("/uncertainty", "/debug/mc"):
                        answer = client.post(route, json=mine)
                        assert answer.status_code == 200, (name, mine, answer.text)
                mine = {"model": name, "version": 1, "passes": 25, "seed": 1, "masks": masks}
                assert client.post("/console/masks", json=mine).status_code == 200
            assert client.get(f"/console/models/{name}/versions/1").status_code == 200


def test_passes_without_sites_are_all_the_same(odd: Path) -> None:
    with service(odd) as client:
        for masks in ("independent", "stratified"):
            body = {"inputs": [[1] * 64], "model": "without-sites", "masks": masks}
            answer = client.post("/debug/mc", json=body).json()
            assert answer["std"] == [[0] * 10]
            assert answer["sites"] == []
            assert answer["mean"] == answer["deterministic"]


def test_masks_larger_than_a_bundle_says_take_no_more_memory_for_it(
    built: Path, tmp_path: Path
) -> None:
    place = tmp_path / "models" / "large" / "1"
    publish(built / "models" / "digits" / "1", place)
    more_masks([2**22])(place)
    with service(tmp_path / "models") as client:
        # By values_per_pass, 1802, hundreds of passes would run at once: each with masks of 4 MiB,
        # and random numbers of twice that.
        assert memory(client, "VmHWM") < 400 * 2**20
