#!/usr/bin/env bash
# Everything, in order.
#
#   bash run_all.sh            the whole paper on the GPUs of this machine (two weeks of one); ends with results/REPORT.md
#   bash run_all.sh list       its jobs, one command a line, in stages 1 and 2; `list 1` and `list 2`: those of one stage
#   bash run_all.sh report     every table and figure, from whatever is under runs/ (or another directory: report DIRECTORY)
#   bash run_all.sh quick      the central effects on a CPU, without a download: students, a ticket, a landscape (minutes)
#   bash run_all.sh mini       Fig. 3 and the transfer of Table 2 at a CPU's size (hours); `list mini`: its jobs
#   bash run_all.sh test       the tests
#
# All but `list` make .venv and install requirements.txt first, unless the active Python has the packages already.
# Arguments after `quick` go to distill.py: bash run_all.sh quick --seed 1 --steps 1000
# The whole paper and mini listen to these variables:
#   SEEDS="0 1 2"              fewer seeds, fewer jobs (pruning curves then use those, too, not five)
#   JOBS=N                     so many jobs at once (default: one a GPU)
#   CIFAR10=FOLDER, TINYIMAGENET=FOLDER    images in a folder in place of the download
#   TOY=FOLDER                 a rehearsal: every job for two steps on the few images of this folder
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
        rm -f runs/quick/summary.json
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

# ---- The jobs of the whole paper: a self-contained command a line; the names of their directories are what `report` reads

OUT=runs/paper
[ -n "${SEEDS:-}" ] && MORE_SEEDS= || { SEEDS="0 1 2" MORE_SEEDS="3 4"; }  # Fig. 8 has five checkpoints
CIFAR10=${CIFAR10:-cifar10} TINYIMAGENET=${TINYIMAGENET:-tinyimagenet}
VIT="vit-tiny vit-small vit-medium vit-base"
ARCHS="vgg11 vgg13 vgg16 vgg19 resnet20 resnet56 resnet18 resnet34 resnet50 $VIT"

minutes() {  # ARCH, thousands of images it trains on -> minutes, guessed: 20 TFLOP/s in 16 bits, 8 in float32; 10 ms a step
    local encoder=30 rate=8  # million multiply-adds an image, TFLOP/s
    case $1 in
        vgg11) encoder=153;; vgg13) encoder=229;; vgg16) encoder=314;; vgg19) encoder=399;; resnet20) encoder=41;;
        resnet56) encoder=126;; resnet18) encoder=556;; resnet34) encoder=1160;; resnet50) encoder=1300;;
        vit-small) encoder=105;; vit-medium) encoder=185;; vit-base) encoder=420;;
    esac
    case $1 in resnet*) rate=20;; esac
    local work=$(((encoder * 6 + 170) * $2 / rate / 1000)) wait=$(($2 * 10 / 256))  # seconds; 170: the projector, both networks' logits
    echo $(((work > wait ? work : wait) / 60 + 1))
}

job() { echo "$2  # stage $1, $3 min"; }  # STAGE, COMMAND, minutes

near() { case "$1" in resnet*) echo 0;; *) echo 1e-10;; esac; }  # without batch norm ε = 0 is a fixed point

distil() {  # NAME, ARCH, thousands of images, OPTIONS: a job for each seed
    for seed in $SEEDS; do
        job "${STAGE:-1}" "python distill.py --resume --arch $2 --seed $seed $4 --out $OUT/$1-seed$seed" $(($(minutes "$2" "$3") + 3))
    done
}

images_of() { case "$1" in cifar10) echo "$CIFAR10";; tinyimagenet) echo "$TINYIMAGENET";; *) echo "$1";; esac; }

runs_of() { for seed in $SEEDS; do printf ' %s' "$OUT/$1-seed$seed"; done; }

