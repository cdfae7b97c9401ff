"""Does it work? On the CPU and, where there is one, on the GPU: bash run_all.sh test"""

import csv
import hashlib
import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from copy import deepcopy
from http.server import HTTPServer, SimpleHTTPRequestHandler
from itertools import count, product
from pathlib import Path
from shutil import copytree
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from pytest import approx, fixture, raises
from torch import allclose, equal, nn, randn

import distill
import landscape
import probe
import prune
from distill import (
    KLDivergence, Problem, channel_stats, kl_by_log_softmax, load_checkpoint, load_data, normalise,
    random_network, read_checkpoint, save)
from results import figures, report
from results.cpu import treated_tables

REPO = Path(__file__).parent
# Networks as small as these are as fast on one thread, and on two, where something else runs on the
# same cores, a hundred times slower. Scripts get this python, also if it is not the first
torch.set_num_threads(1)
os.environ |= {"OMP_NUM_THREADS": "1",
               "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
sys.path.append(str(REPO / "datasets"))
import cifar5m
import folder
import leaves
import tinyimagenet

# A test's cases are often a table, a line each, in the words of the command line
cases = pytest.mark.parametrize
FLOAT32 = "--device cpu --amp off"
SMALL = f"--dataset toy.npz --arch resnet20 --image-size 16 --out-dim 64 --batch-size 16 {FLOAT32}"


def do(words):
    """Run a script of this command line in this process, distill.py with small networks."""
    script, *words = words.split()
    globals()[script].main(SMALL.split() * (script == "distill") + words)


def run(options, out="a"):
    """A small distillation; its checkpoint."""
    do(f"distill --out {out} {options}")
    return read_checkpoint(Path(out))


def problem(words, *says):
    """`words` end in a Problem of one line that says all of `says`."""
    with raises(Problem) as caught:
        do(words)
    message = str(caught.value)
    assert "\n" not in message and all(text in message for text in says), message


def table(text):
    """[[words, what is said], ...] of lines that have a colon between the two."""
    return [line.split(": ", 1) for line in text.strip().splitlines()]


def sh(words, **options):
    """A command as a user types it; the finished process with its stdout and stderr as text."""
    return subprocess.run(shlex.split(words), capture_output=True, text=True, **options)


def one_line(done, *says):
    """The process ended with exit status 1 and one line on stderr that says all of `says`."""
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert all(text in done.stderr for text in says), done.stderr


@fixture(scope="session")
def shelf(tmp_path_factory):
    """60 + 24 random images of 16 x 16 pixels, of three classes, one brighter than the other; and
    two distilled runs with one teacher.
    """
    root, rng = tmp_path_factory.mktemp("shelf"), np.random.default_rng(0)
    x = rng.integers(0, 100, (84, 16, 16, 3), np.uint8)
    y = np.repeat([0, 1, 2], 28)
    x += (70 * y[:, None, None, None]).astype(np.uint8)
    test = np.arange(84) % 28 >= 20
    np.savez(root / "toy.npz", train_x=x[~test], train_y=y[~test], test_x=x[test],
             test_y=y[test], classes=["ant", "bee", "cat"])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        run("--steps 6", "near")
        run("--steps 6 --init-eps inf", "far")
    return root


@fixture
def here(shelf, tmp_path, monkeypatch):
    """A directory to run in, empty but for links to what is on the shelf."""
    monkeypatch.chdir(tmp_path)
    for path in shelf.iterdir():
        Path(path.name).symlink_to(path)
    return tmp_path


def strict_json(path):
    """What a .json file holds; no NaN and no Infinity, which are not JSON."""
    return json.loads(Path(path).read_text(), parse_constant=lambda text: 1 / 0)


def curve(out):
    """The rows of a log.csv, without times."""
    rows = csv.DictReader(Path(out, "log.csv").read_text().splitlines())
    return [{**row, "seconds": 0, "images_per_s": 0} for row in rows]


def same(a, b):
    """Two state dicts equal to the last bit."""
    return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)


# ---- Models --------------------------------------------------------------------------------------

@cases("arch, count", table("""
vgg11: 9_220_480
vgg13: 9_404_992
vgg16: 14_714_688
vgg19: 20_024_384
resnet18: 11_168_832
resnet34: 21_276_992
resnet50: 23_500_352
resnet20: 271_824
resnet56: 855_120
vit-tiny: 594_048
vit-small: 2_072_832
vit-medium: 3_550_208
vit-base: 7_684_608"""))
def test_parameters_of_an_encoder_and_its_width(arch, count):
    """Table 5 has the counts."""
    encoder = distill.build_encoder(arch, 32, "batch")
    assert sum(p.numel() for p in encoder.parameters()) == int(count)
    assert encoder(torch.zeros(2, 3, 32, 32)).shape == (2, distill.EMBEDDING_WIDTH[arch])


@cases("arch, tokens", [("vit-small", 5), ("vit-tiny-p8", 17)])
def test_the_vit_attends_over_tokens_in_twelve_layers(arch, tokens):
    # In the released code heads attend to each other, and tokens do not: a change of one patch
    # would not reach the class token, and the order of the patches would not count
    encoder, shapes = random_network(0, arch, 1).encoder.train(), []
    encoder.layer.register_forward_hook(lambda *call: shapes.append(call[2].shape))
    images = randn(2, 3, 32, 32)
    before = encoder(images)
    assert shapes == [(2, tokens, distill.EMBEDDING_WIDTH[arch])] * 12
    with torch.no_grad():  # torch has a faster way, which rounds otherwise
        assert equal(encoder.eval()(images), before)
    # positions count
    assert not allclose(encoder(images.roll(16, 2)), before, atol=0.01)
    # the last patch of one image: another class token for that one
    images[0, :, -8:, -8:] += 1
    change = (encoder(images) - before).abs().amax(1)
    assert change[0] > 0.01 and change[1] == 0


@cases("norm, share", table("""
instance: 1
group: 8
layer: 512
none: 0"""))
@cases("arch, n_norms", table("""
resnet20: 21
resnet18: 20"""))
def test_norms_of_a_resnet(norm, share, arch, n_norms):
    """`share` channels have their statistics in common (Fig. 11)."""
    modules = random_network(0, arch, 1, norm=norm).encoder.modules()
    norms = [m for m in modules if isinstance(m, (nn.GroupNorm, nn.BatchNorm2d))]
    assert len(norms) == int(n_norms) * (norm != "none")
    for m in norms:
        assert m.num_channels // m.num_groups == min(int(share), m.num_channels)


@cases("parts", "lf/wl lf/l l/wl f/wl lf/ l/l".split())
def test_parts_of_the_bottleneck(parts):
    # The released code normalises the last layer's rows, and then does not use what it has
    network, x = random_network(0, "resnet20", 512, l2_bottleneck=parts), randn(8, 2048)
    layers = network.projector[-1], network.last_layer
    for part, layer, width in zip(parts.split("/"), layers, (256, 512)):
        expected = x
        if "l" in part:
            weight = layer.linear.weight
            expected = x @ (F.normalize(weight) if "w" in part else weight).T
            assert expected.shape == (8, width)
        if "f" in part:
            expected = F.normalize(expected)
        x = layer(x)
        assert allclose(x, expected, atol=1e-6)


@cases("arch", ["resnet18", "vgg11"])
def test_initialisation(arch):
    # Of torch's own kaiming_uniform_, which a module has from the start, nothing must be left
    network = random_network(0, arch, 512)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.weight[:, 0].numel()
            assert module.weight.var().item() == approx(2 / fan_out, rel=0.1)
        elif isinstance(module, nn.Linear):
            assert module.weight.std().item() == approx(0.02, rel=0.02)
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.running_var == 1).all()
        if getattr(module, "bias", None) is not None:
            assert not module.bias.any()
    assert not same(network.state_dict(), random_network(1, arch, 512).state_dict())


def test_a_seed_gives_the_same_weights_in_every_torch():
    """trunc_normal_ does not: torch 2.11 drew otherwise."""
    weights = random_network(0, "resnet20", 64).last_layer.linear.weight[-1, -3:]
    assert weights.tolist() == approx([0.00259741, -0.00387040, 0.01023919], rel=1e-5)


def test_only_the_encoder_is_autocast():
    # Logits of 16 bits would drown differences of 1e-3
    network, types = random_network(0, "resnet20", 8, 16), []
    for module in (network.encoder, network.projector, network.last_layer):
        module.register_forward_hook(lambda *call: types.append(call[2].dtype))
    network(randn(2, 3, 16, 16), "bf16")
    assert types == [torch.bfloat16, torch.float32, torch.float32]


@cases("flags, fast", table("""
avx2 avx512_bf16: bf16
amx_bf16 amx_tile: bf16
avx2: off"""))
def test_amp_auto_is_bf16_with_batch_norm_where_that_is_fast(flags, fast, monkeypatch):
    # VGG11 hardly learned in bf16; on a processor without such instructions it takes longer
    monkeypatch.setattr(distill, "CPUINFO", flags)
    for words, expected in table(f"""
auto resnet20 batch: {fast}
auto resnet20 group: off
auto vgg11 batch: off
bf16 vgg11 batch: bf16"""):
        amp, arch, norm = words.split()
        assert distill.pick_amp(amp, torch.device("cpu"), arch, norm) == expected


# ---- Student initialisation and loss -------------------------------------------------------------

