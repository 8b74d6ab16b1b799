"""What a run measures between two log lines: means, rates, memory. The same numbers under the same names on both sides."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial

from swiftlite.train.flops import ModelFlops, peak_flops
from swiftlite.utils.io import format_bytes, peak_memory_bytes

# Name in logging.jsonl and TensorBoard -> what it is.
METERS: dict[str, str] = {
    "loss": "mean over the tokens (pairs, in preference training) of the steps since the last line",
    "lr": "learning rate of the last step",
    "grad_norm": "norm of the whole gradient before clipping, last step; absent where fp16 skipped it",
    "loss_scale": "factor on the loss of the last step, fp16 only",
    "skipped_steps": "steps so far that updated nothing because gradients overflowed, fp16 only",
    "tokens_per_second": "tokens without padding, all devices",
    "padded_tokens_per_second": "tokens with padding, all devices",
    "samples_per_second": "samples (packed sequences, pairs), all devices",
    "tflops": "10^12 operations per second and device that the model needs; neither padding nor recomputation counts",
    "mfu": "tflops as a share of the device's bf16 peak; absent on a CPU, in fp32 and for unknown devices",
    "step_s": "seconds of a step",
    "data_s": "seconds of a step in which the device waits for data",
    "padding_share": "share of the computed tokens that is padding",
    "memory_gib": "most memory so far on the first device, GiB; on a CPU of the process",
    "elapsed_s": "seconds since the start",
    "remaining_s": "seconds to go at this pace",
    "eval_loss": "mean over the tokens (pairs) of the validation set",
    "kl": "distance of the policy from the reference that --loss_type kto compares with",
    "rewards/chosen": "beta x log-ratio of the chosen (desirable) answers, mean over them",
    "rewards/rejected": "the same of the rejected answers",
    "rewards/margins": "difference of the two",
    "rewards/accuracies": "share of the pairs with a positive margin",
    "logps/chosen": "log-probability of the chosen answers, mean over them",
    "logps/rejected": "the same of the rejected answers",
    "nll_loss": "cross entropy of the chosen answers' tokens, with --rpo_alpha",
}


class StepMeter:
    """Adds up steps and gives a log line's values. Feed it sums over all ranks; the clock is this rank's.

    Args:
        flops: operations of the model, None: neither tflops nor mfu. devices: processes that compute.
        peak: operations per second of one device at best, None: no mfu. memory: peak memory so far in bytes.
        trained, adapters, references: see ModelFlops.training.
    """

    def __init__(
        self,
        flops: ModelFlops | None = None,
        devices: int = 1,
        peak: float | None = None,
        memory: Callable[[], int] | None = None,
        trained: float | None = None,
        adapters: float = 0.0,
        references: int = 0,
    ) -> None:
        self.devices, self.peak = devices, peak
        self.memory = memory
        self._operations: Callable[[float, float], float] | None = None
        if flops is not None:
            self._operations = partial(flops.training, trained=trained, adapters=adapters, references=references)
        self.restart_clock()
        self._reset()

    def _reset(self) -> None:
        self._steps = 0
        self._seconds = 0.0
        self._sums: dict[str, float] = {}

    def restart_clock(self) -> None:
        """What ran since the last step (evaluation, saving) is not training time."""
        self._since = time.perf_counter()

    def add(self, sums: Mapping[str, float]) -> None:
        """A step is done. sums: `tokens`, `padded_tokens`, `samples`, `pairs_attended` (see ModelFlops.pairs) of all ranks,
        `data_s` of this rank, and whatever `summary` is to give back added up.
        """
        now = time.perf_counter()
        self._seconds += now - self._since
        self._since = now
        self._steps += 1
        for name, value in sums.items():
            self._sums[name] = self._sums.get(name, 0.0) + value

    def sum(self, name: str) -> float:
        """Sum of a value over the steps since the last `summary`."""
        return self._sums.get(name, 0.0)

    def sums(self) -> dict[str, float]:
        return dict(self._sums)

    def summary(self) -> dict[str, float]:
        """Rates since the last call, then begins anew."""
        seconds = max(self._seconds, 1e-9)
        tokens = self.sum("tokens")
        padded = self.sum("padded_tokens")
        values = {
            "tokens_per_second": tokens / seconds,
            "padded_tokens_per_second": padded / seconds,
            "samples_per_second": self.sum("samples") / seconds,
        }
        if self._operations is not None:
            done = self._operations(tokens, self.sum("pairs_attended"))
            values["tflops"] = done / seconds / self.devices / 1e12
            if self.peak:
                values["mfu"] = done / seconds / self.devices / self.peak
        values["step_s"] = self._seconds / max(self._steps, 1)
        values["data_s"] = self.sum("data_s") / max(self._steps, 1)
        values["padding_share"] = 1 - tokens / max(padded, 1.0)
        if self.memory is not None:
            values["memory_gib"] = self.memory() / 2**30
        self._reset()
        return values


def device_peak(dtype: str) -> float | None:
    """Peak operations per second of this process's device; None on a CPU, in fp32, or for a device not in the table."""
    import torch

    if not torch.cuda.is_available() or dtype not in ("bfloat16", "float16"):
        return None
    return peak_flops(torch.cuda.get_device_name())


def peak_memory() -> int:
    """Peak of this process so far in bytes: allocated GPU memory, or resident memory on a CPU."""
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_memory_bytes()


def peak_memory_text() -> str:
    return format_bytes(peak_memory())
