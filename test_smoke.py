"""Does it work? On the CPU and, where there is one, on the GPU: bash run_all.sh test"""

import copy
import csv
import hashlib
import http.server
import itertools
import json
import math
import os
import pickle
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image

import distill
import landscape
import probe
import prune
from distill import Problem, random_network
from results import report

REPO = Path(__file__).parent
CPU = torch.device("cpu")
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
FLOAT32 = "--device cpu --amp off"
SMALL = f"--arch resnet20 --image-size 16 --out-dim 64 --batch-size 16 {FLOAT32}"


def draw_images(root, size, train, test):
    """A folder of so many random images of each of three classes, one brighter than the other."""
    rng = np.random.default_rng(0)
    for part, count in (("train", train), ("test", test)):
        for brightness, name in enumerate(("ant", "bee", "cat")):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 100, (size, size, 3)) + 70 * brightness
                Image.fromarray(pixels.astype(np.uint8)).save(
                    root / part / name / f"{i}.png"
                )
    return root


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A folder of 60 + 24 images of 16 x 16 pixels."""
    return draw_images(tmp_path_factory.mktemp("images"), 16, 20, 8)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty directory to run in; main() leaves signals alone, and waits for no disk."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(os, "fsync", lambda file: None)
    return tmp_path


def run(folder, options, out="a"):
    """A small distillation in this process; its checkpoint."""
    distill.main(f"{SMALL} --dataset {folder} --out {out} {options}".split())
    return distill.read_checkpoint(Path(out))


def curve(out):
    """The rows of a log.csv, without times."""
    with open(Path(out) / "log.csv", newline="") as file:
        return [
            {**row, "seconds": 0, "images_per_s": 0} for row in csv.DictReader(file)
        ]


@contextmanager
def killed_at(call, module, name):
    """Inside, this call of a module's function, from 1, ends everything, as a kill would."""
    real, calls = getattr(module, name), itertools.count(1)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(
            module,
            name,
            lambda *args, **options: (
                real(*args, **options) if next(calls) != call else 1 / 0
            )
        )
        yield


def same(a, b):
    """Two state dicts equal to the last bit."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def cli(words, **options):
    """Run a script as a user does; the finished process with its stdout and stderr as text."""
    script, *words = words.split()
    return subprocess.run(
        [sys.executable, REPO / script, *words],
        capture_output=True,
        text=True,
        **options
    )


def one_line(done, *says):
    """The process ended with exit status 1 and one line on stderr that says all of `says`."""
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert all(text in done.stderr for text in says), done.stderr


def problem(main, words, *says):
    """The same in this process: `main` raises a Problem of one line that says all of `says`."""
    with pytest.raises(Problem) as caught:
        main(words.split())
    message = str(caught.value)
    assert "\n" not in message and all(text in message for text in says), message


def refused(folder, options, *says):
    problem(distill.main, f"{SMALL} --dataset {folder} {options}", *says)


# ---- Models --------------------------------------------------------------------------------------

PARAMETERS = {  # of the encoders (Table 5)
    "vgg11": 9_220_480,
    "vgg13": 9_404_992,
    "vgg16": 14_714_688,
    "vgg19": 20_024_384,
    "resnet18": 11_168_832,
    "resnet34": 21_276_992,
    "resnet50": 23_500_352,
    "resnet20": 271_824,
    "resnet56": 855_120,
    "vit-tiny": 594_048,
    "vit-small": 2_072_832,
    "vit-medium": 3_550_208,
    "vit-base": 7_684_608
}


@pytest.mark.parametrize("arch", [arch for arch in distill.ARCHS if "-p8" not in arch])
def test_parameter_count_and_embedding_width(arch):
    build, r = distill.ARCHS[arch]
    encoder = build(32, "batch")
    assert sum(p.numel() for p in encoder.parameters()) == PARAMETERS[arch]
    assert encoder(torch.zeros(2, 3, 32, 32)).shape == (2, r)


@pytest.mark.parametrize("arch, tokens", [("vit-tiny", 5), ("vit-tiny-p8", 17)])
def test_the_vit_attends_over_tokens_in_twelve_layers(arch, tokens):
    encoder, shapes = random_network(0, arch, 1).encoder.train(), []
    encoder.layer.register_forward_hook(lambda *call: shapes.append(call[2].shape))
    images = torch.randn(2, 3, 32, 32)
    before = encoder(images)
    assert shapes == [(2, tokens, 192)] * 12
    # positions count
    assert not torch.allclose(encoder(images.roll(16, 2)), before, atol=0.01)
    # the last patch of one image: another class token for that one
    images[0, :, -8:, -8:] += 1
    change = (encoder(images) - before).abs().amax(1)
    assert change[0] > 0.01 and change[1] == 0


@pytest.mark.parametrize(
    "norm, share", [("instance", 1), ("group", 8), ("layer", 512), ("none", 0)]
)
def test_norms_of_a_resnet(norm, share):
    """`share` channels have their statistics in common (Fig. 11)."""
    for arch, count in (("resnet20", 21), ("resnet18", 20)):
        modules = list(random_network(0, arch, 1, norm=norm).encoder.modules())
        norms = [m for m in modules if isinstance(m, torch.nn.GroupNorm)]
        assert len(norms) == count * (share > 0)
        assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in modules)
        for m in norms:
            assert m.num_channels // m.num_groups == min(share, m.num_channels)


@pytest.mark.parametrize("parts", ["lf/wl", "lf/l", "l/wl", "f/wl", "lf/", "l/l"])
def test_parts_of_the_bottleneck(parts):
    network, x = random_network(0, "resnet20", 512, bottleneck=parts), torch.randn(
        8, 2048
    )
    layers = network.projector[-1], network.last_layer
    for part, layer, width in zip(parts.split("/"), layers, (256, 512)):
        expected = x
        if "l" in part:
            weight = layer.linear.weight
            expected = x @ (F.normalize(weight) if "w" in part else weight).T
            assert expected.shape == (8, width)
        if "f" in part:
            expected = expected / expected.norm(dim=1, keepdim=True)
        x = layer(x)
        assert torch.allclose(x, expected, atol=1e-6)


@pytest.mark.parametrize("arch", ["resnet18", "vgg11"])
def test_initialisation(arch):
    network = random_network(0, arch, 512)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            assert module.weight.var().item() == pytest.approx(2 / fan_out, rel=0.1)
        elif isinstance(module, torch.nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.02)
        elif isinstance(module, torch.nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.running_var == 1).all()
        if getattr(module, "bias", None) is not None:
            assert not module.bias.any()
    again, other = (random_network(seed, arch, 512).state_dict() for seed in (0, 1))
    assert same(network.state_dict(), again) and not same(again, other)


def test_a_seed_gives_the_same_weights_in_every_torch():
    # trunc_normal_ does not: torch 2.11 drew otherwise
    weights = random_network(0, "resnet20", 64).last_layer.linear.weight[-1, -3:]
    assert weights.tolist() == pytest.approx([0.00259741, -0.00387040, 0.01023919], rel=1e-5)


def test_only_the_encoder_is_autocast():
    network, types = random_network(0, "resnet20", 8, 16), []
    for module in (network.encoder, network.projector, network.last_layer):
        module.register_forward_hook(lambda *call: types.append(call[2].dtype))
    network(torch.randn(2, 3, 16, 16), "bf16")
    assert types == [torch.bfloat16, torch.float32, torch.float32]


@pytest.mark.parametrize(
    "flags, expected",
    [("avx2 avx512_bf16", "bf16"), ("amx_bf16 amx_tile", "bf16"), ("avx2", "off")]
)
def test_amp_auto_is_bf16_with_batch_norm_where_that_is_fast(
    flags, expected, monkeypatch
):
    monkeypatch.setattr(distill, "cpuinfo", lambda: flags)
    assert distill.pick_amp("auto", CPU, "resnet20") == expected
    assert distill.pick_amp("auto", CPU, "resnet20", "group") == "off"
    assert distill.pick_amp("auto", CPU, "vgg11") == "off"
    assert distill.pick_amp("bf16", CPU, "vgg11") == "bf16"


# ---- Student initialisation and loss -------------------------------------------------------------


@pytest.mark.parametrize(
    "eps, alpha", [(0, 0), (3 / 7, 0.3), (1.5, 0.6), (math.inf, 1)]
)
def test_init_eps_is_the_papers_alpha(eps, alpha):
    teacher, independent, student = (
        random_network(seed, "resnet20", 64) for seed in (0, 1, 1)
    )
    teacher.encoder[1].running_mean += 1
    distill.init_student(teacher, student, eps)
    networks = (network.parameters() for network in (teacher, independent, student))
    for theta_t, theta, theta_s in zip(*networks):
        expected = ((1 - alpha) * theta_t + alpha * theta) / math.hypot(
            alpha, 1 - alpha
        )
        assert (theta_s - expected).abs().max() <= 1e-6 * (0 < alpha < 1)
    assert (student.encoder[1].running_mean == 0).all()


def logit_pair(difference, m=4096, seed=0):
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(32, m, generator=generator) / 16
    return teacher, teacher + difference * torch.randn(32, m, generator=generator)


@pytest.mark.parametrize("difference, rel", [(1e-6, 5e-3), (1e-3, 1e-5), (1, 1e-5)])
def test_kl_and_its_gradient_against_float64_autograd(difference, rel):
    teacher, student = logit_pair(difference)
    exact, student = student.double().requires_grad_(), student.requires_grad_()
    p = teacher.double().softmax(1)
    by_definition = (p * (p.log() - exact.softmax(1).log())).sum(1).mean()
    by_definition.backward()
    kl = distill.LOSSES["kl"](teacher, student)
    (3 * kl).backward()
    for value in (kl, distill.kl_by_log_softmax(teacher.double(), exact)):
        assert value.item() == pytest.approx(by_definition.item(), rel=rel, abs=0)
    assert (student.grad - 3 * exact.grad).norm() < 1e-4 * student.grad.norm()


def test_kl_is_never_negative():
    for seed in range(20):
        assert distill.KLDivergence.apply(*logit_pair(1e-7, m=64, seed=seed)) >= 0


def test_no_constant_answer_is_nearer_to_the_teacher_than_the_constant_student():
    teacher, _ = logit_pair(0)
    floor = distill.constant_student_kl(teacher)
    answer = teacher.softmax(1).mean(0).log().requires_grad_()
    kl = distill.kl_by_log_softmax(teacher.double(), answer.double().repeat(32, 1))
    assert kl.item() == pytest.approx(floor, rel=1e-4)
    kl.backward()
    assert answer.grad.abs().max() < 1e-9  # it is the lowest


def test_a_plateau_is_named_once(folder, here, capsys, monkeypatch):
    options = "--batch-size 4 --lr 1e-7 --init-eps inf --log-every 200 --steps"
    kl = run(folder, f"{options} 15")["log"][1]["kl"]
    monkeypatch.setattr(distill, "constant_student_kl", lambda _: 0.9 * kl)
    run(folder, f"{options} 200 --eval-every 200", "b")
    lines = capsys.readouterr().out.splitlines()
    assert [i for i, line in enumerate(lines) if "--warmup 200" in line] == [len(lines) - 1]


# ---- Data ----------------------------------------------------------------------------------------


def test_leaves_are_the_same_bytes_everywhere():
    data = distill.load_data("leaves")
    assert data.train_y.bincount().tolist() == [1000] * 10
    assert data.test_y.bincount().tolist() == [200] * 10
    pixels = torch.cat([data.train_x, data.test_x]).numpy().tobytes()
    assert hashlib.sha256(pixels).hexdigest()[:24] == "5a1fdb2fd8dbd2c6c0da07b5"


def test_channel_stats_and_normalise():
    images = torch.randint(0, 256, (1000, 3, 4, 4), dtype=torch.uint8)
    images[:500, 0], images[900:, 1] = 0, 255  # each channel has its own
    stats = distill.channel_stats(images)
    for stat, expected in zip(stats, (np.mean, np.std)):
        expected = expected(images.numpy(), axis=(0, 2, 3))
        assert stat.flatten().numpy() == pytest.approx(expected, rel=1e-6)
    x = distill.normalise(images, stats)
    assert x[0, 0, 0, 0] == -stats[0][0, 0] / stats[1][0, 0]


def test_noise_is_gaussian_and_more_of_it_begins_alike():
    few, more = (
        distill.load_data("noise", image_size=8, n=n).train_x for n in (9, 50_100)
    )
    assert (
        len(few) == 50_000 and len(more) == 50_100 and torch.equal(more[:50_000], few)
    )
    x = distill.normalise(few, distill.channel_stats(few))
    assert (x**4).mean().item() == pytest.approx(3, abs=0.05)


def test_stratified_subset_keeps_every_class_in_its_share():
    labels = torch.tensor([0] * 600 + [2] * 300 + [3] * 100)  # there may be no image of one
    (x, y), (again, _) = (
        distill.stratified_subset(torch.arange(1000), labels, 100) for _ in range(2)
    )
    assert y.bincount().tolist() == [60, 0, 30, 10] and torch.equal(labels[x], y)
    assert len(x.unique()) == 100 and torch.equal(x, again)


def test_a_folder_of_images(folder, here):
    data = distill.load_data(str(folder), 16)
    assert (
        data.classes == ["ant", "bee", "cat"]
        and data.train_y.bincount().tolist() == [20] * 3
    )
    bee = np.asarray(Image.open(folder / "train/bee/0.png"))
    assert (data.train_x[20].permute(1, 2, 0).numpy() == bee).all()
    shutil.copytree(folder, "copy")
    Path("copy/test").rename("copy/val")
    for hidden in (
        "copy/train/.ipynb_checkpoints",
        "copy/train/ant/.git",
        "copy/val/.cache"
    ):
        shutil.copytree("copy/val/bee", hidden)
    shutil.copytree("copy/val/bee", "copy/test/images")  # without labels
    wide = np.pad(bee, ((0, 0), (8, 8), (0, 0)))  # it is cropped in the middle
    Image.fromarray(wide).save("copy/val/ant/0.png")
    again = distill.load_data("copy", 16)
    assert torch.equal(again.train_x, data.train_x) and again.classes == data.classes
    assert torch.equal(again.test_x[0], data.train_x[20])
    assert torch.equal(again.test_x[1:], data.test_x[1:])
    for part in ("train", "val"):  # a class of no format that is known is not left out
        Path("copy", part, "dog").mkdir()
        Path("copy", part, "dog/0.heic").touch()
    refused("copy", "", "copy needs", "same classes")


def test_images_that_cannot_be_read_are_named(folder, here):
    shutil.copytree(folder, "copy")
    for path, content in (
        ("cat/1.png", b"no image"),
        ("bee/1.pgm", b"P5 1 1 0 \0"),
        ("ant/1.png", 0)
    ):
        if content:
            Path("copy/train", path).write_bytes(content)
        else:  # 16 bits, of which 8 would be lost
            Image.fromarray(np.full((16, 16), 9999, np.uint16)).save(
                Path("copy/train", path)
            )
        refused("copy", "", f"copy/train/{path}")


@pytest.fixture
def mirror(here):
    """The URL of a server on this machine for the files in www/."""
    handler = lambda *args: http.server.SimpleHTTPRequestHandler(
        *args, directory=here / "www"
    )
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def publish(monkeypatch, source, files):
    """Put an archive of {name: bytes} for a data set of torchvision's into www/."""
    packed = Path("packed", source.base_folder)
    packed.mkdir(parents=True)
    for name, content in files.items():
        (packed / name).write_bytes(content)
    archive = shutil.make_archive(f"www/{source.filename[:-7]}", "gztar", "packed")
    monkeypatch.setattr(
        source, "tgz_md5", hashlib.md5(Path(archive).read_bytes()).hexdigest()
    )
    monkeypatch.setattr(source, "url", "http://127.0.0.1:9/nothing")  # refused at once


