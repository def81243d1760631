"""Puts the measured tables into README.md, from the files in benchmarks/results and nowhere else.

    python -m benchmarks.report

Between ``<!-- table: NAME -->`` (or ``accuracy``) and ``<!-- end -->`` stands what ``results/NAME.json`` says.
"""

from __future__ import annotations

import json
import re

from benchmarks import harness

README = harness.ROOT / "README.md"

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
    cases: dict[str, dict[str, harness.Result]] = {}
    for result in results:
        if result.labels["direction"] == "both" and result.labels["shape"] in SHAPES:
            cases.setdefault(" ".join(result.labels.values()), {})[result.contestant] = result
    peers = [peer for peer in SHOWN if any(peer in timed for timed in cases.values())]
    rows = ["| operation | tensor | per | ours / copy | " + " | ".join(SHOWN[peer] for peer in peers) + " |"]
    rows.append("|---" * (4 + len(peers)) + "|")
    for timed in cases.values():
        ours = timed["quantkern"]
        cells = [ours.labels["operation"], ours.labels["shape"], ours.labels["per"], harness.figure(ours.to_floor)]
        cells += [f"{harness.figure(timed[peer].to_ours)}x" if peer in timed else "" for peer in peers]
        rows.append("| " + " | ".join(cells) + " |")
    machine, versions = document["machine"], document["versions"]
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    changed = " with uncommitted changes" if document["commit"]["dirty"] else ""
    told = (
        f"Forward and backward, {document['arguments']['dtype']}, on {where}; torch {versions['torch']}, commit "
        f"{document['commit']['hash'][:10]}{changed}, {document['date'][:10]}. The last columns are other libraries' "
        "time over ours (more than 1: we are faster), medians of interleaved runs in one process; the fourth is our "
        f"time over a plain copy of the same bytes. More shapes, and the forward alone: benchmarks/results/{name}.json."
    )
    return told + "\n\n" + "\n".join(rows) + "\n"


def accuracy(name: str) -> str:
    """The markdown table of an example's runs."""
    document = json.loads((harness.RESULTS / f"{name}.json").read_text())
    scores: dict[str, list[float]] = {}
    for run in document["runs"]:
        scores.setdefault(run["recipe"], []).append(run["accuracy"])
    means = {recipe: sum(values) / len(values) for recipe, values in scores.items()}
    settings, machine = document["settings"], document["machine"]
    told = (
        f"Test accuracy on {document['data']}, {document['train_images']} training images, every recipe from scratch: "
        f"{settings['epochs']} epochs, batches of {settings['batch_size']}, {settings['seeds']} seed(s); "
        f"{machine['cpu']}, {machine['threads']} threads, torch {document['versions']['torch']}, commit "
        f"{document['commit']['hash'][:10]}, {document['date'][:10]}. Recipes: examples/recipes.py."
    )
    rows = ["| recipe | accuracy % | points from float |", "|---|---|---|"]
    rows += [f"| {recipe} | {mean:.2f} | {mean - means['float']:+.2f} |" for recipe, mean in means.items()]
    return told + "\n\n" + "\n".join(rows) + "\n"


def update(text: str) -> str:
    """README's text with every table whose results exist written anew."""

    def fill(found: re.Match[str]) -> str:
        kind, name = found.groups()
        write = table if kind == "table" else accuracy
        body = write(name) if (harness.RESULTS / f"{name}.json").exists() else ""
        return f"<!-- {kind}: {name} -->\n{body}<!-- end -->"

    return re.sub(r"<!-- (table|accuracy): (\S+) -->\n.*?<!-- end -->", fill, text, flags=re.S)


if __name__ == "__main__":
    README.write_text(update(README.read_text()))
