"""What lies on the disk when something goes wrong: killed processes, full and read-only disks, damaged files."""

from __future__ import annotations

import errno
import json
import os
import pickletools
import random
import resource
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from flip_bits import FILES, RULES, equal, flip, network, quantizer_of, write_files
from torch import Tensor, nn

import quantkern
from quantkern import files
from quantkern.export import onnx_file

ROOT = Path(__file__).resolve().parents[1]


def run_alone(*arguments: str) -> str:
    """A script in a process with one thread; its output."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("kind, kills", [("model", 40), ("html", 40), ("onnx", 4)])
def test_a_killed_process_leaves_whole_files(kind: str, kills: int, tmp_path: Path) -> None:
    if kind == "onnx":
        pytest.importorskip("onnxscript")
    printed = run_alone("tests/kill_while_writing.py", kind, str(tmp_path), str(kills), "0")
    found: dict[str, Any] = json.loads(printed.splitlines()[-1])
    assert found["wrong"] == []
    assert found.get("killed", 0) > 0
    assert kind == "onnx" or found.get("unfinished", 0) > 0, f"no kill hit a file that was being written: {found}"


WRITERS: dict[str, Callable[[quantkern.QAT_Quantizer, Path], object]] = {
    "model": lambda quantizer, folder: quantizer.export_model(folder / "out"),
    "calibration": lambda quantizer, folder: quantizer.export_model(folder / "model.pth", folder / "out"),
    "onnx": lambda quantizer, folder: quantizer.export_onnx(folder / "out", torch.ones(2, 16), verify=False),
    "html": lambda quantizer, folder: quantizer.report(torch.ones(2, 16)).to_html(folder / "out"),
}


def check_nothing_changed(model: nn.Module, before: dict[str, Tensor], folder: Path, names: list[str]) -> None:
    """The old file alone, and the model as quantized as it was."""
    assert sorted(path.name for path in folder.iterdir()) == names
    assert (folder / "out").read_text() == "old"
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], value) for key, value in before.items())


class FullDisk:
    """A file that takes so many bytes and no more."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: Any) -> int:
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return int(self.file.write(data))

    def __enter__(self) -> FullDisk:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


@pytest.mark.parametrize("room", [0, 1, 300, 1000, 2000])
@pytest.mark.parametrize("kind", ["model", "calibration", "html"])
def test_a_disk_that_fills_up_while_writing(
    kind: str, room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network()
    quantizer = quantizer_of(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    (tmp_path / "out").write_text("old")
    real = Path.open
    text = {"html": lambda path, data, **_: FullDisk(real(path, "wb"), room).write(data.encode())}

    def narrow(path: Path, mode: str = "r", **rest: Any) -> Any:
        file = real(path, mode, **rest)
        return FullDisk(file, room) if "w" in mode and path.name == "out" else file

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", narrow)
        patch.setattr(Path, "write_text", text.get(kind))
        with pytest.raises(OSError, match=rf"cannot write .*{tmp_path}/out: No space left on device") as caught:
            WRITERS[kind](quantizer, tmp_path)
    assert caught.value.errno == errno.ENOSPC
    check_nothing_changed(model, before, tmp_path, ["out"])
    WRITERS[kind](quantizer, tmp_path)  # with room again it goes on
    assert (tmp_path / "out").stat().st_size > 1000


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB of its own."""
    folder = tmp_path / "small"
    folder.mkdir()
    try:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True)
    except FileNotFoundError:
        pytest.skip("there is no mount")
    if done.returncode:
        pytest.skip(f"mounting is not permitted here: {done.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("free", [0, 8192])
def test_a_full_disk(kind: str, free: int, small_disk: Path) -> None:
    if kind == "onnx":
        pytest.importorskip("onnxscript")
    model = nn.Sequential(nn.Linear(16, 300), nn.ReLU(), nn.Linear(300, 16))
    quantizer = quantizer_of(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    (small_disk / "out").write_text("old")
    with pytest.raises(OSError, match="No space left on device"), (small_disk / "rest").open("wb", 0) as rest:
        while True:
            rest.write(bytes(4096))
    os.truncate(small_disk / "rest", (small_disk / "rest").stat().st_size - free)
    with pytest.raises(OSError, match=rf"cannot write .*{small_disk}/.*: No space left on device"):
        WRITERS[kind](quantizer, small_disk)
    check_nothing_changed(model, before, small_disk, ["out", "rest"])


def test_a_limit_on_the_size_of_files(tmp_path: Path) -> None:
    model = network()
    quantizer = quantizer_of(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    (tmp_path / "out").write_text("old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
    try:
        with pytest.raises(OSError, match="cannot write model_path .*: File too large"):
            quantizer.export_model(tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    check_nothing_changed(model, before, tmp_path, ["out"])


AS_NOBODY = """
import os, sys
from pathlib import Path
import torch
import test_disk_faults as faults
model = faults.network()
quantizer = faults.quantizer_of(model)
before = {key: value.clone() for key, value in model.state_dict().items()}
if os.geteuid() == 0:
    os.seteuid(65534)  # permissions do not bind root
for kind in ("model", "html"):
    try:
        faults.WRITERS[kind](quantizer, Path(sys.argv[1]))
    except PermissionError as error:
        assert "cannot write" in str(error) and sys.argv[1] in str(error), error
        print(error)
    else:
        raise AssertionError("it was written")
os.seteuid(os.getuid())
faults.check_nothing_changed(model, before, Path(sys.argv[1]), ["out"])
"""


def test_a_read_only_folder() -> None:
    """Not in pytest's own folder, into which other users cannot look at all."""
    script = f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r})\n" + AS_NOBODY
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "out").write_text("old")
        Path(folder).chmod(0o555)
        try:
            printed = run_alone("-c", script, folder)
        finally:
            Path(folder).chmod(0o755)
    assert printed.count("Permission denied") == 2


