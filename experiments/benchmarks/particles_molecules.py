"""Molecules tilted by a property: the shipped masked model, weighed towards exp(beta QED).

    python -m fewstep.experiments.benchmarks.particles_molecules

The target is P(x) exp(beta QED(x)) for molecules and 0 for strings that are none, P the law of 20
single-token calls or of fewer parallel ones. QED, a drug-likeness in 0..1 (Bickerton et al. 2012),
is a black box: rdkit reads complete strings only. Its mean under the target and the normaliser are
also estimated by reweighting many plain samples, which needs no resampling and is the control.
Rows cost the same calls; they differ in what the weights do on the way. Needs
`fewstep[molecules]` (rdkit).

`problem` is the same target as a study, `experiments/studies/molecules_tilted.toml`, which looks
for the counts and temperatures whose populations come nearest to it.
"""

from __future__ import annotations

import argparse
import functools
import math
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewstep.experiments.benchmarks.metrics_molecules import canonical
from fewstep.experiments.models.assets import AssetError
from fewstep.experiments.models.molecules import CURVE, LENGTH, MASK, decode, load_net
from fewstep.samplers import MaskedProblem, fingerprint, from_subs, sample_masked
from fewstep.samplers.curve import load_curve
from fewstep.samplers.masked_particles import TiltedLaw, sample_tilted
from fewstep.samplers.particles import Particles
from fewstep.samplers.resampling import effective
from fewstep.space.masked import MaskedSchedule
from fewstep.space.particles import ParticleStep

FLOOR = -3.0


@functools.lru_cache(maxsize=200_000)
def drug_likeness(smiles: str) -> float:
    """QED of a string, NaN where rdkit reads no molecule."""
    try:
        from rdkit import Chem, RDLogger
        from rdkit.Chem import QED
    except ImportError:
        raise AssetError("rdkit is missing: pip install 'fewstep[molecules]'") from None
    RDLogger.DisableLog("rdApp.*")
    molecule = Chem.MolFromSmiles(smiles)
    return math.nan if molecule is None or not smiles else float(QED.qed(molecule))


def qed_of(tokens: Tensor) -> Tensor:
    """QED of sequences (B, 20), NaN where they are no molecule."""
    return torch.tensor([drug_likeness(s) for s in decode(tokens)], dtype=torch.float64)


def reward_of(beta: float, tokens: Tensor) -> Tensor:
    """beta QED, -inf where a string is no molecule."""
    qed = qed_of(tokens)
    return torch.where(qed.isnan(), -math.inf, beta * qed.nan_to_num())


def measure(found: Particles) -> Tensor:
    """Populations -> free energy, QED, least ESS, ancestors, distinct molecules; see `problem`."""
    size = found.x.shape[1]
    qed = qed_of(found.x.flatten(0, 1)).reshape(found.x.shape[:2])
    rows = found.draw(size, torch.Generator().manual_seed(0))
    distinct = [len({s for s in canonical(decode(row)) if s}) / size for row in rows]
    columns = [-found.log_normalizer, found.mean(qed.nan_to_num()), found.ess.amin(0)]
    columns += [found.unique_ancestors / size, torch.tensor(distinct)]
    return torch.stack([c.double() for c in columns], dim=1)


def facts(measures: NDArray[np.float64]) -> dict[str, float]:
    """Means of what is measured beside the score."""
    names = ("qed", "least_ess", "ancestors", "distinct")
    return dict(zip(names, measures[:, 1:].mean(0).tolist(), strict=True))


def problem(
    *, beta: float = 12.0, particles: int = 32, resample: str = "never", completions: int = 1
) -> MaskedProblem:
    """The study factory: populations of molecules tilted by exp(-beta (1 - QED)).

    Strings that are no molecule count for exp(FLOOR - beta), so that a population without any has
    a score, a bad one. The score is a population's free energy -log Z, in nats: what the tilt
    costs the law that the schedule draws from and, the logarithm being concave, what the scatter
    of the population costs.

    Args:
        beta: strength of the tilt, > 0.
        particles: sequences of a population.
        resample: after every call; see `ParticleStep`. By default strings are weighed at the end
            alone: completions early on are hardly ever molecules, and resampling by them leaves
            one ancestor (the table).
        completions: see `TiltedLaw`.

    Raises:
        AssetError: rdkit is missing.
    """
    drug_likeness("C")
    net = load_net()

    def reward(tokens: Tensor) -> Tensor:
        return reward_of(beta, tokens).clamp(min=FLOOR) - beta

    return MaskedProblem(
        denoiser=from_subs(net, MASK, length=LENGTH),
        length=LENGTH,
        objective="free_energy",
        measure=measure,
        facts=facts,
        curve=load_curve(CURVE).falling,
        fingerprint=fingerprint(net, "molecules"),
        target=TiltedLaw(reward, completions=completions),
        particles=particles,
        step=ParticleStep.model_validate({"resample": resample}),
    )


