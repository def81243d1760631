"""Writes files in child processes, kills them with SIGKILL at random moments and looks at what lies there then.

    python tests/kill_while_writing.py model|onnx|html FOLDER KILLS SEED

prints a JSON object: how many children were killed, in how many cases the old file, a new one or none lay there, how
many were killed while a file was unfinished, and what was wrong. tests/test_disk_faults.py runs it in a process of its
own with one thread, because it forks.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import quantkern
from quantkern.files import UNFINISHED
from quantkern.report import Report

SIZE = 400
RULES = [{"quant_types": ["weight", "input"], "quant_bits": 8, "op_types": ["Linear"]}]


def quantizer_of(number: int) -> quantkern.QAT_Quantizer:
    """A model whose weights are all the number, so that a file says which one it is."""
    model = nn.Sequential(nn.Linear(SIZE, SIZE), nn.ReLU(), nn.Linear(SIZE, 4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(number)
    quantizer = quantkern.QAT_Quantizer(model, RULES)
    model(torch.ones(2, SIZE))
    model.eval()
    return quantizer


def read_model(folder: Path) -> int | None:
    """The number in model.pth and calibration.pth, which must load whole; None where there is none."""
    loaded = None
    if (folder / "calibration.pth").exists():
        loaded = quantkern.load(folder / "calibration.pth")
        assert sorted(loaded) == ["0", "2"] and loaded["0"]["weight_scale"].numel() == 1
        quantizer_of(1).load_calibration_config(folder / "calibration.pth")
    if not (folder / "model.pth").exists():
        return None
    state = quantkern.load(folder / "model.pth")
    nn.Sequential(nn.Linear(SIZE, SIZE), nn.ReLU(), nn.Linear(SIZE, 4)).load_state_dict(state)
    numbers = {float(value) for tensor in state.values() for value in (tensor.min(), tensor.max())}
    assert len(numbers) == 1, f"mixed: {numbers}"
    number = int(numbers.pop())
    if loaded is not None:
        scale = quantizer_of(number).bound_model[0].parametrizations.weight[0].scale
        assert torch.equal(loaded["0"]["weight_scale"].view(()), scale.view(())), "the calibration of another export"
    return number


def read_onnx(folder: Path) -> int | None:
    """The largest weight of the first layer; without onnxruntime, whose threads do not survive a fork."""
    if not (folder / "model.onnx").exists():
        return None
    import onnx
    from onnx import numpy_helper

    model = onnx.load(folder / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    values = {one.name: numpy_helper.to_array(one) for one in model.graph.initializer}
    node = next(
        one
        for one in model.graph.node
        if one.op_type == "DequantizeLinear" and one.input[0] in values and values[one.input[0]].shape == (SIZE, SIZE)
    )
    codes, scale = values[node.input[0]].astype(float), values[node.input[1]]
    zero = values[node.input[2]].astype(float) if len(node.input) > 2 else 0.0
    numbers = (codes - zero) * scale
    assert numbers.min() == numbers.max(), "mixed"
    return round(float(numbers.max()))


def read_html(folder: Path) -> int | None:
    """The number in the title of a page that has its end."""
    if not (folder / "report.html").exists():
        return None
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>") and text.endswith("</body></html>\n"), "half a page"
    return int(text.split("<title>")[1].split(":")[0])


def write_model(folder: Path, number: int) -> Callable[[], object]:
    quantizer = quantizer_of(number)
    return lambda: quantizer.export_model(folder / "model.pth", folder / "calibration.pth")


def write_onnx(folder: Path, number: int) -> Callable[[], object]:
    quantizer = quantizer_of(number)
    return lambda: quantizer.export_onnx(folder / "model.onnx", torch.ones(2, SIZE), verify=False)


def write_html(folder: Path, number: int) -> Callable[[], object]:
    report = quantizer_of(number).report(torch.ones(2, SIZE))
    # Many rows, so that writing takes a while.
    rows = [dataclasses.replace(row, warnings=()) for row in report.rows] * 300
    many = Report(f"{number}: rows", tuple(rows), (), True, False)
    return lambda: many.to_html(folder / "report.html")


KINDS = {"model": (write_model, read_model), "onnx": (write_onnx, read_onnx), "html": (write_html, read_html)}


def in_child(work: Callable[[], object]) -> int:
    """Start it in a child process, which ends with the work's success as exit status."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        work()
        status = 0
    finally:
        os._exit(status)


def unfinished(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name.startswith(UNFINISHED)]


def has_begun(folder: Path) -> bool:
    """Whether a file is being written just now; the folder may be gone before it is looked into."""
    try:
        return any(any(left.iterdir()) for left in unfinished(folder))
    except FileNotFoundError:
        return False


def kill_at_random(folder: Path, kind: str, kills: int, seed: int) -> dict[str, object]:
    """See above. Half of the children are killed some time after they began, half after their file has appeared."""
    write, read = KINDS[kind]
    chance, seen, wrong = random.Random(seed), Counter[str](), list[str]()
    write(folder, 1)()  # the first one imports and compiles more than the others
    again = write(folder, 1)
    started = time.perf_counter()
    again()
    longest = time.perf_counter() - started
    known = read(folder)
    assert known == 1, known
    for number in range(2, kills + 2):
        work = write(folder, number)
        child = in_child(work)
        if number % 2:
            time.sleep(chance.uniform(0, longest))
        else:
            while not has_begun(folder) and os.waitpid(child, os.WNOHANG)[0] == 0:
                time.sleep(0)
            time.sleep(min(longest, 0.05) * 10 ** chance.uniform(-4, -0.5))
        try:
            os.kill(child, signal.SIGKILL)
            seen["killed"] += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        except (ChildProcessError, ProcessLookupError):
            pass
        left = unfinished(folder)
        seen["unfinished"] += bool(left)
        others = {path.name for path in folder.iterdir()} - {path.name for path in left}
        if not others <= {"model.pth", "calibration.pth", "model.onnx", "report.html"}:
            wrong.append(f"left behind: {others}")
        try:
            found = read(folder)
        except Exception as error:
            wrong.append(f"{type(error).__name__}: {error}")
            found = None
        between = {None} if kind == "model" else set()  # of two files the old ones go before the new ones come
        if found not in {known, number, *between}:
            wrong.append(f"found {found}, expected {known} or {number}")
        seen["absent" if found is None else "new" if found == number else "old"] += 1
        known = found
        for path in left:  # what a user would do
            for file in path.iterdir():
                file.unlink()
            path.rmdir()
        if number % 3 == 0:  # now and then there is no old file
            for path in folder.iterdir():
                path.unlink()
            known = None
    return {**seen, "wrong": wrong}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    name, place, count, start = sys.argv[1:]
    print(json.dumps(kill_at_random(Path(place), name, int(count), int(start))))