STEPS = 5
"""What export_model does to the places of two files that exist: both are set aside, both new ones come, and an end."""


@pytest.mark.parametrize("step", range(STEPS))
@pytest.mark.parametrize("fails", [True, False], ids=["error", "kill"])
def test_files_of_two_exports_never_lie_side_by_side(
    fails: bool, step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before any of its moves: the old files after an error, fewer after a kill, none beside another's."""
    names = ["model.pth", "calibration.pth"]
    quantizer_of(network()).export_model(*(tmp_path / name for name in names))
    old = {name: (tmp_path / name).read_bytes() for name in names}
    model = network()
    with torch.no_grad():
        model[0].weight.add_(1)
    quantizer = quantizer_of(model)
    real, left, seen = Path.replace, step, dict[str, bytes]()

    def count(path: Path, place: Path) -> Path:
        nonlocal left
        left -= 1
        if left == -1:  # what a process killed now would leave
            seen.update((name, (tmp_path / name).read_bytes()) for name in names if (tmp_path / name).exists())
            if fails:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path, place)

    monkeypatch.setattr(Path, "replace", count)
    if fails and step < STEPS - 1:
        with pytest.raises(OSError, match=r"cannot write (model|calibration)_path .*: Input/output error; what was "):
            quantizer.export_model(*(tmp_path / name for name in names))
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == old
        return
    quantizer.export_model(*(tmp_path / name for name in names))
    assert (left == 0) == (step == STEPS - 1), "publish takes another number of moves than STEPS says"
    new = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sorted(new) == sorted(names) and all(new[name] != old[name] for name in names)
    origins = {[old[name], new[name]].index(data) for name, data in seen.items()}
    assert len(origins) <= 1, f"a new file beside an old one: {origins}"


