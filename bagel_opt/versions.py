"""The oldest versions of libraries whose answers are right, asked for where a model is loaded: what a package installer was
told holds until somebody installs another version beside it."""

import re

# onnxruntime 1.24 lacks TensorScatter. 1.25 to 1.27 align the causal mask of Attention with lengths elsewhere than ONNX says:
# golden edits are off by half. From 1.28 on all golden cases agree to 3e-6. On GPUs none older than 1.31 was tried, and of
# torch none older than 2.11.
LEAST = {"torch": "2.11", "onnxruntime": "1.28", "onnxruntime-gpu": "1.31"}
EXTRAS = {"torch": "torch", "onnxruntime": "onnx", "onnxruntime-gpu": "onnx-gpu"}


def check_version(library: str, found: str) -> None:
    """Raises ImportError for a version that is too old."""
    if _numbers(found) < _numbers(LEAST[library]):
        raise ImportError(
            f"{library} {found} is too old: its answers may be wrong without a word, so {LEAST[library]} or newer is needed; "
            f"pip install --upgrade 'bagel-opt[{EXTRAS[library]}]'"
        )


def check_onnxruntime(device: str) -> None:
    """Raises ImportError where onnxruntime is too old, or built without CUDA where the device is "cuda"."""
    import onnxruntime

    found = onnxruntime.__version__
    if device == "cpu":
        return check_version("onnxruntime", found)
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise ImportError(
            f"onnxruntime {found} is built without CUDA; pip uninstall onnxruntime; pip install 'bagel-opt[onnx-gpu]'"
        )
    check_version("onnxruntime-gpu", found)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:2]))