paper() {
    local arch dataset eps m n seed run images
    local probe="python probe.py --resume" count; count=$(wc -w <<<"$SEEDS")  # seeds

    # Tables 1, 3 and 5: raw pixels and random teachers; ViTs with patches of 8 pixels, too
    job 1 "$probe --teacher $ARCHS ${VIT// /-p8 }-p8 --seeds $SEEDS --dataset $CIFAR10 --json $OUT/teachers-cifar10.json" $((12 * count))
    for dataset in cifar100 stl10 tinyimagenet; do
        job 1 "$probe --teacher resnet18 vgg11 --seeds $SEEDS --dataset $(images_of $dataset) --json $OUT/teachers-$dataset.json" $((4 * count))
    done
    # Tables 1, 3 and 5: students
    for arch in $ARCHS; do distil "cifar10-$arch" "$arch" 5000 "--dataset $CIFAR10 --init-eps $(near "$arch")"; done
    for arch in resnet18 vgg11; do
        distil "cifar100-$arch" $arch 5000 "--dataset cifar100 --init-eps $(near $arch)"
        distil "stl10-$arch" $arch 500 "--dataset stl10 --init-eps $(near $arch)"
        distil "tinyimagenet-$arch" $arch 10000 "--dataset $TINYIMAGENET --init-eps $(near $arch)"
    done
    SEEDS=$MORE_SEEDS distil cifar10-resnet18 resnet18 5000 "--dataset $CIFAR10 --init-eps 0"
    # Fig. 1 and 3: 150 epochs, from the teacher (α = 0) to an independent start (α = 1)
    for arch in resnet18 vgg11; do for eps in $(near $arch) 0.1 0.5 1.5 4 inf; do
        distil "fig3-$arch-eps$eps" $arch 7500 "--dataset $CIFAR10 --epochs 150 --init-eps $eps"
    done; done
    # Fig. 4: n images, always as many steps as 100 epochs of 50,000 have (which are those of Table 5's VGG11); beyond them with
    # CIFAR-5M; Gaussian noise
    for n in 500 1000 2000 5000 10000 15000 100000 200000 750000 1000000 5000000; do
        [ $n -le 50000 ] && images="$CIFAR10" || images="cifar5m --probe-dataset $CIFAR10"
        distil "fig4-n$n" vgg11 5000 "--dataset $images --n-samples $n --epochs 10000 --steps 19600 --init-eps 1e-10"
    done
    for n in 500 5000 50000 150000; do
        distil "fig4-noise$n" vgg11 5000 "--dataset noise --probe-dataset $CIFAR10 --n-samples $n --epochs 10000 --steps 19600 --init-eps 1e-10"
    done
    # Fig. 5, 13 to 17: the released code's last layer, whose rows are not normalised
    for eps in 1e-10 inf; do distil "raw-vgg11-eps$eps" vgg11 5000 "--dataset $CIFAR10 --bottleneck lf/l --init-eps $eps"; done
    distil raw-resnet18-eps0 resnet18 5000 "--dataset $CIFAR10 --bottleneck lf/l --init-eps 0"
    # Fig. 10 (m = 65,536 is the student of Table 1), 11 and 12 (lf/wl is, too; lf/l is above), and other losses and optimisers
    for m in 1 4 16 64 256 1024 4096 16384; do
        distil "fig10-m$m" resnet18 5000 "--dataset $CIFAR10 --out-dim $m"
    done
    for norm in instance group layer none; do
        distil "fig11-$norm" resnet18 5000 "--dataset $CIFAR10 --norm $norm --init-eps 1e-10"
    done
    for parts in l/wl l/l f/wl lf/; do
        distil "fig12-${parts/\//-}" resnet18 5000 "--dataset $CIFAR10 --bottleneck $parts"
    done
    distil loss-mse resnet18 5000 "--dataset $CIFAR10 --loss mse"
    distil optimizer-sgd resnet18 5000 "--dataset $CIFAR10 --optimizer sgd --lr 1"

    # Stage 2 wants the students of stage 1. Tables 2 and 4: transfer
    for arch in resnet18 vgg11; do for dataset in cifar10 cifar100 stl10; do
        job 2 "$probe$(runs_of "tinyimagenet-$arch") --dataset $(images_of $dataset) --json $OUT/transfer-$dataset-$arch.json" $((4 * count))
    done; done
    # Fig. 8: 25 trainings of 160 epochs a curve. Fig. 9: ten copies and 20 lines
    for seed in $SEEDS $MORE_SEEDS; do
        run=$OUT/cifar10-resnet18-seed$seed
        job 2 "python prune.py $run --dataset $CIFAR10 --resume" "$(minutes resnet18 200000)"
        for epoch in 0 1 2 5; do
            job 2 "python prune.py $run --dataset $CIFAR10 --init random --rewind-epoch $epoch --resume" "$(minutes resnet18 200000)"
        done
    done
    for seed in $SEEDS; do
        job 2 "python landscape.py connect $OUT/cifar10-resnet18-seed$seed --dataset $CIFAR10 --resume" "$(minutes resnet18 85000)"
    done
    # Fig. 5 and 13 to 16: planes, wide and around the teacher, of whole networks and of encoders
    local near_run=$OUT/raw-vgg11-eps1e-10-seed${SEEDS%% *} far_run=$OUT/raw-vgg11-epsinf-seed${SEEDS%% *} around="--axes barycentric --x -0.2 0.2 --y -0.2 0.2"
    plane() { job 2 "python landscape.py plane $2 --grid 41 --resume --out $OUT/$1.npz" 30; }
    plane fig5-non-local "$far_run"
    plane fig5-shared "$near_run $far_run"
    plane fig13-encoder-non-local "$far_run --encoder-only"
    plane fig14-encoder-non-local-zoom "$far_run --encoder-only $around"
    plane fig15-encoder-shared "$near_run $far_run --encoder-only"
    plane fig16-encoder-shared-zoom "$near_run $far_run --encoder-only $around"
    # Fig. 18: a second round, with the student as teacher
    for arch in resnet18 vgg11; do for seed in $SEEDS; do
        STAGE=2 SEEDS=$seed distil "fig18-$arch" $arch 5000 "--dataset $CIFAR10 --init-eps $(near $arch) --teacher $OUT/cifar10-$arch-seed$seed"
    done; done
}

