"""Let a run go on with another learning rate or weight decay: results/README.md, "The best comes
early".

    PYTHONPATH=. python results/why/branch.py RUN NEW_RUN LR WEIGHT_DECAY
    python distill.py ... --lr LR --out NEW_RUN --steps N --resume

NEW_RUN begins as a copy of RUN, Adam's moments included. The decay is AdamW's: a step multiplies
every weight by 1 - LR·WEIGHT_DECAY.
"""
import sys
from pathlib import Path

from distill import read_checkpoint, save

run, new_run, lr, weight_decay = sys.argv[1:]
checkpoint = read_checkpoint(Path(run))
changed = {"lr": float(lr), "weight_decay": float(weight_decay)}
checkpoint["config"] |= changed
checkpoint["optimizer"]["param_groups"][0] |= changed
save(Path(new_run) / "last.pt", checkpoint)
