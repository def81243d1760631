"""Puts the measured tables into README.md and docs/trust.md, from the files in benchmarks/results and nowhere else.

    python -m benchmarks.report

Between ``<!-- table: NAME -->`` (or ``accuracy``, ``ptq``, ``deployed``) and ``<!-- end -->`` stands what
``results/NAME.json`` says.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import environment, harness, tables
from benchmarks.example_tables import accuracy, calibrated, deployed, trials

PAGES = (environment.ROOT / "README.md", environment.ROOT / "docs" / "trust.md")
SHAPES = ("act-64x56", "weight-512", "weight-64", "tiny-16")
"""The shapes of the table: a large activation, a large and a small weight, the cost of a call."""
SHOWN = {
    "aten": "ATen",
    "aten-fused": "ATen fused observer",
    "eager": "eager",
    "torch.compile": "torch.compile",
    "nni": "NNI 2.10",
    "brevitas": "brevitas",
    "torchao": "torchao",
}
"""The peers of the table, in its order."""


def table(name: str) -> str:
    """The markdown table of one result file."""
    document, results, _ = harness.read_json(harness.RESULTS / f"{name}.json")
    if document["benchmark"] == "bnn":
        return binary_table(name, document, results)
    if document["benchmark"] == "train_step":
        return step_table(name, document, results)
    if document["benchmark"] == "observers":
        return observer_table(document, results)
    cases: dict[str, dict[str, harness.Result]] = {}
    backward: dict[str, harness.Result] = {}
    for result in results:
        labels = {label: text for label, text in result.labels.items() if label != "direction"}
        if result.labels["direction"] == "both" and result.labels["shape"] in SHAPES:
            cases.setdefault(" ".join(labels.values()), {})[result.contestant] = result
        elif result.labels["direction"] == "backward" and result.contestant == "quantkern":
            backward[" ".join(labels.values())] = result
    peers = [peer for peer in SHOWN if any(peer in timed for timed in cases.values())]
    heads = ["operation", "tensor", "per", "ours / copy", *(["our backward"] if backward else [])]
    rows = ["| " + " | ".join([*heads, *(SHOWN[peer] for peer in peers)]) + " |"]
    rows.append("|---" * (len(heads) + len(peers)) + "|")
    for case, timed in cases.items():
        ours = timed["quantkern"]
        cells = [ours.labels["operation"], ours.labels["shape"], ours.labels["per"], tables.figure(ours.to_floor)]
        if backward:
            cells.append(moved(backward[case]) if case in backward else "")
        cells += [tables.ratio(timed[peer]) if peer in timed else "" for peer in peers]
        rows.append("| " + " | ".join(cells) + " |")
    machine, versions = document["machine"], document["versions"]
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    changed = " with uncommitted changes" if document["commit"]["dirty"] else ""
    told = (
        f"Forward and backward, {document['arguments']['dtype']}, on {where}; torch {versions['torch']}, commit "
        f"{document['commit']['hash'][:10]}{changed}, {document['date'][:10]}. The last columns are other libraries' "
        "time over ours (more than 1: we are faster), medians of interleaved runs in one process; the fourth is our "
        f"time over a plain copy of the same bytes. More shapes, and {'the backward' if backward else 'the forward'} "
        f"alone: benchmarks/results/{name}.json."
    )
    if backward:
        floor = tables.figure(next(iter(backward.values())).floor_bytes_per_element)
        told += (
            f" *Our backward* alone, in bytes an element; no backward moves fewer than {floor}. First its time: the "
            f"bytes that adding x and the gradient, which moves {floor}, would have moved in it (fewer: it "
            "is faster than that addition; small tensors: most of it is the call). Then, by count, what the kernel "
            "reads and writes, partial sums included."
        )
    stars = [
        line.replace("* ", "\\* ", 1)
        for line in tables.notes(one for timed in cases.values() for one in timed.values())
    ]
    return "\n".join([told, "", *rows, *(["", "<br>\n".join(stars)] if stars else [])]) + "\n"


def moved(result: harness.Result) -> str:
    """Bytes an element that our backward's time stands for, and those counted."""
    counted = result.figures.get("counted_bytes")
    by_time = f"{tables.figure(result.bytes_per_element)} B"
    return by_time if counted is None else f"{by_time}; {tables.figure(counted)} B"


BINARY_SHOWN = {
    "quantkern packed": "ours, packed inputs",
    "quantkern": "ours, packing included",
    "quantkern sign": "ours, packed signs out",
}
"""Our forms in the table of binary networks, over float."""


BINARY_PEERS = ("int8 torch._int_mm", "int8 onednn", "bitorch-engine", "larq")
"""The peers of that table."""


def by_case(results: Sequence[harness.Result]) -> dict[tuple[str, str], dict[str, harness.Result]]:
    """Results by operation and shape, then by contestant."""
    cases: dict[tuple[str, str], dict[str, harness.Result]] = {}
    for result in results:
        cases.setdefault((result.labels["operation"], result.labels["shape"]), {})[result.contestant] = result
    return cases


