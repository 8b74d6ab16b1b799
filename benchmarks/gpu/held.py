"""What the memory of a GPU was held by at the fullest moment of a step, by the lines of code that asked for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

FRAMES = 4  # of a line of code, those that called it; torch's own do not count


def recorded(step: Callable[[], Any], title: str) -> Any:
    """`step()`, recorded and reported. Returns: what it returns."""
    import torch

    before = torch.cuda.memory_allocated()
    torch.cuda.memory._record_memory_history("all", context="alloc", stacks="python", max_entries=1 << 22)
    result = step()
    torch.cuda.synchronize()
    events = torch.cuda.memory._snapshot()["device_traces"][torch.cuda.current_device()]
    torch.cuda.memory._record_memory_history(None)
    report(title, before, events)
    return result


def report(title: str, before: int, events: list[dict[str, Any]], lines: int = 16) -> None:
    """Print where the tensors of the fullest moment came from. before: bytes that were held already.

    What another stream used is free when the device is done with it: Python, which runs ahead, asks for more meanwhile.
    """
    requested = _fullest(events, "free_requested")
    reusable = _fullest(events, "free_completed")
    total, waiting = (sum(event["size"] for event in held) for held in (requested, reusable))
    print(f"== {title}: {before / 1e9:.2f} GB held before the step, {total / 1e9:.2f} GB more at most, "
          f"{(waiting - total) / 1e9:.2f} GB of what was dropped waited for the device")  # fmt: skip
    sizes, numbers = Counter[str](), Counter[str]()
    for event in reusable:
        sizes[_origin(event)] += event["size"]
        numbers[_origin(event)] += 1
    for origin, size in sizes.most_common(lines):
        print(f"  {size / 1e9:8.3f} GB in {numbers[origin]:4d}: {origin}")


def _fullest(events: list[dict[str, Any]], freed: str) -> list[dict[str, Any]]:
    """Allocations that are held when most is. freed: the event that ends one."""
    live: dict[int, dict[str, Any]] = {}
    held = most = 0
    best: list[dict[str, Any]] = []
    for event in events:
        if event["action"] == "alloc":
            live[event["addr"]] = event
            held += event["size"]
            if held > most:
                most, best = held, list(live.values())
        elif event["action"] == freed:
            live.pop(event["addr"], None)
            held -= event["size"]
    return best


def _origin(event: dict[str, Any]) -> str:
    frames = [frame for frame in event.get("frames", []) if frame["filename"].endswith(".py")]
    own = [frame for frame in frames if "/torch/" not in frame["filename"]] or frames
    places = [f"{'/'.join(f['filename'].split('/')[-2:])}:{f['line']} {f['name']}" for f in own[:FRAMES]]
    return " < ".join(places) or "not from Python"