@cases("alpha", [0, 0.3, 0.6, 1])
def test_init_eps_is_the_papers_alpha(alpha):
    # ε = α/(1−α), at either end to the last bit; batch norm's statistics start fresh
    teacher, independent, student = (random_network(seed, "resnet20", 64) for seed in (0, 1, 1))
    teacher.encoder[1].running_mean += 1
    distill.init_student(teacher, student, alpha / (1 - alpha) if alpha < 1 else math.inf)
    for theta_t, theta, theta_s in zip(
            *(network.parameters() for network in (teacher, independent, student))):
        expected = ((1 - alpha) * theta_t + alpha * theta) / math.hypot(alpha, 1 - alpha)
        assert (theta_s - expected).abs().max() <= 1e-6 * (0 < alpha < 1)
    assert not student.encoder[1].running_mean.any()


def logit_pair(difference, m=4096):
    """Logits (32, m) of a teacher, and of a student that differs by so much."""
    noise = randn(2, 32, m, generator=torch.Generator().manual_seed(0))
    return noise[0] / 16, noise[0] / 16 + difference * noise[1]


@cases("difference, rel", [(1e-6, 5e-3), (1e-3, 1e-5), (1, 1e-5)])
def test_kl_and_its_gradient_against_float64_autograd(difference, rel):
    # At 1e-6 the usual formula, from two log-softmaxes, is wrong by more than the KL. The gradient
    # must be multiplied by what comes from above, here 3
    teacher, student = logit_pair(difference)
    exact, student = student.double().requires_grad_(), student.requires_grad_()
    p = teacher.double().softmax(1)
    by_definition = (p * (p.log() - exact.softmax(1).log())).sum(1).mean()
    by_definition.backward()
    kl = distill.LOSSES["kl"](teacher, student)
    (3 * kl).backward()
    for value in (kl, kl_by_log_softmax(teacher.double(), exact)):
        assert value.item() == approx(by_definition.item(), rel=rel, abs=0)
    assert (student.grad - 3 * exact.grad).norm() < 1e-4 * student.grad.norm()


def test_the_constant_student_says_what_the_teacher_says_on_average(here):
    # The floor that a stuck run is compared with
    teacher, images = load_checkpoint("near")[0], load_data("toy.npz", 16).train_x
    logits = teacher(normalise(images, channel_stats(images))).double()
    kl = kl_by_log_softmax(logits, logits.softmax(1).mean(0).log().repeat(60, 1))
    assert distill.constant_student_kl(teacher, images) == approx(kl.item(), rel=1e-3)


# ---- Data ----------------------------------------------------------------------------------------

def test_leaves_are_the_same_bytes_everywhere(here):
    # A processor or a numpy that draws them otherwise would change every number in the README
    problem("distill --dataset leaves", "datasets/leaves.py makes")
    leaves.main()
    data = b"".join(tensor.numpy().tobytes() for tensor in load_data("leaves")[:4])
    assert hashlib.sha256(data).hexdigest()[:24] == "34dba7be51e8c848ca38e4f2"


def test_every_channel_is_normalised_to_mean_0_and_variance_1():
    # One mean for all three, or a variance over n − 1, would show
    images = torch.randint(0, 256, (1000, 3, 4, 4), dtype=torch.uint8)
    images[:500, 0], images[900:, 1] = 0, 255  # each has its own
    x = normalise(images, channel_stats(images)).double().transpose(0, 1).flatten(1)
    assert x.mean(1).abs().max() < 1e-6 and x[0, 0] < 0
    assert x.std(1, correction=0).tolist() == approx([1, 1, 1], abs=1e-6)


def test_noise_is_gaussian_and_more_of_it_begins_alike():
    # Clipped or uniform noise has another fourth moment
    few, more = (load_data("noise", 8, n=n).train_x for n in (9, 50_100))
    assert len(more) == 50_100 and equal(more[:50_000], few)
    x = normalise(few, channel_stats(few))
    assert (x**4).mean().item() == approx(3, abs=0.05)


def test_stratified_subset_keeps_every_class_in_its_share():
    # Data sets come sorted by class: the first 100 would all be of one
    labels = torch.tensor([0] * 600 + [2] * 300 + [3] * 100)  # there may be no image of one
    (x, y), (again, _) = (
        distill.stratified_subset(torch.arange(1000), labels, 100) for _ in range(2))
    assert y.bincount().tolist() == [60, 0, 30, 10] and equal(labels[x], y)
    assert len(x.unique()) == 100 and equal(x, again)


def test_a_folder_of_images(here):
    """Classes in folders, at any depth; the middle square; what cannot be read is named."""
    x = np.random.default_rng(0).integers(256, size=(4, 16, 32, 3)).astype(np.uint8)
    for pixels, name in zip(x, ("train/ant/a/0", "train/bee/1", "val/ant/0", "val/bee/0")):
        path = Path(f"flowers/{name}.png")
        path.parent.mkdir(parents=True)
        Image.fromarray(pixels).save(path)
    folder.main(["flowers", "--size", "16"])
    data = load_data("flowers", 16)
    found = torch.cat([data.train_x, data.test_x]).permute(0, 2, 3, 1)
    assert (found.numpy() == x[:, :, 8:24]).all() and data.classes == ["ant", "bee"]
    assert data.train_y.tolist() == data.test_y.tolist() == [0, 1]
    other = Path("flowers/train/bee/1.png")
    Image.fromarray(np.full((16, 16), 9999, np.uint16)).save(other)
    with raises(SystemExit, match="bee/1.png .*8 bits.*: mend or delete"):
        folder.main(["flowers"])
    Path("flowers/train/cat").mkdir()
    for says in ("flowers/val.*cat", "the same classes"):  # without an image, then with one
        with raises(SystemExit, match=says):
            folder.main(["flowers"])
        Image.fromarray(x[0]).save("flowers/train/cat/0.png")
    problem("distill --dataset path/to/other", "data/path/to/other.npz", "datasets/folder.py")


@cases("name, array", table("""
train_x: x / 2
train_x: x.swapaxes(1, 3)
test_x: x[:, 1:]
test_x: x[1:]
train_y: y[1:]
train_y: y / 2
test_y: y + 1
test_y: y - 1"""))
def test_a_bad_npz_is_refused(here, name, array):
    """Where one array of a good one is that."""
    x, y = np.zeros((4, 9, 9, 3), np.uint8), np.array([0, 1, 2, 0])
    good = {"train_x": x, "train_y": y, "test_x": x, "test_y": y, "classes": ["a", "b", "c"]}
    np.savez("good.npz", **good)
    assert load_data("good.npz", 9).test_y.tolist() == y.tolist()
    np.savez("bad.npz", **{**good, name: eval(array)})
    problem("distill --dataset bad.npz", "bad.npz is no data set")


@fixture
def mirror(here, monkeypatch):
    """A server on this machine, as DATA_MIRROR, for the files in www/."""
    with HTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("DATA_MIRROR", f"http://127.0.0.1:{server.server_port}/www/")
        yield
        server.shutdown()


@cases("name", distill.DOWNLOADS)
def test_archives_come_from_a_mirror_but_the_md5_check_stays(mirror, monkeypatch, name):
    # What is fetched is not what it should be, and that is noticed
    source = getattr(torchvision.datasets, name.upper())
    monkeypatch.setattr(source, "url", "http://127.0.0.1:9/refused at once")
    archive = Path("www", source.filename)
    archive.parent.mkdir()
    archive.write_bytes(b"something else")
    problem(f"distill --dataset {name}", "corrupted")
    monkeypatch.setenv("DATA_MIRROR", "http://a b")
    problem(f"distill --dataset {name}", f"cannot download http://a b/{archive.name} (",
            "DATA_MIRROR", "--dataset leaves")


@cases("name, splits", [("cifar10", [True, False]), ("stl10", ["train", "test"])])
def test_both_parts_of_torchvisions_data(here, monkeypatch, name, splits):
    """Images and labels as it gives them, in place of its archives."""
    class Source(list):
        url, filename, classes = "http://a/b", "b", ["ant", "bee"]

        def __init__(self, root, split, download):
            super().__init__(zip(map(Image.fromarray, pixels[splits.index(split)]), (1, 0)))

    pixels = np.random.default_rng(0).integers(256, size=(2, 2, 96, 96, 3)).astype(np.uint8)
    monkeypatch.setattr(torchvision.datasets, name.upper(), Source)
    data = load_data(name, 96)
    for x, y, expected in zip(data[::2], data[1::2], pixels):
        assert (x.permute(0, 2, 3, 1).numpy() == expected).all() and y.tolist() == [1, 0]
    assert load_data(name).test_x.shape == (2, 3, 32, 32) and data.classes == ["ant", "bee"]


def test_tiny_imagenet_as_it_comes(mirror, monkeypatch):
    """Validation classes in a text file, a test part without labels; each class has its grey."""
    labels, root, rows = [1, 0, 1], Path("packed/tiny-imagenet-200"), ""
    for i, label in enumerate(labels):
        for name in (f"train/n{label}/images/{i}", f"val/images/{i}", f"test/images/{i}"):
            path = root / f"{name}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (64, 64), (100 + 100 * label,) * 3).save(path)
        rows += f"{i}.JPEG\tn{label}\t0\t0\t62\t62\n"
    (root / "val/val_annotations.txt").write_text(rows)
    archive = Path(shutil.make_archive("www/tiny-imagenet-200", "zip", "packed"))
    with raises(SystemExit, match="tiny-imagenet-200.zip.*corrupted"):
        tinyimagenet.main([])
    monkeypatch.setattr(tinyimagenet, "MD5", hashlib.md5(archive.read_bytes()).hexdigest())
    tinyimagenet.main([])
    data = load_data("tinyimagenet")
    assert data.train_y.tolist() == [0, 1, 1] and data.test_y.tolist() == sorted(labels)
    assert data.test_x.float().mean((1, 2, 3)).tolist() == approx([100, 200, 200], abs=3)


