"""REPORT.md: what the paper says beside what is under runs/. figures.py draws its pictures.

    python -m results.report                      from runs/paper and runs/mini
    python -m results.report results              from the logs that are kept there

paper.csv says what the paper does, a number or a claim a row, and under `ours` what our results are
called; here they are joined and judged. Directories have the names that `run_all.sh list`
gives them, such as paper/fig10-m256-seed0. Read are run.json and log.csv of distill.py, the .json
files of probe.py, config.json and log.csv of prune.py, and landscape.py's .npz; never a checkpoint.
"""
import csv, json, os, re
from collections import defaultdict
from pathlib import Path
from statistics import mean

import numpy as np

from distill import MAY_CHANGE, Problem, check_same, new_parser, save
from landscape import barrier, read_npz
from probe import PROBES

PAGE = """\
# Report

Made by `bash run_all.sh report` from what lies under `{args.root}`; nothing here was typed by hand.
The jobs are those of `bash run_all.sh list`. Test accuracy in %, mean ± standard deviation over n
seeds.

- **luckiest** is the number to hold beside the paper's, which are maxima: of a student, over all
  probes of its run, but for the one before its first step; of a teacher, of raw pixels and of a
  run's best student on other data, over the draws of its linear probe (initial weights, order of
  images). The notes say how many; the paper had 100 to 150. **honest** is the number to believe: of
  a student, its last probe; else the mean of the draws.
- **converged** is a linear probe that the paper does not have: standardised features, trained to
  its optimum (of a student: at the end of its run). It does not depend on how features are scaled.
- **verdict**: *agrees* if ours is within 2 points of the paper, *scattered* if it is not, but
  within two of our standard deviations, else *higher* or *lower*. For a figure without numbers:
  *shows* or *does not show*, by the rule beside it. *unfinished* where a run has steps to go;
  *missing* where there is none.
- **made** numbers the notes at the end: data, size of the run, hardware, versions.

Of {summary}.

## Table 1: linear probe

|  | paper | luckiest (n) | honest | difference | converged | verdict | made |
| --- | --- | --- | --- | --- | --- | --- | --- |
{sections[Table 1]}
## Table 2: linear probe, students of Tiny ImageNet on other data

|  | paper | luckiest (n) | honest | difference | converged | verdict | made |
| --- | --- | --- | --- | --- | --- | --- | --- |
{sections[Table 2]}
## Table 3: k-NN

|  | paper | luckiest (n) | honest | difference | converged | verdict | made |
| --- | --- | --- | --- | --- | --- | --- | --- |
{sections[Table 3]}
## Table 4: k-NN, students of Tiny ImageNet on other data

|  | paper | luckiest (n) | honest | difference | converged | verdict | made |
| --- | --- | --- | --- | --- | --- | --- | --- |
{sections[Table 4]}
## Table 5: architectures on CIFAR10, linear probe

The paper's ViT rows come from another network: its released code attends over heads, not tokens,
and its text says 8-pixel patches where its parameter counts need 16. Here are ours with either.

|  | paper | luckiest (n) | honest | difference | converged | verdict | made |
| --- | --- | --- | --- | --- | --- | --- | --- |
{sections[Table 5]}
## Fig. 4: VGG11 distilled on n images (noise: Gaussian noise), probed on CIFAR10

|  | paper | luckiest (n) | honest | difference | converged | verdict | made |
| --- | --- | --- | --- | --- | --- | --- | --- |
{sections[Fig. 4]}
## Figures without numbers, and switches

Fig. 13 to 16 (encoders alone) have no rule: see the pictures. A switch has no figure: raw is the
released code's last layer, whose rows are not normalised; raw-lr3e-4 has that and a learning rate
of 3e-4 in place of 1e-3; loss-mse takes the MSE of the logits in place of the KL.

|  | the paper shows, by this rule | ours | verdict | made |
| --- | --- | --- | --- | --- |
{sections[claims]}
## In miniature, on a CPU (`bash run_all.sh list mini`)

Fewer images and steps than the paper: read these for their direction, not beside its numbers.
Students at the end of their runs; in brackets the gain over their own teachers and over their own
starts, which at ε = 0 are the teachers.

| (n) | linear (paper) | linear (converged) | k-NN | made |
| --- | --- | --- | --- | --- |
{sections[mini]}
## Pictures

Lines are means over seeds, bars standard deviations. A student of ε = 0 is its teacher at epoch 0.
Dotted: the KL of a constant student, with the same answer for every image.

{sections[pictures]}## How the numbers were made

{sections[notes]}
Begun but not finished: {sections[unfinished]}.
"""