def test_cifar_comes_from_a_mirror_but_the_md5_check_stays(mirror, monkeypatch, capsys):
    source, labels = torchvision.datasets.CIFAR10, list(range(10)) * 2
    pixels = np.random.default_rng(0).integers(0, 256, (20, 3072), np.uint8)
    publish(
        monkeypatch,
        source,
        {
            "batch": pickle.dumps({"data": pixels, "labels": labels}),
            "meta": pickle.dumps({"names": list("abcdefghij")})
        }
    )
    for part in ("train_list", "test_list"):
        monkeypatch.setattr(source, part, [["batch", None]])
    monkeypatch.setattr(
        source, "meta", {"filename": "meta", "key": "names", "md5": None}
    )
    data = distill.load_data("cifar10", mirror=mirror)
    assert "--dataset leaves" in capsys.readouterr().out  # said while one waits
    assert (data.train_x.numpy() == pixels.reshape(20, 3, 32, 32)).all()
    assert data.train_y.tolist() == labels and data.classes == list("abcdefghij")
    shutil.rmtree("data")
    monkeypatch.setattr(source, "tgz_md5", "0" * 32)
    for other, says in (
        (mirror, "corrupted"),
        (None, ""),
        ("http://a b", "")
    ):
        with pytest.raises(
            Problem, match=f"{says}.*--dataset leaves, a folder .*--mirror"
        ):
            distill.load_data("cifar10", mirror=other)


def test_stl10_is_its_labelled_images_upright(mirror, monkeypatch):
    source, pixels = (
        torchvision.datasets.STL10,
        torch.randint(256, (2, 3, 96, 96)).byte()
    )
    publish(
        monkeypatch,
        source,
        {
            "X": pixels.numpy().tobytes(),
            "y": bytes([3, 10]),
            "class_names.txt": b"a\nb"
        }
    )
    for part in ("train_list", "test_list"):
        monkeypatch.setattr(source, part, [["X", None], ["y", None]])
    data = distill.load_data("stl10", 96, mirror=mirror)
    assert torch.equal(data.train_x, pixels.mT)  # it comes a column after the other
    assert torch.equal(data.test_x, pixels.mT) and data.test_y.tolist() == [2, 9]
    small = distill.load_data("stl10").test_x
    assert small.shape == (2, 3, 32, 32) and small.dtype == torch.uint8