def test_cifar5m_follows_cifar10_and_no_more_is_read_than_wanted(here, monkeypatch):
    """Six images of CIFAR10, then a part with four, and one with seven, which may be bad."""
    x = torch.randint(256, (17, 32, 32, 3)).byte().numpy()
    y, cifar10 = np.arange(17) % 10, {"data": x[:6], "targets": range(6), "classes": range(10)}
    read = lambda self, *_, **__: vars(self).update(cifar10)
    monkeypatch.setattr(cifar5m.CIFAR10, "__init__", read)
    Path("data/cifar5m").mkdir(parents=True)
    for part, i, j in ((0, 6, 10), (1, 10, 17)):
        np.savez(f"data/cifar5m/part{part}.npz", X=x[i:j], Y=y[i:j])
    for n in (17, 11, 10):
        cifar5m.main([str(n)])
        data = load_data(f"cifar5m-{n}")
        assert (data.train_x.permute(0, 2, 3, 1).numpy() == x[:n]).all()
        assert data.train_y.tolist() == y[:n].tolist() and len(data.test_x) == 6
        if n == 11:
            Path("data/cifar5m/part1.npz").write_bytes(b"cut")
    for n, says in ((6, "cannot be had: there are"), (12, "part1.npz is damaged")):
        with raises(SystemExit, match=says):
            cifar5m.main([str(n)])


# ---- Training ------------------------------------------------------------------------------------

def test_the_lines_in_the_docstring_lower_the_kl(here, capsys):
    """What a reader types into a notebook, with images of his own."""
    lines = [line[8:] for line in distill.distill.__doc__.splitlines() if line.startswith(" " * 8)]
    images = load_data("toy.npz").train_x
    exec("\n".join(lines).replace("=400", "=12"), {**vars(distill), "images": images})
    losses = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 12 and 0 < losses[-1] < losses[0] / 2


@cases("device", ["cpu"] + ["cuda"] * torch.cuda.is_available())
@cases("amp", ["off", "bf16"])
def test_training_lowers_the_kl_and_leaves_the_teacher_alone(here, monkeypatch, device, amp):
    """The log has a row every so many steps, of an image too few at the end of an epoch, and a
    probe in every second. --steps wins over --epochs.
    """
    # a second from one look to the next
    monkeypatch.setattr(distill, "time", SimpleNamespace(time=count().__next__))
    options = f"--epochs 1 --steps 8 --log-every 2 --eval-every 4 --init-eps inf --amp {amp}"
    checkpoint = run(f"{options} --device {device}")
    assert same(checkpoint["teacher"], random_network(0, "resnet20", 64, 16).state_dict())
    log = checkpoint["log"]
    assert [row["step"] for row in log] == [0, 2, 4, 6, 8]
    assert ["knn" in row for row in log] == [True, False, True, False, True]
    assert [row["images_per_s"] for row in log] == [0, 32, 28, 32, 28]
    assert 0 < log[-1]["loss"] < log[1]["loss"] / 2


@cases("loss, parts", table("""
kl: lf/wl
mse: lf/wl
kl: lf/l"""))
def test_steps_by_hand(here, monkeypatch, loss, parts):
    """Two steps, by SGD in place of AdamW, whose division hides what a gradient is: teacher in eval
    mode, student in train mode, both batches of an epoch, loss, gradient, learning rate and update;
    and of the two batches, of 50 images and of 10, the mean loss of an image.
    """
    def sgd(parameters, lr=1e-3, weight_decay=0.01, **_):
        return torch.optim.SGD(parameters, lr, momentum=0.9, weight_decay=weight_decay)

    function, total = F.mse_loss if loss == "mse" else kl_by_log_softmax, 0
    teacher, student, start = (
        random_network(seed, "resnet20", 64, 16, l2_bottleneck=parts) for seed in (0, 1, 1))
    images, optimizer = load_data("toy.npz", 16).train_x, sgd(student.parameters(), 2, 0)
    order = np.random.default_rng((0, 0)).permutation(60)
    for index in (order[:50], order[50:]):  # the last, smaller batch is kept
        x = normalise(images[index], channel_stats(images))
        value = function(teacher.eval()(x).detach(), student.train()(x))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        total += value.item() * len(index)
    monkeypatch.setattr(torch.optim, "AdamW", sgd)
    options = f"--batch-size 50 --steps 2 --init-eps inf --lr 2 --loss {loss}"
    checkpoint = run(f"{options} --l2-bottleneck {parts}")
    assert checkpoint["log"][1]["loss"] == approx(total / 60, rel=1e-3)
    for (name, p), q in zip(student.named_parameters(), start.parameters()):
        error = checkpoint["student"][name] - p
        assert error.norm() < 2e-2 * (p - q).norm() + 1e-7


def test_at_eps_0_without_batch_norm_the_student_stays_exactly_put(here):
    # The KL's gradient is exactly 0 where the logits agree; of the usual form it is rounding noise
    options = "--norm none --steps 2 --log-every 1"
    still = run(options)
    assert [row["loss"] for row in still["log"][1:]] == [0, 0]
    assert same(still["student"], still["teacher"])
    pushed = run(f"{options} --loss kl-log-softmax", "b")
    assert pushed["log"][-1]["distance"] > 0


def test_a_second_round_has_the_first_rounds_student_as_teacher(here):
    # With its batch-norm statistics: else the student would not start where its teacher is
    first = run("--epochs 1")
    assert first["step"] == 4
    second = run("--steps 1 --teacher a", "b")
    assert same(second["teacher"], first["student"])
    assert 0 < second["log"][1]["loss"] < first["log"][1]["loss"] / 10
    assert second["config"]["teacher_probes"]["knn"] == first["log"][-1]["knn"]
    shutil.rmtree("a")
    # it keeps the teacher that it had
    resumed = run("--steps 2 --teacher a --resume", "b")
    assert resumed["step"] == 2 and same(resumed["teacher"], second["teacher"])


def test_resume_is_bit_identical_and_run_json_tells_what_was_done(here, monkeypatch):
    options = "--n-samples 30 --log-every 1 --seed 3 --init-eps inf --steps"
    whole = run(f"{options} 4")
    first = run(f"{options} 3", "b")["config"]["provenance"]
    monkeypatch.setenv("PATH", "")  # goes on where there is no git, in a folder that needs quotes,
    Path("it's").mkdir()
    monkeypatch.setattr(distill, "__file__", "it's/distill.py")
    monkeypatch.setattr(distill, "CPUINFO", "amx_bf16")  # on another processor
    resumed = run(f"{options} 4 --resume", "b")
    assert same(whole["student"], resumed["student"])
    config = strict_json("b/run.json")
    assert config == resumed["config"]
    assert (config["n_images"], config["total_steps"], config["seed"]) == (30, 4, 3)
    assert config["provenance"] == {
        "torch": torch.__version__, "commit": f"{first['commit']}, then ?",
        "hardware": f"{first['hardware']}, then {os.cpu_count()} cores of ?"}
    teacher, student, _ = load_checkpoint("b")
    assert config["teacher_probes"] == probe.evaluate(teacher.encoder, load_data("toy.npz", 16))
    for network in (teacher, student):
        assert not network.training and not any(p.requires_grad for p in network.parameters())


def test_best_pt_holds_the_student_of_the_best_probe(here, monkeypatch):
    # Not the last, not that of a tie that came later, and not the one before the first step
    scores = iter([50, 50, 30, 40, 40, 35])  # of the teacher, the start, after steps 1 to 4
    monkeypatch.setattr(
        probe, "evaluate", lambda *_, **__: dict.fromkeys(probe.PROBES, next(scores)))
    last = run("--steps 4 --eval-every 1")["student"]
    best = read_checkpoint(Path("a/best.pt"))
    assert best["step"] == 2 and not same(best["student"], last)


# What a kill must not change: the same small runs whole, and killed and gone on with
PRUNE = f"prune far --epochs 3 --batch-size 16 --rounds 2 {FLOAT32}"


def prune_run(out, options=""):
    """A small curve, of 3 trainings of 3 epochs of 4 steps; its checkpoint."""
    do(f"{PRUNE} --out {out} {options}")
    return read_checkpoint(Path(out), "prune.py")


PLANE = f"landscape plane --grid 3 {FLOAT32}"


def plane(out, options="near far"):
    """landscape.py plane on those runs, 3 x 3 points; its arrays."""
    do(f"{PLANE} --out {out} {options}")
    return landscape.read_npz(Path(out))[1]


CONNECT = f"landscape connect near --copies 2 --epochs 3 --batch-size 16 --points 3 {FLOAT32}"


def connect():
    """landscape.py connect with two copies and three epochs; its arrays and the copies."""
    do(f"{CONNECT} --out c")
    copies = read_checkpoint(Path("c"), "landscape.py")
    return landscape.read_npz(Path("c/connect.npz"))[1] | copies


def left(out):
    """What a call has left, but for settings and times."""
    path, changing = Path(out), {"config", "checksum", "format", "log", "anchors"}
    files = sorted(path.glob("*.[np][pt]*")) or [path]
    contents = [np.load(file) if file.suffix == ".npz" else torch.load(file) for file in files]
    return [{key: content[key] for key in content.keys() - changing} for content in contents]