def interval(values: Tensor) -> str:
    """Mean and 95 % interval of the mean."""
    half = 1.96 * float(values.std()) / math.sqrt(len(values))
    return f"{float(values.mean()):.4g} ± {half:.2g}"


def control(schedule: MaskedSchedule, beta: float, count: int, seed: int) -> None:
    """Plain samples reweighted by exp(beta QED)."""
    denoiser, g = from_subs(load_net(), MASK, length=LENGTH), torch.Generator().manual_seed(seed)
    blank = torch.full((count // 8, LENGTH), MASK)
    drawn = [sample_masked(schedule, denoiser, blank, generator=g) for _ in range(8)]
    qed = torch.stack([qed_of(x) for x in drawn])
    w = torch.where(qed.isnan(), 0.0, (beta * qed).exp())
    valid, mean = ~qed.isnan(), qed.nan_to_num()
    plain = (mean * valid).sum(1) / valid.sum(1)
    tilted = (mean * w).sum(1) / w.sum(1)
    size = float(effective(w.log().reshape(1, -1))[0])
    print(
        f"{count} plain samples: valid {interval(valid.double().mean(1))}, QED of the valid "
        f"{interval(plain)}; reweighted: QED {interval(tilted)}, log Z "
        f"{interval(w.mean(1).log())}, ESS {size:.3f}"
    )


def row(name: str, r: Particles, seed: int) -> str:
    """One method's line of the table."""
    qed = qed_of(r.x.flatten(0, 1)).reshape(r.x.shape[:2])
    drawn = r.draw(r.x.shape[1], torch.Generator().manual_seed(seed)).flatten(0, 1)
    names = [s for s in canonical(decode(drawn)) if s]
    alive = float(r.unique_ancestors.double().mean())
    return (
        f"| {name} | {interval(r.mean(qed.nan_to_num()))} | {interval(r.log_normalizer)} | "
        f"{float(r.ess.amin(0).mean()):.3f} | {alive:.1f} | {len(set(names)) / len(drawn):.3f} |"
    )


def main() -> None:
    """The command line."""
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--beta", type=float, default=12.0)
    parser.add_argument("--calls", type=int, default=LENGTH)
    parser.add_argument("--particles", type=int, default=64)
    parser.add_argument("--runs", type=int, default=16)
    parser.add_argument("--control", type=int, default=16_384)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    ends = [round(LENGTH * k / a.calls) for k in range(a.calls + 1)]
    schedule = MaskedSchedule.from_counts([b - a for a, b in pairwise(ends)])
    print(
        f"beta {a.beta:g}, {a.calls} calls, {a.runs} populations of {a.particles}, seed {a.seed}"
    )
    control(schedule, a.beta, a.control, a.seed + 1)
    print(
        "\n| weights | QED | log Z | least ESS | ancestors | distinct |\n|---|---|---|---|---|---|"
    )
    denoiser = from_subs(load_net(), MASK, length=LENGTH)
    reward = functools.partial(reward_of, a.beta)
    half = a.calls // 2
    late = [ParticleStep(resample="ess" if k >= half else "never") for k in range(a.calls)]
    never, ess = ParticleStep(resample="never"), ParticleStep(resample="ess")
    for name, steps, completions in (
        ("at the end alone", [never] * (a.calls - 1) + [ess], 1),
        ("ESS < .5, 1 completion", ess, 1),
        ("ESS < .5, 4 completions", ess, 4),
        ("ESS < .5 in the second half, 1 completion", late, 1),
        ("every call, 1 completion", ParticleStep(resample="always"), 1),
    ):
        target = TiltedLaw(reward, completions=completions, floor=FLOOR)
        tokens = torch.full((a.runs, a.particles, LENGTH), MASK)
        g = torch.Generator().manual_seed(a.seed)
        r = sample_tilted(
            schedule, denoiser, target, tokens, steps=steps, generator=g, warn_ess=0.0
        )
        print(row(name, r, a.seed), flush=True)


if __name__ == "__main__":
    main()
