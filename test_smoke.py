"""Does it work? On the CPU and, where there is one, on the GPU: bash run_all.sh test"""
import copy
import csv
import hashlib
import http.server
import io
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
import tarfile
import threading
import zipfile
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
from distill import Problem
from results import report

REPO = Path(__file__).parent
CPU = torch.device("cpu")
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
SMALL = ["--arch", "resnet20", "--image-size", "16", "--out-dim", "64", "--batch-size", "16",
         "--device", "cpu", "--amp", "off"]


def draw_images(root, size, train, test):
    """A folder of so many random images of each of three classes, one brighter than the other."""
    rng = np.random.default_rng(0)
    for part, count in (("train", train), ("test", test)):
        for brightness, name in enumerate(("ant", "bee", "cat")):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 100, (size, size, 3)) + 70 * brightness
                Image.fromarray(pixels.astype(np.uint8)).save(root / part / name / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A folder of 60 + 24 images of 16 x 16 pixels."""
    return draw_images(tmp_path_factory.mktemp("images"), 16, 20, 8)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Run in an empty directory, where runs/ and data/ are made; main() leaves signals alone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    return tmp_path


def cli(script, *args, **options):
    """Run a script as a user does; the finished process with its stdout and stderr as text."""
    command = [sys.executable, REPO / script, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


def run(folder, *args, out="runs/a"):
    """A small distillation in this process; returns its checkpoint."""
    distill.main([*SMALL, "--dataset", str(folder), "--out", str(out), *map(str, args)])
    return distill.read_checkpoint(Path(out))


def same(a, b):
    """Two state dicts equal to the last bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def one_line(done, *says):
    """The process ended with exit status 1 and one line on stderr that says all of `says`."""
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert all(text in done.stderr for text in says), done.stderr


def problem(main, *args, says):
    """The same in this process: `main` raises a Problem of one line that says all of `says`."""
    with pytest.raises(Problem) as caught:
        main(list(map(str, args)))
    text = str(caught.value)
    assert "\n" not in text and all(part in text for part in says), text


def usage_error(main, args, says, capsys):
    """`main` ends with exit status 2 and a last line on stderr that says `says`."""
    with pytest.raises(SystemExit) as caught:
        main(list(map(str, args)))
    assert caught.value.code == 2 and says in capsys.readouterr().err.splitlines()[-1]

# ---- Models --------------------------------------------------------------------------------------

@pytest.mark.parametrize("arch, count", [
    ("vgg11", 9_220_480), ("vgg13", 9_404_992), ("vgg16", 14_714_688), ("vgg19", 20_024_384),
    ("resnet18", 11_168_832), ("resnet34", 21_276_992), ("resnet50", 23_500_352),
    ("resnet20", 271_824), ("resnet56", 855_120), ("vit-tiny", 594_048),
    ("vit-small", 2_072_832), ("vit-medium", 3_550_208), ("vit-base", 7_684_608)])  # Table 5
def test_parameter_count_and_embedding_width(arch, count):
    build, r = distill.ARCHS[arch]
    encoder = build(32, "batch")
    assert sum(p.numel() for p in encoder.parameters()) == count
    assert encoder(torch.zeros(2, 3, 32, 32)).shape == (2, r)


@pytest.mark.parametrize("arch, tokens", [("vit-tiny", 5), ("vit-tiny-p8", 17)])
def test_the_vit_attends_over_tokens_in_twelve_layers(arch, tokens):
    encoder, seen = distill.random_network(0, arch, 1).encoder.train(), []
    encoder.layer.register_forward_hook(lambda layer, inputs, output: seen.append(output.shape))
    images = torch.randn(2, 3, 32, 32)
    before = encoder(images)
    assert seen == [(2, tokens, 192)] * 12
    images[0, :, -8:, -8:] += 1  # one image's last patch: seen by its class token alone
    change = (encoder(images) - before).abs().amax(1)
    assert change[0] > 0.01 and change[1] == 0
    bound = 192**-0.5
    for name, p in encoder.layer.self_attn.named_parameters():
        assert bound * 0.95 < p.abs().max() <= bound, name


@pytest.mark.parametrize("norm, groups", [
    ("batch", None), ("instance", 1), ("group", 8), ("layer", math.inf), ("none", None)])
@pytest.mark.parametrize("arch, layers", [("resnet20", 21), ("resnet18", 20)])
def test_norms_of_a_resnet(arch, layers, norm, groups):
    """How many channels share their statistics, by what GroupNorm says of itself (Fig. 11)."""
    modules = list(distill.random_network(0, arch, 1, norm=norm).encoder.modules())
    assert sum(isinstance(m, torch.nn.BatchNorm2d) for m in modules) == layers * (norm == "batch")
    norms = [m for m in modules if isinstance(m, torch.nn.GroupNorm)]
    assert len(norms) == layers * bool(groups)
    assert all(min(groups, m.num_channels) == m.num_channels // m.num_groups for m in norms)


@pytest.mark.parametrize("parts", ["lf/wl", "lf/l", "l/wl", "l/l", "f/wl", "lf/", "wl/wlf"])
def test_parts_of_the_bottleneck(parts):
    network = distill.random_network(0, "resnet20", 512, bottleneck=parts)
    first, last = parts.split("/")
    vectors = network.projector(torch.randn(8, 64))
    logits = network.last_layer(vectors)
    assert vectors.shape == (8, 256 if "l" in first else 2048)
    assert torch.allclose(vectors.norm(dim=1), torch.ones(8)) == ("f" in first)
    assert torch.allclose(logits.norm(dim=1), torch.ones(8)) == (last in ("wlf", ""))
    if "l" in last and "f" not in last:
        weight = network.last_layer.linear.weight
        rows = F.normalize(weight, dim=1) if "w" in last else weight
        assert torch.allclose(logits, vectors @ rows.T, atol=1e-6)
        ratio = (weight.norm(dim=1).mean()).item()
        assert ratio == pytest.approx(0.02 * math.sqrt(vectors.shape[1]), rel=0.02)


@pytest.mark.parametrize("arch", ["vgg11", "resnet18"])
def test_encoder_weights_load_into_torchvisions_own_model(arch):
    theirs = torchvision.models.get_model(arch)
    if arch == "resnet18":
        theirs.conv1 = torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    state = distill.random_network(0, arch, 4).encoder.state_dict()
    result = theirs.load_state_dict(state, strict=False)
    assert not result.unexpected_keys
    assert {key.split(".")[0] for key in result.missing_keys} <= {"classifier", "fc"}


def test_initialisation():
    network = distill.random_network(0, "resnet18", 512)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            assert module.weight.var().item() == pytest.approx(2 / fan_out, rel=0.1)
        elif isinstance(module, torch.nn.BatchNorm2d):
            assert module.momentum == 0.1 and (module.weight == 1).all()
        elif isinstance(module, torch.nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.02)
            assert module.bias is None or (module.bias == 0).all()
    again, other = (distill.random_network(seed, "resnet18", 512).state_dict() for seed in (0, 1))
    assert same(network.state_dict(), again) and not same(again, other)


def test_only_the_encoder_is_autocast():
    network, seen = distill.random_network(0, "resnet20", 8, 16), []
    for part in (network.encoder, network.projector, network.last_layer):
        part.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    network(torch.randn(2, 3, 16, 16), "bf16")
    assert seen == [torch.bfloat16, torch.float32, torch.float32]


@pytest.mark.parametrize("flags, expected", [
    ("avx2 avx512_bf16", "bf16"), ("amx_bf16 amx_tile", "bf16"), ("avx2", "off")])
def test_amp_auto_is_float32_without_batch_norm_and_bf16_where_fast(monkeypatch, flags, expected):
    monkeypatch.setattr(distill, "cpuinfo", lambda: flags)
    assert distill.pick_amp("auto", CPU, "resnet20") == expected
    assert distill.pick_amp("auto", CPU, "vgg11") == "off"
    assert distill.pick_amp("auto", CPU, "resnet20", "group") == "off"
    assert distill.pick_amp("bf16", CPU, "vgg11") == "bf16"


# ---- Student initialisation and loss -------------------------------------------------------------

@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.6, 1.0])
def test_init_eps_is_the_papers_alpha(alpha):
    eps = alpha / (1 - alpha) if alpha < 1 else math.inf
    teacher, independent = (distill.random_network(seed, "resnet20", 64) for seed in (0, 1))
    theta = {name: p.clone() for name, p in independent.named_parameters()}
    student = distill.init_student(teacher, independent, eps)
    for (name, p), q in zip(student.named_parameters(), teacher.parameters()):
        scale = math.sqrt(alpha**2 + (1 - alpha) ** 2)
        assert torch.allclose(p, ((1 - alpha) * q + alpha * theta[name]) / scale, atol=1e-6), name
    assert alpha > 0 or same(student.state_dict(), teacher.state_dict())


def logit_pair(difference, m=4096, seed=0):
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(32, m, generator=generator) / 16
    return teacher, teacher + difference * torch.randn(32, m, generator=generator)


@pytest.mark.parametrize("difference", [1e-6, 1e-3, 1.0])
def test_kl_and_its_gradient_against_float64_autograd(difference):
    teacher, student = logit_pair(difference)
    exact = student.double().requires_grad_()
    kl64 = distill.kl_by_log_softmax(teacher.double(), exact)
    kl64.backward()
    student.requires_grad_()
    kl = distill.KLDivergence.apply(teacher, student)
    kl.backward()
    assert kl.item() == pytest.approx(kl64.item(), rel=5e-3 if difference == 1e-6 else 1e-5, abs=0)
    assert (student.grad - exact.grad).norm() < 1e-4 * exact.grad.norm()


def test_kl_is_never_negative_zero_for_equal_logits_and_at_most_2_for_cosines():
    for seed in range(20):
        assert distill.KLDivergence.apply(*logit_pair(1e-7, m=64, seed=seed)) >= 0
    teacher, _ = logit_pair(0)
    student = teacher.clone().requires_grad_()
    kl = distill.KLDivergence.apply(teacher, student)
    kl.backward()
    assert kl.item() == 0 and (student.grad == 0).all()
    worst = torch.tensor([[1.0] * 8 + [-1.0] * 8])
    assert 1 < distill.KLDivergence.apply(worst, -worst) <= 2


