"""The parts of a step in a trace that torch.profiler exported. See records/compare.py."""

import bisect
from collections import namedtuple

Span = namedtuple("Span", "name start end")  # of the profiler's trace, in microseconds


def annotated_spans(events: list) -> tuple[list, list]:
    """The spans called "step" and those directly inside one of them, in the order of time."""
    annotations = [event for event in events if event.get("cat") == "user_annotation"]
    annotations.sort(key=lambda event: (event["ts"], -event["dur"]))
    steps, parts = [], []
    inside_until = 0.0  # an annotation inside a part is a piece of it, no part itself
    thread = None  # of the steps: a loader's thread may have annotations of its own
    for event in annotations:
        span = Span(event["name"], event["ts"], event["ts"] + event["dur"])
        if span.name == "step":
            steps.append(span)
            thread = event["tid"]
        elif event["tid"] == thread and inside_until <= span.start < steps[-1].end:
            parts.append(span)
            inside_until = span.end
    return steps, parts


def device_events(events: list, spans: list) -> list:
    """(span, event) of what a GPU did for these spans of the host; [] without a GPU.

    A kernel or copy belongs to the span that was open when it was launched, by whatever thread.
    """
    launched = {}
    for event in events:
        if event.get("cat") in ("cuda_runtime", "cuda_driver"):
            launched[event["args"].get("correlation")] = event["ts"]
    starts = [span.start for span in spans]
    found = []
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            moment = launched.get(event["args"].get("correlation"), 0.0)
            span = spans[bisect.bisect(starts, moment) - 1]
            if span.start <= moment < span.end:
                found.append((span, event))
    return found


def average_parts(events: list, first: int) -> dict:
    """Milliseconds of each part of a step, of "rest" and of "step", the mean of all but `first`.

    events: of a trace that torch.profiler exported. {} where no step has parts. On a GPU a part's
    time is that of the kernels and copies launched in it, and the rest is what the GPU did beside
    them and waited. Kernels of several streams can overlap; then the rest is less by as much.
    """
    steps, parts = annotated_spans(events)
    steps = steps[first:]
    parts = [part for part in parts if steps and part.start >= steps[0].start]
    if not parts:
        return {}
    on_device = []
    for part, event in device_events(events, parts):
        on_device.append(Span(part.name, event["ts"], event["ts"] + event["dur"]))
    total = {part.name: 0.0 for part in parts}
    for span in on_device or parts:
        total[span.name] += span.end - span.start
    spans = on_device or steps
    whole = max(span.end for span in spans) - min(span.start for span in spans)
    total["rest"] = whole - sum(total.values())
    total["step"] = whole
    return {name: spent / 1000 / len(steps) for name, spent in total.items()}
