"""API keys: the check of requests, malformed keys files, and the command that makes keys."""

import hmac
import json
import os
import re
import stat
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from subprocess import CompletedProcess
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dropserve.app.cli.keys import command
from dropserve.app.errors import Forbidden, StartError, Unauthorized
from dropserve.app.security.api_keys import MAX_FILE_BYTES, Keys, Scope
from tests.conftest import run

OPS, APP = b"ds_ops-key", b"ds_app-key"
# For child processes: a variable of the person who runs the tests must not reach them.
NO_FILE = {"DROPSERVE_API_KEYS_FILE": ""}
KEY = re.compile(r"ds_[A-Za-z0-9_-]{43}")


def entry(name: str, key: bytes, *scopes: str) -> dict[str, object]:
    return {"name": name, "sha256": sha256(key).hexdigest(), "scopes": scopes}


def write(file: Path, *entries: object) -> Path:
    file.write_text(json.dumps({"keys": entries}))
    return file


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    """One key for predict and admin, one for predict."""
    file = tmp_path_factory.mktemp("keys") / "keys.json"
    return Keys.read(
        write(file, entry("ops", OPS, "predict", "admin"), entry("app", APP, "predict"))
    )


@pytest.mark.parametrize("key", [OPS, APP])
@pytest.mark.parametrize("scope", ["predict", None])
def test_a_known_key_is_let_in_by_either_header(keys: Keys, key: bytes, scope: Scope) -> None:
    for headers in (
        {b"authorization": b"Bearer " + key},
        {b"authorization": b"bEARER   " + key + b" "},
        {b"x-api-key": key},
        {b"x-api-key": key, b"authorization": b"Bearer " + key, b"accept": b"*/*"},
    ):
        keys.check(headers, scope)


@pytest.mark.parametrize(
    ("headers", "says"),
    [
        ({}, "an API key is needed"),
        ({b"accept": OPS}, "an API key is needed"),
        ({b"x-api-key": b""}, "X-API-Key is empty"),
        ({b"x-api-key": b"ds_other-key"}, "not known"),
        ({b"x-api-key": OPS + b"x"}, "not known"),
        ({b"x-api-key": OPS.upper()}, "not known"),
        # A key's hash, which any reader of the file knows, is no key.
        ({b"x-api-key": sha256(OPS).hexdigest().encode()}, "not known"),
        ({b"x-api-key": sha256(OPS).digest()}, "not known"),
        ({b"x-api-key": b"\xff\x00\xc3\xa4"}, "not known"),
        ({b"x-api-key": b"x" * 513}, "X-API-Key is longer than 512 bytes"),
        ({b"authorization": b""}, "form 'Bearer KEY'"),
        ({b"authorization": b"Bearer"}, "form 'Bearer KEY'"),
        ({b"authorization": b"Bearer  "}, "form 'Bearer KEY'"),
        ({b"authorization": OPS}, "form 'Bearer KEY'"),
        ({b"authorization": b"Basic " + OPS}, "form 'Bearer KEY'"),
        ({b"authorization": b"Bearer" + OPS}, "form 'Bearer KEY'"),
        ({b"authorization": b"Bearer " + OPS + b" x"}, "not known"),
        ({b"authorization": b"Bearer \xff"}, "not known"),
        ({b"authorization": b"Bearer " + b"x" * 506}, "Authorization is longer than 512 bytes"),
        ({b"authorization": b"Bearer " + OPS, b"x-api-key": APP}, "different API keys"),
        ({b"authorization": b"Bearer " + OPS, b"x-api-key": b""}, "different API keys"),
        ({b"authorization": b"Basic eDp5", b"x-api-key": OPS}, "form 'Bearer KEY'"),
    ],
)
def test_no_key_or_none_that_is_known_is_unauthorized(
    keys: Keys, headers: dict[bytes, bytes], says: str
) -> None:
    scopes: tuple[Scope | None, ...] = (None, "predict")
    for scope in scopes:
        with pytest.raises(Unauthorized, match=says) as caught:
            keys.check(headers, scope)
        # Neither the message nor the cause repeats the key.
        assert "ds_" not in f"{caught.value!r}{caught.value.__cause__!r}"


def test_a_key_without_the_scope_is_forbidden_whatever_else_it_is_for(keys: Keys) -> None:
    forbidden: list[tuple[bytes, Scope]] = [(OPS, "debug"), (APP, "debug"), (APP, "admin")]
    for key, scope in forbidden:
        with pytest.raises(Forbidden, match=f"^the API key is not for the scope '{scope}'$"):
            keys.check({b"x-api-key": key}, scope)


