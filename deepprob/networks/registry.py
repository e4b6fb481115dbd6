"""Networks by name, and a network from its configuration."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from deepprob.errors import unknown
from deepprob.networks.by_class import MLPByClass
from deepprob.networks.convolutional import ConvDecoder, ConvEncoder
from deepprob.networks.dense import MLP
from deepprob.networks.network import Network
from deepprob.networks.recurrent import Recurrent

NETWORKS: dict[str, type[Network]] = {
    "mlp": MLP,
    "mlp_by_class": MLPByClass,
    "conv_encoder": ConvEncoder,
    "conv_decoder": ConvDecoder,
    "recurrent": Recurrent,
}


def network_from_config(config: Mapping[str, Any]) -> Network:
    """Build a network from its ``config``, with new weights.

    Args:
        config: The ``config`` of a network; omitted arguments keep their defaults.

    Returns:
        The network.

    Raises:
        ValueError: If the name of the network or of an argument is unknown.

    Examples:
        >>> net = MLP(5, 2, activation="tanh")
        >>> network_from_config(net.config).config == net.config
        True
    """
    arguments = dict(config)
    name = arguments.pop("network", None)
    if name not in NETWORKS:
        raise unknown("network", name, NETWORKS)
    known = list(inspect.signature(NETWORKS[name]).parameters)
    for argument in arguments:
        if argument not in known:
            raise unknown(f"argument of network {name!r}", argument, known)
    return NETWORKS[name](**arguments)
