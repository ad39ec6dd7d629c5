"""The models by the families of their sizes."""

from bagel_opt.lance.config import Config
from bagel_opt.model.bagel import Bagel
from bagel_opt.model.lance import Lance
from bagel_opt.model.mixture import Mixture

MODELS = {"bagel": Bagel, "lance": Lance}


def build(config: Config) -> Mixture:
    """A model of these sizes, without weights that mean anything."""
    return MODELS[config.family](config)
