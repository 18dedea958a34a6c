"""The onnxruntime providers of each device, and the reason why one did not load.

onnxruntime lists a provider as available if it was built in, and silently falls back to the CPU if
a CUDA library is missing. So the providers of the session itself are checked.
"""

import contextlib
import ctypes
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import onnxruntime

from dropserve.app.errors import DeviceUnavailable

Device = Literal["cpu", "cuda", "tensorrt"]

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"
PROVIDERS: dict[Device, list[str]] = {
    "cpu": [CPU],
    "cuda": [CUDA, CPU],
    "tensorrt": [TENSORRT, CUDA, CPU],
}
OPTIONS: dict[str, dict[str, str]] = {
    CUDA: {
        # TensorFloat-32, on by default, keeps 11 bits: answers would differ from the CPU's by 1e-3.
        "use_tf32": "0",
        # The default, relied on here: copies use the stream of the computation.
        "do_copy_in_default_stream": "1",
    },
}
LIBRARIES = {
    CUDA: "libonnxruntime_providers_cuda.so",
    TENSORRT: "libonnxruntime_providers_tensorrt.so",
}
DRIVER = "libcuda.so.1"
# Severities of onnxruntime's log; at FATAL it logs only what ends the process.
FATAL = 4
WARNING = 2


def open_session(
    graph: bytes, device: Device, options: onnxruntime.SessionOptions
) -> onnxruntime.InferenceSession:
    """Load a graph on a device.

    Raises
    ------
    DeviceUnavailable
        If the device's provider did not load; the message says what is missing.
    """
    wanted = PROVIDERS[device][0]
    if device != "cpu":
        check_present(device)
    if device == "tensorrt":
        # TensorRT has no option for TensorFloat-32; all of NVIDIA's libraries follow this variable.
        os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
    # A missing library is raised as an error; onnxruntime need not log it.
    with quiet_log():
        if device != "cpu":
            onnxruntime.preload_dlls()
        providers = [(provider, OPTIONS.get(provider, {})) for provider in PROVIDERS[device]]
        session = onnxruntime.InferenceSession(graph, options, providers=providers)
    if wanted not in session.get_providers():
        raise DeviceUnavailable(f"device {device}: {wanted} did not load: {load_failure(wanted)}")
    return session


def check_present(device: Device) -> None:
    """Raise DeviceUnavailable if there is no provider or no driver for a GPU."""
    wanted = PROVIDERS[device][0]
    if wanted not in onnxruntime.get_available_providers():
        raise DeviceUnavailable(
            f"device {device}: the installed onnxruntime has no {wanted}; "
            "install the extra 'cuda' in place of 'cpu'"
        )
    if fault := linker_error(DRIVER):
        raise DeviceUnavailable(f"device {device}: no NVIDIA driver: {fault}")


def load_failure(provider: str) -> str:
    """Return why a provider did not load."""
    library = Path(onnxruntime.__file__).parent / "capi" / LIBRARIES[provider]
    return linker_error(str(library)) or "its libraries load, but no device accepts it"


def linker_error(library: str) -> str | None:
    """Return the dynamic linker's error for a library, without its folder; None if it loads."""
    try:
        ctypes.CDLL(library)
    except OSError as error:
        return str(error).rpartition("/")[2]
    return None


@contextlib.contextmanager
def quiet_log() -> Iterator[None]:
    """Silence onnxruntime's log, and the output of its Python part."""
    onnxruntime.set_default_logger_severity(FATAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        onnxruntime.set_default_logger_severity(WARNING)