def test_admin_does_not_imply_predict(tmp_path: Path) -> None:
    keys = Keys.read(write(tmp_path / "keys.json", entry("root", OPS, "admin")))
    keys.check({b"x-api-key": OPS}, "admin")
    with pytest.raises(Forbidden):
        keys.check({b"x-api-key": OPS}, "predict")


def test_every_hash_is_compared_in_constant_time_also_after_the_match(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = [entry(f"key {index}", b"%d" % index, "predict") for index in range(5)]
    keys = Keys.read(write(tmp_path / "keys.json", *stored))
    compared: list[str] = []

    def compare(known: bytes, given: bytes) -> bool:
        compared.append(known.hex())
        return known == given

    monkeypatch.setattr(hmac, "compare_digest", compare)
    for key in (b"0", b"2", b"4"):
        keys.check({b"x-api-key": key}, "predict")
        assert compared == [each["sha256"] for each in stored]
        compared.clear()


VALUES = st.one_of(
    st.binary(max_size=600),
    st.sampled_from([OPS, APP]),
    st.builds(
        lambda *parts: b"".join(parts),
        st.sampled_from([b"Bearer", b"bearer", b"Basic", b""]),
        st.sampled_from([b" ", b"  ", b"\t", b""]),
        st.one_of(st.binary(max_size=600), st.sampled_from([OPS, APP])),
    ),
)
HEADERS = st.one_of(
    st.dictionaries(st.sampled_from([b"authorization", b"x-api-key"]), VALUES),
    st.dictionaries(st.binary(max_size=20), VALUES),
)


@given(headers=HEADERS, scope=st.sampled_from([None, *get_args(Scope)]))
def test_any_headers_are_let_in_unauthorized_or_forbidden(
    keys: Keys, headers: dict[bytes, bytes], scope: Scope | None
) -> None:
    try:
        keys.check(headers, scope)
    except (Unauthorized, Forbidden):
        return
    assert any(key in value for value in headers.values() for key in (OPS, APP))


GOOD = entry("ops", OPS, "predict")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "Invalid JSON: EOF while parsing"),
        ("keys", "Invalid JSON: expected value at line 1 column 1"),
        (b"\xff", "Invalid JSON: "),
        ([], "Input should be an object"),
        ({}, "keys: Field required"),
        ({"keys": {}}, "keys: Input should be a valid array"),
        ({"keys": [GOOD], "version": 1}, "version: Extra inputs are not permitted"),
        ({"keys": [GOOD, 1]}, "keys.1: Input should be an object"),
        ({"keys": [GOOD | {"key": "x"}]}, "keys.0.key: Extra inputs are not permitted"),
        ({"keys": [{"ds_" + "x" * 43: 1} | GOOD]}, "keys.0....: Extra inputs are not permitted"),
        ({"keys": [{**GOOD, "a\nb": 1}]}, "keys.0....: Extra inputs are not permitted"),
        ({"keys": [GOOD | {"scopes": []}]}, "keys.0.scopes: Tuple should have at least 1 item"),
        (
            {"keys": [GOOD | {"scopes": ["admin", "root"]}]},
            "keys.0.scopes.1: Input should be 'predict', 'debug' or 'admin'",
        ),
        ({"keys": [GOOD | {"sha256": OPS.decode()}]}, "keys.0.sha256: String should match"),
        ({"keys": [GOOD | {"sha256": "0" * 63}]}, "keys.0.sha256: String should match"),
        ({"keys": [GOOD | {"sha256": "0" * 64 + "\n"}]}, "keys.0.sha256: String should match"),
        ({"keys": [GOOD | {"name": "a\nb"}]}, "keys.0.name: String should match"),
        (
            {"keys": [GOOD, entry("app", APP, "debug"), GOOD | {"name": "again"}]},
            "keys.2.sha256: the same as in keys.0",
        ),
        (
            {"keys": [GOOD, GOOD | {"name": "again", "sha256": str(GOOD["sha256"]).upper()}]},
            "keys.1.sha256: the same as in keys.0",
        ),
        ({"keys": [GOOD, entry("ops", APP, "debug")]}, "keys.1.name: the same as in keys.0"),
    ],
)
def test_a_malformed_keys_file_is_one_line_that_says_where(
    tmp_path: Path, content: object, says: str
) -> None:
    file = tmp_path / "keys.json"
    if not isinstance(content, str | bytes):
        content = json.dumps(content)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(StartError) as caught:
        Keys.read(file)
    line = str(caught.value)
    assert line.startswith(f"the keys file '{file}'")
    assert says in line
    assert line.splitlines() == [line]
    # A key in the wrong place never reaches a log.
    assert "ds_" not in line


