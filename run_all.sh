#!/usr/bin/env bash
# Everything, in order.
#
#   bash run_all.sh quick    the paper's central effects on a CPU: three students, their features, a ticket, their
#                            landscape (minutes)
#   bash run_all.sh test     the tests
#
# Either makes .venv and installs requirements.txt first, unless the active Python has the packages already.
# Arguments after `quick` go to distill.py: bash run_all.sh quick --seed 1 --steps 1000
set -euo pipefail
cd "$(dirname "$0")"

fail() { echo "run_all.sh: error: $1" >&2; exit "${2:-1}"; }

has_packages() {
    "$1" - 2>/dev/null <<'PYTHON'
from importlib.metadata import version
for package in ("torchvision", "numpy", "matplotlib", "pytest"):
    version(package)
assert tuple(map(int, version("torch").split(".")[:2])) >= (2, 4)
PYTHON
}

environment() {  # sets PY to a Python that has the packages
    for PY in python python3 .venv/bin/python; do
        has_packages "$PY" && return
    done
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || fail "Python 3.10 or newer is needed as python3"
    echo "making .venv and installing requirements.txt (a few minutes and GB, once)"
    python3 -m venv .venv || fail "python3 cannot make a virtual environment: install its venv module (Debian: python3-venv)"
    .venv/bin/python -m pip install --quiet -r requirements.txt || fail "pip could not install requirements.txt (see above); run this again"
    PY=.venv/bin/python
}

quick() {  # --resume: what is done is skipped, what was interrupted goes on
    local student="$PY distill.py --arch resnet20 --out-dim 1024 --batch-size 128 --steps 400 --eval-every 100 --resume"
    $student --dataset leaves --init-eps 0 --out runs/quick/eps0 "$@"
    $student --dataset leaves --init-eps inf --out runs/quick/epsinf "$@"
    $student --dataset noise --n-samples 10000 --probe-dataset leaves --init-eps 0 --out runs/quick/noise "$@"
    local probed=runs/quick/summary.json
    for run in eps0 epsinf noise; do [ "$probed" -nt "runs/quick/$run/last.pt" ] || probed=; done
    if [ -n "$probed" ] && [ -e figures/quick.png ]; then
        cat runs/quick/table.txt
    else
        $PY probe.py runs/quick/eps0 runs/quick/epsinf runs/quick/noise --dataset leaves \
            --json runs/quick/summary.json --figure figures/quick.png | tee runs/quick/table.txt
    fi
    # Lottery tickets in miniature: the student, its random teacher, and the student under random masks
    local ticket="$PY prune.py runs/quick/eps0 --n-samples 1750 --epochs 4 --batch-size 64 --rate 0.65 --rounds 2 --resume"
    $ticket
    $ticket --init random
    $ticket --control random
    $PY prune.py plot runs/quick/eps0 --figure figures/quick_tickets.png
    # The landscape in miniature: a plane through the teacher and two students, and lines between fine-tuned copies
    local plane=runs/quick/eps0/plane-shared-epsinf.npz connect=runs/quick/eps0/connect/connect.npz
    $PY landscape.py plane runs/quick/eps0 runs/quick/epsinf --grid 13 --n-samples 200 --n-test 200 --resume
    $PY landscape.py plot $plane --figure figures/quick_plane.png
    $PY landscape.py connect runs/quick/eps0 --copies 3 --n-samples 1000 --epochs 6 --batch-size 64 --points 5 --n-test 500 --resume
    $PY landscape.py plot $connect --figure figures/quick_connect.png
    echo "the numbers: runs/quick/summary.json, runs/quick/eps0/prune-*/log.csv, runs/quick/eps0/{$(basename $plane),connect/connect.npz}"
    echo "the pictures: figures/quick*.png"
}

case "${1:-}" in
    quick) environment; quick "${@:2}" ;;
    test)  environment; "$PY" -m pytest -q test_smoke.py "${@:2}" ;;
    *)     sed -n '3,10s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