def test_tiny_imagenet_as_it_comes(mirror, monkeypatch):
    """Validation classes in a text file, a test part without labels; nothing is moved."""
    labels, root = [1, 0, 1], Path("packed/tiny-imagenet-200")
    names = [
        f"{part}_{i}.JPEG"
        for part in ("train/n{}/images/", "val/images/val")
        for i in range(3)
    ] + ["test/images/test_0.JPEG"]
    for name, label in zip(names, labels * 3):
        path = root / name.format(label)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), (100 + 100 * label,) * 3).save(path)
    rows = [f"val_{i}.JPEG\tn{label}\t0\t0\t62\t62\n" for i, label in enumerate(labels)]
    (root / "val/val_annotations.txt").write_text("".join(rows))
    shutil.make_archive("www/tiny-imagenet-200", "zip", "packed")
    load, unpack = distill.load_data, distill.download_and_extract_archive
    with pytest.raises(Problem, match="tiny-imagenet-200.zip.*corrupted"):
        load("tinyimagenet", mirror=mirror)
    assert not Path("data/tiny-imagenet-200").exists()
    monkeypatch.setattr(
        distill, "download_and_extract_archive", lambda *args, md5: unpack(*args)
    )  # whose sum is that of the real one
    data = load("tinyimagenet", mirror=mirror)
    assert data.train_y.tolist() == [0, 1, 1] and data.test_y.tolist() == labels
    for x, y in (data[:2], data[2:4]):
        assert ((x - (100 + 100 * y).view(-1, 1, 1, 1)).abs() < 3).all()
    assert len(list(Path("data/tiny-imagenet-200").rglob("*.JPEG"))) == len(names)


def test_cifar5m_follows_cifar10_and_no_more_is_read_than_wanted(here, monkeypatch):
    rng, load = np.random.default_rng(0), lambda n: distill.load_data("cifar5m", n=n)
    x, y = rng.integers(0, 256, (17, 32, 32, 3), np.uint8), rng.integers(0, 10, 17)
    images, labels = torch.from_numpy(x).permute(0, 3, 1, 2), torch.from_numpy(y)
    cifar10 = distill.Data(images[:6], labels[:6], images[:2], labels[:2], "abcdefghij")
    monkeypatch.setattr(distill, "archive", lambda *_: cifar10)
    folder = Path("data/cifar5m")
    with pytest.raises(Problem, match="data/cifar5m holds no part"):
        load(7)
    folder.mkdir(parents=True)
    np.savez(folder / "part0.npz", X=x[6:10], Y=y[6:10])
    np.savez(folder / "part1.npz", X=x[10:], Y=y[10:])
    for n in (None, 17, 11, 10, 6):
        data = load(n)
        assert torch.equal(data.train_x, images[:n]) and torch.equal(
            data.train_y, labels[:n]
        )
    (folder / "part1.npz").write_bytes(b"garbage")
    assert len(load(10).train_x) == 10
    with pytest.raises(Problem, match="part1.npz is damaged"):
        load(11)