# ---- Data ----------------------------------------------------------------------------------------

def test_leaves_are_the_same_bytes_everywhere():
    data = distill.dead_leaves()
    assert data.train_x.shape == (10_000, 3, 32, 32) and data.test_x.shape == (2_000, 3, 32, 32)
    assert data.train_y.bincount().tolist() == [1000] * 10
    assert data.test_y.bincount().tolist() == [200] * 10
    digest = hashlib.sha256(data.train_x.numpy().tobytes() + data.test_x.numpy().tobytes())
    assert digest.hexdigest().startswith("5a1fdb2fd8dbd2c6c0da07b544a9157c85454f3adc5829bb")


def test_channel_stats_and_normalise_over_several_blocks():
    images = torch.randint(0, 256, (12_500, 3, 8, 8), dtype=torch.uint8)
    images[:5_000, 0], images[10_000:, 1] = 0, 255  # so that each block has its own
    x = distill.normalise(images, distill.channel_stats(images))
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-4)
    assert torch.allclose(x.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-4)


def test_noise_is_gaussian_and_more_of_it_begins_with_the_same_images():
    few, more = (distill.load_data("noise", image_size=8, n=n) for n in (1000, 51_000))
    assert len(few.train_x) == 50_000 and len(more.train_x) == len(more.train_y) == 51_000
    assert torch.equal(more.train_x[:50_000], few.train_x) and len(few.test_x) == 0
    x = distill.normalise(few.train_x, distill.channel_stats(few.train_x))
    assert (x.abs() < 1).float().mean().item() == pytest.approx(0.6827, abs=0.02)
    assert (x**4).mean().item() == pytest.approx(3, abs=0.05)


def test_stratified_subset_keeps_every_class_in_its_share():
    labels = torch.tensor([0] * 600 + [1] * 300 + [2] * 100)
    data = distill.Data(torch.arange(1000), labels, None, None, None)
    subset, again = (distill.stratified_subset(data, 100) for _ in range(2))
    assert subset.train_y.bincount().tolist() == [60, 30, 10]
    assert torch.equal(labels[subset.train_x], subset.train_y)
    assert torch.equal(subset.train_x, again.train_x) and len(subset.train_x.unique()) == 100
    assert distill.stratified_subset(data, None) is distill.stratified_subset(data, 1000) is data
    with pytest.raises(Problem, match="1,000 training images"):
        distill.stratified_subset(data, 1001)


def test_an_image_folder(folder, here):
    data = distill.load_data(str(folder), 16)
    assert data.classes == ["ant", "bee", "cat"] and data.train_y.bincount().tolist() == [20] * 3
    pixels = np.asarray(Image.open(folder / "train/bee/0.png")).transpose(2, 0, 1)
    at = (data.train_x.numpy() == pixels).all((1, 2, 3)).nonzero()[0]
    assert len(at) == 1 and data.train_y[at] == 1
    assert distill.load_data(str(folder), 8).test_x.shape == (24, 3, 8, 8)
    shutil.copytree(folder, "copy")
    Path("copy/test").rename("copy/val")
    assert torch.equal(distill.load_data("copy", 16).test_x, data.test_x)
    Path("copy/val/cat").rename("copy/val/cow")
    problem(distill.main, "--dataset", "copy", says=["same classes"])
    Path("copy/train/ant/0.png").write_bytes(b"no image")
    Path("copy/val/cow").rename("copy/val/cat")
    problem(distill.main, "--dataset", "copy", says=["copy/train/ant/0.png"])
    shutil.rmtree("copy/val")
    problem(distill.main, "--dataset", "copy", says=["copy needs train/<class>/"])


def md5(content):
    return hashlib.md5(content).hexdigest()


def pack(path, files):
    """A .tar.gz or .zip of {name: bytes}; returns its MD5 sum."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
    else:
        with tarfile.open(path, "w:gz") as archive:
            for name, content in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return md5(path.read_bytes())


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A web server on this machine for tmp_path/www, with a miniature CIFAR10 archive."""
    Set, files, rng = torchvision.datasets.CIFAR10, {}, np.random.default_rng(0)
    for name in ("train", "test"):
        pixels = rng.integers(0, 256, (20, 3072), dtype=np.uint8)
        files[name] = pickle.dumps({"data": pixels, "labels": list(range(10)) * 2})
    files["meta"] = pickle.dumps({"label_names": list("abcdefghij")})
    (tmp_path / "www").mkdir()
    inside = {f"{Set.base_folder}/{name}": content for name, content in files.items()}
    monkeypatch.setattr(Set, "tgz_md5", pack(tmp_path / "www" / Set.filename, inside))
    monkeypatch.setattr(Set, "url", "http://127.0.0.1:9/nothing")  # refused at once
    monkeypatch.setattr(Set, "train_list", [["train", md5(files["train"])]])
    monkeypatch.setattr(Set, "test_list", [["test", md5(files["test"])]])
    meta = {"filename": "meta", "key": "label_names", "md5": md5(files["meta"])}
    monkeypatch.setattr(Set, "meta", meta)
    handler = lambda *args: http.server.SimpleHTTPRequestHandler(*args, directory=tmp_path / "www")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


def test_cifar_comes_from_a_mirror_but_the_md5_check_stays(mirror, here, monkeypatch):
    for url in (None, mirror + "nowhere", "no-url"):
        with pytest.raises(Problem, match=r"--dataset leaves.*folder.*--mirror"):
            distill.load_data("cifar10", mirror=url)
    data = distill.load_data("cifar10", mirror=mirror)
    assert data.train_x.shape == (20, 3, 32, 32) and data.train_x.dtype == torch.uint8
    assert data.classes == list("abcdefghij") and data.train_y.tolist() == list(range(10)) * 2
    shutil.rmtree("data")
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "tgz_md5", "0" * 32)
    with pytest.raises(Problem, match="corrupted"):
        distill.load_data("cifar10", mirror=mirror)


def test_stl10_is_its_labelled_images_upright(mirror, here, monkeypatch):
    Set, images, files = torchvision.datasets.STL10, {}, {"class_names.txt": b"a\nb"}
    for part, labels in (("train", [2, 1, 1]), ("test", [1, 2])):
        x = np.zeros((len(labels), 3, 96, 96), np.uint8)
        x[:, 0], x[:, 1] = np.arange(96), 2 * np.arange(96)[:, None]  # redder to the right
        images[part] = x
        files[f"{part}_X.bin"] = x.transpose(0, 1, 3, 2).tobytes()  # a column after the other
        files[f"{part}_y.bin"] = np.array(labels, np.uint8).tobytes()
    inside = {f"{Set.base_folder}/{name}": content for name, content in files.items()}
    monkeypatch.setattr(Set, "tgz_md5", pack(here / "www" / Set.filename, inside))
    for part in images:
        names = [[name, md5(files[name])] for name in (f"{part}_X.bin", f"{part}_y.bin")]
        monkeypatch.setattr(Set, f"{part}_list", names)
    data = distill.load_data("stl10", 96, mirror=mirror)
    assert data.train_y.tolist() == [1, 0, 0] and data.test_y.tolist() == [0, 1]
    assert torch.equal(data.train_x, torch.from_numpy(images["train"]))
    assert distill.load_data("stl10").test_x.shape == (2, 3, 32, 32)


def test_tiny_imagenet_as_it_comes(mirror, here, monkeypatch):
    def image(label):
        content = io.BytesIO()
        Image.new("RGB", (64, 64), (40 + 60 * label,) * 3).save(content, "JPEG")
        return content.getvalue()

    val, files = [2, 0, 1, 0], {"test/images/test_0.JPEG": image(0)}
    for label in range(3):
        for i in range(3):
            files[f"train/n0{label}/images/n0{label}_{i}.JPEG"] = image(label)
    rows = (f"val_{i}.JPEG\tn0{label}\t0\t0\t62\t62\n" for i, label in enumerate(val))
    files["val/val_annotations.txt"] = "".join(rows).encode()
    files |= {f"val/images/val_{i}.JPEG": image(label) for i, label in enumerate(val)}
    inside = {f"tiny-imagenet-200/{name}": content for name, content in files.items()}
    pack(here / "www/tiny-imagenet-200.zip", inside)
    with pytest.raises(Problem, match="tiny-imagenet-200.zip.*corrupted"):
        distill.load_data("tinyimagenet", mirror=mirror)
    assert not Path("data/tiny-imagenet-200").exists()
    download = distill.download_and_extract_archive
    monkeypatch.setattr(distill, "download_and_extract_archive",
                        lambda *args, md5: download(*args))  # whose sum is that of the real one
    data = distill.load_data("tinyimagenet", mirror=mirror)
    assert data.train_y.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    for x, y in ((data.train_x, data.train_y), (data.test_x, data.test_y)):
        assert x.shape == (len(y), 3, 32, 32)
        assert (x.float().mean((1, 2, 3)) - (40 + 60 * y)).abs().max() < 3
    kept = {path.relative_to("data/tiny-imagenet-200").as_posix(): path.read_bytes()
            for path in Path("data/tiny-imagenet-200").glob("**/*") if path.is_file()}
    assert data.test_y.tolist() == val and kept == files  # nothing was moved


def test_cifar5m_follows_cifar10(here, monkeypatch):
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (17, 32, 32, 3), dtype=np.uint8), rng.integers(0, 10, 17)
    images, labels = torch.from_numpy(x).permute(0, 3, 1, 2), torch.from_numpy(y)
    cifar10 = distill.Data(images[:6], labels[:6], images[:2], labels[:2], list("abcdefghij"))
    monkeypatch.setattr(distill, "archive", lambda name, *_: {"cifar10": cifar10}[name])
    with pytest.raises(Problem, match="data/cifar5m holds no part"):
        distill.load_data("cifar5m", n=7)
    Path("data/cifar5m").mkdir(parents=True)
    np.savez("data/cifar5m/part0.npz", X=x[6:10], Y=y[6:10])
    np.savez("data/cifar5m/part1.npz", Y=y[10:], X=x[10:])
    for n in (None, 17, 11, 10, 7):
        data = distill.load_data("cifar5m", n=n)
        assert torch.equal(data.train_x, images[:n]) and torch.equal(data.train_y, labels[:n])
        assert torch.equal(data.test_x, cifar10.test_x)
    Path("data/cifar5m/part1.npz").write_bytes(b"garbage")
    assert len(distill.load_data("cifar5m", n=10).train_x) == 10
    with pytest.raises(Problem, match="part1.npz is damaged"):
        distill.load_data("cifar5m", n=11)