def fastest_float(timed: dict[str, harness.Result]) -> harness.Result | None:
    """The float contestant with the smallest median."""
    found = [result for name, result in timed.items() if name.startswith("float")]
    return min(found, key=lambda result: result.p50_ms, default=None)


def speedups(results: Sequence[harness.Result]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of benchmarks.bnn: ours over the fastest float contestant, and the peers' times over ours.

    The peers' times are over ours with packing.
    """
    cases = {case: timed for case, timed in by_case(results).items() if fastest_float(timed)}
    present = [peer for peer in BINARY_PEERS if any(peer in timed for timed in cases.values())]
    columns = ["operation", "shape", "fastest float", *BINARY_SHOWN.values()]
    rows = []
    for (operation, shape), timed in cases.items():
        fastest = fastest_float(timed)
        assert fastest is not None
        row = [operation, shape, fastest.contestant]
        row += [
            tables.figure(fastest.p50_ms / timed[form].p50_ms, "x") if form in timed else "" for form in BINARY_SHOWN
        ]
        rows.append(row + [tables.ratio(timed[peer]) if peer in timed else "" for peer in present])
    return [*columns, *present], rows


def packed_figures(results: Sequence[harness.Result]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the other figures: packing over reading, bytes kept for the backward, megabytes of state."""
    rows = []
    for (operation, shape), timed in by_case(results).items():
        ours = timed.get("quantkern")
        if ours is None:
            continue
        if operation == "pack_signs":
            copied = timed.get("copy")
            copying = f"copying {tables.figure(copied.to_floor, 'x')}" if copied else ""
            rows.append([f"time of pack_signs over reading {shape}", "", copying, tables.figure(ours.to_floor, "x")])
            continue
        key, unit, what = {
            "training": ("saved_bytes", 1e6, f"MB kept for the backward, {shape}, the float layer's over ours"),
            "vgg": ("megabytes", 1.0, f"MB of the VGG's state_dict, {shape}, float over packed"),
        }.get(operation, ("", 1.0, ""))
        other = timed.get("float layer" if operation == "training" else "float")
        if key and other:
            mine, theirs = ours.figures[key] / unit, other.figures[key] / unit
            numbers = (tables.figure(mine), tables.figure(theirs), tables.figure(theirs / mine, "x"))
            rows.append([what, *numbers])
    return ["figure", "ours", "other", "ratio"], rows


def binary_table(name: str, document: dict[str, Any], results: Sequence[harness.Result]) -> str:
    """The markdown tables of benchmarks.bnn."""
    machine, versions = document["machine"], document["versions"]
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    changed = " with uncommitted changes" if document["commit"]["dirty"] else ""
    told = (
        f"Binary networks on {where}, {machine['quantkern']}; torch {versions['torch']}, commit "
        f"{document['commit']['hash'][:10]}{changed}, {document['date'][:10]}. *Ours* are times as fast as the "
        "fastest float32 contestant, which is named (both orientations of a product, layouts and prepacked weights of "
        "a convolution, a frozen network); the last columns are other libraries' time over ours with packing. Medians "
        "of interleaved runs in one process; every binary result was first found equal to that of +-1 in floats. "
        f"All contestants: benchmarks/results/{name}.json."
    )
    parts = [told, "", *tables.markdown(*speedups(results))]
    columns, rows = packed_figures(results)
    if rows:
        parts += ["", *tables.markdown(columns, rows)]
    stars = [line.replace("* ", "\\* ", 1) for line in tables.notes(results)]
    return "\n".join([*parts, *(["", "<br>\n".join(stars)] if stars else [])]) + "\n"


def step_figures(results: Sequence[harness.Result]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of benchmarks.train_step for one network: every contestant with all its figures."""
    columns = ["contestant", "p20 ms", "p50 ms", "x float", "x float, rounds", "peak MB", "x float", "kept MB", "calls"]
    plain = next((one for one in results if one.contestant == "float"), None)
    rows = []
    for one in results:
        peak, kept = one.figures["peak_bytes"], one.figures["saved_bytes"]
        more = tables.figure(peak / plain.figures["peak_bytes"]) if plain else "-"
        cells = [tables.figure(value) for value in (one.p20_ms, one.p50_ms)]
        cells += [precise(one.to_floor), precise(one.round_to_floor), tables.figure(peak / 1e6), more]
        cells += [tables.figure(kept / 1e6), f"{one.figures['operator_calls']:.0f}"]
        rows.append([one.contestant + ("*" if one.other_work else ""), *cells])
    return columns, rows


def precise(ratio: float | None) -> str:
    """A ratio near 1 with three decimals."""
    return "-" if ratio is None else f"{ratio:.3f}"


STEP_SHOWN = {
    "quantkern-qat": "our QAT",
    "quantkern-qat-folded": "our QAT, batch norm folded",
    "quantkern-lsq": "our LSQ",
    "float-compiled": "float, compiled",
    "quantkern-qat-compiled": "our QAT, compiled",
    "quantkern-lsq-compiled": "our LSQ, compiled",
    "nni-qat": "NNI 2.10 QAT",
    "nni-lsq": "NNI 2.10 LSQ",
    "torch.ao": "torch.ao fused",
    "brevitas": "brevitas",
    "torchao": "torchao",
}
"""The contestants of the tables of training steps, in their order."""


def step_table(name: str, document: dict[str, Any], results: Sequence[harness.Result]) -> str:
    """The markdown tables of benchmarks.train_step: time and peak memory over float, and what is kept and called."""
    machine, versions, arguments = document["machine"], document["versions"], document["arguments"]
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    changed = " with uncommitted changes" if document["commit"]["dirty"] else ""
    samples = min(one.samples for one in results)
    told = (
        f"Training steps on {where}; torch {versions['torch']}, commit {document['commit']['hash'][:10]}{changed}, "
        f"{document['date'][:10]}. Forward, backward and an SGD step"
        + (f" over {arguments['accumulate']} micro-batches" if arguments["accumulate"] != 1 else "")
        + f", 8-bit weights, inputs and outputs of ReLUs; medians of at least {samples} steps each, interleaved in one "
        "process. First the time over that of the float network (1.00: quantization costs nothing), then the same of "
        "the most tensor memory alive at once, and the megabytes kept for the backward. All figures: "
        f"benchmarks/results/{name}.json."
    )
    networks: dict[str, dict[str, harness.Result]] = {}
    for result in results:
        networks.setdefault(result.labels["network"], {})[result.contestant] = result
    present = [one for one in STEP_SHOWN if any(one in timed for timed in networks.values())]
    titles = [STEP_SHOWN[one] for one in present]

    def rows(
        cell: Callable[[harness.Result, harness.Result], str], own: Callable[[harness.Result], str]
    ) -> list[list[str]]:
        found = []
        for network, timed in networks.items():
            plain = timed["float"]
            cells = [cell(timed[one], plain) if one in timed else "" for one in present]
            found.append([f"{network}, batch {plain.labels['batch']}", own(plain), *cells])
        return found

    def time(one: harness.Result, plain: harness.Result) -> str:
        return f"{one.p50_ms / plain.p50_ms:.2f}x" + ("*" if one.other_work else "")

    def memory(one: harness.Result, plain: harness.Result) -> str:
        return f"{one.figures['peak_bytes'] / plain.figures['peak_bytes']:.2f}x"

    def kept(one: harness.Result) -> str:
        return tables.figure(one.figures["saved_bytes"] / 1e6)

    parts = [told]
    for heads, table_rows in (
        (["time of a step", "float, ms"], rows(time, lambda one: tables.figure(one.p50_ms))),
        (
            ["peak memory", "float, MB"],
            rows(memory, lambda one: tables.figure(one.figures["peak_bytes"] / 1e6)),
        ),
        (["kept for the backward, MB", "float"], rows(lambda one, _: kept(one), kept)),
    ):
        parts += ["", *tables.markdown([*heads, *titles], table_rows)]
    stars = [line.replace("* ", "\\* ", 1) for line in tables.notes(results)]
    return "\n".join([*parts, *(["", "<br>\n".join(stars)] if stars else [])]) + "\n"


def observer_table(document: dict[str, Any], results: Sequence[harness.Result]) -> str:
    """The markdown table of benchmarks.observers: torch.ao's time over ours, and our error over its."""
    timed = {(*result.labels.values(), result.contestant): result for result in results}
    rows = []
    for observer, tensor, per, part, contestant in timed:
        theirs = timed.get((observer, tensor, per, part, "torch.ao"))
        if contestant != "quantkern" or part != "observe" or theirs is None:
            continue
        ours, our_search, their_search = (
            timed[observer, tensor, per, kind, who]
            for kind, who in ((part, "quantkern"), ("qparams", "quantkern"), ("qparams", "torch.ao"))
        )
        ratio = (theirs.p50_ms + their_search.p50_ms) / (ours.p50_ms + our_search.p50_ms)
        error = ours.figures["error"] / theirs.figures["error"]
        rows.append([observer, tensor, per, f"{tables.figure(ratio)}x", tables.figure(error)])
    told = (
        f"Calibration on {document['machine']['cpu']}, {document['machine']['threads']} thread(s), torch "
        f"{document['versions']['torch']}, commit {document['commit']['hash'][:10]}, {document['date'][:10]}: how many "
        "times as fast as torch.ao's observer over the same batches, the choice of scale and zero point included, and "
        "our squared quantization error over its."
    )
    heads = ["observer", "tensor", "per", "times as fast", "error over torch.ao's"]
    return "\n".join([told, "", *tables.markdown(heads, rows)]) + "\n"


WRITERS = {"table": table, "accuracy": accuracy, "ptq": calibrated, "deployed": deployed, "trials": trials}
"""Who writes what stands behind a marker."""


def update(text: str) -> str:
    """The text of a page with every table whose results exist written anew."""

    def fill(found: re.Match[str]) -> str:
        kind, name = found.groups()
        body = WRITERS[kind](name) if (harness.RESULTS / f"{name}.json").exists() else ""
        return f"<!-- {kind}: {name} -->\n{body}<!-- end -->"

    return re.sub(rf"<!-- ({'|'.join(WRITERS)}): (\S+) -->\n.*?<!-- end -->", fill, text, flags=re.S)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(update(page.read_text()))
