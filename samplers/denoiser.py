"""The Denoiser contract, what a sampler may ask of a model, and wrappers that keep it.

A Denoiser returns the data prediction D = E[x0 | x_t] at the time it was asked. With eps, v, score
or flow outputs:

    eps    D = (x - sigma eps) / alpha
    v      D = alpha x - sigma v                (v = alpha eps - sigma x0, variance preserving)
    score  D = (x + sigma^2 score) / alpha            (eps = -sigma score)
    flow   D = (x - sigma u) / (alpha + sigma)  (u = eps - x0; alpha + sigma = 1)

References: Salimans and Ho 2022 (arXiv 2202.00512) for v; classifier-free guidance, Ho and
Salimans 2022 (2207.12598) eq. 6, here
D = D_null + w (D_cond - D_null), w = 1 being the conditional model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from fewstep.space.costs import Prices
from fewstep.space.errors import ModelError
from fewstep.space.noise import NoiseSchedule

Cond = Mapping[str, Tensor]
OUTPUTS = ("eps", "x0", "v", "score", "flow")


@runtime_checkable
class Denoiser(Protocol):
    """x (B, *shape), t (B,) -> data prediction (B, *shape) at the time asked.

    One that has further networks or settings says so in `networks`, their prices by name, and is
    then called with `network=name` where a schedule asks for one (`Networks`).
    """

    noise: NoiseSchedule

    def __call__(
        self,
        x: Tensor,
        t: Tensor,
        *,
        cond: Cond | None = None,
        guidance: float | Tensor | None = None,
    ) -> Tensor:
        """The data prediction at the time asked.

        Args:
            x: states, shape (B, *shape).
            t: times of `noise`, shape (B,).
            cond: conditioning tensors, each with leading axis B.
            guidance: classifier-free guidance scale, a number or shape (B,); None or 1 is the
                conditional model alone.
        """
        ...


def bcast(value: Tensor, x: Tensor) -> Tensor:
    """value (B,) shaped to multiply x (B, *shape), in x's dtype and device."""
    return value.to(x).reshape(-1, *(1,) * (x.ndim - 1))


