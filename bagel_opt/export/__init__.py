"""Exporting: a checkpoint becomes a bundle that another runtime loads. `python -m bagel_opt.export` is the command."""

from bagel_opt.export.bundle import export

__all__ = ["export"]