def test_a_large_onnx_model_never_lies_beside_other_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over 2 GB the weights lie in a file of their own, here already with a few."""
    pytest.importorskip("onnxscript")
    onnx = pytest.importorskip("onnx")
    monkeypatch.setattr(onnx_file, "FILE_LIMIT", 0)
    quantizer_of(network()).export_onnx(tmp_path / "out", torch.ones(2, 16), verify=False)
    old = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(old) == 2
    model = network()
    with torch.no_grad():
        model[0].weight.add_(1)
    quantizer = quantizer_of(model)
    real, seen = Path.replace, list[list[str]]()

    def look(path: Path, place: Path) -> Path:
        files = [one for one in sorted(tmp_path.iterdir()) if one.is_file()]
        seen.append([f"{'old' if one.read_bytes() == old[one.name] else 'new'} {one.name}" for one in files])
        return real(path, place)

    monkeypatch.setattr(Path, "replace", look)
    quantizer.export_onnx(tmp_path / "out", torch.ones(2, 16), verify=False)
    assert [len(names) for names in seen] == [2, 1, 0, 1]
    assert len({word.split()[0] for word in seen[1]}) == 1
    onnx.checker.check_model(tmp_path / "out")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    write_files(folder)
    return folder


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")  # which torch says of files that are not its own
@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_noticed(name: str, exported: Path) -> None:
    """About 500 bits. ``torch.load`` takes many of these files and gives other numbers."""
    bits = (exported / name).stat().st_size * 8
    counts, wrong = flip(exported / name, range(0, bits, bits // 500))
    assert wrong == [], "other numbers, unnoticed"
    assert counts["said"] > counts["the same"] > 0
    assert counts["wrong by torch.load"] > 10, "torch.load compares checksums itself now: quantkern.load need not"


def test_an_entry_marked_as_a_folder_is_damage(exported: Path, tmp_path: Path) -> None:
    """No checksum covers that bit, and torch.load returns unwritten memory for such a tensor."""
    good = bytearray((exported / "checkpoint.pth").read_bytes())
    with zipfile.ZipFile(exported / "checkpoint.pth") as archive:
        name = next(one for one in archive.namelist() if one.endswith("data/0"))
    place = good.rindex(name.encode()) - 8  # external attributes, in the directory at the end of the file
    assert good[place] == 0
    good[place] = 0x10
    (tmp_path / "checkpoint.pth").write_bytes(good)
    with pytest.raises(ValueError, match=r"checkpoint.pth is damaged: '.*data/0' in it is a folder"):
        quantkern.load(tmp_path / "checkpoint.pth")


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_an_error(name: str, exported: Path, tmp_path: Path) -> None:
    good = (exported / name).read_bytes()
    for length in [0, 1, *random.Random(0).sample(range(2, len(good) - 1), 60), len(good) - 1]:
        (tmp_path / name).write_bytes(good[:length])
        with pytest.raises(
            ValueError, match=r"is cut off, damaged, or no file of torch\.save; copy or export it again"
        ):
            quantkern.load(tmp_path / name)


def test_a_damaged_calibration_file_changes_nothing(exported: Path, tmp_path: Path) -> None:
    model = network()
    quantizer = quantizer_of(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with zipfile.ZipFile(exported / "calibration.pth") as archive:
        entry = next(one for one in archive.infolist() if one.filename.endswith("data/0"))
        scale = torch.load(exported / "calibration.pth", weights_only=True)["0"]["weight_scale"]
        payload = archive.read(entry)
    assert payload[:4] == scale.numpy().tobytes()
    good = bytearray((exported / "calibration.pth").read_bytes())
    place = good.index(payload[:4])
    good[place + 2] ^= 0x40
    (tmp_path / "calibration.pth").write_bytes(good)
    with pytest.raises(ValueError, match=r"calibration.pth is damaged: '.*data/0' in it does not match its checksum"):
        quantizer.load_calibration_config(tmp_path / "calibration.pth")
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_calibration_is_read_from_a_path_as_from_a_dict(exported: Path) -> None:
    states = []
    for calibration in (
        exported / "calibration.pth",
        str(exported / "calibration.pth"),
        torch.load(exported / "calibration.pth", weights_only=True),
    ):
        model = network()
        quantkern.QAT_Quantizer(model, RULES).load_calibration_config(calibration)
        states.append(model.state_dict())
    assert equal(dict(states[0]), dict(states[1])) and equal(dict(states[0]), dict(states[2]))


def test_files_have_checksums_whatever_the_setting_of_torch(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        quantizer_of(network()).export_model(tmp_path / "model.pth", tmp_path / "calibration.pth")
        assert not torch.serialization.get_crc32_options()
    finally:
        torch.serialization.set_crc32_options(True)
    assert quantkern.load(tmp_path / "calibration.pth").keys() == {"0", "2"}
    network().load_state_dict(quantkern.load(tmp_path / "model.pth"))


def test_a_file_of_other_objects_is_refused_and_a_missing_one_is_missing(tmp_path: Path) -> None:
    torch.save({"0": Path("x")}, tmp_path / "objects.pth")
    with pytest.raises(ValueError, match=r"objects.pth cannot be read by torch.load\(weights_only=True\)"):
        quantkern.load(tmp_path / "objects.pth")
    with pytest.raises(FileNotFoundError, match=r"none\.pth"):
        quantkern.load(tmp_path / "none.pth")


KINDS: dict[str, tuple[type[Any], list[dict[str, Any]]]] = {
    "qat": (quantkern.QAT_Quantizer, RULES),
    "lsq": (quantkern.LsqQuantizer, RULES),
    "dorefa": (quantkern.DoReFaQuantizer, [{**RULES[0], "quant_types": ["weight", "output"]}]),
    "bnn": (quantkern.BNNQuantizer, [{"quant_types": ["weight"], "quant_bits": 1, "op_types": ["Linear"]}]),
    "observer": (quantkern.ObserverQuantizer, RULES),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_files_hold_no_objects_of_our_own(kind: str, tmp_path: Path) -> None:
    """Checkpoints of the quantized model and its quantizer, and what export_model writes: plain data, no code."""
    model = network().train(kind != "observer")
    quantizer = KINDS[kind][0](model, KINDS[kind][1])
    model(torch.randn(8, 16))
    if kind == "observer":
        quantizer.calibrate([torch.randn(8, 16)])
        quantizer.compress()
    checkpoint = {"model": model.state_dict(), "quantizer": quantizer.state_dict()}
    torch.save(checkpoint, tmp_path / "checkpoint.pth")
    quantizer.export_model(tmp_path / "model.pth", tmp_path / "calibration.pth")
    operations: set[tuple[str, Any]] = set()
    for path in sorted(tmp_path.iterdir()):
        quantkern.load(path)
        with zipfile.ZipFile(path) as archive:
            pickled = archive.read(next(one for one in archive.namelist() if one.endswith("data.pkl")))
        operations |= {(operation.name, argument) for operation, argument, _ in pickletools.genops(pickled)}
    classes = {argument.split(".")[0].split(" ")[0] for name, argument in operations if name == "GLOBAL"}
    assert classes == {"torch", "collections"} and "STACK_GLOBAL" not in dict(operations)
    assert not any(path.name.startswith(files.UNFINISHED) for path in tmp_path.iterdir())