@cases("words, killed_at", table(f"""
distill --steps 2 --log-every 1 --init-eps inf: save 2
distill --steps 2 --log-every 1 --init-eps inf: save 3
distill --steps 2 --log-every 1 --init-eps inf: save 4
distill --steps 2 --log-every 1 --init-eps inf: save 5
distill --steps 2 --log-every 1 --init-eps inf: save 6
distill --steps 2 --log-every 1 --init-eps inf: save 7
{PRUNE} --rewind-epoch 1: save 4
{PRUNE} --rewind-epoch 1: save 5
{PRUNE} --rewind-epoch 1: save 9
{PRUNE} --rewind-epoch 1: apply_mask 18
{PLANE} near far: set_parameters 1
{PLANE} near far: set_parameters 11
{CONNECT}: save 2
{CONNECT}: error_along_line 2"""))
def test_what_is_killed_goes_on_to_the_same_numbers(here, words, killed_at, monkeypatch):
    """Killed at a call of a module's function; at one of `save`, before that file is written."""
    do(f"{words} --out whole.npz")
    (function, n), module, calls = killed_at.split(), globals()[words.split()[0]], count(1)
    with pytest.MonkeyPatch.context() as patch, raises(ZeroDivisionError):
        real = getattr(module, function)
        kill = lambda *args: real(*args) if next(calls) != int(n) else 1 / 0
        patch.setattr(module, function, kill)
        do(f"{words} --out a.npz")
    if "plane" in words:
        problem("landscape plot a.npz", f"{(int(n) - 1) // 3 * 3} of 12 points", "--resume")
    monkeypatch.setattr(distill, "CPUINFO", "")  # on another processor
    do(f"{words} --out a.npz --resume")
    torch.testing.assert_close(left("a.npz"), left("whole.npz"), rtol=0, atol=0, equal_nan=True)
    if "landscape" not in words:
        assert {*os.listdir("a.npz")} == {*os.listdir("whole.npz")}
        assert curve("a.npz") == curve("whole.npz")
    else:
        npz = Path("a.npz/connect.npz" if "connect" in words else "a.npz")
        assert ", then " in landscape.read_npz(npz)[0]["provenance"]["hardware"]


def test_what_does_not_fit_is_refused_and_nothing_is_overwritten_or_mixed(here):
    """An address in the message says which file, option or setting it is."""
    run("--steps 2")
    run("--steps 1 --seed 1", "other")
    run("--steps 1 --out-dim 32", "smaller")
    prune_run("p", "--rounds 0")
    plane("x.npz")
    connect()
    Path(copytree("c", "d"), "last.pt").unlink()
    Path(copytree("a", "b"), "last.pt").unlink()
    Path("cut.npz").write_bytes(Path("x.npz").read_bytes()[:-1])
    before = {path: path.read_bytes() for path in here.rglob("*.*") if path.is_file()}
    more, again, lines = "--out a --steps 4 --resume", "--rounds 0 --resume", f"{CONNECT} --out"
    for words, says in table(f"""
distill --out a --steps 4: a holds a run: add --resume
distill --out b --steps 4 --resume: b/last.pt
distill {more} --arch resnet56: arch resnet20, not resnet56
distill {more} --lr 0.1: lr 0.001, not 0.1
distill {more} --amp bf16: amp off, not bf16
distill --out f --teacher a --out-dim 32: a does not fit: it has out-dim 64, not 32
distill --dataset cifar11: cifar11
distill --n-samples 61: the 60 training
distill --out {distill.__file__}: cannot write to
{PRUNE} --out p: p holds a run: add --resume
{PRUNE} --out p {again} --init teacher: init student, not teacher
{PRUNE} --out p {again} --lr 0.3: lr 0.05, not 0.3
{PRUNE} --out p {again} --n-samples 30: not 30: name another
{PRUNE.replace("far", "near")} --out p {again}: init-eps inf, not 0.0
{PRUNE} --out q --dataset noise: --dataset
{PRUNE} --out q --rounds 100: last weight
{PRUNE} --out q --lr 1e30: not finite
prune plot nowhere: no pruning curve in nowhere
prune plot p --figure p.json: cannot write p.json
landscape connect nowhere: no checkpoint at nowhere
{PLANE} near: no plane
{PLANE} near near: no plane
{PLANE} near other: different teachers
{PLANE} near smaller: out-dim
{PLANE} near far --out x.npz: x.npz exists
{PLANE} near far --out x.npz --resume --grid 4: grid 3, not 4
{lines} c: c holds a run
{lines} c --resume --epochs 4: epochs 3, not 4
{lines} d --resume: d/last.pt
{lines} e --dataset noise: no labels
{lines} e --n-samples 61: --n-samples 61
landscape plot cut.npz: cut.npz is no whole file
landscape plot none.npz: none.npz is no whole file
probe near --dataset noise: noise has no labels"""):
        problem(words, says)
    run("--steps 2 --resume")  # nothing is left to do
    assert before == {path: path.read_bytes() for path in before} and not Path("nowhere").exists()


def test_neither_a_full_disk_nor_a_loss_that_is_not_finite_costs_what_there_was(here):
    # A disk with no room for a checkpoint, then a weight from which the next step overflows
    checkpoint, last, more = run("--steps 2"), Path("a/last.pt"), "--out a --steps 4 --resume"
    before = last.read_bytes()
    done = sh(f"python {REPO}/distill.py {SMALL} {more}", preexec_fn=lambda: resource.setrlimit(
        resource.RLIMIT_FSIZE, (100_000, 100_000)))
    one_line(done, "cannot write a/", ".pt")
    assert {*os.listdir("a")} == {"best.pt", "last.pt", "log.csv", "run.json"}
    assert last.read_bytes() == before
    checkpoint["student"]["projector.0.weight"][0, 0] = 1e38
    save(last, checkpoint)
    before = last.read_bytes()
    problem(f"distill {more}", "no longer finite by step 4", "--lr")
    assert last.read_bytes() == before


def test_nothing_goes_on_with_other_images_of_the_same_name(here):
    # One image of the training part, or of the test part, is replaced in place
    good = dict(np.load("toy.npz"))
    np.savez("copy.npz", **good)
    run("--dataset copy.npz --steps 2")
    curve_of = f"prune a --epochs 1 --batch-size 16 --rounds 0 {FLOAT32}"
    do(curve_of)
    for name in ("train_x", "test_x"):
        np.savez("copy.npz", **good | {name: np.roll(good[name], 1, axis=0)})
        problem("distill --dataset copy.npz --out a --steps 4 --resume", "data-checksum")
        problem(f"{curve_of} --resume", "data-checksum")
    np.savez("copy.npz", **good)
    run("--dataset copy.npz --steps 4 --resume")


def test_the_order_of_the_data_depends_on_seed_and_epoch_alone():
    # So a run that goes on in the middle of an epoch sees what it would have seen
    def order(first_step, seed=0):
        batches, weight = [], torch.zeros(1, requires_grad=True)
        loss = lambda index: batches.append(index.tolist()) or weight.sum()
        made = distill.train(loss, 10, torch.optim.SGD([weight]), steps=6, batch_size=4, seed=seed,
                             first_step=first_step)
        counts = [(step, n) for step, _, n in made]
        assert counts == list(enumerate(map(len, batches), first_step + 1))
        return batches

    whole = order(0)
    assert [len(batch) for batch in whole] == [4, 4, 2, 4, 4, 2]
    for epoch in (whole[:3], whole[3:]):
        assert sorted(sum(epoch, [])) == [*range(10)]
    assert whole[:3] != whole[3:] and order(4) == whole[4:] and order(0, 1) != whole


def test_a_second_process_waits_until_the_first_is_gone_and_a_kill_is_no_loss(here):
    command = f"python {REPO}/distill.py {SMALL} --log-every 1 --eval-every 30 --out a --steps 300"
    process = subprocess.Popen(command.split(), stdout=subprocess.PIPE, text=True)
    next(line for line in process.stdout if line.startswith("step 3,"))
    problem("distill --out a --resume", "another process")
    process.kill()
    assert process.wait() == -signal.SIGKILL
    options = "--log-every 1 --eval-every 30 --steps 32 --resume"
    assert same(*(run(options, out)["student"] for out in "ab"))


# ---- Probes --------------------------------------------------------------------------------------

def clusters(n, n_test, r=8, spread=1.0):
    """Features (n, r) of three classes and their labels (n,), and as many of a test part."""
    labels, generator = torch.arange(n + n_test) % 3, torch.Generator().manual_seed(99)
    x = 3 * randn(3, r, generator=generator)[labels]
    x += spread * randn(n + n_test, r, generator=generator)
    return x[:n], labels[:n], x[n:], labels[n:]


def test_the_converged_probe_is_that_of_logistic_regression():
    """Against L-BFGS in float64, on features that are badly conditioned on purpose."""
    x, y, test_x, test_y = clusters(600, 2000, 12, 4.0)
    mix = randn(12, 12, generator=torch.Generator().manual_seed(3)) * torch.logspace(-3, 3, 12)
    x, test_x = x @ mix, test_x @ mix
    z, test_z = ((part - x.double().mean(0)) / x.double().std(0) for part in (x, test_x))
    head = nn.Linear(12, 3).double()
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=1000, tolerance_grad=1e-9,
                                  tolerance_change=0, line_search_fn="strong_wolfe")

    def objective():
        optimizer.zero_grad()
        loss = F.cross_entropy(head(z), y) + head.weight.square().sum() * 5e-4
        loss.backward()
        return loss

    optimizer.step(objective)
    score = probe.linear_probe_converged(x, y, test_x, test_y, 3)
    assert score == approx(probe.accuracy(head(test_z), test_y).item(), abs=0.051)


