"""The server for `serve run` and Serve config files, whose import path this is.

`bagel-opt serve --replicas 2` starts replicas on this machine. On a cluster, `serve run bagel_opt.serve.ray:app
checkpoint=/bundle max-replicas=8`, or a Serve config file with this import path, takes the same options.
"""

from ray import serve

from bagel_opt.cli.serving import cluster_settings
from bagel_opt.serve.replicas import application


def app(options: dict[str, str]) -> serve.Application:
    """The options of `bagel-opt serve`, by name, without their dashes."""
    return application(**cluster_settings(options))
