#!/usr/bin/env bash
# Everything, in order. Commands, and then the variables they listen to:
#   bash run_all.sh quick [ARGS]   the central effects on a CPU, no download, minutes; a first call's ARGS go to distill.py
#   bash run_all.sh mini           Fig. 3, a transfer of Table 2 and VGG's plateau at a CPU's size (hours)
#   bash run_all.sh [full]         the whole paper on the GPUs of this machine; ends with results/REPORT.md
#   bash run_all.sh list [X]       its jobs, one command a line (X: stage 1 or 2, or mini); data: makes its data sets
#   bash run_all.sh report [DIR]   every table and figure, from whatever is under runs/ (or DIR)
#   bash run_all.sh test [ARGS]    the tests; ARGS go to pytest
#   SEEDS="0 1"                    these seeds alone, in place of 0 1 2 (Fig. 8: of 0 1 2 3 4)
#   CIFAR10=X, TINYIMAGENET=X      other data sets in place of the downloads; DATA_MIRROR=URL: where archives are
#   TOY=X                          a rehearsal under runs/toy: every job for two steps on the few images of data set X
#   JOBS=N, ON_CPU=1               so many jobs at once (default: one a GPU); full without a GPU
set -euo pipefail; cd "$(dirname "$0")"
export MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=-1  # glibc keeps a batch's logits, 67 MB, for the next
fail() { echo "run_all.sh: error: $1" >&2; exit "${2:-1}"; }

environment() {  # sets PY to a Python with the packages: the active one, or else that of .venv, made if need be
    local test='import sys, matplotlib, numpy, pytest, torch, torchvision
assert sys.version_info >= (3, 10) and torch.__version__ >= (2, 4)'
    for PY in python python3 .venv/bin/python; do "$PY" -c "$test" 2>/dev/null && return; done
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || fail "Python 3.10 or newer is needed as python3"
    echo "making .venv and installing requirements.txt (a few minutes and GB, once)"
    python3 -m venv .venv || fail "python3 makes no virtual environment: install its venv module (Debian: python3-venv)"
    "$PY" -m pip install --quiet -r requirements.txt || fail "pip could not install requirements.txt; run this again"
}
quick() {  # what is done is skipped, what was interrupted goes on, and a student that went on is probed again
    local student="$PY distill.py --arch resnet20 --out-dim 1024 --batch-size 128 --steps 400 --eval-every 100 --resume"
    local out=runs/quick start run; made leaves leaves
    $student --dataset leaves --init-eps 0 --out $out/eps0 "$@"
    $student --dataset leaves --init-eps inf --out $out/epsinf "$@"
    $student --dataset noise --n-samples 10000 --probe-dataset leaves --init-eps 0 --out $out/noise "$@"
    for run in eps0 epsinf noise; do [ $out/summary.json -nt $out/$run/last.pt ] || rm -f $out/summary.json; done
    [ -e $out/summary.json ] || $PY probe.py $out/{eps0,epsinf,noise} --json $out/summary.json
    $PY -m results.figures runs --only quick.png --figures figures
    for start in "" "--init teacher" "--control random"; do  # lottery tickets: student, teacher, student under random masks
        $PY prune.py $out/eps0 --n-samples 1000 --epochs 3 --batch-size 50 --rate 0.65 --rounds 2 --resume $start; done
    $PY prune.py plot $out/eps0 --figure figures/quick_tickets.png
    # The landscape in miniature: a plane through teacher and students, and lines between fine-tuned copies
    $PY landscape.py plane $out/eps0 $out/epsinf --grid 11 --n-samples 200 --n-test 200 --resume
    $PY landscape.py plot $out/eps0/plane-shared-epsinf.npz --figure figures/quick_plane.png
    $PY landscape.py connect $out/eps0 --copies 3 --n-samples 1000 --epochs 3 --batch-size 50 --points 5 --n-test 500 \
        --resume
    $PY landscape.py plot $out/eps0/connect/connect.npz --figure figures/quick_connect.png
    echo "the numbers: $out/summary.json; in $out/eps0, prune-*/log.csv and *.npz; the pictures: figures/quick*.png"
}