@cases("constant", [0.0, 0.7, 123.456])
def test_a_feature_that_is_constant_in_training_counts_for_nothing(constant):
    """Whatever it is for test images; alone, it says that all are of the larger class. (Alone, 0.7
    has a standard deviation of 6e-8, because torch rounds.)
    """
    def score(features, test_features, n_classes):
        labels, test_labels = (part.clamp(max=n_classes - 1) for part in (y, test_y))
        return probe.linear_probe_converged(features, labels, test_features, test_labels, n_classes)

    x, y, test_x, test_y = clusters(600, 300)
    column, test_column = torch.full((600, 1), constant), constant + 999 * randn(300, 1)
    both = score(torch.cat([x, column], 1), torch.cat([test_x, test_column], 1), 3)
    assert both == score(x, test_x, 3) > 90 and score(column, test_column, 2) == approx(200 / 3)


def test_every_draw_of_the_papers_probe_is_its_recipe():
    # The heads train side by side: none may see another's gradient, batches or weight decay
    x, y, test_x, test_y = clusters(300, 500, spread=9.0)
    found = probe.linear_probe(x, y, test_x, test_y, 3, seeds=(5, 6, 7))
    for accuracy, seed in zip(found, (5, 6, 7)):
        torch.manual_seed(seed)
        head = nn.Linear(8, 3)
        optimizer = torch.optim.AdamW(head.parameters())
        order = torch.randperm(300, generator=torch.Generator().manual_seed(seed))
        for index in order.split(256) * 10:
            optimizer.zero_grad()
            F.cross_entropy(head(x[index]), y[index]).backward()
            optimizer.step()
        alone = probe.accuracy(head(test_x), test_y)
        assert accuracy.item() == approx(alone.item(), abs=0.21)
    assert found.unique().numel() == 3