def unreadable(file: Path, why: str) -> None:
    with pytest.raises(StartError) as caught:
        Keys.read(file)
    assert str(caught.value) == f"the keys file '{file}' {why}"


def test_a_keys_file_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    unreadable(tmp_path / "none.json", "cannot be read: No such file or directory")
    unreadable(tmp_path, "is not a regular file")


def test_a_keys_file_that_would_never_end_is_refused_at_once(tmp_path: Path) -> None:
    # Opening a named pipe would wait for a writer.
    os.mkfifo(tmp_path / "pipe")
    unreadable(tmp_path / "pipe", "is not a regular file")
    unreadable(Path("/dev/zero"), "is not a regular file")
    large = tmp_path / "large.json"
    large.touch()
    os.truncate(large, MAX_FILE_BYTES + 1)
    unreadable(large, f"is larger than {MAX_FILE_BYTES} bytes")


def test_a_keys_file_may_be_a_link_as_kubernetes_mounts_a_secret(tmp_path: Path) -> None:
    (tmp_path / "keys.json").symlink_to(write(tmp_path / "data.json", GOOD))
    Keys.read(tmp_path / "keys.json").check({b"x-api-key": OPS}, "predict")


@pytest.mark.parametrize("content", ["", " \n", '{"keys": []}'])
def test_without_keys_in_the_file_no_key_is_known(tmp_path: Path, content: str) -> None:
    (tmp_path / "keys.json").write_text(content)
    keys = Keys.read(tmp_path / "keys.json")
    for key in (OPS, b"", b"x"):
        with pytest.raises(Unauthorized):
            keys.check({b"x-api-key": key}, None)


def new(*arguments: str) -> CompletedProcess[str]:
    return run("app", "key", "new", *arguments, **NO_FILE)


def test_the_command_makes_a_file_whose_key_works(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    done = new("--scope", "predict,debug", "--scope", "predict", "--file", str(file))
    assert done.returncode == 0
    key = done.stdout.removesuffix("\n")
    assert KEY.fullmatch(key)
    assert done.stderr == f"wrote the hash of key 'key-1' (predict, debug) to '{file}'\n"
    assert key not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["keys.json"]
    keys = Keys.read(file)
    keys.check({b"x-api-key": key.encode()}, "predict")
    keys.check({b"authorization": b"Bearer " + key.encode()}, "debug")
    with pytest.raises(Forbidden):
        keys.check({b"x-api-key": key.encode()}, "admin")


def test_the_command_adds_to_the_file_of_the_environment(tmp_path: Path) -> None:
    file = write(tmp_path / "keys.json", entry("key-1", OPS, "predict", "admin"))
    file.chmod(0o640)
    done = run("app", "key", "new", "--scope", "admin", DROPSERVE_API_KEYS_FILE=str(file))
    assert done.returncode == 0
    assert "'key-2' (admin)" in done.stderr
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    first, second = json.loads(file.read_text())["keys"]
    assert first == entry("key-1", OPS, "predict", "admin") | {"scopes": ["predict", "admin"]}
    assert (second["name"], second["scopes"]) == ("key-2", ["admin"])
    keys = Keys.read(file)
    keys.check({b"x-api-key": OPS}, "admin")
    keys.check({b"x-api-key": done.stdout.strip().encode()}, "admin")


def test_without_a_file_the_command_prints_the_entry_for_one(tmp_path: Path) -> None:
    done = new("--scope", "debug", "--name", "night shift")
    assert done.returncode == 0
    key = done.stdout.removesuffix("\n")
    assert KEY.fullmatch(key)
    assert key not in done.stderr
    given = json.loads(done.stderr)
    assert given["name"] == "night shift"
    Keys.read(write(tmp_path / "keys.json", given)).check({b"x-api-key": key.encode()}, "debug")


# The tests below call the function in this process: a child process takes a second to start.
Said = tuple[int, str, str]


def called(capsys: pytest.CaptureFixture[str], arguments: Sequence[str]) -> Said:
    """Call the command; return its status, standard output and standard error."""
    try:
        status = command(arguments, "python -m app key")
    except SystemExit as leaving:
        status = int(leaving.code or 0)
    return status, *capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["old"], "argument COMMAND: invalid choice: 'old' (choose from 'new')"),
        (["new"], "the following arguments are required: --scope"),
        (["new", "--scope"], "argument --scope: expected one argument"),
        (
            ["new", "--scope", "root"],
            "argument --scope: 'root' is not one of predict, debug, admin",
        ),
        (["new", "--scope", "debug,"], "argument --scope: '' is not one of"),
        (["new", "--scope", "debug", "--name", ""], "argument --name: '' is not of 1 to 64"),
        (["new", "--scope", "debug", "--name", "a\nb"], "argument --name: 'a\\nb' is not of 1"),
        (["new", "--scope", "debug", "x"], "unrecognized arguments: x"),
    ],
)
def test_an_argument_that_is_not_allowed_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    status, out, err = called(capsys, arguments)
    assert (status, out) == (2, "")
    assert err.startswith(f"python -m app key: error: {says}")
    assert err.count("\n") == 1