# ---- Training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_training_lowers_the_kl_and_leaves_the_teacher_alone(folder, here, device, amp):
    every, fall = (1, 1) if device == "cpu" and amp != "off" else (4, 2)  # slow there
    teacher = run(
        folder,
        f"--steps {4 * every} --log-every {every} --eval-every {2 * every} --amp "
        f"{amp} --device {device} --init-eps inf"
    )["teacher"]
    assert same(
        {name: t.cpu() for name, t in teacher.items()},
        random_network(0, "resnet20", 64, 16).state_dict()
    )
    rows = curve("a")
    assert [int(row["step"]) // every for row in rows] == [0, 1, 2, 3, 4]
    assert [row["knn"] > "" for row in rows] == [True, False, True, False, True]
    assert 0 < float(rows[-1]["kl"]) < float(rows[1]["kl"]) / fall


def test_fp16_scales_the_loss_so_that_no_gradient_rounds_to_0(folder, here):
    """With 256 images of 32 x 32 gradients are 17 times smaller than with 60 of 16 x 16, in a wider
    encoder smaller still.
    """
    scale = run(folder, "--amp fp16 --steps 1")["scaler"]["scale"] / 64
    run(folder, "--steps 20 --batch-size 60", "b")
    teacher, student, _ = distill.load_networks("b")
    images = distill.load_data(str(folder), 16).train_x
    x = distill.normalise(images, distill.channel_stats(images))
    target = teacher.eval()(x).detach()

    def gradient(amp, scale):
        student.zero_grad()
        (scale * distill.KLDivergence.apply(target, student(x, amp))).backward()
        return torch.cat([p.grad.flatten() / scale for p in student.encoder.parameters()])

    exact = gradient("off", 1)
    ours, best = ((gradient("fp16", s) - exact).norm() for s in (scale, 2.0**24))
    assert ours < 1.1 * best < 0.3 * exact.norm()


@pytest.mark.parametrize(
    "loss, parts", [("kl", "lf/wl"), ("mse", "lf/wl"), ("kl", "lf/l")]
)
def test_steps_by_hand(folder, here, loss, parts):
    """Two steps of SGD: teacher in eval mode, student in train mode, both batches of an epoch,
    loss, gradient and update.
    """
    function = F.mse_loss if loss == "mse" else distill.kl_by_log_softmax
    teacher, student, start, end = (
        random_network(seed, "resnet20", 64, 16, bottleneck=parts)
        for seed in (0, 1, 1, 1)
    )
    images, total = distill.load_data(str(folder), 16).train_x, 0
    optimizer = torch.optim.SGD(student.parameters(), 0, momentum=0.9)
    order = np.random.default_rng((0, 0)).permutation(60)
    for index in (order[:32], order[32:]):  # the last, smaller batch is kept
        x = distill.normalise(images[index], distill.channel_stats(images))
        value = function(teacher.eval()(x).detach(), student.train()(x))
        optimizer.zero_grad()
        value.backward()
        optimizer.param_groups[0]["lr"] += 1
        optimizer.step()
        total += value.item()
    checkpoint = run(
        folder,
        "--steps 2 --batch-size 32 --init-eps inf --optimizer sgd --lr 3 --warmup 3 "
        f"--loss {loss} --bottleneck {parts}"
    )
    assert checkpoint["log"][1]["kl"] == pytest.approx(total / 2, rel=1e-3)
    end.load_state_dict(checkpoint["student"])
    for p, q, r in zip(end.parameters(), student.parameters(), start.parameters()):
        assert (p - q).norm() < 2e-2 * (q - r).norm() + 1e-7


def test_at_eps_0_without_batch_norm_the_student_stays_exactly_put(
    folder, here, capsys
):
    options = "--norm none --steps 2 --log-every 1"
    still = run(folder, options)
    assert [row["kl"] for row in still["log"][1:]] == [0, 0]
    assert same(still["student"], still["teacher"])
    assert capsys.readouterr().out.count("take --init-eps 1e-10") == 1
    pushed = run(folder, f"{options} --loss kl-log-softmax", "b")
    assert pushed["log"][-1]["distance"] > 0
    # one logit, no KL
    run(folder, "--steps 2 --log-every 1 --out-dim 1 --init-eps 1e-10", "c")
    out = capsys.readouterr().out
    assert "take --init-eps" not in out and out.count("has not moved") == 1


def test_a_second_round_has_the_first_rounds_student_as_teacher(folder, here):
    first = run(folder, "--steps 5")
    second = run(folder, "--steps 1 --teacher a", "b")
    assert same(second["teacher"], first["student"])
    assert 0 < second["log"][1]["kl"] < first["log"][1]["kl"] / 10
    assert second["about"]["teacher_probes"]["knn"] == first["log"][-1]["knn"]
    refused(
        folder, "--out c --teacher a --out-dim 32", "a does not fit", "--out-dim 64"
    )
    shutil.rmtree("a")
    # it keeps the teacher that it had
    resumed = run(folder, "--steps 2 --teacher a --resume", "b")
    assert resumed["step"] == 2 and same(resumed["teacher"], second["teacher"])


def test_resume_is_bit_identical_and_run_json_tells_what_was_done(
    folder, here, monkeypatch
):
    options = "--n-samples 30 --log-every 1 --seed 3 --steps"
    whole = run(folder, f"{options} 4")
    run(folder, f"{options} 3", "b")
    monkeypatch.setenv("PATH", "")  # goes on where there is no git,
    monkeypatch.setattr(distill, "cpuinfo", lambda: "amx_bf16")  # on another processor
    resumed = run(folder, f"{options} 4 --resume --amp auto", "b")
    assert same(whole["student"], resumed["student"]) and resumed["step"] == 4
    about = json.loads(Path("b/run.json").read_text())
    assert (
        about.items() >= {**resumed["config"], "n_images": 30, "total_steps": 4}.items()
    )
    first, second = about["made"]
    assert first["hardware"] and first["torch"] and not second["commit"]
    assert (first["from_step"], second["from_step"]) == (0, 3)
    encoders = distill.load_checkpoint("b")[:2]
    data = distill.load_data(str(folder), 16)
    assert about["teacher_probes"] == probe.evaluate(encoders[0], data)
    for encoder in encoders:
        assert not encoder.training and not any(
            p.requires_grad for p in encoder.parameters()
        )


def test_best_pt_holds_the_student_of_the_best_probe(folder, here, monkeypatch):
    scores = iter([50, 30, 40, 40, 35])  # of the teacher, then after steps 1 to 4
    monkeypatch.setattr(
        probe, "evaluate", lambda *_, **__: dict.fromkeys(distill.PROBES, next(scores))
    )
    run(folder, "--steps 4 --eval-every 1")
    teacher, student, config = distill.load_checkpoint("a/best.pt")
    assert config["step"] == 2
    last = distill.load_checkpoint("a")[1]
    assert distill.fingerprint(student) != distill.fingerprint(last)


def test_a_run_killed_before_it_writes_its_log_goes_on_to_the_same(folder, here):
    options = "--steps 2 --log-every 1 --init-eps inf"
    whole = run(folder, options)
    for out, call, step in (("b", 1, 0), ("c", 3, 2)):
        with killed_at(call, distill, "write_csv"):
            run(folder, options, out)
        assert distill.read_checkpoint(Path(out))["step"] == step
        resumed = run(folder, f"{options} --resume", out)
        assert curve(out) == curve("a") and same(resumed["student"], whole["student"])


def test_a_run_is_neither_overwritten_nor_mixed_nor_lost(folder, here):
    checkpoint, last, more = (
        run(folder, "--steps 2"),
        Path("a/last.pt"),
        "--out a --steps 4"
    )
    before = last.read_bytes()
    refused(folder, more, "a/last.pt exists", "--resume")
    for change in (
        "--arch resnet20, not resnet56",
        "--lr 0.001, not 0.1",
        "--amp off, not fp16"
    ):
        refused(folder, f"{more} --resume {re.sub(' .* ', ' ', change)}", change)
    # a full disk
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    done = cli(
        f"distill.py {SMALL} --dataset {folder} {more} --resume", preexec_fn=limit
    )
    one_line(done, "cannot write a/", "disk")
    assert re.search("a/(best|last).pt", done.stderr)  # whichever came first
    assert {*os.listdir("a")} == {"best.pt", "last.pt", "log.csv", "run.json"}
    run(folder, "--steps 2 --resume")
    assert last.read_bytes() == before
    # the next loss is not finite
    checkpoint["student"]["projector.0.weight"][0, 0] = 1e38
    torch.save(checkpoint, last)
    before = last.read_bytes()
    refused(folder, f"{more} --resume", "no longer finite by step 4", "--lr")
    assert last.read_bytes() == before
    last.unlink()
    refused(folder, f"{more} --resume", "results without their last.pt")


def test_the_order_of_the_data_depends_on_seed_and_epoch_alone():
    def order(start, seed=0):
        batches, weight = [], torch.zeros(1, requires_grad=True)
        steps = distill.train(
            lambda index, step: batches.append(index.tolist()) or weight.sum(),
            10,
            torch.optim.SGD([weight]),
            torch.amp.GradScaler(enabled=False),
            float,
            steps=6,
            batch_size=4,
            seed=seed,
            start=start
        )
        assert len(list(steps)) == 6 - start
        return batches

    whole = order(0)
    assert [len(batch) for batch in whole] == [4, 4, 2, 4, 4, 2]
    for epoch in (whole[:3], whole[3:]):
        assert sorted(sum(epoch, [])) == list(range(10))
    assert whole[:3] != whole[3:] and order(4) == whole[4:] and order(0, 1) != whole


@pytest.mark.parametrize("stop", ["signal", "pipe", "rival"])
def test_nothing_that_disturbs_a_run_costs_work(folder, here, stop):
    """SIGTERM; nobody who reads what it prints (`| head`); another process with the same --out."""
    options = f"{SMALL} --dataset {folder} --log-every 1 --eval-every 1000"
    steps = 30 if stop == "pipe" else 1000
    process = subprocess.Popen(
        [
            sys.executable,
            REPO / "distill.py",
            *f"{options} --out a --steps {steps}".split()
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True
    )
    next(line for line in process.stdout if line.startswith("      3 "))
    if stop == "signal":
        process.terminate()
        assert "--resume goes on" in process.stdout.read() and process.wait() == 143
    elif stop == "pipe":
        process.stdout.close()
        assert process.wait() == 0 and process.stderr.read() == ""
    else:
        try:
            distill.main(f"{options} --out a --steps 2 --resume".split())
        except Problem as error:  # we came between its reading and writing: so it goes on
            assert "another process" in str(error)
            process.terminate()
            assert process.wait() == 143
        else:
            assert process.wait() == 1 and "another process" in process.stderr.read()
            steps = 2
    stopped = distill.read_checkpoint(Path("a"))["step"]
    assert stopped == steps if steps < 1000 else 3 <= stopped < 1000
    for out in "ab":
        distill.main(f"{options} --steps {stopped + 2} --out {out} --resume".split())
    assert curve("a")[-1]["distance"] == curve("b")[-1]["distance"]


# ---- Probes --------------------------------------------------------------------------------------


def clusters(n, r=8, spread=1.0, seed=0):
    """n features (n, r) of three classes, and their labels."""
    generator, labels = torch.Generator().manual_seed(seed), torch.arange(n) % 3
    centres = 3 * torch.randn(3, r, generator=torch.Generator().manual_seed(99))
    return centres[labels] + spread * torch.randn(n, r, generator=generator), labels


def test_the_converged_probe_is_that_of_logistic_regression():
    """Against L-BFGS in float64, on features that are badly conditioned on purpose."""
    (x, y), (test_x, test_y) = clusters(600, 12, 4.0), clusters(2000, 12, 4.0, seed=1)
    mix = torch.randn(12, 12, generator=torch.Generator().manual_seed(3))
    mix *= torch.logspace(-3, 3, 12)
    x, test_x = x @ mix, test_x @ mix
    mean, std = x.double().mean(0), x.double().std(0)
    head = torch.nn.Linear(12, 3).double()
    optimizer = torch.optim.LBFGS(
        head.parameters(),
        max_iter=1000,
        tolerance_grad=1e-9,
        tolerance_change=0,
        line_search_fn="strong_wolfe"
    )

    def objective():
        optimizer.zero_grad()
        loss = (
            F.cross_entropy(head((x - mean) / std), y)
            + head.weight.square().sum() * 5e-4
        )
        loss.backward()
        return loss

    optimizer.step(objective)
    expected = probe.accuracy(head((test_x - mean) / std), test_y).item()
    score = probe.linear_probe_converged(x, y, test_x, test_y, 3)
    assert score == pytest.approx(expected, abs=0.051)


def test_collapsed_features_are_no_error():
    y = torch.arange(300) % 3
    parts = torch.ones(300, 8), y, torch.ones(300, 8), y, 3
    assert probe.linear_probe_converged(*parts) == pytest.approx(100 / 3)


def test_every_draw_of_the_papers_probe_is_its_recipe():
    (x, y), (test_x, test_y) = clusters(300, 8, 9.0), clusters(500, 8, 9.0, seed=1)
    found = probe.linear_probe(x, y, test_x, test_y, 3, seeds=(5, 6, 7))
    for accuracy, seed in zip(found, (5, 6, 7)):
        torch.manual_seed(seed)
        head = torch.nn.Linear(8, 3)
        optimizer = torch.optim.AdamW(head.parameters())
        order = torch.randperm(300, generator=torch.Generator().manual_seed(seed))
        for index in order.split(256) * 10:
            optimizer.zero_grad()
            F.cross_entropy(head(x[index]), y[index]).backward()
            optimizer.step()
        alone = probe.accuracy(head(test_x), test_y)
        assert accuracy.item() == pytest.approx(alone.item(), abs=0.21)
    assert found.unique().numel() == 3


def test_calibration_gives_batch_norms_the_statistics_of_the_images():
    encoder = distill.random_network(0, "resnet20", 1, 16).encoder
    data = distill.dead_leaves(20, 2, size=16)
    stats = distill.channel_stats(data.train_x)
    copy = probe.calibrated(encoder, data.train_x, stats)
    first = encoder[0](distill.normalise(data.train_x, stats))  # before the first norm
    assert torch.allclose(copy[1].running_mean, first.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(copy[1].running_var, first.var((0, 2, 3)), rtol=1e-3)
    assert encoder[1].running_mean.count_nonzero() == 0


def test_knn_against_brute_force_and_its_ties():
    (x, y), (test_x, test_y) = clusters(200, spread=6.0), clusters(
        700, spread=6.0, seed=1
    )
    votes = [np.bincount(y[(x - query).norm(dim=1).argsort()[:20]]) for query in test_x]
    expected = np.mean(
        [vote.argmax() for vote in votes] == test_y.numpy()
    )  # ties: the lowest
    assert probe.knn_probe(x, y, test_x, test_y, 3) == pytest.approx(100 * expected)


def test_probe_table_json_figure_and_resume(folder, here, capsys, monkeypatch):
    last = [
        run(folder, f"--steps 2 --seed {seed}", f"s-seed{seed}")["log"][-1]
        for seed in (0, 1)
    ]
    command = "s-seed0 s-seed1 --json t.json --draws 3 --device cpu"
    probe.main(f"{command} --figure f.png".split())
    text, found = capsys.readouterr().out, json.loads(Path("t.json").read_text())
    assert re.search(
        r"teacher resnet20 \(2 seeds\) .* ± .*\nteacher resnet20, calibrated .*\n"
        r"  gain over its teacher .*\nstudent s \(2 seeds\) .* ± .*\n"
        r"  gain over its teacher +[+-]",
        text
    )
    student = found["student s-seed1"]
    known = {name: last[1][name] for name in ("linear_converged", "knn")}
    known |= {"train_images": 60, "test_images": 24, "amp": "off", "draws": 3}
    assert student.items() >= known.items()
    assert student["linear_paper_max"] >= student["linear_paper"] > 0
    gain = float(re.findall("gain over its teacher .* (.*)", text)[-1])
    gains = [found[f"student s-seed{i}"]["knn"] - found[f"teacher of s-seed{i}"]["knn"]
             for i in (0, 1)]
    assert gain == pytest.approx(np.mean(gains), abs=0.006)
    Image.open("f.png")
    problem(probe.main, command, "t.json exists", "--resume")
    shutil.copytree(folder, "other")
    problem(probe.main, "s-seed0 --figure f.png --dataset other", "logs", "not of other")
    for change in ("--amp bf16", "--dataset other", "--draws 4"):
        problem(probe.main, f"{command} --resume {change}", "other data", "--amp")
    run(
        folder, "--steps 4 --resume --seed 1", "s-seed1"
    )  # what goes on is measured again
    evaluate, measured = probe.evaluate, []
    monkeypatch.setattr(
        probe, "evaluate", lambda *args: measured.append(0) or evaluate(*args)
    )
    probe.main(f"{command} --resume".split())
    assert len(measured) == 1


def test_probes_are_kept_apart_for_networks_that_differ_in_their_norm_alone():
    networks = [random_network(0, "resnet20", 8, norm=norm) for norm in distill.NORMS]
    assert len(set(map(distill.fingerprint, networks))) == len(networks)


def test_unfinished_runs_are_named_and_not_averaged(folder, here, capsys):
    run(folder, "--steps 2", "s-seed0")
    checkpoint = run(folder, "--steps 2 --seed 1", "s-seed1")
    distill.save_checkpoint(
        Path("s-seed1/last.pt"), "distill.py", **{**checkpoint, "step": 1}
    )
    probe.main(["s-seed0", "s-seed1", "s-seed0/best.pt"])
    prune.main(f"s-seed1 --rounds 0 --epochs 1 {FLOAT32}".split())
    out = capsys.readouterr().out
    for label in ("student s (step 1 of 2) ", "student s  ", "student s, best probe "):
        assert label in out, label
    assert "weights of s-seed1 (step 1 of 2) on" in out


# ---- The command line and bad input --------------------------------------------------------------


@pytest.mark.parametrize(
    "words, says",
    [
        ("distill --init-eps nan", "at least 0"),
        ("distill --dataset noise", "--probe-dataset"),
        ("distill --probe-dataset noise", "--probe-dataset"),
        ("distill --bottleneck w/l", "invalid choice: 'w/l'"),
        ("distill --arch vgg11 --image-size 16", "at least 32"),
        ("distill --arch vit-base-p8 --image-size 36", "patch size, 8"),
        ("distill --image-size 8", "at least 16"),
        ("probe", "name one or more"),
        ("probe a --teacher vgg11 --dataset leaves", "name one or more"),
        ("probe a --figure a.txt", ".png"),
        ("probe a --amp auto", "invalid choice: 'auto'"),
        ("prune a --rewind-epoch 3 --epochs 3", "--rewind-epoch 3 is beyond"),
        ("landscape", "command"),
        ("landscape plane a --x nan 1", "at least"),
        ("landscape plane a --out a.png", ".npz")
    ]
)
def test_usage_errors_exit_2(words, says, capsys):
    script, *words = words.split()
    with pytest.raises(SystemExit, match="2"):
        globals()[script].main(words)
    assert says in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "main",
    [
        distill.main,
        probe.main,
        prune.main,
        landscape.plane,
        landscape.connect,
        landscape.plot
    ]
)
def test_help(main):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])


