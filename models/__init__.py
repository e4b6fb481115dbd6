"""Models, imported as ``deepprob.models``: one file per model."""

from __future__ import annotations

# Imported under a second name, every class would exist twice and isinstance would fail between the copies.
if __name__ == "models":
    raise ImportError(
        "this folder must be imported as deepprob.models, not as models. Write: from deepprob.models import VAE"
    )

from deepprob.models.bayesian_neural_network import BayesianNeuralNetwork
from deepprob.models.bayesian_vae import BayesianVAE
from deepprob.models.conditional_vae import ConditionalVAE
from deepprob.models.deep_markov_model import DeepMarkovModel
from deepprob.models.hierarchical_vae import HierarchicalVAE
from deepprob.models.mixture_vae import MixtureVAE
from deepprob.models.semi_supervised_vae import SemiSupervisedVAE
from deepprob.models.vae import VAE
from deepprob.programs.lifted import lift
from deepprob.programs.program import Program

#: The models by their names in commands and saved posteriors.
MODELS: dict[str, type[Program]] = {
    "vae": VAE,
    "bnn": BayesianNeuralNetwork,
    "dmm": DeepMarkovModel,
    "bayesian_vae": BayesianVAE,
    "mixture_vae": MixtureVAE,
    "semi_supervised_vae": SemiSupervisedVAE,
    "conditional_vae": ConditionalVAE,
    "hierarchical_vae": HierarchicalVAE,
}

__all__ = [
    "MODELS",
    "VAE",
    "BayesianNeuralNetwork",
    "BayesianVAE",
    "ConditionalVAE",
    "DeepMarkovModel",
    "HierarchicalVAE",
    "MixtureVAE",
    "SemiSupervisedVAE",
    "lift",
]