# ---- The jobs: self-contained commands, in two stages; `report` knows their outputs by name --------------------------
CIFAR5M="100000 200000 750000 1000000 5000000" TOY=${TOY:-} OUT=runs${TOY:+/toy}/paper few="--batch-size 16 --device cpu"
if [ -n "${SEEDS:-}" ]; then MORE_SEEDS=; else SEEDS="0 1 2" MORE_SEEDS="3 4"; fi
ARCHS="vgg11 vgg13 vgg16 vgg19 resnet20 resnet56 resnet18 resnet34 resnet50 vit-tiny vit-small vit-medium vit-base"
printf -v cifar10 %q "${TOY:-${CIFAR10:-cifar10}}"; printf -v tinyimagenet %q "${TOY:-${TINYIMAGENET:-tinyimagenet}}"
for name in cifar100 stl10; do printf -v $name %q "${TOY:-$name}"; done; noise=noise
job() { echo "python $*  # stage $STAGE"; }  # a rehearsal adds ${TOY:+...}: of an option given twice the last counts
distil() {  # NAME, ARCH, DATA SET, OPTIONS: a student of each seed
    local seed; for seed in $SEEDS; do job distill.py --resume ${TOY:+--out-dim 64} --arch $2 --seed $seed \
        --dataset ${!3} ${*:4} ${TOY:+--n-samples 32 --steps 2 --eval-every 2 $few} --out $OUT/$1-seed$seed; done
}
probe() { job probe.py --draws 100 ${*:3} ${TOY:+--draws 2} --dataset ${!2} --json $OUT/$1.json; }  # likewise
plane() { job landscape.py plane $2 --grid 41 ${TOY:+--grid 3 --n-samples 32 --n-test 16} --resume --out $OUT/$1.npz; }
near() { case $1 in resnet*) echo 0 ;; *) echo 1e-10 ;; esac; }  # without batch norm ε = 0 is a fixed point
stage1() {
    # Tables 1, 3 and 5: raw pixels, random teachers (ViTs with patches of 8 pixels, too), students
    probe teachers-cifar10 cifar10 --teacher $ARCHS vit-{tiny,small,medium,base}-p8 --seeds $SEEDS
    for arch in $ARCHS; do distil cifar10-$arch $arch cifar10 --init-eps $(near $arch); done
    SEEDS=$MORE_SEEDS distil cifar10-resnet18 resnet18 cifar10 --init-eps 0  # Fig. 8 has five
    for dataset in cifar100 stl10 tinyimagenet; do
        probe teachers-$dataset $dataset --teacher resnet18 vgg11 --seeds $SEEDS
        for arch in resnet18 vgg11; do distil $dataset-$arch $arch $dataset --init-eps $(near $arch); done; done
    # Fig. 1 and 3: 150 epochs, from the teacher (α = 0) to an independent start (α = 1)
    for arch in resnet18 vgg11; do for eps in $(near $arch) 0.1 0.5 1.5 4 inf; do
        distil fig3-$arch-eps$eps $arch cifar10 --epochs 150 --init-eps $eps; done; done
    # Fig. 4: n images (50,000 are Table 5's VGG11, more are CIFAR-5M's) or Gaussian noise, for as many steps
    steps="--steps 19600 --init-eps 1e-10" probed="--probe-dataset $cifar10"
    for n in 500 1000 2000 5000 10000 15000; do distil fig4-n$n vgg11 cifar10 --n-samples $n $steps; done
    for n in $CIFAR5M; do printf -v cifar5m %q "${TOY:-cifar5m-$n}"; distil fig4-n$n vgg11 cifar5m $probed $steps; done
    for n in 500 5000 50000 150000; do distil fig4-noise$n vgg11 noise $probed --n-samples $n $steps; done
    # Fig. 5, 13 to 17: the released code's last layer, its rows not normalised; a way past the README's plateau
    for eps in 1e-10 inf; do how="vgg11 cifar10 --init-eps $eps --l2-bottleneck lf/l"
        distil raw-vgg11-eps$eps $how; distil raw-lr3e-4-vgg11-eps$eps $how --lr 3e-4; done
    distil raw-resnet18-eps0 resnet18 cifar10 --l2-bottleneck lf/l --init-eps 0; distil loss-mse resnet18 cifar10 --loss mse
    # Fig. 10 (m = 65,536 is the student of Table 1), 11 and 12 (lf/wl is, too; lf/l is above)
    for m in 1 4 16 64 256 1024 4096 16384; do distil fig10-m$m resnet18 cifar10 --out-dim $m; done
    for norm in instance group layer none; do distil fig11-$norm resnet18 cifar10 --norm $norm --init-eps 1e-10; done
    for parts in l/wl l/l f/wl lf/; do distil fig12-${parts/\//-} resnet18 cifar10 --l2-bottleneck $parts; done
}
stage2() {  # with the students of stage 1. First Tables 2 and 4: transfer
    for arch in resnet18 vgg11; do for dataset in cifar10 cifar100 stl10; do
        probe transfer-$dataset-$arch $dataset $(printf "$OUT/tinyimagenet-$arch-seed%s/best.pt " $SEEDS); done; done
    # Fig. 8: 25 trainings of 160 epochs a curve. Fig. 9: ten copies and 20 lines
    for seed in $SEEDS $MORE_SEEDS; do for start in "" "--init teacher --rewind-epoch "{0,1,2,5}; do
        job prune.py $OUT/cifar10-resnet18-seed$seed --resume $start --dataset $cifar10 \
            ${TOY:+--rounds 1 --rate 0.5 --epochs 6 --n-samples 16 $few}; done; done
    for seed in $SEEDS; do job landscape.py connect $OUT/cifar10-resnet18-seed$seed/best.pt --resume --dataset $cifar10 \
        ${TOY:+--copies 2 --points 3 --epochs 1 $few}; done
    # Fig. 5 and 13 to 16: planes, wide and around the teacher, of whole networks and of encoders
    near=$OUT/raw-vgg11-eps1e-10-seed${SEEDS%% *} far=$OUT/raw-vgg11-epsinf-seed${SEEDS%% *}
    around="--encoder-only --axes barycentric --x -0.2 0.2 --y -0.2 0.2"
    plane fig5-non-local "$far"; plane fig5-shared "$near $far"
    plane fig13-encoder-non-local "$far --encoder-only"; plane fig14-encoder-non-local-zoom "$far $around"
    plane fig15-encoder-shared "$near $far --encoder-only"; plane fig16-encoder-shared-zoom "$near $far $around"
    # Fig. 18: a second round, with the student as teacher
    for arch in resnet18 vgg11; do for seed in $SEEDS; do SEEDS=$seed distil fig18-$arch $arch cifar10 \
        --init-eps $(near $arch) --teacher $OUT/cifar10-$arch-seed$seed; done; done
}
mini() {  # what two CPU cores can do
    OUT=${OUT/paper/mini} how="--out-dim 1024 --batch-size 128 --steps 1600 --eval-every 1600"
    for eps in 0 0.1 0.5 1.5 4 inf; do distil fig3-eps$eps resnet20 cifar10 $how --n-samples 10000 --init-eps $eps; done
    distil transfer resnet20 tinyimagenet $how --probe-dataset $cifar10
    SEEDS=0 distil resnet20 resnet20 cifar10 --out-dim 1024 --epochs 6 --eval-every 588
    how+=" --n-samples 10000 --eval-every 800 --log-every 40 --amp off --init-eps 1e-10"
    for lr in 1e-3 3e-4; do for parts in lf/wl lf/l; do  # the README's plateau
        SEEDS=0 distil plateau-${parts/\//-}-lr$lr vgg11 cifar10 $how --l2-bottleneck $parts --lr $lr; done; done
}
list() (  # [1 | 2 | mini]; in a shell of its own, for its variables and -f: no word of a command is a pattern
    set -f; case ${1:-} in "") list 1; list 2 ;; 1 | 2) STAGE=$1 stage$1 ;; mini) STAGE=1 mini ;;
        *) fail "list knows the stages 1 and 2, and mini" 2 ;; esac)
