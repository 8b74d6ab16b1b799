"""What recorded steps spent their time on: busy share of the device, its largest kernels, its longest waits."""

from __future__ import annotations

import bisect
from collections import Counter
from typing import Any


def _exchanges(name: str) -> bool:
    return name.startswith("nccl") or "_exchange_kernel" in name


def _covered(ranges: list[tuple[int, int]], start: int, stop: int) -> int:
    """Nanoseconds of [start, stop) that lie in one of the sorted ranges."""
    total, reached = 0, start
    first = max(bisect.bisect_left(ranges, (start, 0)) - 64, 0)  # one that began earlier may still run
    for begin, end in ranges[first:]:
        if begin >= stop:
            break
        total += max(min(end, stop) - max(begin, reached), 0)
        reached = max(reached, min(end, stop))
    return total


def report(title: str, record: Any, kernels: int = 22) -> None:
    """Print a recorded `torch.profiler.profile`."""
    events = [e for e in record.profiler.kineto_results.events() if "CUDA" in str(e.device_type())]
    events = [e for e in events if not e.name().startswith(("## ", "nccl:"))]
    spans = sorted((e.start_ns(), e.start_ns() + e.duration_ns(), e.name()) for e in events if e.duration_ns())
    if not spans:
        print(f"{title}: no kernels recorded")
        return
    busy, end, gaps = 0, spans[0][0], []
    last = ""
    for start, stop, name in spans:
        if start > end:
            gaps.append((start - end, last, name))
        if stop > end:
            busy += stop - max(start, end)
            end, last = stop, name
    whole = end - spans[0][0]
    alone, reached = 0, 0  # while nothing but exchanges runs
    ranges = sorted((a, b) for a, b, name in spans if not _exchanges(name))
    for start, stop in sorted((a, b) for a, b, name in spans if _exchanges(name)):
        start = max(start, reached)
        reached = max(reached, stop)
        alone += max(stop - start, 0) - _covered(ranges, start, stop)
    times: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for start, stop, name in spans:
        times[name] += stop - start
        counts[name] += 1
    lines = [f"== {title}: {whole / 1e9:.3f} s, busy {100 * busy / whole:.1f} %, {len(spans)} kernels, exchanges alone "
             f"{100 * alone / whole:.1f} %"]  # fmt: skip
    for name, spent in times.most_common(kernels):
        lines.append(f"  {100 * spent / whole:5.1f} % {spent / 1e6:9.1f} ms {counts[name]:6d}  {name[:110]}")
    longer = sum(gap for gap, _, _ in gaps if gap > 20_000)
    lines.append(f"  waits: {len(gaps)}, of them over 20 us {100 * longer / whole:.1f} %; longest:")
    for gap, before, after in sorted(gaps, reverse=True)[:5]:
        lines.append(f"    {gap / 1e6:.2f} ms between {before[:45]} and {after[:45]}")
    host = sorted(record.key_averages(), key=lambda cost: -cost.self_cpu_time_total)[:8]
    lines += [f"  host {c.self_cpu_time_total / 1e3:9.1f} ms {c.count:6d}  {c.key[:80]}" for c in host]
    syncs = [
        c
        for c in record.key_averages()
        if "Synchronize" in c.key or c.key in ("aten::item", "aten::_local_scalar_dense")
    ]
    lines += [f"  sync {c.self_cpu_time_total / 1e3:9.1f} ms {c.count:6d}  {c.key[:80]}" for c in syncs]
    print("\n".join(lines), flush=True)
