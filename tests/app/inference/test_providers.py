"""A device that is not to be had is said plainly: here, on most machines, a GPU."""

from pathlib import Path

import onnxruntime
import pytest

from dropserve.app.bundles import loader
from dropserve.app.errors import DeviceUnavailable
from dropserve.app.inference import providers
from dropserve.app.inference.engine import Engine
from dropserve.app.inference.registry import load_engines

HAS_GPU = providers.linker_error(providers.DRIVER) is None


def bundle(built: Path) -> loader.Bundle:
    return loader.read_bundle(built / "models" / "diabetes" / "1")


@pytest.mark.parametrize("name", ["cuda", "tensorrt"])
def test_a_device_without_its_provider_or_driver_is_unavailable(
    built: Path, name: providers.Device
) -> None:
    if HAS_GPU:
        assert Engine(bundle(built), "cuda").provider == providers.CUDA
        return
    with pytest.raises(DeviceUnavailable, match=f"^device {name}: ") as caught:
        Engine(bundle(built), name)
    if providers.PROVIDERS[name][0] in onnxruntime.get_available_providers():
        # onnxruntime calls it available, though it would run on the CPU.
        assert "no NVIDIA driver: libcuda.so.1: cannot open" in str(caught.value)
    else:
        assert "the installed onnxruntime has no" in str(caught.value)


def test_a_provider_that_onnxruntime_silently_leaves_out_is_unavailable(
    built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state of a machine with a driver and without CUDA's libraries."""
    monkeypatch.setattr(providers, "DRIVER", "libc.so.6")
    available = [providers.CUDA, providers.CPU]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: available)
    if HAS_GPU:
        return
    with pytest.raises(DeviceUnavailable, match=r"^device cuda: CUDA\w+ did not load: .*\.so"):
        Engine(bundle(built), "cuda")


def test_auto_falls_back_to_the_cpu_with_one_warning(
    built: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engines = load_engines(built / "models", "auto")
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    devices = {engine.device for versions in engines.values() for engine in versions.values()}
    if HAS_GPU:
        assert (devices, warnings) == ({"cuda"}, [])
        return
    assert devices == {"cpu"}
    (warning,) = warnings
    assert warning.getMessage().startswith("serving on the CPU: device cuda: ")
