"""Next steps that several checks name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RICHER_GUIDE = "Try a richer guide (guide='multivariate_normal' or 'flow')."
WIDTH = "For a width, fit guide='normal' or guide='laplace'."
RICHER_ENCODER = "Try a larger encoder or a richer guide (full covariance, flow), or train it for longer."
AGAINST_COLLAPSE = (
    "Raise the weight of the KL slowly (callbacks=[dp.KLWarmUp(epochs)]), keep a minimum of it "
    "(objective=dp.objectives.ELBO(free_bits=0.5)), or use a weaker decoder."
)

_FURTHER = {
    "multivariate_normal": "Try guide='flow', or reparameterize the model, such as by non-centered effects.",
    "flow": "Reparameterize the model, such as by non-centered effects, or draw from the posterior by a sampler.",
}


_LIGHTER_KL = (
    "The KL weighs {beta:g} times: lower beta, or let the codes hold some nats, "
    "objective=dp.objectives.Beta({beta:g}, capacity=...)."
)
_MORE_CAPACITY = "Raise the capacity of the codes, now {capacity:g} nats, or use a weaker decoder."
_MORE_BITS = "Raise free_bits, now {free_bits:g} nats for each dimension, or use a weaker decoder."

_BY_SVI = "Try another posterior: svi with guide='multivariate_normal' or 'flow', or draws by sghmc."
_WIDTH_BY_SVI = "For a width, fit by svi, which has one for every latent number."


def possible(step: str, config: Mapping[str, Any], *, extends: bool) -> str:
    """A next step, or another one if the fit has tried it, cannot go on, or its routine takes no guide.

    Args:
        step: The next step.
        config: The settings of the fit.
        extends: Whether the fit can go on from where it ended.

    Examples:
        >>> possible(RICHER_GUIDE, {"guide": "normal"}, extends=True) == RICHER_GUIDE
        True
        >>> possible(RICHER_GUIDE, {"guide": "flow"}, extends=True).split(",")[0]
        'Reparameterize the model'
        >>> possible(RICHER_GUIDE, {"routine": "laplace"}, extends=False).split(":")[0]
        'Try another posterior'
        >>> possible("Train on: dp.extend(posterior, data).", {"guide": "normal"}, extends=False)
        'Fit again for longer: raise epochs= or steps=.'
        >>> possible(AGAINST_COLLAPSE, {"objective": {"name": "beta", "beta": 20.0}}, extends=True).split(",")[0]
        'The KL weighs 20 times: lower beta'
    """
    if "dp.extend(" in step and not extends:
        return "Fit again for longer: raise epochs= or steps=."
    if AGAINST_COLLAPSE in step:
        return step.replace(AGAINST_COLLAPSE, _against_collapse(config.get("objective") or {}))
    if config.get("routine", "svi") != "svi":
        return {RICHER_GUIDE: _BY_SVI, WIDTH: _WIDTH_BY_SVI}.get(step, step)
    return _FURTHER.get(str(config.get("guide")), step) if step == RICHER_GUIDE else step


def _against_collapse(objective: Mapping[str, Any]) -> str:
    """What keeps information in the codes, by the objective of a fit whose codes have lost it."""
    if objective.get("capacity") is not None:
        return _MORE_CAPACITY.format(**objective)
    if objective.get("name") == "beta" and objective["beta"] > 1:
        return _LIGHTER_KL.format(**objective)
    return _MORE_BITS.format(**objective) if objective.get("free_bits") else AGAINST_COLLAPSE