# ---- Training ------------------------------------------------------------------------------------

@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_training_lowers_the_kl_and_leaves_the_teacher_alone(folder, here, device, amp):
    steps, every = (4, 1) if (device, amp) == ("cpu", "fp16") else (40, 4)  # it is slow there
    checkpoint = run(folder, "--steps", steps, "--log-every", every, "--eval-every", steps // 2,
                     "--amp", amp, "--device", device, "--init-eps", "inf")
    fresh = distill.random_network(0, "resnet20", 64, 16)
    assert same({k: v.cpu() for k, v in checkpoint["teacher"].items()}, fresh.state_dict())
    kls = [row["kl"] for row in checkpoint["log"][1:]]
    assert min(kls) > 0 and kls[-1] < kls[0] / (3 if steps == 40 else 1)
    with open("runs/a/log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(0, steps + 1, every))
    assert all(bool(row["knn"]) == (int(row["step"]) % (steps // 2) == 0) for row in rows)
    assert float(rows[-1]["kl"]) == kls[-1] and float(rows[-1]["distance"]) > 0


def by_hand(folder, losses, **shape):
    """SGD with momentum 0.9 and lr 3, a step a loss: the student before, after, and the losses."""
    teacher, student = (distill.random_network(s, "resnet20", 64, 16, **shape) for s in (0, 1))
    start, values = copy.deepcopy(student), []
    images = distill.load_data(str(folder), 16).train_x
    stats, order = distill.channel_stats(images), np.random.default_rng((0, 0)).permutation(60)
    velocity = [torch.zeros_like(p) for p in student.parameters()]
    for i, loss in enumerate(losses):
        x = distill.normalise(images[order[16 * i:16 * (i + 1)]], stats)
        with torch.no_grad():
            target = teacher.eval()(x)
        values.append(loss(target, student.train()(x)))
        gradient = torch.autograd.grad(values[-1], list(student.parameters()))
        with torch.no_grad():
            for p, v, g in zip(student.parameters(), velocity, gradient):
                p -= 3 * v.mul_(0.9).add_(g)
    return start, student, [value.item() for value in values]


@pytest.mark.parametrize("loss, bottleneck", [("kl", "lf/wl"), ("mse", "lf/wl"), ("kl", "lf/l")])
def test_a_step_is_what_the_paper_says(folder, here, loss, bottleneck):
    """Teacher in eval mode, student in train mode, the right images, loss, gradient and update."""
    function = F.mse_loss if loss == "mse" else distill.kl_by_log_softmax
    start, student, values = by_hand(folder, [function] * 2, bottleneck=bottleneck)
    checkpoint = run(folder, "--steps", 2, "--log-every", 1, "--eval-every", 2, "--init-eps", "inf",
                     "--loss", loss, "--optimizer", "sgd", "--lr", 3, "--bottleneck", bottleneck)
    assert [row["kl"] for row in checkpoint["log"][1:]] == pytest.approx(values, rel=1e-3)
    for (name, p), q in zip(student.named_parameters(), start.parameters()):
        moved, expected = checkpoint["student"][name] - q, (p - q).detach()
        assert (moved - expected).norm() < 2e-2 * expected.norm() + 1e-7, name


def test_at_eps_0_without_batch_norm_the_student_stays_exactly_put(folder, here, capsys):
    common = ["--arch", "vgg11", "--image-size", "32", "--steps", 2, "--log-every", 1]
    still = run(folder, *common)
    assert [row["kl"] for row in still["log"][1:]] == [0] * 2 and still["log"][-1]["distance"] == 0
    assert same(still["student"], still["teacher"])
    assert capsys.readouterr().out.count("take --init-eps 1e-10") == 1
    pushed = run(folder, *common, "--loss", "kl-log-softmax", out="runs/b")
    assert pushed["log"][-1]["distance"] > 0
    assert "take --init-eps" not in capsys.readouterr().out


def test_the_fixed_point_is_unstable_under_adam():
    """Where gradients are far below Adam's eps it is descent at rate lr/eps = 1e5, stable for
    curvatures < 38·eps/lr."""
    data = distill.dead_leaves(n_train=4, n_test=1)
    images = distill.normalise(data.train_x, distill.channel_stats(data.train_x))
    teacher, student = (distill.random_network(0, "vgg11", 1024) for _ in range(2))
    with torch.no_grad():
        target = teacher(images)
    theta, theta_t = list(student.parameters()), list(teacher.parameters())
    torch.manual_seed(0)
    direction = [torch.randn_like(p) for p in theta]
    for _ in range(5):  # power iteration: the gradient at the teacher + δ·v is δ·H·v
        norm = distill.distance(direction, [0 * p for p in direction])
        with torch.no_grad():
            for p, q, v in zip(theta, theta_t, direction):
                p.copy_(q + 0.01 * v / norm)
        kl = distill.KLDivergence.apply(target, student(images))
        direction = [g / 0.01 for g in torch.autograd.grad(kl, theta)]
    curvature = distill.distance(direction, [0 * p for p in direction])
    assert curvature == pytest.approx(2 * kl.item() / 0.01**2, rel=0.1)  # KL = λδ²/2
    assert curvature > 1000 * 38 * 1e-8 / 1e-3


def test_a_second_round_has_the_first_rounds_student_as_teacher(folder, here):
    first = run(folder, "--steps", 20, "--eval-every", 20)
    second = run(folder, "--steps", 2, "--log-every", 1, "--teacher", "runs/a", out="runs/b")
    assert same(second["teacher"], first["student"])
    assert 0 < second["log"][1]["kl"] < first["log"][1]["kl"] / 30
    probes = json.loads(Path("runs/b/run.json").read_text())["teacher_probes"]
    assert probes == {name: first["log"][-1][name] for name in probes} and len(probes) == 4
    run(folder, "--steps", 21, "--resume")  # the first goes on, the second keeps the teacher it had
    resumed = run(folder, "--steps", 3, "--teacher", "runs/a", "--resume", out="runs/b")
    assert resumed["step"] == 3 and same(resumed["teacher"], second["teacher"])
    command = [*SMALL, "--dataset", folder, "--steps", 1, "--out", "runs/d", "--teacher"]
    problem(distill.main, *command, "runs/a", "--out-dim", 32, says=["runs/a", "--out-dim 64"])
    problem(distill.main, *command, "runs/nowhere", says=["no checkpoint at runs/nowhere"])
    assert not Path("runs/d").exists()


def test_resume_is_bit_identical_and_run_json_tells_where_it_was_made(folder, here, monkeypatch):
    options = ["--n-samples", 30, "--log-every", 1, "--seed", 3]
    whole = run(folder, *options, "--steps", 7, "--eval-every", 7)
    run(folder, *options, "--steps", 3, "--eval-every", 3, out="runs/b")
    monkeypatch.setattr(distill, "provenance", lambda device: {"hardware": "elsewhere"})
    resumed = run(folder, *options, "--steps", 7, "--eval-every", 7, "--resume", out="runs/b")
    assert same(whole["student"], resumed["student"]) and resumed["step"] == 7
    for mine, theirs in zip(*(c["optimizer"]["state"].values() for c in (whole, resumed))):
        assert same(mine, theirs)
    last = [{key: c["log"][-1][key] for key in ("kl", "distance", "knn")} for c in (whole, resumed)]
    assert last[0] == last[1]
    about = json.loads(Path("runs/b/run.json").read_text())
    assert about.items() >= resumed["config"].items() and about["n_images"] == 30
    assert about["total_steps"] == 7 and len(about["teacher_probes"]) == 4
    first, second = about["made"]
    assert set(first) == {"hardware", "torch", "commit", "from_step"} and first["from_step"] == 0
    assert second == {"hardware": "elsewhere", "from_step": 3}


def test_a_finished_run_is_left_alone_but_its_log_is_completed(folder, here, capsys):
    run(folder, "--steps", 2)
    before, log = Path("runs/a/last.pt").read_bytes(), Path("runs/a/log.csv").read_bytes()
    Path("runs/a/log.csv").write_text("step\n")  # killed between the two
    run(folder, "--steps", 2, "--resume")
    assert "all 2 steps are done" in capsys.readouterr().out
    assert Path("runs/a/last.pt").read_bytes() == before
    assert Path("runs/a/log.csv").read_bytes() == log
    Path("runs/a/last.pt").unlink()
    problem(distill.main, *SMALL, "--dataset", folder, "--out", "runs/a", "--resume",
            says=["runs/a holds a log.csv without its last.pt"])
    assert Path("runs/a/log.csv").read_bytes() == log


def test_a_run_killed_while_it_probes_goes_on_to_the_same_log(folder, here, monkeypatch):
    options = ["--steps", 4, "--log-every", 1, "--eval-every", 2, "--init-eps", "inf"]
    whole, evaluate, calls = run(folder, *options), probe.evaluate, itertools.count(1)
    kill = lambda *args: evaluate(*args) if next(calls) != 3 else 1 / 0  # after step 2
    monkeypatch.setattr(probe, "evaluate", kill)
    with pytest.raises(ZeroDivisionError):
        run(folder, *options, out="runs/b")
    assert distill.read_checkpoint(Path("runs/b"))["step"] == 0
    resumed = run(folder, *options, "--resume", out="runs/b")
    assert same(resumed["student"], whole["student"])
    for mine, theirs in zip(resumed["log"], whole["log"], strict=True):
        assert {**mine, "images_per_s": 0, "kl": 0} == {**theirs, "images_per_s": 0, "kl": 0}


def test_the_order_of_the_data_depends_on_seed_and_epoch_alone():
    def order(start, seed=0):
        seen, weight = [], torch.nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.SGD([weight], 0.1)

        def batch_loss(index, step):
            assert optimizer.param_groups[0]["lr"] == 1 + step
            seen.append(index.tolist())
            return weight.sum()
        steps = distill.train(batch_loss, 10, optimizer, torch.amp.GradScaler("cpu", enabled=False),
                              lambda step: 1 + step, steps=6, batch_size=4, seed=seed, start=start)
        assert [step for step, _ in steps] == list(range(start + 1, 7))
        return seen
    whole = order(0)
    assert [len(batch) for batch in whole] == [4, 4, 2, 4, 4, 2]  # the last partial batch is kept
    assert sorted(sum(whole[:3], [])) == sorted(sum(whole[3:], [])) == list(range(10))
    assert whole[:3] != whole[3:] and order(4) == whole[4:] and order(0, seed=1) != whole


def test_sigterm_saves_and_resume_goes_on_to_the_same_result(folder, tmp_path):
    command = [*SMALL, "--dataset", folder, "--log-every", 1, "--eval-every", 1000]
    process = subprocess.Popen([sys.executable, REPO / "distill.py", *map(str, command), "--out",
                                "a", "--steps", "1000"], cwd=tmp_path, stdout=subprocess.PIPE,
                               text=True)
    for line in process.stdout:
        if re.match(r" +3 ", line):
            process.send_signal(signal.SIGTERM)
            break
    assert "--resume goes on" in process.stdout.read()
    assert process.wait() == 128 + signal.SIGTERM
    stopped = distill.read_checkpoint(tmp_path / "a")["step"]
    assert 3 <= stopped < 1000
    ends = []
    for out in ("a", "b"):
        done = cli("distill.py", *command, "--out", out, "--steps", stopped + 2, "--resume",
                   cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        ends.append(distill.read_checkpoint(tmp_path / out)["student"])
    assert same(*ends)


def test_load_checkpoint(folder, here):
    checkpoint = run(folder, "--steps", 1)
    for path in ("runs/a", "runs/a/last.pt", Path("runs/a")):
        teacher, student, config = distill.load_checkpoint(path)
        assert config["arch"] == "resnet20" and not (teacher.training or student.training)
        assert not any(p.requires_grad for p in student.parameters())
        assert torch.equal(student[0].weight, checkpoint["student"]["encoder.0.weight"])
        assert torch.equal(teacher[0].weight, checkpoint["teacher"]["encoder.0.weight"])
        assert student(torch.randn(2, 3, 16, 16)).shape == (2, 64)


# ---- Probes --------------------------------------------------------------------------------------

def clusters(n, r=8, n_classes=3, spread=1.0, seed=0):
    centres = torch.randn(n_classes, r, generator=torch.Generator().manual_seed(99)) * 3
    y = torch.arange(n) % n_classes
    noise = torch.randn(n, r, generator=torch.Generator().manual_seed(seed))
    return centres[y] + spread * noise, y


def test_probes_on_separable_and_on_random_labels():
    (x, y), (test_x, test_y) = clusters(9000), clusters(300, seed=1)
    wrong = torch.randint(3, (9000,), generator=torch.Generator().manual_seed(2))
    for labels, low, high in ((y, 95, 100), (wrong, 0, 60)):
        heads = x[None], labels, test_x[None], test_y, 3
        for score in (probe.linear_probe_paper(*heads)[-1], probe.linear_probe_converged(*heads)):
            assert low <= score <= high
    assert probe.knn_probe(x, y, test_x, test_y, 3) > 95


def test_the_converged_probe_is_that_of_logistic_regression():
    """Against L-BFGS in float64, on features that are badly conditioned on purpose."""
    mix = torch.randn(12, 12, generator=torch.Generator().manual_seed(3))
    (x, y), (test_x, test_y) = clusters(600, 12, spread=4.0), clusters(2000, 12, spread=4.0, seed=1)
    x, test_x = ((x @ mix * torch.logspace(-3, 3, 12)).double() for x in (x, test_x))
    mean, std = x.mean(0), x.std(0)
    weight, bias = (torch.zeros(*shape, dtype=torch.float64, requires_grad=True)
                    for shape in ((12, 3), (3,)))
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=1000, tolerance_grad=1e-9,
                                  tolerance_change=0, line_search_fn="strong_wolfe")

    def objective():
        optimizer.zero_grad()
        logits = (x - mean) / std @ weight + bias
        loss = F.cross_entropy(logits, y) + 1e-3 / 2 * weight.square().sum()
        loss.backward()
        return loss
    optimizer.step(objective)
    expected = probe.accuracy((test_x - mean) / std @ weight + bias, test_y)
    score = probe.linear_probe_converged(x.float()[None], y, test_x.float()[None], test_y, 3)
    assert score.item() == pytest.approx(expected.item(), abs=0.051)


def test_collapsed_features_and_heads_side_by_side():
    sets = [(clusters(300, spread=spread), clusters(200, spread=spread, seed=1))
            for spread in (0.5, 2, 4)]
    y, test_y = sets[0][0][1], sets[0][1][1]
    x, test_x = (torch.stack([pair[part][0] for pair in sets]) for part in (0, 1))
    for probing in (probe.linear_probe_paper, probe.linear_probe_converged):
        together = probing(x, y, test_x, test_y, 3)
        alone = [probing(x[i:i + 1], y, test_x[i:i + 1], test_y, 3) for i in range(3)]
        assert torch.allclose(together, torch.cat(alone, -1), atol=0.51)
    constant = torch.ones(1, 300, 8)
    score = probe.linear_probe_converged(constant, y, constant[:, :200], test_y, 3)
    assert score.item() == pytest.approx(100 / 3, abs=1)


def test_knn_against_brute_force_and_its_ties():
    (x, y), (test_x, test_y) = clusters(200, spread=6.0), clusters(70, spread=6.0, seed=1)
    correct = 0
    for query, label in zip(test_x, test_y):
        nearest = (x - query).norm(dim=1).argsort()[:20]
        correct += np.bincount(y[nearest].numpy(), minlength=3).argmax() == label.item()
    assert probe.knn_probe(x, y, test_x, test_y, 3) == pytest.approx(100 * correct / 70)
    x, y = torch.tensor([[0.0], [1.0], [10.0], [11.0]]), torch.tensor([2, 1, 0, 0])
    query, label = torch.tensor([[0.4]]), torch.tensor([1])  # 1 and 2 tie: the lower wins
    assert probe.knn_probe(x, y, query, label, 3, k=2) == 100


def test_probing_leaves_the_student_in_train_mode(folder):
    encoder = distill.random_network(0, "resnet20", 8, 16).encoder.train()
    before = copy.deepcopy(encoder.state_dict())
    scores = probe.evaluate(encoder, distill.load_data(str(folder), 16))
    assert encoder.training and same(before, encoder.state_dict())
    assert set(scores) == {"linear_paper", "linear_paper_last", "linear_converged", "knn"}
    assert all(0 <= score <= 100 for score in scores.values())


def test_probe_table_json_figure_and_resume(folder, here, capsys, monkeypatch):
    for seed in (0, 1):
        run(folder, "--steps", 2, "--seed", seed, out=f"runs/s-seed{seed}")
    capsys.readouterr()
    runs = ["runs/s-seed0", "runs/s-seed1", "--json", "summary.json"]
    probe.main([*runs, "--figure", "out/f.png"])
    text, summary = capsys.readouterr().out, json.loads(Path("summary.json").read_text())
    assert re.search(r"teacher resnet20 \(2 seeds\) .* ± ", text)
    assert re.search(r"student s \(2 seeds\) .* ± .*\([+-]", text)
    assert list(summary) == ["raw pixels", "teacher of runs/s-seed0", "student runs/s-seed0",
                             "teacher of runs/s-seed1", "student runs/s-seed1"]
    last = distill.read_checkpoint(Path("runs/s-seed1"))["log"][-1]
    student = summary["student runs/s-seed1"]
    assert all(student[name] == last[name] for name in ("linear_paper", "linear_converged", "knn"))
    assert student.items() >= {"train_images": 60, "test_images": 24, "amp": "off"}.items()
    assert Image.open("out/f.png").size[0] > 1000
    problem(probe.main, *runs, says=["summary.json exists", "--resume"])
    monkeypatch.setattr(probe, "evaluate", lambda *args: 1 / 0)
    probe.main([*runs, "--resume"])
    table = lambda text: text[text.index("accuracy in %"):].replace("the picture: out/f.png\n", "")
    assert table(capsys.readouterr().out) == table(text)
    problem(probe.main, *runs, "--resume", "--amp", "bf16", says=["--amp"])
    with pytest.raises(ZeroDivisionError):
        probe.main(["--teacher", "resnet20", "--dataset", str(folder), "--seeds", "4"])


# ---- The command line and bad input --------------------------------------------------------------

@pytest.mark.parametrize("main, args, says", [
    (distill.parse_args, ["--arch", "resnet19"], "resnet18"),
    (distill.parse_args, ["--init-eps", "nan"], "at least 0"),
    (distill.parse_args, ["--steps", "0"], "at least 1"),
    (distill.parse_args, ["--seed", str(2**63)], "at most"),
    (distill.parse_args, ["--dataset", "noise"], "--probe-dataset"),
    (distill.parse_args, ["--colour"], "--colour"),
    (distill.parse_args, ["--arch", "vgg11", "--image-size", "16"], "at least 32"),
    (distill.parse_args, ["--arch", "vgg11", "--norm", "group"], "for ResNets"),
    (distill.parse_args, ["--arch", "vit-base-p8", "--image-size", "36"], "patch size, 8"),
    (distill.parse_args, ["--bottleneck", "w/l"], "w goes with l"),
    (distill.parse_args, ["--bottleneck", "lf/wl/l"], "two layers"),
    (probe.parse_args, [], "name one or more run directories"),
    (probe.parse_args, ["a", "--figure", "a.txt"], ".png"),
    (prune.parse_args, ["a", "--rate", "1"], "at most"),
    (prune.parse_args, ["a", "--rewind-epoch", "3", "--epochs", "3"], "--rewind-epoch 3 is beyond"),
    (landscape.main, [], "command"), (landscape.main, ["plain"], "plane"),
    (landscape.main, ["plane", "a", "--view", "shared"], "two runs"),
    (landscape.main, ["plane", "a", "--x", "1", "0"], "--x"),
    (landscape.main, ["plane", "a", "--out", "a.png"], ".npz"),
    (landscape.main, ["connect", "a", "--copies", "1"], "at least 2"),
    (landscape.main, ["plot", "a.npz", "--kl-range", "1", "0"], "--kl-range")])
def test_usage_errors_exit_2(main, args, says, capsys):
    usage_error(main, args, says, capsys)


def test_help_and_settings_that_fit(capsys):
    for main in (distill.parse_args, probe.parse_args, prune.parse_args, landscape.plane_args,
                 landscape.connect_args):
        with pytest.raises(SystemExit) as caught:
            main(["--help"])
        assert caught.value.code == 0 and "(default: data)" in capsys.readouterr().out
    for args in (["--arch", "vit-tiny-p8", "--image-size", "24"], ["--bottleneck", "/"],
                 ["--norm", "group"], ["--dataset", "noise", "--probe-dataset", "leaves"]):
        distill.parse_args(args)


def test_errors_are_one_line(folder, here):
    run(folder, "--steps", 1)
    good = Path("runs/a/last.pt").read_bytes()
    one_line(cli("distill.py", "--dataset", "cifar11"), "cifar11", "cifar10", "leaves")
    Path("evil.pt").write_bytes(pickle.dumps(print))  # a pickle that names code: refused, not run
    one_line(cli("probe.py", "evil.pt"), "evil.pt is truncated or no checkpoint")
    command = [*SMALL, "--dataset", folder, "--out", "runs/a", "--steps", 2]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # a full disk
    one_line(cli("distill.py", *command, "--resume", preexec_fn=limit), "last.pt", "disk")
    assert Path("runs/a/last.pt").read_bytes() == good
    assert sorted(os.listdir("runs/a")) == ["last.pt", "log.csv", "run.json"]


def test_bad_checkpoints(folder, here):
    run(folder, "--steps", 1)
    good = Path("runs/a/last.pt").read_bytes()
    for length in (0, 1, 100, 5000, len(good) - 1):  # torch raises another error for each
        Path("cut.pt").write_bytes(good[:length])
        problem(probe.main, "cut.pt", says=["cut.pt is truncated"])
    Path("runs/a/last.pt").write_bytes(good[:5000])
    problem(distill.main, *SMALL, "--dataset", folder, "--out", "runs/a", "--resume",
            says=["truncated"])
    assert Path("runs/a/last.pt").read_bytes() == good[:5000]  # nothing was overwritten
    torch.save({"weights": torch.zeros(3)}, "foreign.pt")
    problem(probe.main, "foreign.pt", says=["not a checkpoint of distill.py"])
    distill.save_checkpoint(Path("old.pt"), "distill.py", config={"arch": "vit"})
    problem(probe.main, "old.pt", says=["does not fit"])
    problem(probe.main, "runs/nowhere", says=["no checkpoint"])
    problem(probe.main, "--teacher", "resnet20", "--dataset", "noise", says=["no labels"])
    Path("file").touch()
    problem(distill.main, *SMALL, "--dataset", folder, "--out", "file", says=["cannot write"])


def test_a_run_is_neither_overwritten_nor_mixed_nor_lost(folder, here):
    checkpoint = run(folder, "--steps", 2)
    before = Path("runs/a/last.pt").read_bytes()
    command = [*SMALL, "--dataset", folder, "--out", "runs/a", "--steps", 4]
    problem(distill.main, *command, says=["--resume"])
    for option, was, value in (("--arch", "resnet20", "resnet56"), ("--lr", 0.001, 0.1),
                               ("--amp", "off", "fp16"), ("--seed", 0, 1)):
        problem(distill.main, *command, "--resume", option, value,
                says=[f"{option} {was}, not {value}"])
    assert Path("runs/a/last.pt").read_bytes() == before
    checkpoint["student"]["projector.0.weight"][0, 0] = math.nan
    torch.save(checkpoint, "runs/a/last.pt")
    before = Path("runs/a/last.pt").read_bytes()
    problem(distill.main, *command, "--resume", says=["no longer finite by step 4", "--lr"])
    assert Path("runs/a/last.pt").read_bytes() == before

# ---- Pruning -------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def pair(folder, tmp_path_factory):
    """Two small distilled runs with one teacher, at ε = 0 and ε = inf."""
    root = tmp_path_factory.mktemp("pair")
    for name, eps in (("near", 0), ("far", "inf")):
        run(folder, "--init-eps", eps, "--steps", 6, out=root / name)
    return root


def prune_run(pair, out, *args):
    """A small pruning curve in this process: 3 trainings of 3 epochs of 4 steps."""
    prune.main([str(pair / "near"), "--epochs", "3", "--batch-size", "16", "--rounds", "2",
                "--device", "cpu", "--amp", "off", "--out", str(out), *map(str, args)])
    out = f"{out}-control" if "--control" in args else out
    return distill.read_checkpoint(Path(out), "prune.py")


def curve(out):
    """The log of a curve without its times."""
    with open(Path(out) / "log.csv", newline="") as file:
        return [{**row, "seconds": 0} for row in csv.DictReader(file)]


def test_augment_flips_and_crops_whole_images():
    images = torch.randint(1, 256, (200, 3, 8, 8), dtype=torch.uint8)
    crops, padded, seen = distill.augment(images, seed=0, step=5), F.pad(images, [4] * 4), set()
    for image, flipped, crop in zip(padded, padded.flip(3), crops):
        places = itertools.product(enumerate((image, flipped)), range(9), range(9))
        seen.add(next((is_flipped, y, x) for (is_flipped, source), y, x in places
                      if torch.equal(source[:, y:y + 8, x:x + 8], crop)))
    assert len(seen) > 100 and {s[0] for s in seen} == {0, 1}
    assert {s[1] for s in seen} == {s[2] for s in seen} == set(range(9))
    assert torch.equal(crops, distill.augment(images, seed=0, step=5))
    assert not torch.equal(crops, distill.augment(images, seed=0, step=6))
    assert not torch.equal(crops, distill.augment(images, seed=1, step=5))


def test_the_threshold_is_global_and_the_control_keeps_the_counts_of_each_layer():
    weights = {"small": torch.tensor([[0.1, -0.2], [0.3, 0.4]]),
               "large": torch.tensor([-1.0, 2.0, 3.0, 4.0])}
    everything = {name: torch.ones_like(w, dtype=torch.bool) for name, w in weights.items()}
    mask = prune.magnitude_mask(weights, everything, keep=4)  # half of each layer, if by layers
    assert not mask["small"].any() and mask["large"].all()
    mask = prune.magnitude_mask(weights, everything, keep=6)
    assert mask["small"].tolist() == [[False, False], [True, True]]
    weights["small"][0, 0] = 9.0  # what is pruned does not come back, however large
    again = prune.magnitude_mask(weights, mask, keep=5)
    assert again["small"].tolist() == [[False, False], [False, True]] and again["large"].all()
    ones = {"w": torch.ones(10)}
    ties = prune.magnitude_mask(ones, {"w": torch.ones(10, dtype=torch.bool)}, keep=7)
    assert ties["w"].sum() == 7
    alive = {"w": torch.arange(1000) % 2 == 0}
    ticket = {"w": torch.arange(1000) % 4 == 0}
    random, other = (prune.random_mask(alive, ticket, seed)["w"] for seed in (0, 1))
    assert random.sum() == 250 and not (random & ~alive["w"]).any()
    assert not torch.equal(random, other) and not torch.equal(random, ticket["w"])


@pytest.mark.parametrize("everything, count", [
    (False, 271_824 + 640 - 2 * (16 * 7 + 32 * 7 + 64 * 7)), (True, 271_824 + 650)])
def test_what_is_pruned(everything, count):
    network = distill.classifier(distill.random_network(0, "resnet20", 1).encoder, 64, 10, seed=0)
    weights = prune.prunable(network, everything)
    assert {"head.weight", "encoder.0.weight"} <= weights.keys()
    assert ("head.bias" in weights) == ("encoder.1.weight" in weights) == everything  # a batch norm
    assert sum(p.numel() for p in weights.values()) == count


@pytest.mark.parametrize("args", [
    [], ["--rewind-epoch", 1, "--init", "random"], ["--prune-all", "--rate", 0.5, "--amp", "bf16"],
    ["--control", "random"]])
def test_rewinding_is_bit_identical_but_for_the_mask(pair, here, monkeypatch, args):
    """What each round starts from: network with its buffers, optimiser, step, order of the data,
    crops and learning rates; and after each of its steps what is pruned is 0.
    """
    rounds, train = [], distill.train

    def spy(batch_loss, n, optimizer, scaler, learning_rate, *, start, **options):
        network = batch_loss.__closure__[[*batch_loss.__code__.co_freevars].index("network")]
        network = network.cell_contents
        weights = prune.prunable(network, "--prune-all" in args)
        round_ = {"start": start, "indices": [], "lr": [], "zeros": [],
                  **copy.deepcopy({"network": network.state_dict(),
                                   "optimizer": optimizer.state_dict()["state"]})}
        rounds.append(round_)

        def watched(index, step):
            round_["indices"].append(index.tolist())
            round_["lr"].append(optimizer.param_groups[0]["lr"])
            round_["zeros"].append(sum((w == 0).sum().item() for w in weights.values()))
            return batch_loss(index, step)
        return train(watched, n, optimizer, scaler, learning_rate, start=start, **options)
    monkeypatch.setattr(distill, "train", spy)
    checkpoint = prune_run(pair, "p", *args)
    point, (first, *later) = checkpoint["rewinding_point"], rounds
    skipped = 4 if "--rewind-epoch" in args else 0
    total = sum(m.numel() for m in checkpoint["mask"].values())
    rate = 0.5 if "--rate" in args else 0.2
    assert first["lr"] == pytest.approx([0.05] * 6 + [0.005] * 3 + [0.0005] * 3)
    assert point["step"] == skipped and len(later) == 2
    for number, start in enumerate(later, 1):
        pruned = total - round(total * (1 - rate) ** number)
        assert start["start"] == skipped and min(start["zeros"]) >= pruned
        for part in ("indices", "lr"):
            assert start[part] == first[part][skipped:]
        for key, state in point["optimizer"]["state"].items():
            mine = start["optimizer"][key]["momentum_buffer"]
            assert torch.equal(mine, state["momentum_buffer"])
        changed = 0
        for name, q in point["network"].items():
            kept = start["network"][name] == q
            assert (start["network"][name][~kept] == 0).all(), name
            changed += (~kept).sum().item()
        assert changed <= pruned
    last = {name: (checkpoint["network"][name] != 0) & ~m for name, m in checkpoint["mask"].items()}
    assert not any(revived.any() for revived in last.values())
    assert sum(m.sum().item() for m in checkpoint["mask"].values()) == total - pruned
    if not args or "random" in args:  # the student's own weights (or its teacher's), nothing else
        encoder = distill.load_checkpoint(pair / "near")["--init" not in args]
        if skipped == 0:
            assert all(torch.equal(point["network"]["encoder." + name], t)
                       for name, t in encoder.state_dict().items())


def test_a_round_that_prunes_nothing_repeats_the_first_and_it_learns(pair, here):
    checkpoint = prune_run(pair, "p", "--rewind-epoch", 1, "--rate", 1e-9, "--rounds", 0)
    again = prune_run(pair, "p", "--rewind-epoch", 1, "--rate", 1e-9, "--resume")
    assert same(checkpoint["network"], again["network"])
    assert len({row["final_accuracy"] for row in curve("p")}) == 1 and len(curve("p")) == 3
    prune_run(pair, "q", "--init", "random", "--rounds", 0, "--epochs", 10, "--batch-size", 8)
    assert float(curve("q")[0]["final_accuracy"]) > 90  # three classes, which differ in brightness


@pytest.mark.parametrize("killed_at", ["save", "csv", "step"])
def test_a_killed_curve_goes_on_to_the_same_numbers(pair, here, monkeypatch, killed_at):
    args = ["--rewind-epoch", 1]
    whole, calls = prune_run(pair, "whole", *args), itertools.count(1)
    name, when = {"save": ("save_checkpoint", 2), "csv": ("write_csv", 2),
                  "step": ("apply_mask", 18)}[killed_at]
    function = getattr(prune, name)
    kill = lambda *args, **options: function(*args, **options) if next(calls) != when else 1 / 0
    with monkeypatch.context() as patch:
        patch.setattr(prune, name, kill)
        with pytest.raises(ZeroDivisionError):
            prune_run(pair, "killed", *args)
    problem(prune.main, pair / "near", "--out", "killed", says=["--resume"])
    resumed = prune_run(pair, "killed", *args, "--resume")
    assert curve("killed") == curve("whole") and same(whole["network"], resumed["network"])
    longer, longest = (prune_run(pair, out, *args, "--rounds", 3, *resume)
                       for out, resume in (("killed", ["--resume"]), ("fresh", [])))
    assert same(longer["network"], longest["network"]) and len(curve("killed")) == 4


def test_prune_refuses_bad_input_and_overwrites_nothing(folder, pair, here):
    prune_run(pair, "p", "--rounds", 0)
    command = [pair / "near", "--epochs", 3, "--batch-size", 16, "--rounds", 1, "--amp", "off",
               "--out", "p", "--resume"]
    before = {path: path.read_bytes() for path in Path("p").iterdir()}
    assert {path.name for path in before} == {"last.pt", "log.csv", "config.json"}
    for option, was, value in (("--init", "student", "random"), ("--lr", 0.05, 0.3),
                               ("--seed", 0, 1), ("--n-samples", None, 30)):
        problem(prune.main, *command, option, value, says=[f"{option} {was}, not {value}"])
    problem(prune.main, pair / "far", *command[1:], says=["--starting-weights"])
    problem(prune.main, *command, "--dataset", "noise", says=["--dataset"])
    problem(prune.main, *command[:-3], "--out", "q", "--rounds", 100, says=["last weight"])
    problem(prune.main, *command[:-3], "--out", "q", "--lr", 1e30, says=["not finite", "--lr"])
    problem(prune.main, "p", says=["not a checkpoint of distill.py"])
    assert before == {path: path.read_bytes() for path in Path("p").iterdir()}


def test_plot_draws_means_over_seeds_from_the_logs_alone(pair, here, capsys):
    prune_run(pair, "made", "--rounds", 0)
    config = json.loads(Path("made/config.json").read_text())

    def write(out, best, **settings):
        Path(out).mkdir(parents=True)
        Path(out, "config.json").write_text(json.dumps({**config, **settings}))
        rows = "".join(f"{i},{100 * 0.8**i},{accuracy}\n" for i, accuracy in enumerate(best))
        Path(out, "log.csv").write_text(f"round,weights_left,best_accuracy\n{rows}")
    write("runs/0/prune-a", (60, 50), seed=0, run="runs/0")
    write("runs/1/prune-a", (62, 54, 44), seed=1, run="runs/1")  # one round more
    write("runs/0/prune-b", (60, 40), init="random")
    write("runs/0/prune-a-control", (60, 30), control="random")
    capsys.readouterr()
    prune.main(["plot", "runs/0", "runs/1/prune-a", "runs/1", "--figure", "f.png"])  # one twice
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [" ".join(line) for line in lines[1:4]] == [
        "[1] student, rewound to epoch 0 (n=2)",
        "[2] student, rewound to epoch 0, random masks (n=1)",
        "[3] random init, rewound to epoch 0 (n=1)"]
    assert lines[5] == ["100.00", "61.00", "±", "1.41", "60.00", "60.00"]
    assert lines[6] == ["80.00", "52.00", "±", "2.83", "30.00", "40.00"] and len(lines) == 8
    write("runs/2/prune-a", (70, 71), epochs=9, seed=2)  # another experiment: not averaged
    prune.main(["plot", "runs/0", "runs/2", "--figure", "g.png"])
    assert "(runs/2/prune-a) (n=1)" in capsys.readouterr().out
    Path("stub").mkdir()
    Path("stub/matplotlib.py").write_text(
        "raise ModuleNotFoundError('No module named matplotlib', name='matplotlib')")
    done = cli("prune.py", "plot", "runs/0", env={**os.environ, "PYTHONPATH": "stub"})
    one_line(done, "matplotlib", "requirements.txt")
    assert "60.00" in done.stdout  # the numbers come out without it
    problem(prune.main, "plot", "nowhere", says=["no pruning curve in nowhere"])
    Path("runs/0/prune-b/log.csv").write_text("round,seconds\n1,2\n")
    problem(prune.main, "plot", "runs/0", says=["runs/0/prune-b", "no readable curve"])


# ---- Landscapes ----------------------------------------------------------------------------------

def lay(pair, out, *args, runs=("near", "far")):
    """landscape.py plane on those runs, 5 x 5 unless told; its config and arrays."""
    landscape.main(["plane", *(str(pair / name) for name in runs), "--grid", "5", "--device", "cpu",
                    "--amp", "off", "--out", str(out), *map(str, args)])
    return landscape.read_npz(Path(out))


def toy_anchors(seed=0, n=3):
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(shape, generator=generator) for shape in ((4, 3), (5,), (2, 2, 2))]
            for _ in range(n)]


def flat(parameters):
    return torch.cat([p.detach().double().reshape(-1) for p in parameters]).numpy()


@pytest.mark.parametrize("axes", ["barycentric", "orthonormal"])
def test_points_of_a_plane_against_the_closed_form(axes):
    anchors, network = toy_anchors(), [torch.zeros_like(p) for p in toy_anchors()[0]]
    products = landscape.inner_products(anchors)
    coordinates = landscape.plane_basis(products, axes)
    grid = np.meshgrid(np.linspace(-3, 4, 5), np.linspace(-2, 5, 6))
    points = np.concatenate([coordinates, np.stack(grid, axis=2).reshape(-1, 2)])
    a, b, c = map(flat, anchors)
    if axes == "barycentric":
        expected = a + points @ np.stack([b - a, c - a])
    else:  # a basis made without the code; the point of least norm is the part of a beside it
        e1 = (b - a) / np.linalg.norm(b - a)
        e2 = (c - a) - (c - a) @ e1 * e1
        e2 /= np.linalg.norm(e2)
        expected = a - a @ e1 * e1 - a @ e2 * e2 + points @ np.stack([e1, e2])
    coefficients = landscape.to_coefficients(points, coordinates)
    for i, (point, theta) in enumerate(zip(coefficients, expected)):
        landscape.place(network, anchors, point)
        assert flat(network) == pytest.approx(theta, rel=1e-5, abs=1e-5)
        assert i > 2 or all(torch.equal(p, q) for p, q in zip(network, anchors[i]))  # to the bit
    norms = landscape.norms(coefficients, products)
    assert norms == pytest.approx(np.linalg.norm(expected, axis=1))


def test_points_that_span_no_plane_are_refused():
    a, b, c = toy_anchors()
    mix = [p + 2.5 * (q - p) for p, q in zip(a, b)]
    nearly = [p + 1e-8 * q for p, q in zip(a, c)]
    for anchors in ([a, b, a], [a, a, b], [a, b, b], [a, b, mix], [a, b, nearly]):
        with pytest.raises(Problem, match="no plane"):
            landscape.plane_basis(landscape.inner_products(anchors), "orthonormal")


@pytest.mark.parametrize("args", [[], ["--encoder-only"]])
def test_anchors_have_their_own_loss_exactly(folder, pair, here, args):
    config, arrays = lay(pair, "a.npz", *args)
    teacher, near, _ = distill.load_networks(pair / "near")
    far = distill.load_networks(pair / "far")[1]
    data = distill.load_data(str(folder), 16)
    images, _ = landscape.labelled_subset(data.train_x, data.train_y, None)
    images, _ = landscape.labelled_subset(images, _, None)
    assert torch.equal(images.sort(0).values, data.train_x.sort(0).values)  # shuffled, none lost
    output = (lambda net, x: net.encoder(x)) if args else (lambda net, x: net(x))
    batches = [distill.normalise(x, distill.channel_stats(images)) for x in images.tensor_split(4)]
    teacher.eval()
    for net, kl in zip((copy.deepcopy(teacher), near, far), arrays["kl"]):  # students in train mode
        with torch.no_grad():
            own = sum(distill.KLDivergence.apply(output(teacher, x), output(net.train(), x)).item()
                      * len(x) / 60 for x in batches)
        assert kl == pytest.approx(own, rel=1e-6) and own > 0
    assert [str(name) for name in arrays["anchors"]] == ["θ_T", "θ*_S(0)", "θ*_S(1)"]
    assert config["n_images"] == 60 and config["n_test_images"] == 24


@pytest.mark.parametrize("bn", ["batch", "reset"])
def test_no_running_statistics_of_an_anchor_are_used(pair, here, bn):
    _, arrays = lay(pair, "a.npz", "--bn", bn, "--grid", 3)
    shutil.copytree(pair, "spoilt")
    for name in ("near", "far"):
        checkpoint = distill.read_checkpoint(Path("spoilt") / name)
        for key, t in checkpoint["student"].items():
            if "running" in key:
                t.mul_(7).add_(3)
        torch.save(checkpoint, f"spoilt/{name}/last.pt")
    _, spoilt = lay(Path("spoilt"), "b.npz", "--bn", bn, "--grid", 3)
    assert all(np.array_equal(arrays[key], spoilt[key]) for key in landscape.QUANTITIES)


def test_a_killed_plane_goes_on_to_the_same_file(pair, here, monkeypatch, capsys):
    _, whole = lay(pair, "whole.npz")
    place, count = landscape.place, itertools.count()
    kill = lambda *args: place(*args) if next(count) != 20 else 1 / 0
    with monkeypatch.context() as patch:
        patch.setattr(landscape, "place", kill)
        with pytest.raises(ZeroDivisionError):
            lay(pair, "a.npz")
    assert landscape.read_npz(Path("a.npz"))[1]["done"] == 16
    problem(landscape.main, "plot", "a.npz", says=["16 of 28 points", "--resume"])
    for args, says in (([], "--resume"), (["--resume", "--bn", "reset"], "--bn batch, not reset")):
        with pytest.raises(Problem, match=says):
            lay(pair, "a.npz", *args)
    _, arrays = lay(pair, "a.npz", "--resume")
    assert arrays.keys() == whole.keys()
    assert all(np.array_equal(arrays[key], whole[key]) for key in whole)


def test_lines_are_exact_at_their_ends_and_a_permuted_copy_has_a_barrier():
    """XOR by hand: swapping hidden units changes nothing, but half way between the two all output
    weights are 0.
    """
    x = torch.tensor([[1.0, 1], [-1, -1], [1, -1], [-1, 1]])
    y = torch.tensor([0, 0, 1, 1])

    def error(state):
        predicted = (F.relu(x @ state["hidden"].T) @ state["out"]) > 0
        return 100 * (predicted.long() != y).double().mean().item()
    a = {"hidden": x.clone(), "out": torch.tensor([-1.0, -1, 1, 1])}
    permuted = {name: t[[2, 3, 0, 1]] for name, t in a.items()}
    ts = np.linspace(0, 1, 11)
    level, line = (landscape.error_along_line(a, b, ts, error) for b in (a, permuted))
    assert (level == 0).all() and landscape.barrier(level) == 0
    assert line[0] == line[-1] == 0 and landscape.barrier(line) == 50
    assert landscape.barrier(np.array([[10.0, 40, 20], [30, 10, 10]])).tolist() == [25, 10]
    a, b = (distill.random_network(seed, "resnet20", 4, 16).state_dict() for seed in (0, 1))
    seen = []
    landscape.error_along_line(a, b, [0.0, 1.0], lambda state: seen.append(state) or 0)
    assert same(seen[0], a) and same(seen[1], b)


def join(out, pair, *args):
    """landscape.py connect with two copies and three epochs; its arrays and the copies."""
    landscape.main(["connect", str(pair / "near"), "--copies", "2", "--epochs", "3", "--batch-size",
                    "16", "--points", "3", "--device", "cpu", "--amp", "off", "--out", str(out),
                    *map(str, args)])
    copies = distill.read_checkpoint(Path(out), "landscape.py")["copies"]
    return landscape.read_npz(Path(out) / "connect.npz")[1], copies


def test_copies_differ_in_the_order_of_the_data_alone(folder, pair, here, monkeypatch):
    starts, seeds, fine_tune = [], [], landscape.fine_tune

    def spy(network, *args, order_seed):
        starts.append(copy.deepcopy(network.state_dict()))
        seeds.append(order_seed)
        return fine_tune(network, *args, order_seed=order_seed)
    monkeypatch.setattr(landscape, "fine_tune", spy)
    arrays, copies = join("c", pair)
    assert seeds == [0, 1, 0, 1] and same(starts[0], starts[1]) and same(starts[2], starts[3])
    assert torch.equal(starts[0]["head.weight"], starts[2]["head.weight"])
    for start, encoder in zip(starts[::2], reversed(distill.load_checkpoint(pair / "near")[:2])):
        own = {f"encoder.{name}": t for name, t in encoder.state_dict().items()}
        assert same({name: t for name, t in start.items() if name in own}, own)
    assert not same(copies[0], copies[1]) and not same(copies[2], copies[3])
    data = distill.load_data(str(folder), 16)
    stats = distill.channel_stats(data.train_x)
    network = distill.classifier(distill.random_network(0, "resnet20", 1, 16).encoder, 64, 3, 0)
    images, _ = landscape.labelled_subset(data.train_x, data.train_y, None)
    for state, error in zip(copies, arrays["error"][:, 0, [0, -1]].reshape(-1)):
        network.load_state_dict(state)  # the ends: with batch norm's statistics averaged anew
        landscape.update_bn([distill.normalise(images, stats)], network.encoder)
        own = distill.classification_accuracy(network, data.test_x, data.test_y, stats, "off")
        assert error == pytest.approx(100 - own)


@pytest.mark.parametrize("saves", [1, 5])
def test_a_killed_connect_goes_on_to_the_same_numbers(pair, here, monkeypatch, saves):
    whole, copies = join("whole", pair)
    save, count = landscape.save_checkpoint, itertools.count(1)

    def kill(*args, **content):
        save(*args, **content)
        if next(count) == saves:
            raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(landscape, "save_checkpoint", kill)
        with pytest.raises(KeyboardInterrupt):
            join("a", pair)
    for args, says in (([], "--resume"), (["--resume", "--epochs", 4], "--epochs 3, not 4")):
        with pytest.raises(Problem, match=says):
            join("a", pair, *args)
    arrays, again = join("a", pair, "--resume")
    assert all(np.array_equal(arrays[key], whole[key]) for key in whole)
    assert all(same(a, b) for a, b in zip(again, copies, strict=True))


def test_the_npz_redraws_and_bad_input_is_refused(folder, pair, here):
    lay(pair, "a.npz", "--grid", 3)
    lay(pair, "b.npz", "--grid", 3, "--axes", "barycentric", runs=["far"])
    good = Path("a.npz").read_bytes()
    for files in (["a.npz", "b.npz"], ["a.npz", "--kl-range", "1e-9", "1"]):
        landscape.main(["plot", *files, "--figure", "one.png"])
        landscape.main(["plot", *files, "--figure", "two.png"])
        assert Path("one.png").read_bytes() == Path("two.png").read_bytes()
        assert len(Path("one.png").read_bytes()) > 10_000
    problem(landscape.main, "plane", pair / "near", says=["no plane"])  # at ε = 0 it starts there
    for option, value, says in (("--seed", 1, "different teachers"), ("--out-dim", 32, "--out-dim"),
                                ("--norm", "none", "--norm")):
        run(folder, "--steps", 1, option, value, out="other")
        problem(landscape.main, "plane", pair / "near", "other", says=[says])
        shutil.rmtree("other")
    for length in (0, 100, len(good) - 1):
        Path("cut.npz").write_bytes(good[:length])
        problem(landscape.main, "plot", "cut.npz", says=["cut.npz", "truncated"])
    np.savez("lines.npz", error=np.zeros((2, 1, 3)), config="{}")
    problem(landscape.main, "plot", "a.npz", "lines.npz", says=["apart"])
    problem(landscape.main, "plot", "none.npz", says=["no file none.npz"])
    problem(landscape.main, "connect", pair / "near", "--dataset", "noise", says=["no labels"])
    problem(landscape.main, "connect", pair / "near", "--n-samples", 61, says=["--n-samples 61"])

# ---- run_all.sh ----------------------------------------------------------------------------------

def listed(*args, **variables):
    """The lines that `run_all.sh list` prints."""
    environment = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", **variables}
    done = subprocess.run(["bash", REPO / "run_all.sh", "list", *args], env=environment,
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout.splitlines()


def parsed(line):
    """(main of the script, its words, its options, where it writes) of a line of the list."""
    _, script, *words = shlex.split(line, comments=True)
    module = {"distill.py": distill, "probe.py": probe, "prune.py": prune,
              "landscape.py": landscape}[script]
    parse = getattr(module, "parse_args", None)
    if parse is None:
        parse = {"plane": landscape.plane_args, "connect": landscape.connect_args}[words[0]]
        options = parse(words[1:])
    else:
        options = parse(words)
    return module.main, words, options, options.json if script == "probe.py" else options.out


def test_the_list_needs_no_python_and_prints_one_command_a_line(tmp_path):
    for tool in ("bash", "dirname", "grep", "sed", "wc"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    lines = listed(PATH=str(tmp_path))
    stages = [listed(stage, PATH=str(tmp_path)) for stage in ("1", "2")]
    assert sorted(lines) == sorted(sum(stages, [])) and len(set(lines)) == len(lines) == 253
    for line in lines + listed("mini"):
        job = r"python (distill|probe|prune|landscape)\.py \S.*\S  # stage [12]"
        assert re.fullmatch(job, line) and "--resume" in line.split(), line
    spaced = listed("mini", CIFAR10="/data/my images")
    assert all("/data/my images" in vars(parsed(line)[2]).values() for line in spaced)
    for word in ("quik", "list 3"):
        bad = subprocess.run(["bash", REPO / "run_all.sh", *word.split()], capture_output=True)
        assert bad.returncode == 2 and bad.stdout == b"" and b"run_all.sh" in bad.stderr


@pytest.mark.parametrize("variables", [{}, {"SEEDS": "1 4"}])
def test_every_job_has_its_own_output_and_reads_what_earlier_jobs_made(variables):
    made = {1: set(), 2: set()}
    for stage in (1, 2):
        for line in listed(str(stage), **variables):
            _, words, options, out = parsed(line)
            reads = {Path(word) for word in words if word.startswith("runs/")} - {out}
            assert reads <= made[1] and bool(reads) == (stage == 2), line
            assert {options.dataset} <= {*distill.DATASETS, None} and out not in made[stage], line
            made[stage].add(out)


def test_seeds_differ_in_their_number_alone():
    lines = listed()

    def of(seed):
        return [re.sub(r"(seed ?)\d", r"\1N", line) for line in lines
                if set(re.findall(r"seed ?(\d)", line)) == {str(seed)} and " plane " not in line]
    assert of(0) == of(1) == of(2) and len(of(0)) > 70
    assert of(3) == of(4) and len(of(3)) == 6 and set(of(3)) < set(of(0))  # Fig. 8 has five


def test_one_toy_job_of_each_kind_runs(tmp_path, here, monkeypatch):
    toy = draw_images(here / "toy", 32, 12, 3)
    scores = dict.fromkeys((*distill.PROBES, "linear_paper_last"), 50.0)
    monkeypatch.setattr(probe, "evaluate", lambda *_: scores)
    lines = listed(TOY=str(toy), SEEDS="0")
    patterns = ("raw-vgg11-eps1e-10-seed0", "raw-vgg11-epsinf-seed0", "fig14-encoder",
                "optimizer-sgd", "cifar10-vit-tiny", "teachers-stl10.json", "cifar10-resnet18-seed0",
                "prune.py .*--init random --rewind-epoch 1", "connect")
    for pattern in patterns:
        main, words, _, out = parsed(next(line for line in lines if re.search(pattern, line)))
        main(words)
        assert out.exists() and out.is_relative_to("runs/toy/paper"), words


def as_a_user(folder, *args, **variables):
    """Run run_all.sh, from the folder above, in one that holds what a clone of this does."""
    for name in ("distill.py", "probe.py", "prune.py", "landscape.py", "results/report.py",
                 "results/paper.csv", "run_all.sh", "requirements.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if not (folder / name).exists():
            shutil.copy(REPO / name, folder / name)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(["bash", f"{folder.name}/run_all.sh", *args], cwd=folder.parent,
                          env={**os.environ, "PATH": path, **variables}, capture_output=True,
                          text=True, timeout=900)


def test_jobs_run_side_by_side_and_one_that_fails_stops_no_other(tmp_path):
    """With a stub for distill.py, which fails for one of them."""
    clone = tmp_path / "clone"
    clone.mkdir()
    (clone / "distill.py").write_text(
        "import sys\nrun_cli = load_data = lambda *_: None\nif __name__ == '__main__':\n"
        "    sys.exit('lost' if 'eps1.5' in str(sys.argv) else 0)\n")
    done = as_a_user(clone, "mini", SEEDS="0", JOBS="2", CIFAR10=".", TINYIMAGENET=".")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "8 jobs of stage mini, 2 at once" in done.stdout
    assert len(re.findall("^done ", done.stdout, re.M)) == 7
    (failed,) = (clone / "runs/logs/failed").read_text().splitlines()
    assert "eps1.5" in failed and re.search("^FAILED .*eps1.5.*lost", done.stdout, re.M)


def test_what_cannot_be_had_stops_the_full_run_in_one_line(tmp_path):
    done = as_a_user(tmp_path / "clone", "data", DATA_MIRROR="http://127.0.0.1:9")
    one_line(done, "cannot download", "cifar-10-python.tar.gz")
    if not torch.cuda.is_available():
        done = as_a_user(tmp_path / "clone", "full")
        assert done.returncode == 1 and "quick" in done.stderr and "mini" in done.stderr
        assert not (tmp_path / "clone/runs").exists() and "ON_CPU=1" in done.stderr


# ---- The report ----------------------------------------------------------------------------------

def finished(root, name, linear, steps=2, teacher=30.0, **settings):
    """A finished run, as its run.json and log.csv tell it: its linear probe at steps 0, 1, ..."""
    made = [{"hardware": "a GPU", "torch": "2", "commit": "abc", "from_step": 0}]
    settings = {"dataset": "cifar10", "probe_dataset": None, "n_images": 9, "batch_size": 3,
                "out_dim": 4, "amp": "off", "seed": 0, **settings}
    teacher_probes = dict.fromkeys(distill.PROBES, teacher)
    distill.write_json(root / name / "run.json", {**settings, "total_steps": steps, "made": made,
                                                  "teacher_probes": teacher_probes})
    rows = [{"step": i, "epoch": i, "kl": 1e-5 / i if i else math.nan, "distance": 20 + i,
             "images_per_s": 1, "linear_paper": score, "linear_paper_last": score,
             "linear_converged": score + 5, "knn": score - 5} for i, score in enumerate(linear)]
    distill.write_csv(root / name / "log.csv", distill.LOG_COLUMNS, rows)


def reported(root):
    """The rows of the report's tables: {label: cells}; and the page."""
    report.main([str(root), "--out", str(root / "REPORT.md"), "--figures", str(root / "figures")])
    page = (root / "REPORT.md").read_text()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines()
             if line.startswith("| ")]
    return {label: row for label, *row in cells}, page


def test_verdicts_follow_their_rule(tmp_path):
    paper = tmp_path / "paper"
    for seed, scores in enumerate(([30, 47, 45], [30, 45, 46.5])):  # the paper has 46.02
        finished(paper, f"cifar10-resnet18-seed{seed}", scores, seed=seed)
    finished(paper, "cifar100-vgg11-seed0", [60, 10, 20])  # step 0 is not the student's
    finished(paper, "stl10-vgg11-seed0", [5, 10], steps=2)  # it is not at its end
    finished(paper, "fig4-n500-seed0", [5, 50, 43.7])
    for seed, score in enumerate((10, 60)):  # far from 45.94, but also from each other
        finished(paper, f"fig4-n1000-seed{seed}", [5, 5, score], seed=seed)
    rows, page = reported(tmp_path)
    for line in ("44.67 | 41.75 ± 0.35 (2) | 40.75 ± 1.06 | -2.92 | lower |  | [1]",  # k-NN
                 "46.02 | 46.75 ± 0.35 (2) | 45.75 ± 1.06 | +0.73 | agrees | 50.75 ± 1.06 | [1]"):
        assert f"| cifar10, resnet18, student | {line} |" in page
    assert rows["n500"][1:5] == ["50.00 (1)", "43.70", "+8.24", "higher"]
    assert rows["n1000"][4] == "agrees" and rows["n2000"][4] == "missing"
    assert "| stl10, vgg11, student | 46.20 |  |  |  | missing |  |  |" in page
    assert "| cifar100, vgg11, student | 26.62 | 20.00 (1) | 20.00 | -6.62 | lower |" in page
    assert "left out: stl10-vgg11-seed0" in page
    assert "[1] cifar10, 9 images, 2 steps of 3, m = 4, amp off; a GPU, torch 2, commit abc" in page


def test_claims_follow_their_rule(tmp_path):
    paper = tmp_path / "paper"
    for eps, score in (("0", 46), ("0.1", 45.5), ("0.5", 46), ("1.5", 45), ("4", 43), ("inf", 40)):
        finished(paper, f"fig3-resnet18-eps{eps}-seed0", [30, 40, score], teacher=35.0)
        vgg_eps = "1e-10" if eps == "0" else eps
        finished(paper, f"fig3-vgg11-eps{vgg_eps}-seed0", [30, 40, score], teacher=41.0)
    for m in (1, 4, 16, 64, 256, 1024, 4096, 16384):
        finished(paper, f"fig10-m{m}-seed0", [30, 30, 46 if m >= 256 else 36], out_dim=m)
    finished(paper, "cifar10-resnet18-seed0", [30, 42, 46])
    finished(paper, "cifar10-resnet18-seed1", [30, 90, 90], seed=1)  # no other has this teacher
    finished(paper, "fig12-lf-l-seed0", [30, 40, 45])
    finished(paper, "fig12-l-wl-seed0", [30, 40, 41])
    finished(paper, "fig18-resnet18-seed0", [46, 46, 46])
    finished(paper, "loss-mse-seed0", [30, 40, 43])
    rows, page = reported(tmp_path)
    verdicts = {label: row[2] for label, row in rows.items() if len(row) == 4}
    for figure, verdict in ((1, "shows"), (3, "shows"), (10, "shows"), (12, "shows"),
                            (18, "does not show"), (9, "missing"), (11, "missing")):
        assert verdicts[f"Fig. {figure}, resnet18"] == verdict, figure
    assert verdicts["Fig. 3, vgg11"] == verdicts["loss-mse"] == "does not show"
    assert page.count("](figures/fig3.png)") == 1
    assert Image.open(tmp_path / "figures/fig3.png").size[0] > 1000


def test_the_committed_report_and_pictures_come_from_the_committed_logs(here, monkeypatch):
    report.main([str(REPO / "results/cpu"), "--out", "results/REPORT.md", "--figures",
                 "figures/report"])
    page = Path("results/REPORT.md").read_text().replace(f"`{REPO}/", "`")
    assert page == (REPO / "results/REPORT.md").read_text()
    landscape.main(["plot", str(REPO / "results/cpu/plane.npz"), "--figure", "plane.png"])
    landscape.main(["plot", str(REPO / "results/cpu/connect-seed0.npz"), "--figure", "c.png"])
    prune.main(["plot", *map(str, (REPO / "results/cpu/tickets").glob("*seed?"))])
    problem(report.main, "runs", says=["runs", "mini"])