def test_probed_images_are_normalised_by_the_training_part(here):
    # The test part is darker here, so that its own statistics would show
    data, seen, encoder = load_data("toy.npz", 16), [], nn.Flatten()
    data = data._replace(test_x=data.test_x // 2)
    encoder.register_forward_hook(lambda *call: seen.append(call[1][0]))
    probe.evaluate(encoder, data)
    for x, images in zip(seen, (data.train_x, data.test_x), strict=True):
        assert equal(x, normalise(images, channel_stats(data.train_x)))


def test_calibration_gives_batch_norms_the_statistics_of_the_images(here):
    # Those of the first one, over all images at once, by hand; the encoder itself is left as it is
    encoder, data = random_network(0, "resnet20", 1, 16).encoder, load_data("toy.npz", 16)
    norm = probe.calibrated(encoder, data)[1]
    # before the first norm
    first = encoder[0](normalise(data.train_x, channel_stats(data.train_x)))
    assert allclose(norm.running_mean, first.mean((0, 2, 3)), atol=1e-5)
    assert allclose(norm.running_var, first.var((0, 2, 3)), rtol=1e-3)
    assert not encoder[1].running_mean.any()


def test_knn_against_brute_force_and_its_ties():
    # Clusters that overlap, so that there are ties; the last query batch is smaller than 500
    x, y, test_x, test_y = clusters(200, 700, spread=6.0)
    votes = [np.bincount(y[(x - query).norm(dim=1).argsort()[:20]]) for query in test_x]
    # ties: the lowest
    expected = np.mean([vote.argmax() for vote in votes] == test_y.numpy())
    assert probe.knn_probe(x, y, test_x, test_y, 3) == approx(100 * expected)


def test_whitened_features_are_uncorrelated_and_know_the_training_part_alone():
    x, _, test_x, _ = clusters(600, 300)
    x, test_x = x @ torch.logspace(-1, 1, 8).diag(), test_x + 99
    z, test_z = probe.whitened(x, test_x, ridge=0)
    assert allclose(z.T.cov(), torch.eye(8), atol=1e-4) and z.mean(0).abs().max() < 1e-4
    assert allclose(probe.whitened(x, x[:9])[1], probe.whitened(x, x)[0][:9])  # the same map
    # what does not vary in training, but for rounding, stays 0
    flat = torch.cat([x, x[:, :1] + x[:, 1:2], torch.full((600, 1), 0.7)], 1)
    z, test_z = probe.whitened(flat, torch.cat([test_x, 9 * test_x[:, :2]], 1))
    assert (z.std(0) > 1e-6).sum() == 8 and test_z.abs().max() < 1e5
    # with a ridge of 1 an axis of the mean variance keeps half of it
    variance = torch.linalg.eigvalsh(x.T.cov())
    found = torch.linalg.eigvalsh(probe.whitened(x, x, ridge=1)[0].T.cov())
    assert allclose(found, variance / (variance + variance.mean()), rtol=1e-3)


def test_spread_counts_directions():
    # ±1 along each of three of five axes; far from the origin they all point one way
    x = torch.cat([torch.eye(5)[:3], -torch.eye(5)[:3]]) * 2
    assert probe.spread(x) == approx({"cosine": -0.2, "directions": 3})
    found = probe.spread(x + 1000)
    assert found["cosine"] > 0.999 and found["directions"] == approx(3)
    # a student that says nothing can be saved
    assert probe.spread(x * 0) == {"cosine": 0, "directions": 0}


@cases("arch, depth", [("resnet20", 19), ("vgg11", 8), ("vit-tiny", 12)])
def test_spread_along_depth_sees_what_each_block_hands_on(here, arch, depth):
    data, encoder = load_data("toy.npz"), random_network(0, arch, 1).encoder
    found = probe.spread_along_depth(encoder, data)
    assert len(found) == depth
    if arch == "resnet20":  # before the mean over pixels
        x = encoder[:-2](normalise(data.test_x, channel_stats(data.train_x)))
        assert found[-1] == approx(probe.spread(x.flatten(1)))


def test_probe_table_and_json(here, capsys):
    log = run("--steps 2", "s-seed0")["log"]
    do("probe s-seed0 far --json t.json --draws 3 --device cpu")
    text, found = capsys.readouterr().out, strict_json("t.json")
    student, teacher = "student s-seed0", "teacher resnet20 seed 0"  # which both runs share
    known = {"train_images": 60, "test_images": 24, "amp": "off", "draws": 3}
    known |= {name: log[-1][name] for name in ("linear_converged", "knn", "cosine", "directions")}
    assert found[student].items() >= known.items() and len(found) == 15
    assert found[student]["linear_paper_max"] >= found[student]["linear_paper_mean"] > 0
    # each is compared with the teacher that was treated alike, in a row of its own
    rows = text.partition(student)[2].splitlines()
    for treatment, row in zip(("", ", standardised", ", whitened"), rows):
        assert row.startswith(treatment.replace(",", " "))
        for key in ("linear_paper_mean", "linear_converged", "knn"):
            score = found[student + treatment][key]
            assert f"{score:.2f} ({score - found[teacher + treatment][key]:+.2f})" in row
    with raises(SystemExit, match="2"):  # it overwrites nothing
        do("probe s-seed0 --json t.json")


def test_unfinished_students_are_called_so(here, capsys):
    save(Path("s/last.pt"), {**run("--steps 2", "s"), "step": 1})
    do("probe s s/best.pt")
    do(f"prune s --rounds 0 --epochs 1 {FLOAT32}")
    out = capsys.readouterr().out
    for label in ("student s", "weights of s"):
        assert f"{label} (step 1 of 2) " in out and "student s/best.pt " in out


# ---- The command line and bad input --------------------------------------------------------------

@cases("words, says", table("""
distill --init-eps nan: at least 0
distill --dataset noise: --probe-dataset
distill --probe-dataset noise: --probe-dataset
distill --l2-bottleneck w/l: invalid choice: 'w/l'
distill --arch vgg11 --image-size 48: multiple of 32
distill --arch vit-base-p8 --image-size 48: multiple of 32
distill --arch vgg11 --image-size 32 --norm none: is for ResNets
distill --image-size 8: at least 16
probe: name one or more
probe a --teacher vgg11 --dataset leaves: name one or more
probe a --json a.txt: .json
prune a --rewind-epoch 3 --epochs 3: --rewind-epoch 3 is too late
landscape: command
landscape plane a --x nan 1: at least
landscape plane a --out a.png: .npz"""))
def test_usage_errors_exit_2(words, says, capsys):
    with raises(SystemExit, match="2"):
        do(words)
    assert says in capsys.readouterr().err.splitlines()[-1]


@cases("words", "distill probe prune prune_plot landscape_plane landscape_connect "
                "landscape_plot".split())
def test_help(words):
    with raises(SystemExit, match="0"):
        do(words.replace("_", " ") + " --help")


def test_bad_checkpoints(here):
    # Of another script, changed, foreign or not finite; then a pickle that would run code, files
    # that are no archive, and one with a lost block, its beginning, and all but the last byte
    checkpoint = run("--steps 1")
    save(Path("old.pt"), {**checkpoint, "format": "prune.py 4"})
    problem("probe old.pt", "old.pt is ", "distill.py")
    for content in ({**torch.load("a/last.pt"), "step": 0}, {"student": torch.zeros(9999)}):
        torch.save(content, "old.pt")
        problem("probe old.pt", "old.pt is ", "distill.py")
    checkpoint["student"]["encoder.0.weight"][0, 0] = math.nan
    save(Path("nan.pt"), checkpoint)
    problem("probe nan.pt", "not finite")
    good = Path("a/last.pt").read_bytes()
    zeroed = good[:60_000] + bytes(4096) + good[64_096:]  # a lost block
    evil = b"cos\nmkdir\n(Vran\ntR."  # calls os.mkdir("ran")
    for content in (evil, b"", b"a,b\n1,2\n", zeroed, good[:100], good[:-1]):
        Path("last.pt").write_bytes(content)
        problem("probe last.pt", "last.pt is ", "name another")
        problem("distill --out . --resume", "last.pt is ")
        assert Path("last.pt").read_bytes() == content and not Path("ran").exists()


def test_the_numbers_come_out_without_matplotlib(here):
    # A picture that cannot be drawn comes last, when all else is printed and saved
    Path("matplotlib.py").write_text("raise ModuleNotFoundError('No module named matplotlib')")
    for script, status in (("figures", 1), (f"report --out {here}/page", 0)):
        done = sh(f"python -m results.{script} {REPO}/results --figures {here}/f",
                  cwd=REPO, env={**os.environ, "PYTHONPATH": str(here)})
        assert done.returncode == status and ("matplotlib" in done.stderr) == status


# ---- Pruning -------------------------------------------------------------------------------------

def test_augment_flips_and_crops_whole_images():
    """Every crop is at one place of its image, or of its mirror image, and all places occur."""
    images, found = torch.randint(1, 256, (200, 3, 8, 8), dtype=torch.uint8), []
    crops, places = prune.augment(images, 0, 5), [*product((0, 1), range(9), range(9))]
    for padded, crop in zip(F.pad(images, [4] * 4), crops):
        found += [(flip, top, left) for flip, top, left in places if equal(
            crop, (padded, padded.flip(2))[flip][:, top:top + 8, left:left + 8])]
    assert len(found) == 200 and [len(set(part)) for part in zip(*found)] == [2, 9, 9]
    for at, alike in (((0, 5), True), ((0, 6), False), ((1, 5), False)):
        assert equal(crops, prune.augment(images, *at)) == alike


def test_the_threshold_is_global_and_what_is_pruned_does_not_come_back():
    # A layer of small weights loses more than its share; a pruned weight that is set to 9 stays out
    weights = {"a": torch.tensor([0.1, -0.2, 0.3, 0.4]), "b": torch.tensor([-1.0, 2, 3, 4])}
    mask = {name: w != 0 for name, w in weights.items()}
    for keep, left in ((6, "0011 1111"), (5, "0001 1111"), (2, "0000 0011")):
        mask = prune.magnitude_mask(weights, mask, keep)
        for m, bits in zip(mask.values(), left.split(), strict=True):
            assert m.tolist() == [bit == "1" for bit in bits]
        weights["a"][0] = 9
    ties = {"w": torch.ones(10)}
    assert prune.magnitude_mask(ties, {"w": ties["w"] > 0}, 7)["w"].sum() == 7


def test_the_control_keeps_the_counts_of_each_layer():
    # As many survivors as the ticket has, among those of its own last mask, but others
    mask, ticket = (
        {name: torch.arange(n) % k == 0 for name, n in (("a", 1000), ("b", 100))} for k in (2, 4))
    control, other = (prune.random_mask(mask, ticket, seed) for seed in (0, 1))
    for name, m in control.items():
        assert m.sum() == ticket[name].sum() and not (m & ~mask[name]).any()
        assert not equal(m, other[name]) and not equal(m, ticket[name])


def test_random_masks_of_neighbouring_seeds_share_no_draw(here):
    # Of 64 % each, 41 % are in both by chance; with a draw in common it would be 51 %
    a, b = (torch.cat([m.flatten() for m in prune_run(seed, f"--control random --seed {seed}")[
        "mask"].values()]) for seed in "01")
    assert (a & b).double().mean() < 0.46


@cases("options, total", table("""
--rewind-epoch 0: 270_448
--rewind-epoch 1 --init teacher: 270_448
--prune-all --rate 0.5 --amp bf16: 272_019
--control random: 270_448"""))
def test_rewinding_is_bit_identical_but_for_the_mask(here, monkeypatch, options, total):
    """What each round starts from (network with its buffers, optimiser) and sees (order of the
    data, crops, learning rates). Of ResNet20's 271,824 parameters and the classifier's 64 · 3 + 3,
    weights and biases of 21 batch norms and the classifier's biases are vectors.
    """
    rounds, fine_tune, augment = [], prune.fine_tune, prune.augment

    def spy(network, optimizer, *args):
        states = deepcopy((network.state_dict(), optimizer.state_dict()["state"]))
        rounds.append((*states, optimizer, []))
        return fine_tune(network, optimizer, *args)

    def watch(images, *args):
        *_, optimizer, seen = rounds[-1]
        seen.append((images.tolist(), args, optimizer.param_groups[0]["lr"]))
        return augment(images, *args)

    monkeypatch.setattr(prune, "fine_tune", spy)
    monkeypatch.setattr(prune, "augment", watch)
    checkpoint = prune_run("p", options)
    point, mask, network = (checkpoint[key] for key in ("rewinding_point", "mask", "network"))
    rate, skipped, total = 0.5 if "0.5" in options else 0.2, 4 * ("epoch 1" in options), int(total)
    assert sum(m.numel() for m in mask.values()) == total
    assert sum(m.sum() for m in mask.values()) == round(total * (1 - rate) ** 2)
    (*_, seen), *later = rounds
    _, steps, rates = zip(*seen)
    assert steps == tuple((0, step) for step in range(12))
    assert rates == approx([0.05] * 6 + [0.005] * 3 + [0.0005] * 3)
    for number, (weights, momentum, _, sees) in enumerate(later, 1):
        assert sees == seen[skipped:]
        torch.testing.assert_close(momentum, point["optimizer"]["state"], rtol=0, atol=0)
        changed = {name: weights[name] != w for name, w in point["network"].items()}
        assert not any(weights[name][c].any() for name, c in changed.items())
        n_changed = sum(c.sum() for c in changed.values())
        assert 0 < n_changed <= total * (1 - (1 - rate) ** number) + 1
    assert not any(network[name][~m].any() for name, m in mask.items())  # at a round's end, too
    start = load_checkpoint("far")["--init" not in options]
    for name, weight in start.encoder.state_dict().items():
        assert skipped or equal(point["network"][f"encoder.{name}"], weight)


def test_fine_tuning_learns(here):
    """The three classes differ in brightness."""
    prune_run("a", "--init teacher --rounds 0 --epochs 10 --batch-size 8")
    assert float(curve("a")[0]["final_accuracy"]) > 90


def test_plot_draws_every_curve_from_its_log_alone(here, capsys):
    # None is averaged with another
    prune_run("made", "--rounds 0")
    config = strict_json("made/config.json")
    for curve_of in """\
0/prune-a {} 60 50
0/prune-b {"init":"teacher"} 60 40
0/prune-c {"control":"random"} 61 30
1 {"rounds":9,"n_images":9,"prune_all":true} 70 71 72""".splitlines():
        out, change, *best = curve_of.split()
        save(Path(out, "config.json"), {**config, "rounds": 1, **json.loads(change)})
        save(Path(out, "log.csv"), [
            {"weights_left": 100 * 0.8**i, "best_accuracy": score} for i, score in enumerate(best)])
    capsys.readouterr()
    do("prune plot 0 1 --figure f.png")
    Image.open("f.png")
    assert capsys.readouterr().out.startswith("""\
best epoch's test accuracy in %
  [1] student, ℓ = 0, 3 epochs; resnet20, 60 images of toy.npz (0/prune-a)
  [2] teacher, ℓ = 0, 3 epochs; resnet20, 60 images of toy.npz (0/prune-b)
  [3] student, ℓ = 0, 3 epochs, random masks; resnet20, 60 images of toy.npz (0/prune-c)
  [4] student, ℓ = 0, 3 epochs, all parameters, 2 of 9 rounds; resnet20, 9 images of toy.npz (1)
weights left (%)       [1]       [2]       [3]       [4]
          100.00     60.00     60.00     61.00     70.00
           80.00     50.00     40.00     30.00     71.00
           64.00                                   72.00
""")
    Path("0/prune-b/log.csv").write_text("round,seconds\n1,2\n")
    problem("prune plot 0", "0/prune-b holds no readable curve")


# ---- Landscapes ----------------------------------------------------------------------------------

@cases("axes", ["barycentric", "orthonormal"])
def test_a_plane_goes_through_its_anchors(axes):
    a, b, c = theta = randn(3, 50).double()
    origin, basis = landscape.plane_basis(theta, axes)
    args = SimpleNamespace(axes=axes, grid=3, x=None, y=(0, 1))
    grid, weights = landscape.lay_grid(theta, args)
    found = torch.stack([*map(weights, range(12))])
    assert allclose(found, origin + torch.from_numpy(grid["points"]) @ basis)
    assert equal(found[:3], theta)
    if axes == "barycentric":
        assert equal(origin, a) and equal(basis, theta[1:] - a)
    else:
        assert allclose(basis @ basis.T, torch.eye(2).double())
        assert (basis @ origin).abs().max() < 1e-9
        assert allclose(b - a, (b - a).norm() * basis[0])
    for points in ([a, b, a], [a, a, b], [a, b, b], [a, b, 2 * b - a], [a, b, a + 1e-9 * c]):
        with raises(Problem, match="no plane"):
            landscape.plane_basis(torch.stack(points), axes)


@cases("options", ["", "--encoder-only"])
def test_anchors_have_their_own_loss_exactly(here, options):
    """In train mode, each batch by its own statistics; but from the teacher in eval mode."""
    arrays = plane("a.npz", f"near far {options}")
    teacher, near, _ = load_checkpoint("near")
    networks = deepcopy(teacher), near, load_checkpoint("far")[1]
    images = load_data("toy.npz", 16).train_x
    stats = channel_stats(images)
    for _ in range(2):  # the subset of a subset, shuffled; none is lost
        images, _ = landscape.labelled_subset(images, torch.arange(60) // 20, None)
    for network, kl in zip(networks, arrays["kl"]):
        own = 0
        for batch in images.tensor_split(4):
            x = normalise(batch, stats)
            p, q = ((net.encoder if options else net)(x) for net in (teacher, network.train()))
            own += KLDivergence.apply(p, q).item() * len(x) / 60
        assert kl == approx(own, rel=1e-4) and own > 0
    assert " ".join(arrays["anchors"]) == "θ_T θ*_S(0) θ*_S(1)"
    theta = landscape.flatten((near.encoder if options else near).parameters())
    assert arrays["length"][1] == approx(theta.norm().item())


def test_lines_are_straight_and_exact_at_their_ends():
    (a, b), states = randn(2, 99), []
    error = lambda state: states.append(state["w"]) or len(states)
    for end in (a, b):
        errors = landscape.error_along_line({"w": a}, {"w": end}, np.linspace(0, 1, 11), error)
    assert all(equal(w, a) for w in states[:12]) and equal(states[-1], b)
    assert allclose(states[14], 0.7 * a + 0.3 * b)
    assert errors.tolist() == [*range(12, 23)]
    assert landscape.barrier(np.array([[10.0, 40, 20], [0, 0, 8]])).tolist() == [25, 4]


def test_copies_differ_in_the_order_of_the_data_alone(here, monkeypatch):
    """And the error at a line's ends is that of its copies, with batch norm's statistics anew."""
    starts, fine_tune = [], landscape.fine_tune

    def spy(network, *args):
        starts.append((deepcopy(network.state_dict()), args[-1]))
        return fine_tune(network, *args)

    monkeypatch.setattr(landscape, "fine_tune", spy)
    made = connect()
    teacher, student, _ = load_checkpoint("near")
    for i, origin in ((0, student), (2, teacher)):
        network, _ = prune.new_classifier(origin.encoder, 64, 3, seed=0, lr=1)
        for (state, order_seed), expected in zip(starts[i:], (0, 1)):
            assert same(state, network.state_dict()) and order_seed == expected
        assert not same(*made["copies"][i:i + 2])
    x, y, *test, _ = load_data("toy.npz", 16)
    stats, (x, _) = channel_stats(x), landscape.labelled_subset(x, y, None)
    batches = [normalise(part, stats) for part in x.tensor_split(4)]
    for state, error in zip(made["copies"], made["error"][:, 0, [0, -1]].flatten()):
        network.load_state_dict(state)
        landscape.update_bn(batches, network.encoder)
        own = prune.classification_accuracy(network, *test, stats, "off")
        assert error == approx(100 - own)


def test_pictures_are_drawn_from_the_npz(here):
    # Of another checkpoint, network or image nothing is left to read
    plane("a.npz")
    plane("b.npz", "far --axes barycentric")
    connect()
    for eps in ("1", "inf"):  # one logit: no KL anywhere
        run(f"--steps 1 --out-dim 1 --init-eps {eps}", eps)
    assert not plane("zero.npz", "1 inf")["kl"].any()
    for words in ("a.npz", "b.npz", "zero.npz", "c/connect.npz"):
        do(f"landscape plot {words} --figure f.png")
        assert Path("f.png").stat().st_size > 10_000
        Path("f.png").unlink()


# ---- run_all.sh ----------------------------------------------------------------------------------

@fixture
def clone(tmp_path):
    """A folder that holds what a clone does."""
    ignored = shutil.ignore_patterns(".*", "data", "runs", "figures")
    return Path(copytree(REPO, tmp_path / "clone", ignore=ignored))


def run_all(words, clone, **variables):
    """Run the clone's run_all.sh, from the folder above."""
    env = {**os.environ, **variables}
    return sh(f"bash {clone.name}/run_all.sh {words}", cwd=clone.parent, env=env, timeout=300)


def listed(words="", **variables):
    """The lines of `run_all.sh list`, in an environment that holds the `variables` alone."""
    variables = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", **variables}
    done = sh(f"bash {REPO}/run_all.sh list {words}", env=variables)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def parsed(line):
    """(a line's words, the options that they give, where they write)."""
    _, script, *words = shlex.split(line, comments=True)
    module = globals()[script[:-3]]
    if module is landscape:
        options = getattr(landscape, f"{words[0]}_args")(words[1:])
    else:
        options = module.parse_args(words)
    return words, options, options.json if module is probe else options.out


def test_the_list_needs_no_python_and_prints_one_command_a_line(clone, tmp_path):
    # So that one can read, count and edit the jobs before anything is installed
    for tool in "bash dirname grep sed wc".split():
        (tmp_path / tool).symlink_to(shutil.which(tool))
    lines, first, second, mini = (
        listed(words, PATH=str(tmp_path)) for words in ("", "1", "2", "mini"))
    assert lines == first + second and len(set(lines)) == len(lines) == 256
    job = r"python (probe\.py .*--json|(distill|prune|landscape)\.py .*--resume) .*\S  # stage "
    for line in lines + mini:
        assert re.fullmatch(job + "12"[line in second], line), line
    for line in listed("mini", CIFAR10="/my *'images"):
        _, options, _ = parsed(line)
        assert "/my *'images" in (options.dataset, options.probe_dataset)
    for words in ("quik", "list 3"):
        done = run_all(words, clone)
        assert done.returncode == 2 and done.stdout == "" and "mini" in done.stderr


@cases("seeds", ["", "1 4"])
def test_jobs_have_outputs_of_their_own_that_the_report_knows(seeds):
    # Of stage 1 no job reads what another writes; of stage 2 every job does, from stage 1 alone
    outputs, stage1, known = set(), set(), ("noise", *distill.DOWNLOADS, *distill.MADE)
    for line in listed(SEEDS=seeds):
        if line.endswith("2"):
            stage1 = stage1 or set(outputs)
        words, options, out = parsed(line)
        reads = {Path(word.removesuffix("/best.pt")) for word in words if word.startswith("runs/")}
        reads -= {out}
        assert reads <= stage1 and bool(reads) == bool(stage1) and out not in outputs, line
        assert not options.dataset or options.dataset.startswith(known), line
        outputs.add(out)
    # what the report looks for, by the names that it gives to outputs
    names = {re.sub("-seed.|/connect$|.npz", "", str(out)).removeprefix("runs/paper/")
             for out in outputs}
    rows = list(csv.DictReader(open(REPO / "results/paper.csv")))
    names |= {row["row"] for row in rows if row["artefact"] == "same runs"}
    for name in "; ".join(row["ours"] for row in rows).split("; "):
        assert re.sub(":.*|/connect/connect$", "", name) in names, name


def test_a_toy_job_of_each_kind_runs(here, monkeypatch):
    # On images of 16 pixels, which are quickest
    scores = "linear_paper_mean linear_paper_max cosine directions".split() + [*probe.PROBES]
    monkeypatch.setattr(probe, "judge", lambda *_, **__: dict.fromkeys(scores, 50.0))
    monkeypatch.setitem(probe.TREATMENTS, ", whitened", lambda *parts: parts)
    lines = listed(TOY="toy.npz", SEEDS="0")
    for part in ("teachers-stl10", "cifar10-resnet18-seed0", "teacher --rewind-epoch 1", "connect"):
        line = next(line for line in lines if part in line)
        *_, out = parsed(line)
        do(re.sub(r"python |\.py|  #.*", "", line))
        assert out.exists() and out.is_relative_to("runs/toy/paper"), line


def test_jobs_run_side_by_side_and_one_that_fails_stops_no_other(clone):
    """Two jobs that wait for each other; one that fails; one whose shell is killed."""
    (clone / "distill.py").write_text("""
import os, pathlib, sys, time
load_data = lambda *_: None
if __name__ == "__main__":
    if "eps1.5" in sys.argv[-1]:
        sys.exit("lost")
    if "eps4" in sys.argv[-1]:
        os.kill(os.getppid(), 9)
    pathlib.Path("started" + sys.argv[-1][-12:-6].replace("/", "")).touch()
    while len(list(pathlib.Path().glob("started*"))) < 2:
        time.sleep(0.1)
""")
    done = run_all("mini", clone, SEEDS="0", JOBS="2", CIFAR10=".", TINYIMAGENET=".")
    assert "12 jobs of stage mini, 2 at once" in done.stdout, done.stderr
    assert done.returncode == 1 and done.stdout.count("\ndone ") == 10
    lost, killed, page = (clone / "runs/logs/failed").read_text().splitlines()
    assert page == "bash run_all.sh report"  # without a whole distill.py
    assert "eps1.5" in lost and re.search("FAILED .*eps1.5.*: lost", done.stdout)
    assert "eps4" in killed and "error: 3 jobs did not end well" in done.stderr.splitlines()[-1]


@cases("wanted, done", table("""
cifar10-resnet18-seed1: 0
fig4-n500-seed1: 46"""))
def test_stage_2_begins_unless_it_wants_a_student_that_was_lost(clone, wanted, done):
    """With a stand-in that does all jobs but one, and one that makes the report."""
    jobs = f"""run_job() {{ [[ $1 == *{wanted}* ]] || echo "$1" >>$LOGS/done; }}"""
    told = sh(f"""bash -c 'source $0 list >/dev/null; PY=true GPUS=0 JOBS=9; report() {{ :; }}
{jobs}; (run 1 2) || grep -c "stage 2" runs/logs/done' {clone}/run_all.sh""")
    assert told.stdout.splitlines()[-1] == done, told
    assert "error: 1 jobs did not end well" in told.stderr


def test_what_is_probed_is_probed_again_where_its_run_went_on(here):
    """Or where nobody knows by which job it was; with a stand-in that makes the job's last word."""
    Path("probes.json").touch()
    (here / "probe").write_text('echo measured; touch "${@: -1}"')
    job = f"run_job 'python {here}/run --json {here}/probes.json  # stage 1' 0"
    start = f"source $0 list >{here}/list; LOGS={here} GPUS=0 PY='bash {here}/probe'"
    jobs = f"{job}; {job}; touch -d +1min {here}/run; {job}"
    done = sh(f'bash -c "{start}; {jobs}" {REPO}/run_all.sh')
    (log,) = here.glob("*.log")
    assert done.stdout.count("done ") == 3 and log.read_text() == "measured\n" * 2, done.stderr


def test_what_cannot_be_had_is_said_at_once(clone):
    # Before hours of other jobs: the data made by hand, the archives, and a GPU
    one_line(run_all("data", clone), "CIFAR-5M")
    (clone / "data/cifar5m").mkdir(parents=True)
    (clone / "data/cifar5m/part0.npz").touch()
    one_line(run_all("data", clone, DATA_MIRROR="http://127.0.0.1:9"), "cannot download")
    if not torch.cuda.is_available():
        done = run_all("full", clone)
        assert done.returncode == 1 and "quick" in done.stderr and "mini" in done.stderr


# ---- The report ----------------------------------------------------------------------------------


# What a report needs of a run.json
RUN = json.loads("""{
    "dataset": "cifar10", "n_images": 9, "batch_size": 3, "out_dim": 4, "amp": "off",
    "total_steps": 2, "teacher_probes": {"linear_paper": 30, "linear_converged": 30, "knn": 30},
    "provenance": {"hardware": "a GPU", "torch": "2", "commit": "abc"}}""")


def finished(name, *linear, seed=0):
    """A run of two steps as its run.json and log.csv tell it: its linear probe at steps 0, 1, 2."""
    out = Path(f"paper/{name}-seed{seed}")
    save(out / "run.json", {**RUN, "seed": seed})
    log = "step,epoch,loss,distance,linear_paper,linear_converged,knn\n"
    for i, score in enumerate(linear):
        log += f"{i},{i},{1e-5 / i if i else 'nan'},20,{score},{score + 5},{score - 5}\n"
    (out / "log.csv").write_text(log)


def test_verdicts_follow_their_rule(here):
    # A page of eight runs, with what a verdict could get wrong: the first row of a log, a run that
    # is not at its end, seeds that are not in both groups, and ours that are far from each other
    finished("cifar10-resnet18", 30, 47, 45)
    finished("cifar10-resnet18", 30, 45, 46.5, seed=1)
    # no other has this teacher
    finished("fig18-resnet18", 40, 41, 46, seed=1)
    finished("cifar100-vgg11", 60, 10, 20)  # step 0 is not the student's
    finished("cifar10-vgg11", 30, 50)  # not at its end
    finished("fig4-n500", 5, 50, 43.7)
    finished("fig4-n1000", 5, 5, 10)
    # far off, but so are ours from each other
    finished("fig4-n1000", 5, 5, 60, seed=1)
    # figures show such runs, but not their prunings
    for name in ("cifar10-resnet18", "raw-vgg11", "fig3-vgg11-eps4"):
        ticket = Path(f"paper/{name}-seed0/prune-student-rewind0")
        save(ticket / "config.json", {"seed": 0, "rounds": 0})
        save(ticket / "log.csv", [{"round": 0, "weights_left": 100, "best_accuracy": 9}])
    do("figures . --figures f")
    do("report . --figures f --out page")
    text = Path("page").read_text()
    for row in """\
cifar10, resnet18, student | 44.67 | 41.75 ± 0.35 (2) | 40.75 ± 1.06 | -2.92 | 50.75 ± 1.06 \
| lower | [1]
cifar10, resnet18, student | 46.02 | 46.75 ± 0.35 (2) | 45.75 ± 1.06 | +0.73 | 50.75 ± 1.06 | agrees
cifar100, vgg11, student | 26.62 | 20.00 (1) | 20.00 | -6.62 | 25.00 | lower | [1] |
vgg11, student | 51.98 | 50.00 (1) | 50.00 | -1.98 | 55.00 | unfinished
n50000 | 51.36 |  |  |  |  | missing |
n500 | 41.76 | 50.00 (1) | 43.70 | +8.24 | 48.70 | higher
n1000 | 45.94 | 35.00 ± 35.36 (2) | 35.00 ± 35.36 | -10.94 | 40.00 ± 35.36 | scattered
KL at the end 5.0e-06, then 5.0e-06 (n = 1) | does not show
not finished: cifar10-vgg11-seed0 (1 to go)
, 2 steps of 3, m = 4 (1 to go), 1 probes, amp off
[1] cifar10, 9 images, 2 steps of 3, m = 4, 2 probes, amp off; a GPU, torch 2, commit abc
](f/fig4.png)
](f/learning-curves.png)""".splitlines():
        assert row in text, row
    save(Path("paper/fig4-n1000-seed1/run.json"), {**RUN, "seed": 1, "total_steps": 3})
    problem("report . --figures f --out page", "fig4-n1000-seed1 does not fit", "total-steps")
    Path("paper/fig4-n500-seed0/run.json").write_text("{")
    problem("report . --figures f --out page", "run.json", "truncated")


@cases("rule, examples", table("""
beats_its_teacher: 37 | 35.5
flat_then_lower: 46 45 46 45 43 40 | 46 45 46 43 43 40 | 46 45 46 45 43 40///34 | 46 45 46 45 43 44
wide_enough: 36 46 46 46 46 47 | 45 46 46 46 46 46 | 36 43 46 46 46 46
batch_norm_is_first: 46/40 45/38 45 45 45 | 46/40 45/39.5 45 45 45 | 46/40 43 45 45 45
feature_norm_matters: 46 45 41 | 46 41 45 | 46 50 49
second_round_adds_nothing: 46//1 47//0.01 | 46//1 47//0.5 | 46//1 49//0.01
switch_changes_little: 46 45 | 46 43 | 46 49
student_is_a_ticket: 92 90 91 91.8 | 92 93 91 91.8 | 92 90 91 91 | 92 90////40 91 91.8"""))
def test_claims_follow_their_rule(rule, examples):
    """Of the examples, best accuracy/first/KL/last/weights left a group, the first alone shows it.
    """
    verdicts = []
    for example in examples.split(" | "):
        groups = []
        for group in example.split():
            best, first, loss, end, left = (
                float(number or 0) for number in f"{group}////".split("/")[:5])
            scores = {"linear_paper": best, "loss": loss}
            groups.append([{
                "first": {"linear_paper": first},
                "best": scores,
                "end": {**scores, "linear_paper": end or best},
                "teacher": {"linear_paper": 35},
                "rows": [{"weights_left": left or 50, "best_accuracy": best}]}])
        verdicts.append(report.judge(getattr(report, rule), groups)[1])
    assert verdicts == ["shows"] + ["does not show"] * examples.count("|")


@cases("far, shows", [(3, True), (1.5, False)])
def test_claims_on_landscapes_and_the_kl(far, shows):
    # A point beside the teacher, a barrier and a peak, each just high enough or not
    points = np.array([[0, 0], [1, 0], [0, 1], [0.25, 0], [-0.25, 0]])
    plane = {"points": points, "kl": np.array([9, 9, 9, 1, far])}
    assert report.asymmetric_valley([plane])[1] == shows
    lines = {"error": np.array([[[0, 1, 0]], [[0, far, 0]]])}
    assert report.students_share_a_basin([lines])[1] == shows
    rows = [{"epoch": 0}, {"epoch": 1, "loss": far}, {"epoch": 10, "loss": 1}]
    assert report.kl_peaks_early([{"end": {"distance": 20}, "rows": rows}])[1] == shows


def test_tables_of_readme_and_lab_book_are_those_of_the_committed_files():
    text = (REPO / "README.md").read_text().replace("−", "-")
    found = strict_json(REPO / "results/quick/summary.json")
    for student in ("eps0", "epsinf", "noise"):
        for treatment, key in (("", "linear_paper_mean"), ("", "linear_converged"), ("", "knn"),
                               (", whitened", "linear_paper_mean"), (", whitened", "knn")):
            score, teacher = (found[name + treatment][key] for name in (
                f"student runs/quick/{student}", "teacher resnet20 seed 0"))
            assert f"{score:.1f} ({score - teacher:+.1f})" in text, (student, key)
    lab_book = (REPO / "results/README.md").read_text()
    assert all(table in lab_book for table in treated_tables.tables())


def test_the_committed_report_and_pictures_come_from_the_committed_logs(here):
    # A page or a rule that was changed, and not made again
    problem("report runs", "runs", "mini")
    logs = REPO / "results"
    do(f"figures {logs}")
    do(f"report {logs}")
    page = Path("results/REPORT.md").read_text().replace(f"`{REPO}/", "`")
    assert page == (logs / "REPORT.md").read_text()
    for file in ("cpu/plane.npz", "cpu/connect-seed0.npz"):
        do(f"landscape plot {logs}/{file} --figure f.png")
    figures.pyplot.close("all")  # of more than twenty it would warn
    prune.main(["plot", *map(str, logs.glob("cpu/tickets/*-seed?")), "--figure", "tickets.png"])