made() { [ -e "data/$1.npz" ] || "$PY" "datasets/$2.py" "${@:3}"; }  # NAME, SCRIPT, ARGS: the data set NAME is there
fetch() {  # DATA SETS: each is there before jobs load it side by side
    case " $* " in *" tinyimagenet "*) made tinyimagenet tinyimagenet ;; esac
    "$PY" -c 'import sys, distill; [distill.load_data(name) for name in sys.argv[1:]]' "$@"
}
data() {
    [ -z "$TOY" ] || return 0; local n
    [ -e data/cifar5m-5000000.npz ] || compgen -G "data/cifar5m/*.npz" >/dev/null || fail "five sizes of Fig. 4 need CIFAR-5M: put its .npz files into \
data/cifar5m/ by hand (https://github.com/preetum/cifar5m), or run the other lines of \`list\` yourself"
    fetch "${CIFAR10:-cifar10}" cifar100 stl10 "${TINYIMAGENET:-tinyimagenet}"
    for n in $CIFAR5M; do made cifar5m-$n cifar5m $n; done
}
gpu() {  # there is one, or none is needed
    [ -n "$TOY" ] || [ "${ON_CPU:-}" = 1 ] || "$PY" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
        fail "no GPU. On two CPU cores a ResNet18's distillation takes 8 hours, a curve of Fig. 8 13 days (measured, bf16),
the $(list | wc -l) jobs over a year, and 170 GB for checkpoints. A CPU can do \`bash run_all.sh quick\` (minutes) and \`mini\`
(hours); \`ON_CPU=1 bash run_all.sh\` starts all the same"
}
run_job() {  # LINE, SLOT: one job on one GPU, its output in a file; one that ends well is noted in $LOGS/done
    local gpus=($GPUS) out=${1%  #*} word log; out=${out##*--out }; out=${out##*--json }; log=${out//[^a-zA-Z0-9.-]/_}
    export CUDA_VISIBLE_DEVICES=${gpus[$2 % ${#gpus[@]}]}
    # probe.py has no --resume: it measures again if the job, or a file that it names, has changed
    for word in $1; do [[ $out != *.json || ! $word -nt $out ]] || rm -f "$out"; done
    if [[ $out == *.json ]] && ! grep -qsxF -- "$1" $LOGS/probed; then rm -f "$out"; fi
    if [[ $out == *.json && -e $out ]] || bash -c "${1/#python/$PY}" >>"$LOGS/$log.log" 2>&1; then
        echo "$1" | tee -a $LOGS/probed >>$LOGS/done; echo "done    $log"
    else echo "FAILED  $log: $(tail -n 1 "$LOGS/$log.log")"; fi
}
run() {  # STAGES: all their jobs, one a GPU or $JOBS at once; then the report; names what failed or was killed
    local stage line slot pids=()
    GPUS=${CUDA_VISIBLE_DEVICES:-$("$PY" -c 'import torch; print(*range(torch.cuda.device_count()) or [-1])')}  # -1: none
    LOGS=runs${TOY:+/toy}/logs GPUS=${GPUS//,/ } JOBS=${JOBS:-$(wc -w <<<"${GPUS//,/ }")}; mkdir -p $LOGS; : >$LOGS/failed
    for stage in "$@"; do  # stage 2 does not begin without a student that it wants
        [ ! -s $LOGS/failed ] || ! list "$stage" | grep -Ff <(sed 's/.*--out \([^ ]*\).*/\1/' $LOGS/failed) >/dev/null || break
        echo "$(list "$stage" | wc -l) jobs of stage $stage, $JOBS at once; their output: $LOGS/"; : >$LOGS/done
        while IFS= read -r line; do for ((slot = 0; ; slot++)); do  # the first whose job has ended, or was never begun
            if [ $slot -eq "$JOBS" ]; then wait -n 2>/dev/null || sleep 1; slot=0; fi
            kill -0 "${pids[slot]:-x}" 2>/dev/null || break; done
            run_job "$line" $slot </dev/null & pids[slot]=$!; done < <(list "$stage"); wait
        list "$stage" | grep -vxFf $LOGS/done >>$LOGS/failed || true; done
    (report) || echo "${TOY:+TOY=$TOY }bash run_all.sh report" >>$LOGS/failed
    [ ! -s $LOGS/failed ] || fail "$(wc -l <$LOGS/failed) jobs did not end well; run this again, or them: $LOGS/failed"
}
plot() { [ $# -lt 3 ] || "$PY" $1 plot --figure $figures/$2.png "${@:3}" || true; }  # SCRIPT, NAME, FILES
report() {  # [DIR with paper/ or mini/ in it]; a picture that cannot be drawn says why and stops no other
    local root=${1:-runs${TOY:+/toy}} to=${TOY:+runs/toy/} file; local figures=${to}figures/report
    [ -d "$root/paper" ] || [ -d "$root/mini" ] || fail "$root holds neither paper/ nor mini/: run jobs of \`list\`"
    rm -f $figures/*.png; shopt -s nullglob  # another report's, also ours, which git keeps; no file, no word
    set -- "$root"/paper/cifar10-resnet18-seed*/prune-*/config.json
    plot prune.py fig8 "${@%/config.json}"
    for file in "$root"/paper/*/connect/connect.npz; do
        file=${file%/connect/*}; plot landscape.py "fig9-${file##*-}" "$file/connect/connect.npz"; done
    for file in "$root"/paper/fig{5,13,14,15,16}-*.npz; do plot landscape.py "$(basename "$file" .npz)" "$file"; done
    "$PY" -m results.figures "$root" --figures $figures || true
    "$PY" -m results.report "$root" --out ${to:-results/}REPORT.md --figures $figures
}
case ${1:-full} in
    full)   environment; gpu; data; run 1 2 ;;
    mini)   environment; [ -n "$TOY" ] || fetch "${CIFAR10:-cifar10}" "${TINYIMAGENET:-tinyimagenet}"; run mini ;;
    quick | data | report) environment; "$@" ;;
    test)   environment; "$PY" -m pytest -q test_smoke.py "${@:2}" ;;
    list)   "$@" ;;
    *)      sed -n '2,12s/^# \{0,1\}//p' run_all.sh >&2; exit 2 ;;
esac
