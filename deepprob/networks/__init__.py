"""Networks for the functions one does not know, and what makes distributions of their outputs.

Every network maps ``(*batch, ...)`` to ``(*batch, out_features)`` and says how it was made in
``config``, from which :func:`network_from_config` makes it again.
"""

from __future__ import annotations

from deepprob.networks.conditional import FAMILIES, Conditional
from deepprob.networks.convolutional import ConvDecoder, ConvEncoder
from deepprob.networks.dense import MLP
from deepprob.networks.initialisation import ACTIVATIONS, init_weights, pretrained
from deepprob.networks.likelihood import LIKELIHOODS, Likelihood
from deepprob.networks.network import Network
from deepprob.networks.recurrent import Recurrent
from deepprob.networks.registry import NETWORKS, network_from_config

__all__ = [
    "ACTIVATIONS",
    "FAMILIES",
    "LIKELIHOODS",
    "MLP",
    "NETWORKS",
    "Conditional",
    "ConvDecoder",
    "ConvEncoder",
    "Likelihood",
    "Network",
    "Recurrent",
    "init_weights",
    "network_from_config",
    "pretrained",
]
