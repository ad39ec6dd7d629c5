"""The oldest versions of libraries whose answers are right, asked for where a model is loaded: what a package installer was
told holds until somebody installs another version beside it."""

import re

import PIL

# onnxruntime 1.24 lacks TensorScatter. 1.25 to 1.27 align the causal mask of Attention with lengths elsewhere than ONNX says:
# golden edits are off by half. From 1.28 on all golden cases agree to 3e-6. On GPUs none older than 1.31 was tried, and of
# torch none older than 2.11.
LEAST = {"torch": "2.11", "onnxruntime": "1.28", "onnxruntime-gpu": "1.31"}
PILLOW = "13"  # findings/pillow-13-resizes-differently.sh: golden answers about some pictures differ with older ones
EXTRAS = {"torch": "torch", "onnxruntime": "onnx", "onnxruntime-gpu": "onnx-gpu"}


def check_version(library: str, found: str) -> None:
    """Raises ImportError for a version that is too old."""
    if release(found) < release(LEAST[library]):
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


def older_pillow() -> tuple[str, str] | None:
    """What is to be said of a Pillow that resizes otherwise, and what to do. It is no reason to refuse."""
    if release(PIL.__version__) >= release(PILLOW):
        return None
    why = f"pillow {PIL.__version__} resizes some pictures a little differently from {PILLOW} and newer, so answers about them may differ"
    return why, f"pip install 'pillow>={PILLOW}'"


def release(version: str) -> tuple[int, ...]:
    """Its numbers, without what says that it is a beta or how it was built."""
    return tuple(map(int, re.findall(r"\d+", re.match(r"[\d.]*", version)[0])))
