"""Neural networks, and the conditionals and likelihoods that turn their outputs into distributions.

Every network keeps leading batch axes and returns ``out_features`` numbers on the last axis. Its ``config`` holds the
constructor's arguments; :func:`network_from_config` rebuilds the network from them.
"""

from __future__ import annotations

from deepprob.networks.conditional import FAMILIES, Conditional
from deepprob.networks.convolutional import ConvDecoder, ConvEncoder
from deepprob.networks.dense import MLP
from deepprob.networks.flow import ConditionalFlow
from deepprob.networks.initialisation import ACTIVATIONS, init_weights, pretrained
from deepprob.networks.likelihood import LIKELIHOODS, Likelihood
from deepprob.networks.mixed import MixedLikelihood
from deepprob.networks.network import Network
from deepprob.networks.priors import FlowPrior, MixturePrior, VampPrior
from deepprob.networks.recurrent import Recurrent
from deepprob.networks.registry import NETWORKS, network_from_config

__all__ = [
    "ACTIVATIONS",
    "FAMILIES",
    "LIKELIHOODS",
    "MLP",
    "NETWORKS",
    "Conditional",
    "ConditionalFlow",
    "ConvDecoder",
    "ConvEncoder",
    "FlowPrior",
    "Likelihood",
    "MixedLikelihood",
    "MixturePrior",
    "Network",
    "Recurrent",
    "VampPrior",
    "init_weights",
    "network_from_config",
    "pretrained",
]