class Evil:
    """Its pickle names code."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_bad_checkpoints(folder, here, monkeypatch):
    torch.save({"student": torch.zeros(9999)}, "foreign.pt")
    problem(probe.main, "foreign.pt", "not a checkpoint of distill.py")
    checkpoint = run(folder, "--steps 1")
    mistyped = {**checkpoint["config"], "seed": "0"}
    for change in (
        {"config": 3}, {"config": mistyped}, {"student": [1]}, {"teacher": {}}
    ):
        distill.save_checkpoint(
            Path("old.pt"), "distill.py", **{**checkpoint, **change}
        )
        problem(probe.main, "old.pt", "does not fit")
    checkpoint["student"]["projector.0.weight"][0, 0] = math.nan
    torch.save(checkpoint, "nan.pt")
    problem(probe.main, "nan.pt", "not finite")
    monkeypatch.setenv("DATA_MIRROR", "http://elsewhere")  # as no run had it before
    distill.load_checkpoint("a")
    good = Path("a/last.pt").read_bytes()
    zeroed = good[:60_000] + bytes(4096) + good[64_096:]  # a lost block
    for content in (
        pickle.dumps(Evil()),
        b"",
        b"a,b\n1,2\n",
        zeroed,
        good[:100],
        good[:-1]
    ):
        Path("last.pt").write_bytes(content)
        problem(probe.main, "last.pt", "last.pt is ", "name another")
        problem(distill.main, "--out . --resume", "last.pt is ")
        assert Path("last.pt").read_bytes() == content and not Path("ran").exists()


def test_bad_data_and_places(folder, here):
    Path("empty").mkdir()
    refused("cifar11", "", "cifar11", "leaves")
    refused("empty", "", "train/")
    refused(folder, "--n-samples 61", "the 60 training")
    for options, says in (
        ("", "File exists.*permission"),
        ("--out b --out-dim 2000000000", "out of memory")
    ):
        with pytest.raises(SystemExit, match=says):
            distill.run_cli(lambda: run(folder, options, distill.__file__))


def test_any_terminal_and_notebook_and_somebodys_repository(folder, here):
    """No ε in ASCII; a notebook's matplotlib; the code inside a repository that is not ours."""
    for name in ("distill.py", "probe.py"):
        shutil.copy(REPO / name, name)
    for words in (
        "init -q",
        "add .",
        "-c user.name=a -c user.email=a commit -qm theirs"
    ):
        subprocess.run(["git", *words.split()], check=True)
    Path("inside").mkdir()
    for name in ("distill.py", "probe.py"):
        Path(name).rename(f"inside/{name}")
    environment = {
        **os.environ,
        "PYTHONIOENCODING": "ascii",
        "MPLBACKEND": "module://matplotlib_inline.backend_inline"
    }
    for words in (
        f"inside/distill.py {SMALL} --dataset {folder} --steps 1 --out a",
        "inside/probe.py a --figure f.png"
    ):
        done = subprocess.run(
            [sys.executable, *words.split()], env=environment, capture_output=True
        )
        assert done.returncode == 0, done.stderr
    assert json.loads(Path("a/run.json").read_text())["made"][0]["commit"] == ""


# ---- Pruning -------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def pair(folder, tmp_path_factory):
    """Two small distilled runs with one teacher, at ε = 0 and ε = inf."""
    root = tmp_path_factory.mktemp("pair")
    for name, eps in (("near", 0), ("far", "inf")):
        run(folder, f"--init-eps {eps} --steps 6", root / name)
    return root


def prune_run(pair, out, options=""):
    """A small curve in this process, of 3 trainings of 3 epochs of 4 steps; its checkpoint."""
    prune.main(
        f"{pair}/near --epochs 3 --batch-size 16 --rounds 2 {FLOAT32} --out {out} "
        f"{options}".split()
    )
    return distill.read_checkpoint(Path(out), "prune.py")


def test_augment_flips_and_crops_whole_images():
    images, places = torch.randint(1, 256, (200, 3, 8, 8), dtype=torch.uint8), set()
    crops, padded = distill.augment(images, 0, 5), F.pad(images, [4] * 4)
    for image, crop in zip(torch.stack([padded, padded.flip(3)], dim=1), crops):
        windows = image.unfold(2, 8, 1).unfold(3, 8, 1)  # (2, 3, 9, 9, 8, 8)
        (at,) = (windows == crop[:, None, None]).all(5).all(4).all(1).nonzero().tolist()
        places.add(tuple(at))
    assert [len(set(coordinate)) for coordinate in zip(*places)] == [2, 9, 9]
    again, later, other = (
        distill.augment(images, *at) for at in ((0, 5), (0, 6), (1, 5))
    )
    assert torch.equal(crops, again)
    assert not torch.equal(crops, later) and not torch.equal(crops, other)


def test_the_threshold_is_global_and_what_is_pruned_does_not_come_back():
    weights = {
        "small": torch.tensor([0.1, -0.2, 0.3, 0.4]),
        "large": torch.tensor([-1.0, 2, 3, 4])
    }
    mask = {name: w != 0 for name, w in weights.items()}
    for keep, small, large in (
        (6, "0011", "1111"),
        (5, "0001", "1111"),
        (2, "0000", "0011")
    ):
        mask = prune.magnitude_mask(weights, mask, keep)
        for name, expected in (("small", small), ("large", large)):
            assert mask[name].tolist() == [digit == "1" for digit in expected]
        weights["small"][0] = 9
    ties = {"w": torch.ones(10)}
    assert prune.magnitude_mask(ties, {"w": ties["w"] > 0}, 7)["w"].sum() == 7


def test_the_control_keeps_the_counts_of_each_layer():
    mask, ticket = (
        {name: torch.arange(n) % k == 0 for name, n in (("a", 1000), ("b", 100))}
        for k in (2, 4)
    )
    control, other = (prune.random_mask(mask, ticket, seed) for seed in (0, 1))
    for name, m in control.items():
        assert m.sum() == ticket[name].sum() and not (m & ~mask[name]).any()
        assert not torch.equal(m, other[name]) and not torch.equal(m, ticket[name])


