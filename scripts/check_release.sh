#!/usr/bin/env bash
# Builds the release from a clean clone of HEAD and tries it where there is neither a compiler nor a source tree.
#
#   scripts/check_release.sh [DIST]        DIST: a folder for the wheel and the sdist (default: they are thrown away)
#
# 1. the version of quantkern/__init__.py is the one that CHANGELOG.md begins with
# 2. sdist from the clean clone, wheel from the sdist, so that what is missing in the sdist is noticed
# 3. what the wheel holds, and that no file of it comes from somewhere else
# 4. the wheel in an empty virtual environment, with a PATH that has no compiler: python -m quantkern, a model trained,
#    exported, loaded again
#
# PYTHON (default python3) makes the environments, TORCH (default torch==2.13.0, as in README.md) is what is installed
# there. The files of the checkout are not touched; commit what the release shall have.
set -euo pipefail
dist=${1:+$(realpath -m "$1")}
cd "$(dirname "$0")/.."
python=$(command -v "${PYTHON:-python3}")
torch=${TORCH:-torch==2.13.0}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PYTHONDONTWRITEBYTECODE=1
unset PYTHONPATH

step() { printf '== %s\n' "$*"; }

step "clean clone of $(git rev-parse --short HEAD)"
git diff --quiet HEAD || echo "note: uncommitted changes are not part of it"
git clone -q . "$work/clone"
cd "$work/clone"
version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' quantkern/__init__.py)
changes=$(sed -n 's/^## \([^ ]*\).*/\1/p' CHANGELOG.md | head -n 1)
[ -n "$version" ] && [ "$version" = "$changes" ] ||
  { echo "quantkern/__init__.py has version '$version', CHANGELOG.md begins with '$changes'" >&2 && exit 1; }

step "sdist, and the wheel from it"
"$python" -m venv "$work/build"
"$work/build/bin/pip" install -q "$torch" numpy 'setuptools>=77' ninja build
"$work/build/bin/python" -m build --no-isolation --outdir "$work/dist" . >"$work/build.log" 2>&1 ||
  { tail -n 40 "$work/build.log" >&2 && exit 1; }
ls -l "$work/dist"

step "what the wheel holds"
"$python" - "$work"/dist/*.whl "$version" <<'PY'
import subprocess, sys, zipfile

wheel, version = sys.argv[1:]
names = set(zipfile.ZipFile(wheel).namelist())
metadata = f"quantkern-{version}.dist-info/"
tracked = subprocess.run(["git", "ls-files", "quantkern"], capture_output=True, text=True, check=True).stdout.split()
built = {name for name in names if name.startswith("quantkern/_C.") and name.endswith(".so")}
assert len(built) == 1, f"expected one extension, found {built}"
allowed = {*tracked, *built, "quantkern/_built_for.py"}
own = {name for name in names if not name.startswith(metadata)}
assert own == allowed, f"missing: {sorted(allowed - own)}; not of this package: {sorted(own - allowed)}"
assert any(name.startswith(metadata) and name.endswith("LICENSE") for name in names), "no LICENSE"
print(f"{len(names)} files, the extension {next(iter(built))}")
PY

step "the wheel in an empty environment without a compiler"
"$python" -m venv "$work/empty"
"$work/empty/bin/pip" install -q "$torch"
mkdir "$work/elsewhere"
cd "$work/elsewhere"
# Nothing but the environment's own programs: no gcc, no ninja, no shell.
bare() { env -i PATH="$work/empty/bin" HOME="$work/elsewhere" LANG=C.UTF-8 "$@"; }
bare python -c 'import shutil; found = [name for name in ("cc", "gcc", "g++", "c++", "clang", "nvcc", "ninja") if shutil.which(name)]; assert not found, found'
PATH="$work/empty/bin" CC=false CXX=false pip install -q --only-binary :all: "$work"/dist/*.whl
bare python -m quantkern
bare python - "$version" "$work/clone" <<'PY'
import sys

import torch

import quantkern

version, clone = sys.argv[1:]
assert quantkern.__version__ == version, quantkern.__version__
assert "site-packages" in quantkern.__file__ and not quantkern.__file__.startswith(clone), quantkern.__file__


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 3))


rules = [
    {"quant_types": ["weight", "input"], "quant_bits": 8, "op_types": ["Conv2d", "Linear"]},
    {"quant_types": ["output"], "quant_bits": 8, "op_types": ["ReLU"]},
]
model = network()
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
quantizer = quantkern.QAT_Quantizer(model, rules, optimizer)
x, y = torch.randn(32, 1, 8, 8), torch.arange(32) % 3
losses = []
for _ in range(20):
    optimizer.zero_grad()
    loss = torch.nn.functional.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert losses[-1] < losses[0], losses
expected = model.eval()(x)
quantizer.export_model("model.pth", "calibration.pth")
again = network()
again.load_state_dict(torch.load("model.pth", weights_only=True))
quantkern.QAT_Quantizer(again, rules).load_calibration_config(torch.load("calibration.pth", weights_only=True))
assert torch.equal(again.eval()(x), expected), "the reloaded model gives other numbers"
print(f"trained {losses[0]:.3f} -> {losses[-1]:.3f}, exported, loaded again with the same numbers")
PY

if [ -n "$dist" ]; then
  mkdir -p "$dist"
  cp "$work"/dist/* "$dist/"
fi
step "all green: quantkern $version"