# ---- What we have --------------------------------------------------------------------------------

FILES = ("paper/*/run.json", "mini/*/run.json", "quick/*/run.json", "paper/*/prune-*/config.json",
         "paper/*/connect/connect.npz", "paper/fig5-shared.npz")


def read_json(file):
    try:
        return dict(json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        raise Problem(f"{file} is truncated or not ours ({error}): remove it or make it again")


def read_result(file):
    """(settings with log or arrays, how much remains to do) of one of these files."""
    if file.suffix == ".npz":
        config, arrays = read_npz(file)
        return config | arrays, len(arrays.get("points", ())) - len(arrays.get("kl", ()))
    run = read_json(file)
    rows = [{column: float(cell) for column, cell in row.items() if cell not in ("", "nan")}
            for log in file.parent.glob("log.csv")  # none yet where a run has only begun
            for row in csv.DictReader(log.read_text().splitlines())]
    probed = [row for row in rows[1:] if "knn" in row]  # the first row is before any step
    if probed:
        run |= {"start": rows[0], "first": probed[0], "end": probed[-1],
                "teacher": run["teacher_probes"],
                "best": {probe: max(row[probe] for row in probed) for probe in PROBES},
                "n_probes": len(probed)}
    done = [*rows[-1].values()][0] if rows else 0  # the first column counts steps, or rounds
    return run | {"rows": rows}, run.get("total_steps", run.get("rounds")) - done


SEED_IN_NAME = r"( \S*/\S*)?[- ]seed ?\d+(/best.pt)?"  # with the path that probe.py gives a student


def check_repeats(configs):
    """Raise Problem unless the runs {path: config} repeat one experiment, so that one may average
    them: all settings agree but the seed, also that in a path.
    """
    ignored = MAY_CHANGE - {"total_steps"} | {"seed", "teacher_probes", "constant_student_kl"}
    first = None
    for path, config in configs.items():
        settings = json.loads(re.sub(r"seed\d+", "", json.dumps(config)))
        first = first or settings
        check_same(path, settings, first, ignored)


def read_results(root):
    """({name without its seed: {seed: result}}, [what is not finished]). Raises Problem where one
    name has runs that do not repeat one experiment.
    """
    results, configs, unfinished = defaultdict(dict), defaultdict(dict), []
    for file in sorted(root.glob("paper/*.json")):
        for name, probes in read_json(file).items():
            results[f"{file.name}: {re.sub(SEED_IN_NAME, '', name)}"][name] = probes | {
                "end": probes | {"linear_paper": probes["linear_paper_mean"]},
                "best": probes | {"linear_paper": probes["linear_paper_max"]}}
    for pattern in FILES:
        for file in sorted(root.glob(pattern)):
            name = re.sub(r"^paper/|/\w+\.json$|\.npz$", "", os.path.relpath(file, root))
            result, remaining = read_result(file)
            if remaining:
                unfinished.append(f"{name} ({remaining:,.0f} to go)")
            if file.suffix == ".json":
                configs[re.sub(SEED_IN_NAME, "", name)][name] = read_json(file)
            if not remaining or "best" in result:
                results[re.sub(SEED_IN_NAME, "", name)][result.get("seed")] = result | {
                    "remaining": remaining}
    for group in configs.values():
        check_repeats(group)
    for row in paper_rows():
        if row["artefact"] == "same runs" and row["ours"] in results:
            results[row["row"]] |= {seed: run for seed, run in results[row["ours"]].items()
                                    if not run["remaining"]}
    return results, unfinished


def paper_rows():
    return [*csv.DictReader(Path(__file__).with_name("paper.csv").read_text().splitlines())]


def values(group, when="best", column="linear_paper"):
    """A number of each result: `when` is teacher, start, first, best or end."""
    return [result[when][column] for result in group]


def curve(group, column, x="epoch"):
    """{x: [the column's value in each run]} from the runs' log.csv, where all runs have one."""
    points = defaultdict(list)
    for run in group:
        for row in run["rows"]:
            if column in row:
                points[row[x]].append(row[column])
    return {position: found for position, found in points.items() if len(found) == len(group)}


# ---- Numbers beside the paper's ------------------------------------------------------------------

def mean_std(numbers):
    """12.34 ± 0.56 as text, without the deviation for a single value."""
    spread = f" ± {deviation(numbers):.2f}" if len(numbers) > 1 else ""
    return f"{mean(numbers):.2f}{spread}"


def deviation(numbers):
    return np.std(numbers, ddof=len(numbers) > 1)


def compare(row, group):
    """Cells beside a number of paper.csv: luckiest, honest, difference, converged and verdict."""
    ours, end = values(group, "best", row["probe"]), values(group, "end", row["probe"])
    if not ours:
        return "", "", "", "", "missing"
    difference = mean(ours) - float(row["value"])
    verdict = "higher" if difference > 0 else "lower"
    if abs(difference) <= 2:
        verdict = "agrees"
    elif abs(difference) <= 2 * deviation(ours):
        verdict = "scattered"
    return (f"{mean_std(ours)} ({len(ours)})", mean_std(end), f"{difference:+.2f}",
            mean_std(values(group, "end", "linear_converged")), verdict)


ORIGIN = {  # what a note says of a result that has such a setting
    "dataset": "{dataset}",
    "n_images": ", {n_images:,} images",
    "train_images": ", {train_images:,} + {test_images:,} images",
    "probe_dataset": ", probed on {probe_dataset}",
    "total_steps": ", {total_steps:,} steps of {batch_size}, m = {out_dim:,}",
    "remaining": " ({remaining:,.0f} to go)",
    "n_probes": ", {n_probes} probes",
    "draws": ", {draws} draws",
    "provenance": ", amp {amp}; {provenance[hardware]}, torch {provenance[torch]}, "
                  "commit {provenance[commit]}",
}


def origin(about):
    """On what data, how large, on which hardware and by which version a result was made."""
    return "".join(part.format(**about) for key, part in ORIGIN.items() if about.get(key))


def cite(group, notes):
    """[1, 2] for how these results were made; `notes` is {text: number}, and grows."""
    return str(sorted({notes.setdefault(origin(result), len(notes) + 1) for result in group}) or "")


# ---- Claims of figures that have no numbers ------------------------------------------------------
# A rule gets groups of results, all of the same seeds, and returns (text, whether the claim shows);
# its docstring is printed beside them.

def means(groups, *what):
    return [mean(values(group, *what)) for group in groups]


def listed(groups, *what):
    return ", ".join(mean_std(values(group, *what)) for group in groups)


def beats_its_teacher(*student):
    """At its end the student's linear probe is a point above its teacher's."""
    return (f"teacher {listed(student, 'teacher')}, student {listed(student)}, at the end "
            f"{listed(student, 'end')}",
            means(student, "end")[0] > means(student, "teacher")[0] + 1)


def flat_then_lower(*by_alpha):
    """Within 2 points for α ≤ 0.6; at α = 1 a point lower, at its end above the teacher."""
    *flat, _, independent = means(by_alpha)  # α = 0.8 may be either
    at_its_end, teacher = means(by_alpha, "end")[-1], means(by_alpha, "teacher")[-1]
    return (f"α = 0, 0.09, 0.33, 0.6, 0.8, 1: {listed(by_alpha)}; teacher {teacher:.2f}, α = 1 at "
            f"its end {at_its_end:.2f}",
            max(flat) - min(flat) <= 2 and independent < min(flat) - 1 and at_its_end > teacher)


def asymmetric_valley(planes):
    """Up to half the way from θ_T to θ*_S(0) the KL is less than half of that on the other side."""
    points, kl = planes[0]["points"] @ (1, 1j), planes[0]["kl"]
    way = (points - points[0]) / (points[1] - points[0])  # complex: 0 is θ_T, and 1 is θ*_S(0)
    discs = [kl[abs(way - centre) < 0.25] for centre in (0.25, -0.25)]
    near, far = map(np.median, discs)
    return (f"median KL {near:.1e} on the student's side, {far:.1e} on the other ({len(discs[0])} "
            f"and {len(discs[1])} points)", far > 2 * near)


def student_is_a_ticket(*groups):
    """Under 60 % of weights the student beats its teacher, ℓ = 0; it is within 0.5 of 1 or 2."""
    curves = [curve(group, "best_accuracy", "weights_left") for group in groups]
    levels = [left for left in set.intersection(*map(set, curves)) if left < 60]
    if not levels:
        return "no such level in all curves", False
    student, *random = np.array([[mean(scores[left]) for left in levels] for scores in curves])
    ahead, *differences = student - random  # of ℓ = 0, and of the others
    nearer = max(np.minimum(*np.abs(differences)))
    return (f"student minus teacher, ℓ = 0: {min(ahead):+.2f} to {max(ahead):+.2f} points; at "
            f"most {nearer:.2f} from the nearer of ℓ = 1 and 2", min(ahead) > 0 and nearer <= 0.5)


def students_share_a_basin(lines):
    """The barrier between fine-tuned students is less than half of that between random teachers."""
    student, random = np.hstack([barrier(line["error"]) for line in lines]).mean(axis=1)
    return (f"barrier {student:.2f} points between students, {random:.2f} between teachers",
            student < random / 2)


def wide_enough(*by_width):
    """From m = 256 on within 2 points of m = 65,536 or better; not at m = 16."""
    narrow, *wide = means(by_width)
    return (f"m = 16, 256, 1,024, 4,096, 16,384, 65,536: {listed(by_width)}",
            narrow < wide[-1] - 2 < min(wide))


def batch_norm_is_first(*by_norm):
    """Batch norm leads by a point at the run's first probe; the others come within 2 points."""
    (early, *others), late = means(by_norm, "first"), means(by_norm)
    return (f"batch, instance, group, layer, none: at the first probe {listed(by_norm, 'first')}; "
            f"best {listed(by_norm)}", early > max(others) + 1 and min(late) > late[0] - 2)


def feature_norm_matters(*groups):
    """No feature norm (l/wl) costs a point, and a point more than no weight norm (lf/l)."""
    both, no_weight_norm, no_feature_norm = means(groups)
    return (f"without weight norm {no_weight_norm - both:+.2f} points, without feature norm "
            f"{no_feature_norm - both:+.2f}", no_feature_norm < min(both, no_weight_norm) - 1)


def kl_peaks_early(student):
    """The KL peaks in the first tenth, then halves; the distance from init ends at 10 to 40."""
    distance = mean(values(student, "end", "distance"))
    kl = {epoch: mean(numbers) for epoch, numbers in curve(student, "loss").items()}
    peak, end = max(kl, key=kl.get), max(kl)
    return (f"highest KL {kl[peak]:.1e} at {peak / end:.0%} of the run, {kl[end]:.1e} at its end; "
            f"distance {distance:.1f}",
            peak <= end / 10 and kl[end] < kl[peak] / 2 and 10 <= distance <= 40)


def second_round_adds_nothing(*rounds):
    """The probe stays within 2 points, and the KL ends below a tenth of the first round's."""
    (first, second), (first_kl, second_kl) = means(rounds, "end"), means(rounds, "end", "loss")
    return (f"probe {second - first:+.2f} points; "
            f"KL at the end {first_kl:.1e}, then {second_kl:.1e}",
            abs(second - first) <= 2 and second_kl < first_kl / 10)


def switch_changes_little(*groups):
    """The best linear probe is within 2 points of the usual student's."""
    usual, switched = means(groups)
    return f"{listed(groups[:1])} → {listed(groups[1:])}", abs(switched - usual) <= 2


def judge(rule, groups):
    """Cells beside a claim of paper.csv: ours and the verdict."""
    if not groups[0]:
        return "", "missing"
    text, shows = rule(*groups)
    return f"{text} (n = {len(groups[0])})", "shows" if shows else "does not show"


# ---- Main ----------------------------------------------------------------------------------------

def main(argv=None):
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("root", default="runs", nargs="?", type=Path, help="directory with paper/ and mini/ in it")
    add("--out", default="results/REPORT.md", type=Path, help="the page")
    add("--figures", default="figures/report", type=Path, help="directory of pictures to show")
    args = parser.parse_args(argv)
    results, unfinished = read_results(args.root)
    if not results and not unfinished:
        raise Problem(f"{args.root} holds neither paper/ nor mini/ with a run: do some jobs of "
                      "`bash run_all.sh list` first, or name another directory")

    # The paper's numbers and claims beside ours
    sections, notes, verdicts = defaultdict(str), {}, []
    for row in paper_rows():
        groups = [results[name] for name in row["ours"].split("; ")]
        if row["artefact"] == "same runs":
            continue
        seeds = sorted(set.intersection(*map(set, groups)))  # only these have the same teachers
        groups = [[group[seed] for seed in seeds] for group in groups]
        runs = sum(groups, [])
        rule = globals().get(row["rule"])  # one of the functions above
        *cells, verdict = judge(rule, groups) if rule else compare(row, *groups)
        if any(run.get("remaining") for run in runs):
            verdict = "unfinished"
        verdicts.append(verdict)
        sections[row["artefact"]] += (
            f"| {row['row']} | {row['value'] or rule.__doc__} | {' | '.join(cells)} "
            f"| {verdict} | {cite(runs, notes)} |\n")
    summary = f"{len(verdicts)} rows: " + ", ".join(
        f"{verdicts.count(verdict)} {verdict}" for verdict in sorted(set(verdicts)))

    # Our small runs, beside their own teachers
    for name, group in results.items():
        if name.startswith("mini/"):
            runs, cells = group.values(), f"{name} ({len(group)})"
            for probe in PROBES:
                end, *origins = (values(runs, when, probe) for when in ("end", "teacher", "start"))
                gains = ", ".join(f"{mean(end) - mean(scores):+.2f}" for scores in origins)
                cells += f" | {mean_std(end)} ({gains})"
            sections["mini"] += f"| {cells} | {cite(runs, notes)} |\n"

    for note, number in notes.items():
        sections["notes"] += f"- [{number}] {note}\n"
    sections["unfinished"] = ", ".join(unfinished) or "none"
    for file in sorted(args.figures.glob("*.png")):
        sections["pictures"] += (
            f"**{file.stem}**\n\n![{file.stem}]({os.path.relpath(file, args.out.parent)})\n\n")
    page = PAGE.format(args=args, summary=summary, sections=sections)
    save(args.out, lambda temporary: temporary.write_text(page))
    print(f"{args.out}: {summary}")


if __name__ == "__main__":
    main()