class ModelDenoiser:
    """A network with a given output kind as a Denoiser.

    The network runs in its own dtype and device; the data prediction is formed in the state's
    dtype (at least float32). `calls` counts calls of this interface (NFE), `forwards` images sent
    through the network (guidance doubles them).
    """

    def __init__(
        self,
        model: Callable[..., Tensor],
        noise: NoiseSchedule,
        output: str,
        *,
        null_cond: Callable[[Cond], Cond] | None,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
    ) -> None:
        if output not in OUTPUTS:
            raise ModelError(f"output {output!r} is unknown: use one of {', '.join(OUTPUTS)}")
        if isinstance(model, torch.nn.Module):
            require_no_cache(model, "the model")
        self.model, self.noise, self.output, self.null_cond = model, noise, output, null_cond
        self._dtype, self._device = dtype, device
        self.calls = 0
        self.forwards = 0

    @property
    def device(self) -> torch.device | None:
        """Where the network runs; None if it follows the state."""
        if self._device is not None:
            return torch.device(self._device)
        if isinstance(self.model, torch.nn.Module):
            return next((p.device for p in self.model.parameters()), None)
        return None

    def reset(self) -> None:
        """Set both counters to 0."""
        self.calls = self.forwards = 0

    def __call__(
        self,
        x: Tensor,
        t: Tensor,
        *,
        cond: Cond | None = None,
        guidance: float | Tensor | None = None,
    ) -> Tensor:
        """See `Denoiser`."""
        self.calls += 1
        cond = cond or {}
        if guidance is None or _is_one(guidance):
            raw = self._network(x, t, cond)
        else:
            if self.null_cond is None:
                raise ModelError(
                    "guidance is set but the model has no unconditional branch: give null_cond "
                    "to from_model"
                )
            if not cond:
                raise ModelError(
                    "guidance is set but there are no conditions, so that both branches are one: "
                    "give cond, or guidance 1"
                )
            none = self.null_cond(cond)
            if set(none) != set(cond):
                raise ModelError(
                    f"null_cond returned conditions {sorted(none)} for {sorted(cond)}: it must "
                    "return the same names"
                )
            both = {name: torch.cat([value, none[name]]) for name, value in cond.items()}
            out, null = self._network(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
            scale = (
                guidance
                if isinstance(guidance, Tensor)
                else torch.full((), float(guidance), dtype=torch.float64, device=out.device)
            )
            raw = null + bcast(scale.to(out.device).expand(len(x)), out) * (out - null)
        return self._data(x, t, raw)

    def _network(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        self.forwards += len(x)
        device, dtype = self._device or x.device, self._dtype or x.dtype
        label = self.noise.label(t.to(torch.float64)).to(
            device=device, dtype=torch.float32 if dtype.itemsize < 4 else dtype
        )
        out = self.model(
            x.to(device=device, dtype=dtype), label, **{k: v.to(device) for k, v in cond.items()}
        )
        if not isinstance(out, Tensor) or out.shape != x.shape:
            found = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ModelError(
                f"the model returned {found} for a state of shape {tuple(x.shape)}: it must "
                "return a tensor of the state's shape"
            )
        return out.to(device=x.device, dtype=x.dtype)

    def _data(self, x: Tensor, t: Tensor, out: Tensor) -> Tensor:
        t = t.to(torch.float64)
        alpha, sigma = bcast(self.noise.alpha(t), x), bcast(self.noise.sigma(t), x)
        return data_prediction(self.output, x, out, alpha, sigma)


def data_prediction(output: str, x: Tensor, out: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """D from a network's output of kind `output` at state x (module docstring)."""
    if output == "x0":
        return out
    if output == "eps":
        return (x - sigma * out) / alpha
    if output == "v":
        return alpha * x - sigma * out
    if output == "score":
        return (x + sigma**2 * out) / alpha
    return (x - sigma * out) / (alpha + sigma)


def _is_one(guidance: float | Tensor) -> bool:
    if isinstance(guidance, Tensor):  # elsewhere than on a CPU the question is a wait
        return guidance.device.type == "cpu" and bool((guidance == 1).all())
    return guidance == 1


def from_model(
    model: Callable[..., Tensor],
    noise: NoiseSchedule,
    output: str = "eps",
    *,
    null_cond: Callable[[Cond], Cond] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> ModelDenoiser:
    """Wrap a network as a Denoiser.

    Args:
        model: (x (B, *shape), label (B,), **cond) -> (B, *shape); label is `noise.label(t)`, what
            the network was trained with.
        noise: its noise schedule.
        output: what it returns: "eps", "x0", "v", "score" or "flow" (module docstring).
        null_cond: cond -> the unconditional conditioning of the same batch; needed for
            classifier-free guidance.
        dtype: dtype the network runs in; None = the state's.
        device: device the network runs on; None = the state's.

    Raises:
        ModelError: unknown output kind; at call time, a result of the wrong shape.
    """
    return ModelDenoiser(model, noise, output, null_cond=null_cond, dtype=dtype, device=device)


class Networks:
    """Several networks, or settings of one, behind the Denoiser contract.

    A schedule's program names the one that a call asks; "" and any caller that names none ask
    `main`. All predict the same data on one noise schedule.

    Args:
        main: the model's own.
        others: further ones by name, each with its price: what it costs beside `main`, which is 1.

    Raises:
        ModelError: a network of another noise schedule, or a price that is not positive.
    """

    def __init__(self, main: Denoiser, others: Mapping[str, tuple[Denoiser, float]]) -> None:
        self._by_name = {"": main} | {name: denoiser for name, (denoiser, _) in others.items()}
        self.networks = {name: float(price) for name, (_, price) in others.items()}
        self.noise = main.noise
        self.device = getattr(main, "device", None)
        self.piece: int | None = getattr(main, "piece", None)
        for name, (denoiser, price) in others.items():
            if denoiser.noise != main.noise:
                raise ModelError(f"network {name!r} has another noise schedule than the model's")
            if not (name and price > 0):
                raise ModelError(f"network {name!r} at price {price!r}: both must say something")

    def __call__(
        self,
        x: Tensor,
        t: Tensor,
        *,
        cond: Cond | None = None,
        guidance: float | Tensor | None = None,
        network: str = "",
    ) -> Tensor:
        """See `Denoiser`; `network` is one of the names."""
        return self._by_name[network](x, t, cond=cond, guidance=guidance)


class Quicker:
    """A denoiser in a lower precision, compiled or both; its attributes are the denoiser's own.

    Args:
        inner: the denoiser.
        device: where its network runs.
        autocast: dtype of its network, "bfloat16" or "float16"; None is its own.
        backend: of torch.compile, which raises what it likes where it knows none; None does not
            compile.
    """

    def __init__(
        self, inner: Denoiser, device: torch.device, autocast: str | None, backend: str | None
    ) -> None:
        self._inner: Any = inner
        self._call: Any = inner
        self._device = device.type
        self._dtype = None if autocast is None else getattr(torch, autocast)
        if backend is not None:
            self._call = torch.compile(self._inner.__call__, backend=backend)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_inner"], name)

    def __call__(
        self, x: Tensor, t: Tensor, *, cond: Any = None, guidance: Any = None, **named: str
    ) -> Tensor:
        """See `Denoiser`."""
        with torch.autocast(self._device, self._dtype, enabled=self._dtype is not None):
            found: Tensor = self._call(x, t, cond=cond, guidance=guidance, **named)
        return found.to(x.dtype)


class Counted:
    """A denoiser that counts the images it is asked for, or with prices what they cost."""

    def __init__(self, inner: Denoiser, prices: Prices | None = None) -> None:
        self.inner, self.noise, self._prices, self._paid = inner, inner.noise, prices, 0.0
        self.piece: int | None = getattr(inner, "piece", None)
        self.device = getattr(inner, "device", None)
        self.networks = getattr(inner, "networks", {})

    @property
    def evaluations(self) -> int:
        """So far, a whole number."""
        return round(self._paid)

    def __call__(
        self, x: Tensor, t: Tensor, *, cond: Any = None, guidance: Any = None, **named: str
    ) -> Tensor:
        """See `Denoiser`."""
        each = 1.0
        if self._prices is not None:
            once = guidance is None or (isinstance(guidance, float | int) and guidance == 1)
            each = self._prices.of(guided=not once, network=named.get("network", ""))
        self._paid += each * len(x)
        return self.inner(x, t, cond=cond, guidance=guidance, **named)


def require_no_cache(network: torch.nn.Module, name: str) -> None:
    """Refuse a network with one of diffusers' caches, which knows the calls before.

    Its answer to a question is another after other calls, and other candidates' at that, so that
    no batch, no piece of one and no shared prefix would give the samples of a candidate alone.
    """
    for part in network.modules():
        hooks = getattr(getattr(part, "_diffusers_hook", None), "hooks", {})
        stateful = any(getattr(hook, "_is_stateful", False) for hook in hooks.values())
        if stateful or getattr(part, "is_cache_enabled", False):
            raise ModelError(
                f"{name} reuses activations between steps (a cache of diffusers'), so that a "
                "call's answer depends on the calls before it: call disable_cache() for the search"
            )


def fingerprint(module: torch.nn.Module, name: str) -> str:
    """`name` and a hash of a module's weights, for provenance."""
    import hashlib

    digest = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return f"{name}:{digest.hexdigest()[:12]}"