@pytest.mark.parametrize(
    "options",
    [
        "",
        "--rewind-epoch 1 --init random",
        "--prune-all --rate 0.5 --amp bf16",
        "--control random"
    ]
)
def test_rewinding_is_bit_identical_but_for_the_mask(pair, here, monkeypatch, options):
    """What each round starts from (network with its buffers, optimiser) and sees (order of the
    data, crops, learning rates).
    """
    rounds, fine_tune, augment = [], prune.fine_tune, distill.augment

    def spy(network, optimizer, *args):
        states = copy.deepcopy((network.state_dict(), optimizer.state_dict()["state"]))
        rounds.append((*states, []))
        for step in fine_tune(network, optimizer, *args):
            rounds[-1][2][-1].append(optimizer.param_groups[0]["lr"])
            yield step

    def watch(images, *args):
        rounds[-1][2].append([images.tolist(), args])
        return augment(images, *args)

    monkeypatch.setattr(prune, "fine_tune", spy)
    monkeypatch.setattr(distill, "augment", watch)
    checkpoint = prune_run(pair, "p", options)
    point, mask = checkpoint["rewinding_point"], checkpoint["mask"]
    total, kept = (sum(map(count, mask.values())) for count in (torch.numel, torch.sum))
    rate, skipped = 0.5 if "0.5" in options else 0.2, 4 * ("epoch" in options)
    assert kept == round(total * (1 - rate) ** 2)
    # weights and biases of 21 batch norms, of the classifier
    vectors = 2 * (16 + 32 + 64) * 7 + 3
    assert total == 271_824 + 64 * 3 + (3 if "all" in options else 3 - vectors)
    (*_, seen), *later = rounds
    rates = [lr for _, _, lr in seen]
    assert rates == pytest.approx([0.05] * 6 + [0.005] * 3 + [0.0005] * 3)
    for number, (weights, momentum, sees) in enumerate(later, 1):
        assert sees == seen[skipped:]
        for key, state in point["optimizer"]["state"].items():
            assert torch.equal(
                momentum[key]["momentum_buffer"], state["momentum_buffer"]
            )
        changed = {name: weights[name] != w for name, w in point["network"].items()}
        assert not any(weights[name][c].any() for name, c in changed.items())
        n_changed = sum(c.sum() for c in changed.values())
        assert 0 < n_changed <= total * (1 - (1 - rate) ** number) + 1
    for name, m in mask.items():  # and at the end of a round what is pruned is 0
        assert not checkpoint["network"][name][~m].any()
    encoder = distill.load_checkpoint(pair / "near")["--init" not in options]
    for name, weight in encoder.state_dict().items():
        assert skipped or torch.equal(point["network"][f"encoder.{name}"], weight)


def test_a_round_that_prunes_nothing_repeats_the_first_and_it_learns(pair, here):
    options = "--rewind-epoch 1 --rate 1e-9"
    checkpoint = prune_run(pair, "p", f"{options} --rounds 0")
    assert same(
        checkpoint["network"], prune_run(pair, "p", f"{options} --resume")["network"]
    )
    prune_run(pair, "q", "--init random --rounds 0 --epochs 10 --batch-size 8")
    # three classes, which differ in brightness
    assert float(curve("q")[0]["final_accuracy"]) > 90


@pytest.mark.parametrize(
    "function, call", [("save_checkpoint", 2), ("write_csv", 2), ("apply_mask", 18)]
)
def test_a_killed_curve_goes_on_to_the_same_numbers(pair, here, function, call):
    options = "--rewind-epoch 1"
    whole = prune_run(pair, "a", options)
    with killed_at(call, prune, function):
        prune_run(pair, "b", options)
    resumed = prune_run(pair, "b", f"{options} --resume")
    assert curve("b") == curve("a") and same(whole["network"], resumed["network"])
    assert len(resumed["config"]["made"]) == 2


def test_prune_refuses_bad_input_and_overwrites_nothing(pair, here):
    prune_run(pair, "p", "--rounds 0")
    same_run = f"{pair}/near --epochs 3 --batch-size 16 --amp off --rounds 1 --out p"
    before = {path: path.read_bytes() for path in Path("p").iterdir()}
    assert {path.name for path in before} == {"last.pt", "log.csv", "config.json"}
    problem(prune.main, same_run, "p/last.pt exists", "--resume")
    for change, says in (
        ("--init random", "--init student, not random"),
        ("--lr 0.3", "--lr 0.05, not 0.3"),
        ("--n-samples 30", "--n-samples None, not 30"),
        ("--dataset noise", "--dataset"),
        ("--out q --rounds 100", "last weight"),
        ("--out r --lr 1e30", "not finite")
    ):
        problem(prune.main, f"{same_run} --resume {change}", says)
    problem(
        prune.main, same_run.replace("near", "far") + " --resume", "--starting-weights"
    )
    assert before == {path: path.read_bytes() for path in Path("p").iterdir()}


def test_plot_draws_means_over_seeds_from_the_logs_alone(pair, here, capsys):
    prune_run(pair, "made", "--rounds 0")
    config = json.loads(Path("made/config.json").read_text())
    for out, settings, best in (
        ("0/prune-a", {"seed": 0}, (60, 50)),
        ("0/prune-b", {"init": "random"}, (60, 40)),
        ("1/prune-a", {"seed": 1, "run": "1"}, (62, 54, 44)),  # one round more
        ("0/prune-a-control", {"control": "random"}, (60, 30)),
        ("2/prune-a", {"seed": 2, "epochs": 9}, (70, 71)),  # another experiment
        ("3/prune-a", {"seed": 3, "epochs": 9}, (70, 71))
    ):
        distill.write_json(Path(out, "config.json"), {**config, **settings})
        rows = [
            {"round": i, "weights_left": 100 * 0.8**i, "best_accuracy": accuracy}
            for i, accuracy in enumerate(best)
        ]
        distill.write_csv(Path(out, "log.csv"), prune.LOG_COLUMNS, rows)
    capsys.readouterr()
    prune.main("plot 0 1/prune-a 1 2 3 --figure f.png".split())  # one twice
    Image.open("f.png")
    assert capsys.readouterr().out.startswith("""\
best epoch's test accuracy in %
  [1] student, rewound to epoch 0 (n=2)
  [2] student, rewound to epoch 0 (2/prune-a) (n=2)
  [3] student, rewound to epoch 0, random masks (n=1)
  [4] random init, rewound to epoch 0 (n=1)
weights left (%)             [1]             [2]             [3]             [4]
          100.00    61.00 ± 1.41           70.00           60.00           60.00
           80.00    52.00 ± 2.83           71.00           30.00           40.00
""")
    Path("matplotlib.py").write_text(
        "raise ModuleNotFoundError('No module named matplotlib', name='matplotlib')"
    )
    done = cli("prune.py plot 0", env={**os.environ, "PYTHONPATH": "."})
    one_line(done, "matplotlib", "requirements.txt")
    assert "60.00" in done.stdout  # the numbers come out without it
    Path("0/prune-b/log.csv").write_text("round,seconds\n1,2\n")
    for words, says in (
        ("plot nowhere", "no pruning curve in nowhere"),
        ("plot 0", "0/prune-b holds no readable curve")
    ):
        problem(prune.main, words, says)


# ---- Landscapes ----------------------------------------------------------------------------------


def lay(pair, out, options="", runs=("near", "far")):
    """landscape.py plane on those runs, 3 x 3 points; its config and arrays."""
    landscape.main(
        [
            "plane",
            *(f"{pair}/{name}" for name in runs),
            *f"--grid 3 {FLOAT32} --out {out} {options}".split()
        ]
    )
    return landscape.read_npz(Path(out))


@pytest.mark.parametrize("axes", ["barycentric", "orthonormal"])
def test_a_plane_goes_through_its_points(axes):
    a, b, c = theta = torch.randn(3, 50, dtype=torch.float64)
    origin, basis = landscape.plane_basis(theta, axes)
    corners = torch.from_numpy(landscape.coordinates(theta, origin, basis))
    assert torch.allclose(origin + corners @ basis, theta)
    (x0, y0), (x1, y1), _ = corners
    if axes == "barycentric":
        assert torch.equal(origin, a) and torch.equal(basis, theta[1:] - a)
    else:
        assert torch.allclose(basis @ basis.T, torch.eye(2).double())
        assert (basis @ origin).abs().max() < 1e-9 and abs(y1 - y0) < 1e-9 and x1 > x0
    for points in (
        [a, b, a],
        [a, a, b],
        [a, b, b],
        [a, b, 2 * b - a],
        [a, b, a + 1e-9 * c]
    ):
        with pytest.raises(Problem, match="no plane"):
            landscape.plane_basis(torch.stack(points), axes)


