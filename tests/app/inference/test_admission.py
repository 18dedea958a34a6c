"""Which requests are admitted, and what the others are told."""

import pytest

from dropserve.app.errors import Overloaded
from dropserve.app.inference.admission import MAX_RETRY_SECONDS, Admission, Admitted


def test_a_request_beyond_the_limit_is_refused_until_there_is_room() -> None:
    admission = Admission(10, "loaves")
    with Admitted(admission, 6, 0.0):
        with pytest.raises(Overloaded, match="loaves of all requests may be at most 10"):
            admission.acquire(5)
        with Admitted(admission, 4, 0.0):
            assert admission.held == 10
    admission.acquire(5)
    assert admission.held == 5


def test_a_request_larger_than_the_limit_is_admitted_alone() -> None:
    admission = Admission(10)
    with Admitted(admission, 100, 0.0), pytest.raises(Overloaded):
        admission.check(1)
    admission.check(100)


@pytest.mark.parametrize(
    ("seconds", "retry"), [(0.0, 1), (0.2, 1), (2.5, 3), (1e6, MAX_RETRY_SECONDS)]
)
def test_a_refused_client_is_told_when_the_admitted_work_should_be_done(
    seconds: float, retry: int
) -> None:
    admission = Admission(1)
    with Admitted(admission, 1, seconds), pytest.raises(Overloaded) as refused:
        admission.check()
    assert refused.value.seconds == retry


def test_an_error_releases_what_was_admitted() -> None:
    admission = Admission(10)
    with pytest.raises(ZeroDivisionError), Admitted(admission, 6, 1.0):
        raise ZeroDivisionError
    assert (admission.held, admission.seconds) == (0, 0)
