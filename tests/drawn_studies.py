"""Studies of schedules whose samples are drawn, on models small enough to enumerate or solve."""

from __future__ import annotations

from pathlib import Path

MODEL = '''
"""A joint of 5 tokens, and a Gaussian in the plane; both exact, as a user would write them."""

import itertools

import torch

from fewstep.samplers import MaskedProblem, ParticleProblem, from_subs
from fewstep.samplers.masked_particles import TiltedLaw
from fewstep.samplers.targets import Factor, anneal, product, reward
from fewstep.space.noise import VPLinear

LENGTH, TOKENS = 5, 3
MASK = TOKENS
STATES = torch.tensor(list(itertools.product(range(TOKENS), repeat=LENGTH)))


def joint():
    """A chain whose neighbours like to be equal, the later the more."""
    equal = (STATES[:, 1:] == STATES[:, :-1]).double()
    p = torch.exp(equal @ torch.tensor([0.3, 0.8, 1.5, 2.5], dtype=torch.float64))
    return p / p.sum()


class Table:
    def __init__(self, broken):
        self.p, self.broken = joint(), broken
        self.one_hot = torch.nn.functional.one_hot(STATES, TOKENS + 1).double()

    def __call__(self, tokens):
        fits = ((tokens[:, None] == STATES) | (tokens[:, None] == MASK)).all(-1)
        weights = fits * self.p
        mu = torch.einsum("bs,slv->blv", weights / weights.sum(-1, keepdim=True), self.one_hot)
        return mu.log() * (float("nan") if self.broken == "nan" else 1)


class Allowing:
    mask, length = MASK, LENGTH

    def __call__(self, tokens, t):
        return torch.zeros(*tokens.shape, TOKENS + 1)


def index(tokens):
    return (tokens * TOKENS ** torch.arange(LENGTH - 1, -1, -1)).sum(-1)


def variation(measures):
    """Total variation between the states drawn and the joint."""
    at = torch.from_numpy(measures[:, 0]).long()
    share = torch.bincount(at, minlength=len(STATES)).double() / len(at)
    return float((share - joint()).abs().sum() / 2)


def masked(score="variation", given=0, broken=""):
    """`given`: first tokens that are given; `broken` breaks a contract on purpose."""
    table = Table(broken)

    def states(tokens):
        found = index(tokens).double()[:, None]
        if broken == "gaps":  # states that start with token 2 have no measure
            found[tokens[:, 0] == 2] = float("nan")
        return found.flatten() if broken == "shape" else found

    def prompt(indices):
        tokens = torch.full((len(indices), LENGTH), MASK)
        tokens[:, :given] = 0
        return tokens

    denoiser = from_subs(table, MASK, length=LENGTH - (broken == "long"))
    if broken == "mask":
        denoiser = Allowing()
    own = dict(denoiser=denoiser, length=LENGTH, fingerprint="table")
    if given:
        own["prompt"] = prompt
    if score == "variation":
        return MaskedProblem(
            objective="total_variation", measure=states, score=variation,
            facts=lambda m: {"measured": float((m == m).mean())}, **own
        )
    return MaskedProblem(
        objective="surprise", measure=lambda t: -joint()[index(t)].log()[:, None],
        picture=lambda t: torch.nn.functional.one_hot(t, TOKENS).double(), **own
    )


def worth():
    """What a state is worth: a number of its own."""
    return torch.randn(len(STATES), generator=torch.Generator().manual_seed(3)).double()


def tilted(beta=1.0):
    """Towards the joint times exp(beta worth); the score is the error of the mean worth."""
    weights = joint() * torch.exp(beta * worth())
    exact = float((weights * worth()).sum() / weights.sum())

    def measure(found):
        mean = found.mean(worth()[index(found.x)])
        return torch.stack([(mean - exact) ** 2, mean, found.log_normalizer.exp()], dim=1)

    return MaskedProblem(
        denoiser=from_subs(Table(""), MASK, length=LENGTH), length=LENGTH,
        objective="mean_error", measure=measure, particles=16, fingerprint="table",
        target=TiltedLaw(lambda tokens: beta * worth()[index(tokens)]),
        facts=lambda m: {"mean": float(m[:, 1].mean())},
    )


class Gaussian:
    """N(0, 1/2) in the plane."""

    noise = VPLinear()

    def __call__(self, x, t, *, cond=None, guidance=None):
        t = t.to(torch.float64)[:, None]
        alpha, sigma = self.noise.alpha(t), self.noise.sigma(t)
        gain = 0.5 * alpha / (0.5 * alpha**2 + sigma**2)
        return (gain * x).to(x)

    @staticmethod
    def log_density(x, t):
        v = 0.5 * Gaussian.noise.alpha(t) ** 2 + Gaussian.noise.sigma(t) ** 2
        return -(x**2).sum(1) / (2 * v) - torch.log(2 * torch.pi * v)


def particles(broken="", dense=False, tilt=""):
    """Towards the square of the density; the score is the error of the second moment.

    `tilt`: where a reward that keeps that target is seen instead, "state" or "data".
    """

    def measure(found, seeds):
        moment = found.mean((found.x**2).mean(-1))
        return torch.stack([(moment - 0.25) ** 2, found.ess.amin(0)], dim=1)

    model = Factor(Gaussian(), log_density=Gaussian.log_density) if dense else Gaussian()
    target = anneal(model, 2.0)
    if broken == "noise":
        other = Gaussian()
        other.noise = VPLinear(beta_max=10.0)
        target = product(Gaussian(), other)
    if broken == "reward":
        target = reward(Gaussian(), lambda x: x[:, 0] * float("nan"), at="data")
    if tilt:  # N(0, 1/2) exp(-|x|^2) is N(0, 1/4)
        target = reward(Gaussian(), lambda x: -(x**2).sum(1), at=tilt)
    return ParticleProblem(
        target=target, shape=(2,), particles=16, objective="moment_error", measure=measure,
        facts=lambda m: {"least_ess": float(m[:, 1].mean())}, fingerprint="gaussian",
    )
'''

STUDY = """
name = "tiny"
[model]
factory = "drawn_model:KIND"
[budget]
candidates = 70
[search]
nfe = [3]
strategy = "evolution"
generation = 8
samples = 32
block = [4, 16]
workers = 0
[final]
samples = 64
resamples = 200
top = 3
pictures = 2
[tracking]
enabled = false
"""


def write_drawn(folder: Path, kind: str, text: str = STUDY) -> Path:
    """The study file of "masked", "tilted" or "particles", its model beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "drawn_model.py").write_text(MODEL)
    path = folder / f"{kind}.toml"
    path.write_text(text.replace("KIND", kind))
    return path