mini() {  # what two CPU cores can do: minutes are theirs
    local OUT=runs/mini eps seed student="python distill.py --resume --arch resnet20 --out-dim 1024 --batch-size 128 --steps 1600 --eval-every 1600"
    for eps in 0 0.1 0.5 1.5 4 inf; do for seed in $SEEDS; do
        job 1 "$student --dataset $CIFAR10 --n-samples 10000 --init-eps $eps --seed $seed --out $OUT/fig3-eps$eps-seed$seed" 4
    done; done
    for seed in $SEEDS; do
        job 1 "$student --dataset $TINYIMAGENET --probe-dataset $CIFAR10 --seed $seed --out $OUT/transfer-seed$seed" 4
    done
    job 1 "python distill.py --resume --arch resnet20 --dataset $CIFAR10 --out-dim 1024 --epochs 6 --eval-every 588 --out $OUT/resnet20-seed0" 6
}

list() {  # [1 | 2 | mini]
    local jobs; case "${1:-}" in
        "") jobs=$(paper);; 1 | 2) jobs=$(paper | grep "# stage $1,");; mini) jobs=$(mini);;
        *) fail "list knows the stages 1 and 2, and mini" 2;;
    esac
    if [ -n "${TOY:-}" ]; then
        local few="--batch-size 16 --device cpu" images="(cifar10|cifar100|stl10|tinyimagenet|cifar5m|$CIFAR10|$TINYIMAGENET)"
        jobs=$(sed -E -e "s#--(probe-)?dataset $images( |\$)#--\1dataset $TOY #g" -e 's#runs/(paper|mini)#runs/toy/\1#g' \
            -e "s#^(python distill.py)(.*)  \##\1 --out-dim 64\2 --n-samples 32 --steps 2 --eval-every 2 $few  \##" \
            -e "s#^(python prune.py)(.*)  \##\1\2 --rounds 1 --rate 0.5 --epochs 6 --n-samples 16 $few  \##" \
            -e "s#^(python landscape.py connect)(.*)  \##\1\2 --copies 2 --points 3 --epochs 1 $few  \##" \
            -e "s#^(python landscape.py plane)(.*)  \##\1\2 --grid 3 --n-samples 32 --n-test 16  \##" <<<"$jobs")
    fi
    echo "$jobs"
}

