"""The smallest change of a bound that matters."""

from __future__ import annotations

from deepprob.programs.instance import ProgramInstance

NATS_PER_NUMBER, LEAST_NATS = 0.01, 0.1


def margin_of(instance: ProgramInstance) -> float:
    """The smallest relevant change of the bound, in nats of the whole posterior.

    It is 0.01 nats for every latent number, at least 0.1 nats. An error of 0.01 nats in a normal is a seventh of an sd
    in its mean, or a tenth in its width. Latents of a row count for every row; without latents, trained numbers count.
    """
    found, rows = instance.structure, instance.num_data
    numbers = sum(found.sites[name].numbers * (rows if found.sites[name].local else 1) for name in found.latent)
    numbers = numbers or sum(p.numel() for p in instance.parameters().values())
    return max(LEAST_NATS, NATS_PER_NUMBER * numbers)
