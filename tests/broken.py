"""Packages that are installed and broken: small ones that a test writes."""

import contextlib
import sys

from bagel_opt import installed
from bagel_opt.model import attention
from bagel_opt.runtime import fused_products

CACHED = (
    *(installed.fault, attention.flash_package),
    *(fused_products.fault, fused_products.fault_fp8, fused_products.usable, fused_products.usable_fp8),
)


@contextlib.contextmanager
def packages(monkeypatch, folder, **files):
    """Modules by their dotted names with __ for a dot, and what stands in them; what was tried before is forgotten, then and
    afterwards."""
    tops = set()
    for name, text in files.items():
        *above, last = name.split("__")
        place = folder.joinpath(*above, last)
        place.mkdir(parents=True, exist_ok=True)
        (place / "__init__.py").write_text(text)
        tops.add((above or [last])[0])
    if "triton" in tops:
        import torch._dynamo  # noqa: F401  which asks for Triton once, and would take the false one for it
    for variable in ("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", *installed.KERNELS.values()):
        monkeypatch.setenv(variable, "")  # so that it is as before, afterwards
        monkeypatch.delenv(variable)
    monkeypatch.syspath_prepend(folder)
    there = _forget(tops)
    try:
        yield
    finally:
        _forget(tops)
        sys.modules.update(there)


def _forget(tops):
    for cached in CACHED:
        cached.cache_clear()
    names = [name for name in sys.modules if name.partition(".")[0] in tops]
    return {name: sys.modules.pop(name) for name in names}