@pytest.mark.parametrize("options", ["", "--encoder-only"])
def test_anchors_have_their_own_loss_exactly(folder, pair, here, options):
    _, arrays = lay(pair, "a.npz", options)
    teacher, near, _ = distill.load_networks(pair / "near")
    networks = copy.deepcopy(teacher), near, distill.load_networks(pair / "far")[1]
    images, *_ = distill.load_data(str(folder), 16)
    stats = distill.channel_stats(images)
    for _ in range(2):  # the subset of a subset, shuffled; none is lost
        images, _ = landscape.labelled_subset(images, torch.arange(60) // 20, None)
    teacher.eval()
    for network, kl in zip(networks, arrays["kl"]):  # the students in train mode
        own = 0
        for batch in images.tensor_split(4):
            x = distill.normalise(batch, stats)
            p, q = (
                (net.encoder(x) if options else net(x)).detach()
                for net in (teacher, network)
            )
            own += distill.KLDivergence.apply(p, q).item() * len(x) / 60
        assert kl == pytest.approx(own, rel=1e-4) and own > 0
    assert " ".join(arrays["anchors"]) == "θ_T θ*_S(0) θ*_S(1)"
    theta = landscape.flat((near.encoder if options else near).parameters())
    assert arrays["norm"][1] == pytest.approx(theta.norm().item())


def test_a_killed_plane_goes_on_to_the_same_file(pair, here):
    _, whole = lay(pair, "whole.npz")
    with killed_at(11, landscape, "place"):
        lay(pair, "a.npz")
    problem(landscape.main, "plot a.npz", "9 of 12 points", "--resume")
    for options, says in (
        ("", "a.npz exists"),
        ("--resume --n-samples 9", "5000, not 9")
    ):
        with pytest.raises(Problem, match=says):
            lay(pair, "a.npz", options)
    _, arrays = lay(pair, "a.npz", "--resume")
    assert arrays.keys() == whole.keys()
    assert all(np.array_equal(arrays[key], whole[key]) for key in whole)


def test_lines_are_straight_and_exact_at_their_ends():
    a, b = ({"w": torch.randn(99)} for _ in range(2))
    states = []

    def error(state):
        states.append(state)
        return len(states)

    for end in (a, b):
        errors = landscape.error_along_line(a, end, np.linspace(0, 1, 11), error)
    assert all(same(state, a) for state in states[:12]) and same(states[-1], b)
    assert torch.allclose(states[14]["w"], 0.7 * a["w"] + 0.3 * b["w"])
    assert errors.tolist() == [*range(12, 23)]
    barriers = landscape.barrier(np.array([[10.0, 40, 20], [0, 0, 8]]))
    assert barriers.tolist() == [25, 4]


def join(out, pair, options=""):
    """landscape.py connect with two copies and three epochs; its arrays and the copies."""
    landscape.main(
        f"connect {pair}/near --copies 2 --epochs 3 --batch-size 16 --points 3 "
        f"{FLOAT32} --out {out} {options}".split()
    )
    copies = distill.read_checkpoint(Path(out), "landscape.py")["copies"]
    return landscape.read_npz(Path(out) / "connect.npz")[1], copies


def test_copies_differ_in_the_order_of_the_data_alone(folder, pair, here, monkeypatch):
    starts, seeds, fine_tune = [], [], landscape.fine_tune

    def spy(network, *args):
        starts.append(copy.deepcopy(network.state_dict()))
        seeds.append(args[-1])
        return fine_tune(network, *args)

    monkeypatch.setattr(landscape, "fine_tune", spy)
    arrays, copies = join("c", pair)
    teacher, student, _ = distill.load_checkpoint(pair / "near")
    args = landscape.connect_args(["near", "--seed", "0", "--lr", "1"])
    for i, encoder in enumerate((student, teacher)):
        network, *_ = distill.classifier(encoder, 64, 3, args, CPU)
        first, second = starts[2 * i : 2 * i + 2]
        assert same(first, second) and same(first, network.state_dict())
        assert not same(*copies[2 * i : 2 * i + 2])
    assert seeds == [0, 1, 0, 1]
    x, y, *test, _ = distill.load_data(str(folder), 16)
    stats, (x, _) = distill.channel_stats(x), landscape.labelled_subset(x, y, None)
    batches = [distill.normalise(part, stats) for part in x.tensor_split(4)]
    for state, error in zip(copies, arrays["error"][:, 0, [0, -1]].flatten()):
        # the ends: with batch norm's statistics averaged anew
        network.load_state_dict(state)
        landscape.update_bn(batches, network.encoder)
        own = distill.classification_accuracy(network, *test, stats, "off")
        assert error == pytest.approx(100 - own)


@pytest.mark.parametrize(
    "function, call", [("save_checkpoint", 2), ("error_along_line", 2)]
)
def test_a_killed_connect_goes_on_to_the_same_numbers(pair, here, function, call):
    whole, copies = join("whole", pair)
    with killed_at(call, landscape, function):
        join("a", pair)
    for options, says in (
        ("", "--resume"),
        ("--resume --epochs 4", "--epochs 3, not 4")
    ):
        with pytest.raises(Problem, match=says):
            join("a", pair, options)
    arrays, again = join("a", pair, "--resume")
    Path("a/last.pt").unlink()
    with pytest.raises(Problem, match="results without"):
        join("a", pair, "--resume")
    assert all(np.array_equal(arrays[key], whole[key]) for key in whole)
    assert all(same(a, b) for a, b in zip(again, copies, strict=True))


def test_the_npz_redraws_and_bad_input_is_refused(folder, pair, here):
    lay(pair, "a.npz")
    lay(pair, "b.npz", "--axes barycentric", runs=["far"])
    for files in ("a.npz b.npz", "a.npz --kl-range 1e-9 1"):
        landscape.main(f"plot {files}".split())
        assert Path("a.png").stat().st_size > 10_000
        Path("a.png").unlink()
    Path("cut.npz").write_bytes(Path("a.npz").read_bytes()[:-1])
    np.savez("lines.npz", error=np.zeros((2, 1, 3)), config="{}")
    run(folder, "--steps 1 --seed 1", "other")
    run(folder, "--steps 1 --out-dim 32", "smaller")
    near = f"{pair}/near"
    for words, says in (
        (f"plane {near}", "no plane"),  # at ε = 0 it starts there
        (f"plane {near} other", "different teachers"),
        (f"plane {near} {near}", "no plane"),
        (f"plane {near} smaller", "--out-dim"),
        ("plot cut.npz", "cut.npz is no whole file"),
        ("plot none.npz", "none.npz is no whole file"),
        ("plot a.npz lines.npz", "apart"),
        (f"connect {near} --dataset noise", "no labels"),
        (f"connect {near} --n-samples 61", "--n-samples 61")
    ):
        problem(landscape.main, words, says)


# ---- run_all.sh ----------------------------------------------------------------------------------


def as_a_user(clone, *args, **variables):
    """Run run_all.sh in a folder that holds what a clone does, from the folder above."""
    for name in """
        distill.py
        probe.py
        prune.py
        landscape.py
        results/report.py
        results/paper.csv
        run_all.sh
        requirements.txt
    """.split():
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        if not (clone / name).exists():
            shutil.copy(REPO / name, clone / name)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", f"{clone.name}/run_all.sh", *args],
        cwd=clone.parent,
        env={**os.environ, "PATH": path, **variables},
        capture_output=True,
        text=True,
        timeout=300
    )


