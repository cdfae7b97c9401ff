"""The script that made timing.txt and the kernels' times of the lab book's section 12, as it ran at commit dbdfc71:

    PYTHONPATH=. python results/gpu/timing.py auto DIR_FOR_PROFILES
"""
import sys

import torch
from torch.profiler import ProfilerActivity, profile

from distill import (
    LOSSES, channel_stats, embed, init_student, normalise, pick_device, random_network, train)

device = pick_device(sys.argv[1])
n, batch = (50_000, 256) if device.type == "cuda" else (512, 16)
images = torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8, device=device)
stats = channel_stats(images)
print(torch.cuda.get_device_name() if device.type == "cuda" else "cpu", torch.__version__)

for arch, amp, tf32 in (
        ("resnet18", "bf16", 0), ("vgg11", "off", 0), ("vgg11", "off", 1), ("vgg11", "bf16", 0),
        ("resnet20", "bf16", 0), ("resnet20", "off", 0), ("resnet18", "fp16", 0),
        ("resnet18", "off", 0)):
    torch.backends.cudnn.allow_tf32 = bool(tf32)  # in convolutions alone, as torch has it
    teacher = random_network(0, arch, 2**16).requires_grad_(False).eval().to(device)
    student = init_student(teacher, random_network(1, arch, 2**16).to(device), 1e-10).train()
    vectors = torch.randn(n, 256, device=device)
    vectors /= vectors.norm(dim=1, keepdim=True)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, weight_decay=0, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
    marks = []  # of each step, five events

    def mark():
        if device.type == "cuda":
            marks[-1].append(torch.cuda.Event(enable_timing=True))
            marks[-1][-1].record()

    def batch_loss(index, step):
        marks.append([])
        mark()
        x = normalise(images[index], stats)
        with torch.no_grad():
            teacher_logits = teacher.last_layer(vectors[index])
        mark()
        e = embed(student.encoder, x, amp)
        mark()
        logits = student.last_layer(student.projector(e))
        loss = LOSSES["kl"](teacher_logits, logits)
        mark()
        return loss

    warm, timed = (30, 100) if device.type == "cuda" else (1, 2)
    for step, loss in train(batch_loss, n, optimizer, scaler, lambda step: 1e-3,
                            steps=warm + timed, batch_size=batch, seed=0):
        mark()
    if device.type != "cuda":
        print(arch, amp, float(loss))
        continue
    torch.cuda.synchronize()
    last = marks[-timed:]
    parts = [sum(m[i].elapsed_time(m[i + 1]) for m in last) / timed for i in range(4)]
    total = last[0][0].elapsed_time(last[-1][-1]) / timed
    print(f"{arch:9} {amp:5} {'tf32' if tf32 else '':5} {total:7.2f} ms a step, "
          f"{196 * total / 1e3:6.2f} s an epoch; images, teacher's logits {parts[0]:.2f}, encoder "
          f"forward {parts[1]:.2f}, projector, last layer, KL {parts[2]:.2f}, backward and AdamW "
          f"{parts[3]:.2f}; peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB", flush=True)
    torch.cuda.reset_peak_memory_stats()
    if (amp, tf32) in (("bf16", 0), ("off", 0)):
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as prof:
            for _ in train(batch_loss, n, optimizer, scaler, lambda step: 1e-3, steps=5,
                           batch_size=batch, seed=0):
                pass
            torch.cuda.synchronize()
        with open(f"{sys.argv[2]}/profile-{arch}-{amp}.txt", "w") as file:
            file.write(prof.key_averages().table(
                sort_by="self_cuda_time_total", row_limit=25, max_name_column_width=80))
