"""Next steps that several checks name."""

from __future__ import annotations

RICHER_GUIDE = "Try a richer guide (guide='multivariate_normal' or 'flow')."
RICHER_ENCODER = "Try a larger encoder or a richer guide (full covariance, flow), or train it for longer."

_FURTHER = {
    "multivariate_normal": "Try guide='flow', or reparameterize the model, such as by non-centered effects.",
    "flow": "Reparameterize the model, such as by non-centered effects, or draw from the posterior by a sampler.",
}


def untried(step: str, guide: object) -> str:
    """A next step, or another one if it names the guide that the fit has tried.

    Examples:
        >>> untried(RICHER_GUIDE, "normal") == RICHER_GUIDE
        True
        >>> untried(RICHER_GUIDE, "flow").split(",")[0]
        'Reparameterize the model'
    """
    return _FURTHER.get(str(guide), step) if step == RICHER_GUIDE else step
