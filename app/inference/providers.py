"""Which onnxruntime providers a device needs, and why they may not have loaded.

onnxruntime lists a provider as available when its library was built in, and runs on the CPU
without an error when a CUDA library is absent. So the session is asked what it really got.
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
        # The default, which this relies on: copies take the stream of the computation.
        "do_copy_in_default_stream": "1",
    },
}
LIBRARIES = {
    CUDA: "libonnxruntime_providers_cuda.so",
    TENSORRT: "libonnxruntime_providers_tensorrt.so",
}
DRIVER = "libcuda.so.1"
# Of onnxruntime's log; it then says only what ends the process.
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
        # It has no option for it; NVIDIA's libraries all follow this.
        os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
    # Here an absent library is no news for the log: the caller gets it as an error.
    with quiet_log():
        if device != "cpu":
            onnxruntime.preload_dlls()
        providers = [(provider, OPTIONS.get(provider, {})) for provider in PROVIDERS[device]]
        session = onnxruntime.InferenceSession(graph, options, providers=providers)
    if wanted not in session.get_providers():
        raise DeviceUnavailable(f"device {device}: {wanted} did not load: {why(wanted)}")
    return session


def check_present(device: Device) -> None:
    """Raise DeviceUnavailable where there is no use in trying to use a GPU."""
    wanted = PROVIDERS[device][0]
    if wanted not in onnxruntime.get_available_providers():
        raise DeviceUnavailable(
            f"device {device}: the installed onnxruntime has no {wanted}; "
            "install the extra 'cuda' in place of 'cpu'"
        )
    if fault := load_fault(DRIVER):
        raise DeviceUnavailable(f"device {device}: no NVIDIA driver: {fault}")


def why(provider: str) -> str:
    """Say what keeps a provider's library from loading."""
    library = Path(onnxruntime.__file__).parent / "capi" / LIBRARIES[provider]
    return load_fault(str(library)) or "its libraries load, but no device accepts it"


def load_fault(library: str) -> str | None:
    """Return the dynamic linker's complaint about a library, without its folder."""
    try:
        ctypes.CDLL(library)
    except OSError as error:
        return str(error).rpartition("/")[2]
    return None


@contextlib.contextmanager
def quiet_log() -> Iterator[None]:
    """Silence onnxruntime's own log, and what its Python part prints, for a while."""
    onnxruntime.set_default_logger_severity(FATAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        onnxruntime.set_default_logger_severity(WARNING)
