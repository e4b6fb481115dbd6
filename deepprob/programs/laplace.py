"""The Laplace approximation of a fitted mode."""

from __future__ import annotations

import torch

from deepprob.engine.random import RandomStream
from deepprob.programs.guides import attach_guide
from deepprob.programs.instance import ProgramInstance
from deepprob.programs.minibatch import Batch, num_rows


def finish_guide(instance: ProgramInstance, batch: Batch) -> None:
    """Finish a guide at the end of a fit: ``guide="laplace"`` turns a mode into a Gaussian; others stay as they are.

    Args:
        instance: The fitted program.
        batch: All of the data.

    Raises:
        ValueError: If the fit has not reached the mode that ``"laplace"`` needs.
    """
    if instance.guide_name == "laplace":
        laplace(instance, batch)


def laplace(instance: ProgramInstance, batch: Batch) -> None:
    r"""Replace a fitted mode by the Gaussian of the same curvature, in place.

    .. math:: q(z) = N(\hat z, H^{-1}), \qquad H = -\nabla^2 \log p(x, z) |_{z = \hat z}

    Args:
        instance: A program fitted with ``guide="laplace"``; afterwards its guide is a multivariate normal.
        batch: All of the data.

    Raises:
        ValueError: If the curvature is not that of a maximum.
    """
    program = instance.program
    rows = torch.arange(num_rows(batch), device=instance.device)
    # Incidental draws do not affect the curvature, and must not advance the caller's random state.
    with RandomStream(0, instance.device).drawing(), instance.running(), program.bound(rows, instance.num_data):
        args, kwargs = program.call_arguments(program.prepare(*batch))
        try:
            gaussian = program.current_guide.laplace_approximation(*args, **kwargs)
            covariance_root = gaussian.get_posterior(*args, **kwargs).scale_tril.detach()
        except RuntimeError as error:
            raise ValueError(
                "the Laplace approximation needs a mode, and the fit has not reached one (the curvature is not that of "
                "a maximum). Fit for longer: raise epochs= or steps= of svi. A hierarchy whose scale may shrink to 0 "
                "has no mode: use guide='multivariate_normal'."
            ) from error
    location, scale = gaussian.loc.detach(), covariance_root.diagonal()
    instance.guide_name = attach_guide(program, "multivariate_normal")
    with RandomStream(0, instance.device).drawing():
        instance.dry_run(batch)
    guide = program.current_guide
    with torch.no_grad():
        guide.loc.copy_(location)
        guide.scale = scale
        guide.scale_tril = covariance_root / scale.unsqueeze(-1)
    with RandomStream(0, instance.device).drawing():
        instance.dry_run(batch)  # until then the store holds the old values