def test_a_wrong_argument_is_status_2_of_the_process_too() -> None:
    done = new("--scope", "root")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("python -m app key: error: argument --scope: 'root'")


def test_a_name_that_is_taken_is_an_argument_that_is_not_allowed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "keys.json", GOOD)
    before = file.read_bytes()
    arguments = ["new", "--scope", "debug", "--name", "ops", "--file", str(file)]
    status, out, err = called(capsys, arguments)
    assert (status, out, file.read_bytes()) == (2, "", before)
    assert err == f"python -m app key: error: argument --name: 'ops' is in '{file}' already\n"


def test_the_default_name_is_the_first_that_is_free(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "keys.json", entry("key-1", OPS, "debug"), entry("key-3", APP, "debug"))
    for _ in range(2):
        assert called(capsys, ["new", "--scope", "debug", "--file", str(file)])[0] == 0
    names = [each["name"] for each in json.loads(file.read_text())["keys"]]
    assert names == ["key-1", "key-3", "key-2", "key-4"]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("keys.json", "Invalid JSON"),
        ("none/keys.json", "cannot be written: No such file or directory"),
        ("keys.json/keys.json", "cannot be written: Not a directory"),
        (".", "is not a regular file"),
    ],
)
def test_a_file_that_cannot_be_added_to_is_one_line_and_status_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, says: str
) -> None:
    (tmp_path / "keys.json").write_text("{")
    arguments = ["new", "--scope", "debug", "--file", str(tmp_path / name)]
    status, out, err = called(capsys, arguments)
    assert (status, out) == (1, "")
    assert err.startswith("error: the keys file '")
    assert says in err
    assert err.count("\n") == 1
    assert (tmp_path / "keys.json").read_text() == "{"
    assert os.listdir(tmp_path) == ["keys.json"]


def test_where_the_new_file_cannot_take_its_place_the_old_one_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "keys.json", GOOD)
    before = file.read_bytes()

    def fail(old: str, new: Path) -> None:
        # By now everything is written, to another file.
        assert len(json.loads(Path(old).read_text())["keys"]) == 2
        assert new.read_bytes() == before
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    status, out, err = called(capsys, ["new", "--scope", "debug", "--file", str(file)])
    assert (status, out) == (1, "")
    assert err == f"error: the keys file '{file}' cannot be written: No space left on device\n"
    assert file.read_bytes() == before
    assert os.listdir(tmp_path) == ["keys.json"]


def test_a_key_is_added_to_the_target_of_a_link(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "keys.json", GOOD)
    link = tmp_path / "link.json"
    link.symlink_to(file)
    assert called(capsys, ["new", "--scope", "debug", "--file", str(link)])[0] == 0
    assert link.is_symlink()
    assert len(json.loads(file.read_text())["keys"]) == 2


def test_commands_at_the_same_time_lose_no_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "keys.json"
    together = threading.Barrier(8)

    def add(_: int) -> int:
        together.wait(timeout=60)
        return command(["new", "--scope", "debug", "--file", str(file)], "python -m app key")

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(add, range(16))) == [0] * 16
    keys = Keys.read(file)
    made = KEY.findall(capsys.readouterr().out)
    assert len(made) == 16
    for key in made:
        keys.check({b"x-api-key": key.encode()}, "debug")


def test_two_processes_at_the_same_time_lose_no_key(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    arguments = ["--scope", "debug", "--file", str(file)]
    with ThreadPoolExecutor(2) as threads:
        done = list(threads.map(lambda _: new(*arguments), range(2)))
    keys = Keys.read(file)
    for each in done:
        keys.check({b"x-api-key": each.stdout.strip().encode()}, "debug")
