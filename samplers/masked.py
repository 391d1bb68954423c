"""The first-hitting sampler of masked diffusion: exact token by token, searched in parallel.

A masked diffusion model gives mu_l(x, t), the law of the token at masked position l given the
visible ones. Whether and when a position unmasks does not depend on the network: its level
1 - a(tau_l) is uniform below 1 - a(1). So the sampler draws one uniform level per free position,
visits positions by decreasing level, and asks the network once per event,

    x_l ~ Cat(mu_l(x, tau_l)),

which is the model's law exactly with as many calls as positions (Zheng et al. 2409.02908,
section 4.1). With several positions per call the calls are fewer and the law an approximation;
`fewstep.space.masked.MaskedSchedule` says how many, which and how. All randomness is one tensor
`u` of shape `(B, 2, L)` (more rows where a schedule masks positions again): levels and token
draws, float64 and per sequence, so equal `u` gives equal samples whatever the batch size, and
schedules can be compared on the same draws. Tokens are drawn in float64 (`samplers.categorical`).

References:
    Zheng et al. 2409.02908 (first hitting, section 4; extrapolation, section 4.3);
    Sahoo et al. 2406.07524, section 3.2.3 (SUBS).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fewstep.samplers.categorical import uniforms
from fewstep.samplers.token_denoiser import TokenDenoiser
from fewstep.samplers.unmasking import MaskedProgress, Query, Unmasking
from fewstep.space.errors import ModelError, ScheduleError
from fewstep.space.masked import MaskedSchedule

__all__ = ["MaskedProgress", "anneal", "sample_masked"]


@torch.no_grad()
def sample_masked(
    schedule: MaskedSchedule,
    denoiser: TokenDenoiser,
    tokens: Tensor,
    *,
    u: Tensor | None = None,
    generator: torch.Generator | None = None,
    fit: bool = False,
    callback: Callable[[MaskedProgress], None] | None = None,
) -> Tensor:
    """Complete sequences.

    Args:
        schedule: its counts sum to the number of masks of every sequence.
        denoiser: the model.
        tokens: int64 ids `(B, L)`, `denoiser.mask` where a token is wanted; others stay.
        u: float64 uniforms in [0, 1), `(B, R, L)` with R = `schedule.uniforms`, 2 if nothing is
            remasked; drawn from `generator` if None.
        generator: source of `u`.
        fit: rescale the counts to each sequence's number of masks instead of raising; then
            sequences of one batch may have different prompts.
        callback: called after every network call.

    Returns:
        int64 ids `(B, L)` without masks. Network calls: `schedule.nfe`, or fewer where no
        sequence has a token left for a call; a sequence that has none is not asked for.

    Raises:
        ScheduleError: the counts do not sum to the free positions; ends_last, and the denoiser
            does not say which ids end a text.
        ModelError: sequences longer than the model; logits with NaN or that allow the mask.
    """
    batch, length = tokens.shape
    if denoiser.length is not None and length > denoiser.length:
        raise ModelError(f"length {length} exceeds the model's {denoiser.length} positions")
    if u is None:
        rows = schedule.uniforms
        u = uniforms(batch, rows, length, generator=generator, device=tokens.device)
    ends = getattr(denoiser, "ends", ())
    state = Unmasking(schedule, tokens, denoiser.mask, u, fit=fit, ends=ends)
    for k in range(schedule.nfe):
        query = state.ask(k)
        if query is None:
            continue
        progress = state.answer(k, query, _logits(denoiser, query), keep=callback is not None)
        if callback is not None:
            callback(progress)
    return state.tokens.clone()


def anneal(
    schedule: MaskedSchedule,
    denoiser: TokenDenoiser,
    tokens: Tensor,
    *,
    power: float,
    u: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted samples of P(x)^b / Z, P the model's law: exact for any temperatures.

    The proposal draws v ~ p^{b_k} / Z_{b_k} with b_k = 1 / T_k of call k; each draw adds
    (b - b_k) log p_v + log Z_{b_k} to the log-weight. P is a product of conditionals along any
    decoding order, so the order cancels and the weighted sample targets P^b for any b_k.

    Args:
        schedule: counts of one, and no choice but temperatures, which are 1 / b_k.
        denoiser: the model.
        tokens: as for `sample_masked`.
        power: b > 0.
        u: as for `sample_masked`.
        generator: as for `sample_masked`.

    Returns:
        int64 ids `(B, L)` and float64 log-weights `(B,)`, unnormalised.

    Raises:
        ScheduleError: another schedule than that, or power <= 0.
    """
    if not power > 0:
        raise ScheduleError(f"power {power} must be positive")
    for k, call in enumerate(schedule.calls):
        if not call.temperature or not call.model_copy(update={"temperature": 1.0}).exact:
            raise ScheduleError(
                f"call {k}: annealing needs count 1, a temperature above 0, and nothing else"
            )
    weights = torch.zeros(len(tokens), dtype=torch.float64, device=tokens.device)

    def weigh(progress: MaskedProgress) -> None:
        inverse = 1 / schedule.calls[progress.call].temperature
        mu = progress.mu[:, 0]
        chosen = mu.gather(1, progress.drawn).log()[:, 0]
        weights.add_((power - inverse) * chosen + mu.pow(inverse).sum(-1).log())

    done = sample_masked(schedule, denoiser, tokens, u=u, generator=generator, callback=weigh)
    return done, weights


def _logits(denoiser: TokenDenoiser, query: Query) -> Tensor:
    """The network's logits; what lies behind a sequence's end is hidden, and NaN."""
    if query.ends is None:
        return denoiser(query.tokens, query.t)
    result = None
    for end in query.ends.unique().tolist():
        rows = (query.ends == end).nonzero()[:, 0]
        part = denoiser(query.tokens[rows, :end], query.t[rows])
        if result is None:
            result = part.new_full((*query.tokens.shape, part.shape[-1]), float("nan"))
        result[rows, :end] = part
    assert result is not None
    return result