run_job() {  # LINE: one job on one GPU, its output in a file; what fails is noted and the others go on
    local line=$1 name log; name=$(sed -E 's/ +#.*//; s/.*(--out|--json) //; s/[^a-zA-Z0-9.-]+/_/g' <<<"$1")
    [ ${#name} -le 150 ] || name=${name: -150}
    log=$LOGS/$name.log
    if [ -n "$GPUS" ]; then
        local gpus; IFS=, read -ra gpus <<<"$GPUS"
        export CUDA_VISIBLE_DEVICES=${gpus[$((SLOT % ${#gpus[@]}))]}
    fi
    if bash -c "${line/#python/$PY}" >>"$log" 2>&1; then echo "done    $name"; else
        echo "FAILED  $name: $(tail -n 1 "$log")"
        echo "$line" >>"$LOGS/failed"
    fi
}

run() {  # STAGES...: all their jobs, as many at once as there are GPUs
    xargs --version >/dev/null 2>&1 || fail "this needs GNU xargs: put the lines of \`bash run_all.sh list\` through another tool"
    export PY LOGS=runs/logs SLOT=0
    GPUS=${CUDA_VISIBLE_DEVICES:-$("$PY" -c 'import torch; print(*range(torch.cuda.device_count()), sep=",")')}; export GPUS
    local at_once; at_once=${JOBS:-$(tr ',' '\n' <<<"${GPUS:-cpu}" | wc -l)}
    mkdir -p $LOGS; rm -f $LOGS/failed
    for stage in "$@"; do
        echo "$(list "$stage" | wc -l) jobs of stage $stage, $at_once at once; their output: $LOGS/"
        list "$stage" | xargs -d '\n' -n 1 -P "$at_once" --process-slot-var=SLOT bash run_all.sh job
    done
}

report() {  # [DIRECTORY with paper/ and mini/ in it]; a picture that cannot be drawn says why and stops no other
    local root=${1:-runs} page=results/REPORT.md figures=figures/report curves=() lines=() run plane
    [ -z "${TOY:-}" ] || root=runs/toy page=runs/toy/REPORT.md figures=runs/toy/figures
    [ -d "$root/paper" ] || [ -d "$root/mini" ] || fail "$root holds neither paper/ nor mini/: do some jobs of \`bash run_all.sh list\` first"
    rm -f $figures/*fig*.png  # whatever another report has left
    for run in "$root"/paper/cifar10-resnet18-seed*; do
        compgen -G "$run/*/config.json" >/dev/null && curves+=("$run")
        [ ! -e "$run/connect/connect.npz" ] || lines+=("$run/connect/connect.npz")
    done
    [ ${#curves[@]} = 0 ] || "$PY" prune.py plot "${curves[@]}" --figure $figures/fig8.png || true
    [ ${#lines[@]} = 0 ] || "$PY" landscape.py plot "${lines[@]}" --figure $figures/fig9.png || true
    local fig5=("$root"/paper/fig5-*.npz)  # in the colours of the paper
    [ ! -e "${fig5[0]}" ] || "$PY" landscape.py plot "${fig5[@]}" --kl-range 1e-7 1e-3 --accuracy-range 10 50 --figure $figures/fig5.png || true
    for plane in "$root"/paper/fig1[3-6]-*.npz; do
        [ ! -e "$plane" ] || "$PY" landscape.py plot "$plane" --kl-range 1e-6 1 --figure "$figures/$(basename "$plane" .npz).png" || true
    done
    "$PY" -m results.report "$root" --out $page --figures $figures
}

finish() {  # the report, and what failed
    report
    [ ! -e runs/logs/failed ] || fail "$(wc -l <runs/logs/failed) jobs failed; run this again, or one by one: runs/logs/failed"
}

case "${1:-full}" in
    full)   environment; run 1 2; finish ;;
    list)   list "${2:-}" ;;
    job)    run_job "$2" ;;
    mini)   environment; run mini; finish ;;
    report) environment; report "${2:-}" ;;
    quick)  environment; quick "${@:2}" ;;
    test)   environment; "$PY" -m pytest -q test_smoke.py "${@:2}" ;;
    *)      sed -n '3,19s/^# \{0,1\}//p' run_all.sh >&2; exit 2 ;;
esac