def listed(words="", **variables):
    """The lines of `run_all.sh list`, in an environment that holds the `variables` alone."""
    variables = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", **variables}
    done = subprocess.run(
        ["bash", REPO / "run_all.sh", "list", *words.split()],
        env=variables,
        capture_output=True,
        text=True
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout.splitlines()


def parsed(line):
    """(main of a line's script, its words, its options, where it writes)."""
    _, script, *words = shlex.split(line, comments=True)
    module = globals()[script[:-3]]
    if module is landscape:
        parse = {"plane": landscape.plane_args, "connect": landscape.connect_args}
        options = parse[words[0]](words[1:])
    else:
        options = module.parse_args(words)
    return module.main, words, options, options.json if module is probe else options.out


def test_the_list_needs_no_python_and_prints_one_command_a_line(tmp_path):
    for tool in ("bash", "dirname", "grep", "sed", "wc"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    lines, first, second, mini = (
        listed(words, PATH=str(tmp_path)) for words in ("", "1", "2", "mini")
    )
    assert lines == first + second and len(set(lines)) == len(lines) == 265
    job = r"python (distill|probe|prune|landscape)\.py.* --resume .*\S  # stage "
    for line in first + mini:
        assert re.fullmatch(job + "1", line), line
    for line in second:
        assert re.fullmatch(job + "2", line), line
    for line in listed("mini", CIFAR10="/my *'images"):
        options = parsed(line)[2]
        assert "/my *'images" in (options.dataset, options.probe_dataset)
    for words in ("quik", "list 3"):
        done = as_a_user(tmp_path / "clone", *words.split())
        assert done.returncode == 2 and done.stdout == "" and "mini" in done.stderr


@pytest.mark.parametrize("seeds", ["", "1 4"])
def test_jobs_have_outputs_of_their_own_that_the_report_knows(seeds):
    outputs, stage1 = set(), set()
    for line in listed(SEEDS=seeds):
        if line.endswith("2"):
            stage1 = stage1 or set(outputs)
        _, words, options, out = parsed(line)
        reads = {Path(word.removesuffix("/best.pt")) for word in words if word.startswith("runs/")}
        reads -= {out}
        assert (
            reads <= stage1 and bool(reads) == bool(stage1) and out not in outputs
        ), line
        assert options.dataset in (*distill.DATASETS, None), line
        outputs.add(out)
    # what the report looks for, by the names that it gives to outputs
    names = {
        re.sub("-seed.", "", str(out.relative_to("runs/paper"))) for out in outputs
    }
    names = {re.sub("connect$|.npz", "", name) for name in names}
    rows = list(csv.DictReader((REPO / "results/paper.csv").open()))
    same_runs = {row["row"] for row in rows if row["artefact"] == "same runs"}
    for row in rows:
        for name in row["ours"].split("; "):
            name = re.sub(":.*|connect/connect$", "", name)
            assert name in names | same_runs, name


def test_a_toy_job_of_each_kind_runs(here, monkeypatch):
    toy = draw_images(here / "toy", 32, 12, 3)
    scores = dict.fromkeys(probe.COLUMNS, 50.0)
    monkeypatch.setattr(probe, "evaluate", lambda *_, **__: scores)
    lines = listed(TOY=str(toy), SEEDS="0")
    for pattern in (
        "teachers-stl10",
        "cifar10-resnet18-seed0",
        "init random --rewind-epoch 1",
        "connect"
    ):
        line = next(line for line in lines if pattern in line)
        # the smallest images are quickest
        main, words, _, out = parsed(
            line.replace("18 --seed", "18 --image-size 16 --seed")
        )
        main(words)
        assert out.exists() and out.is_relative_to("runs/toy/paper"), words


def test_jobs_run_side_by_side_and_one_that_fails_stops_no_other(tmp_path):
    (tmp_path / "distill.py").write_text("""
import pathlib, sys, time
run_cli = load_data = lambda *_: None
if __name__ == "__main__":
    if "eps1.5" in sys.argv[-1]:
        sys.exit("lost")
    pathlib.Path("started" + sys.argv[-1][-12:-6].replace("/", "")).touch()
    while len(list(pathlib.Path().glob("started*"))) < 2:
        time.sleep(0.1)
""")
    done = as_a_user(
        tmp_path, "mini", SEEDS="0", JOBS="2", CIFAR10=".", TINYIMAGENET="."
    )
    assert "14 jobs of stage mini, 2 at once" in done.stdout, done.stderr
    assert done.returncode == 1 and done.stdout.count("\ndone ") == 13
    failed, page = (tmp_path / "runs/logs/failed").read_text().splitlines()
    assert page == "bash run_all.sh report"  # without a whole distill.py
    assert "eps1.5" in failed and re.search("FAILED .*eps1.5.*: lost", done.stdout)


def test_what_cannot_be_had_is_said_at_once(tmp_path):
    one_line(as_a_user(tmp_path, "data"), "CIFAR-5M")
    (tmp_path / "data/cifar5m").mkdir(parents=True)
    (tmp_path / "data/cifar5m/part0.npz").touch()
    one_line(
        as_a_user(tmp_path, "data", DATA_MIRROR="http://127.0.0.1:9"), "cannot download"
    )
    if not torch.cuda.is_available():
        done = as_a_user(tmp_path, "full")
        assert done.returncode == 1 and "quick" in done.stderr and "mini" in done.stderr


# ---- The report ----------------------------------------------------------------------------------


def finished(root, name, *linear, steps=2, seed=0):
    """A run as its run.json and log.csv tell it: its linear probe at steps 0, 1, ..."""
    made = {"hardware": "a GPU", "torch": "2", "commit": "abc"}
    config = {
        "dataset": "cifar10",
        "n_images": 9,
        "batch_size": 3,
        "out_dim": 4,
        "amp": "off",
        "seed": seed,
        "total_steps": steps,
        "made": [made],
        "teacher_probes": dict.fromkeys(distill.PROBES, 30)
    }
    out = root / f"paper/{name}-seed{seed}"
    distill.write_json(out / "run.json", config)
    rows = [
        {
            "step": i,
            "epoch": i,
            "kl": 1e-5 / i if i else math.nan,
            "distance": 20,
            "linear_paper": score,
            "linear_converged": score + 5,
            "knn": score - 5
        }
        for i, score in enumerate(linear)
    ]
    distill.write_csv(out / "log.csv", distill.LOG_COLUMNS, rows)


def test_verdicts_follow_their_rule(tmp_path):
    finished(tmp_path, "cifar10-resnet18", 30, 47, 45)
    finished(tmp_path, "cifar10-resnet18", 30, 45, 46.5, seed=1)
    # no other has this teacher
    finished(tmp_path, "fig18-resnet18", 40, 41, 46, seed=1)
    finished(tmp_path, "cifar100-vgg11", 60, 10, 20)  # step 0 is not the student's
    finished(tmp_path, "cifar10-vgg11", 30, 50)  # not at its end
    finished(tmp_path, "fig4-n500", 5, 50, 43.7)
    finished(tmp_path, "fig4-n1000", 5, 5, 10)
    # far off, but so are ours from each other
    finished(tmp_path, "fig4-n1000", 5, 5, 60, seed=1)
    # figures show such runs, but not their prunings
    for name in ("cifar10-resnet18", "raw-vgg11", "fig3-vgg11-eps4"):
        ticket = tmp_path / f"paper/{name}-seed0/prune-student-rewind0"
        distill.write_json(ticket / "config.json", {"seed": 0, "rounds": 0})
        row = dict.fromkeys(prune.LOG_COLUMNS, 0)
        distill.write_csv(ticket / "log.csv", prune.LOG_COLUMNS, [row])
    page = tmp_path / "page"
    args = [str(tmp_path), "--figures", f"{tmp_path}/f", "--out", str(page)]
    report.main(args)
    text = page.read_text()
    for row in """\
cifar10, resnet18, student | 44.67 | 41.75 ± 0.35 (2) | 40.75 ± 1.06 | -2.92 | 50.75 ± 1.06 \
| lower | [1]
cifar10, resnet18, student | 46.02 | 46.75 ± 0.35 (2) | 45.75 ± 1.06 | +0.73 | 50.75 ± 1.06 | agrees
cifar100, vgg11, student | 26.62 | 20.00 (1) | 20.00 | -6.62 | 25.00 | lower | [1] |
vgg11, student | 51.98 | 50.00 (1) | 50.00 | -1.98 | 55.00 | unfinished
n50000 | 51.36 |  |  |  |  | missing |
n500 | 41.76 | 50.00 (1) | 43.70 | +8.24 | 48.70 | higher
n1000 | 45.94 | 35.00 ± 35.36 (2) | 35.00 ± 35.36 | -10.94 | 40.00 ± 35.36 | agrees
KL at the end 5.0e-06, then 5.0e-06 (n = 1) | does not show
not finished: cifar10-vgg11-seed0 (1 to go)
, 2 steps of 3, m = 4 (1 to go), 1 probes, amp off
[1] cifar10, 9 images, 2 steps of 3, m = 4, 2 probes, amp off; a GPU, torch 2, commit abc
](f/fig4.png)
](f/table5.png)""".splitlines():
        assert row in text, row
    (tmp_path / "paper/fig4-n500-seed0/run.json").write_text("{")
    problem(report.main, " ".join(args), "run.json", "truncated")


@pytest.mark.parametrize(
    "claim",
    """\
beats_its_teacher: 36 | 34
flat_then_lower: 46 45 46 45 43 40 | 46 45 46 43 43 40 | 46 45 46 45 43 40///34 | 46 45 46 45 43 45
wide_enough: 36 46 46 46 46 47 | 45 46 46 46 46 46 | 36 43 46 46 46 46
batch_norm_is_first: 46/40 45/39 45 45 45 | 46/40 45/41 45 45 45 | 46/40 43 45 45 45
feature_norm_matters: 46 45 41 | 46 41 45
second_round_adds_nothing: 46//1 47//0.01 | 46//1 47//0.5 | 46//1 49//0.01
switch_changes_little: 46 45 | 46 43 | 46 49
student_is_a_ticket: 92 90 91 91.8 | 92 93 91 91.8 | 92 90 91 91""".splitlines()
)
def test_claims_follow_their_rule(claim):
    """Of the cases, best accuracy/first/KL/last a group, the first alone shows the claim."""
    rule, cases = claim.split(": ")
    for i, case in enumerate(cases.split(" | ")):
        groups = []
        for group in case.split():
            best, first, kl, end = [
                float(number or 0) for number in f"{group}///".split("/")[:4]
            ]
            scores = {"linear_paper": best, "kl": kl}
            groups.append(
                [
                    {
                        "first": {"linear_paper": first},
                        "best": scores,
                        "end": {**scores, "linear_paper": end or best},
                        "teacher": {"linear_paper": 35},
                        "rows": [{"weights_left": 50, "best_accuracy": best}]
                    }
                ]
            )
        assert (
            report.judge(getattr(report, rule), groups)[1]
            == ("does not show", "shows")[i == 0]
        )


def test_curves_that_share_no_level_show_no_ticket():
    groups = [
        [{"rows": [{"weights_left": left, "best_accuracy": 90}]}]
        for left in (50, 40, 50, 50)
    ]
    assert report.judge(report.student_is_a_ticket, groups)[1] == "does not show"


@pytest.mark.parametrize("far, shows", [(3, True), (1.5, False)])
def test_claims_on_landscapes_and_the_kl(far, shows):
    points = np.array([[0, 0], [1, 0], [0, 1], [0.25, 0], [-0.25, 0]])
    assert (
        report.asymmetric_valley(
            [{"points": points, "kl": np.array([9, 9, 9, 1, far])}]
        )[1]
        == shows
    )
    assert (
        report.students_share_a_basin([{"error": np.array([[[0, 1, 0]], [[0, far, 0]]])}])[1]
        == shows
    )
    rows = [{"epoch": 0}, {"epoch": 1, "kl": far}, {"epoch": 10, "kl": 1}]
    assert report.kl_peaks_early([{"end": {"distance": 20}, "rows": rows}])[1] == shows


def test_the_committed_report_and_pictures_come_from_the_committed_logs(here):
    problem(report.main, "runs", "runs", "mini")
    logs = REPO / "results"
    report.main(
        [str(logs), "--out", "results/REPORT.md", "--figures", "figures/report"]
    )
    page = Path("results/REPORT.md").read_text().replace(f"`{REPO}/", "`")
    assert page == (REPO / "results/REPORT.md").read_text()
    landscape.main(["plot", str(logs / "cpu/plane.npz"), "--figure", "plane.png"])
    landscape.main(["plot", str(logs / "cpu/connect-seed0.npz"), "--figure", "lines.png"])
    prune.main(
        ["plot", *map(str, logs.glob("cpu/tickets/*-seed?")), "--figure", "tickets.png"]
    )
