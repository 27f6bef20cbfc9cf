"""scripts/benchmark.py on real runs of a tiny model, its table and report; the emoji set's fronts; the task scripts."""

import csv
import io
import json
import os
import re
import statistics
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import charts
import comparison
import fronts
import pytest
import report
import rows as commands
import tiny
from conftest import ROOT
from scripts_in_process import load_script, run_script

from guided_diffusion import evaluation
from guided_diffusion.errors import InputError
from guided_diffusion.evaluation import Evaluation
from guided_diffusion.evaluation.distances import kernel_distance
from guided_diffusion.run.record import curves

benchmark = load_script("benchmark")

NAMES = ["a.png", "b.png", "c/d.png", "e.png"]
TABLE = """
# method | setting | command | FID | SSIM
SDDM | 4 steps | ae_sample.py --timestep_respacing 4 --range_t 1 --area 4 --energy dct | 62.29 ± 0.63 | 0.422
ILVR | N=4     | ilvr_sample.py --timestep_respacing 3 --range_t 0 --down_N 4   # no published row
"""


# The table


def test_rows_of_a_table():
    first, second = commands.parse_table(TABLE)
    assert (first.method, first.setting, first.script) == ("SDDM", "4 steps", "ae_sample.py")
    assert first.published == ("62.29 ± 0.63", "0.422") and second.published == ("", "")
    assert second.flags == ("--timestep_respacing", "3", "--range_t", "0", "--down_N", "4")
    assert (second.name, second.folder) == ("ILVR, N=4", "ILVR_N=4")
    (quoted,) = commands.parse_table("EGSDE | | egsde_sample.py --dsepath 'my models/#1.pt' | | 0.36")
    assert quoted.flags[1] == "my models/#1.pt" and quoted.published == ("", "0.36") and quoted.name == "EGSDE"


@pytest.mark.parametrize("text, message", [
    ("# nothing\n\n", "t.txt: no row in it"),
    ("\nA | b | ilvr_sample.py --x 'y", "line 2: the command cannot be read .No closing quotation"),
    ("A | b c | ilvr_sample.py\na | B_C | ilvr_sample.py", "line 2: a second row with the name 'a, B_C'"),
    # What would start other programs, write elsewhere, or sample something else than the other rows
    ("A | b | ../scripts/ilvr_sample.py", "line 1: '../scripts/ilvr_sample.py' is no sampling script"),
    (".. | | ilvr_sample.py", "line 1: a row cannot be called '..'"),
    ("A | b | ilvr_sample.py --save_dir=/tmp/x", "line 1: the row has --save_dir"),
    ("A\x1b[2J | b | ilvr_sample.py", "line 1: .* has control characters"),
])  # fmt: skip
def test_bad_tables_name_the_line(text, message):
    with pytest.raises(InputError, match=message) as caught:
        commands.parse_table(text, "t.txt")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000


# Whole runs


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("benchmark")
    tiny.make_model(root / "model.safetensors")
    tiny.make_references(root / "sources", NAMES)
    tiny.make_references(root / "truth", NAMES[::-1])
    (root / "table.txt").write_text(TABLE)
    return root


def flags(data, save_dir, *more):
    return list(map(str, [
        "--table", data / "table.txt", "--name", "Tiny <test>", "--model_path", data / "model.safetensors",
        "--base_samples", data / "sources", "--targets", data / "truth", "--truth", data / "truth",
        "--features", data / "model.safetensors", "--image_size", tiny.SIZE, "--lpips", "False", "--device", "cpu",
        "--seeds", "0,1", "--save_dir", save_dir, *more,
    ]))  # fmt: skip


def run(monkeypatch, arguments, stdin=""):
    monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    benchmark.compare(benchmark.create_parser().parse(arguments))


def in_process(command):
    return run_script(Path(command[1]).stem, *command[2:])


@pytest.fixture(scope="module")
def made(data):
    """A whole benchmark: two rows, two seeds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "run", in_process)
        run(patch, flags(data, data / "out"))
    return data / "out"


def test_results_are_those_of_the_folders(data, made):
    results = json.loads((made / "results.json").read_text())
    assert [row["method"] for row in results["rows"]] == ["SDDM", "ILVR"]
    for row, evaluations in zip(results["rows"], (4, 3)):
        for seed in ("0", "1"):
            folder = made / row["folder"].replace("seed_0", f"seed_{seed}")
            assert tiny.record(folder)["settings"]["seed"] == int(seed)
            direct, _ = evaluation.evaluate(Evaluation(
                outputs=folder, sources=data / "sources", targets=data / "truth", truth=data / "truth",
                features=data / "model.safetensors", image_size=tiny.SIZE, lpips="False", device="cpu",
            ))  # fmt: skip
            for name, value in direct["metrics"].items():
                assert row["seeds"][seed][name] == (value if value is None else pytest.approx(value, rel=1e-6)), name
        values = [row["seeds"][seed]["fid"] for seed in ("0", "1")]
        assert values[0] != values[1] and row["mean"]["fid"] == pytest.approx(statistics.fmean(values))
        assert row["std"]["fid"] == pytest.approx(statistics.stdev(values))
        assert row["mean"]["model_evaluations"] == evaluations and row["mean"]["seconds_per_image"] > 0
        assert row["images"] == 4 and "source_lpips" not in row["mean"]
    guided, plain = results["rows"]
    assert [step["i"] for step in guided["curves"]] == [3, 2] and plain["curves"] == []
    assert guided["energies"] == ["dct"] and "negative_impact" not in plain["mean"]
    # The share of steps against the score, from the record's own steps, by another way than the record's sum.
    steps = [step for seed in (0, 1) for step in curves(tiny.record(made / "SDDM_4_steps" / f"seed_{seed}"))]
    share = statistics.fmean(step["negative"] for step in steps)
    assert guided["mean"]["negative_impact"] == pytest.approx(share, abs=1e-9)


def test_tables_have_mean_and_deviation_and_the_published_row_beside(made):
    sddm, ilvr = json.loads((made / "results.json").read_text())["rows"]
    lines = (made / "table.md").read_text().splitlines()
    heading, first, second = ([cell.strip() for cell in lines[i].strip("|").split("|")] for i in (2, 4, 5))
    assert lines[0] == "# Tiny <test>" and heading[2:4] == ["kernel·10³ ↓", "Fréchet ↓"]  # FID is Inception's name
    assert heading[-2:] == ["published FID", "published SSIM"]
    assert first[-2:] == ["62.29 ± 0.63", "0.422"] and second[-2:] == ["", ""]
    assert first[3] == f"{sddm['mean']['fid']:.2f} ± {sddm['std']['fid']:.2f}"
    assert second[heading.index("evaluations")] == "3"
    assert "- seeds 0, 1; mean ± standard deviation" in lines
    rows = list(csv.DictReader((made / "table.csv").open(encoding="utf-8")))
    assert float(rows[1]["truth_ssim"]) == ilvr["mean"]["truth_ssim"] and rows[0]["seeds"] == "0 1"
    assert float(rows[1]["truth_ssim_std"]) == ilvr["std"]["truth_ssim"]
    assert rows[0]["published_fid"] == "62.29 ± 0.63" and rows[0]["images"] == "4"
    assert rows[1]["command"] == "ilvr_sample.py --timestep_respacing 3 --range_t 0 --down_N 4"


def test_report_is_one_page_with_pictures_and_charts(made):
    text = (made / "report.html").read_text(encoding="utf-8")
    page = re.sub(r"<((meta|img) [^>]*)>", r"<\1/>", text[text.index("<html") :])
    root = ElementTree.fromstring(page)  # every other element is closed
    images = [image.get("src") for image in root.iter("img")]
    assert len(images) == 4 * 4  # source, two rows and truth of four references
    assert all(address.startswith("data:image/webp;base64,") for address in images)
    words = "".join(root.itertext())
    assert "Tiny <test>" in words and "protocol: egsde" in words
    # Pictures come first, then numbers and charts; protocol and commands are folded.
    order = ["<img", "<h2>Results", "<h2>Charts", "<h2>Weights in the merge", "<details><summary>Protocol"]
    assert sorted(order, key=text.index) == order and text.count("<figure>") == 6
    results = json.loads((made / "results.json").read_text())["rows"]
    names, ((method, setting, *weights),) = report.mean_weights(results)
    assert names == ["score", "dct"] and (method, setting) == ("SDDM", "4 steps")
    for k, cell in enumerate(weights):
        assert cell == f"{statistics.fmean(step['weights'][k] for step in results[0]['curves']):.4f}"
    for name in charts.TRADE_OFFS:
        words = "".join(ElementTree.parse(made / name).getroot().itertext())
        assert "kernel distance against SSIM to" in " ".join(words.split()) and "ILVR" in words and "SDDM" in words


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.parent != folder}


def test_a_second_run_samples_nothing_again(data, made, monkeypatch, capsys):
    """And a piece of it gives the same numbers."""
    before, table, page = files(made), (made / "table.md").read_text(), (made / "report.html").read_bytes()
    monkeypatch.setattr(comparison, "run", lambda command: pytest.fail(f"sampled again: {command}"))
    run(monkeypatch, flags(data, made))
    assert files(made) == before and (made / "report.html").read_bytes() == page
    assert capsys.readouterr().out == table + f"report: {made / 'report.html'}\n"
    run(monkeypatch, flags(data, made, "--only", "ILVR", "--seeds", "1"))
    (row,) = json.loads((made / "results.json").read_text())["rows"]
    assert row["method"] == "ILVR" and row["std"]["fid"] is None and list(row["seeds"]) == ["1"]
    assert files(made) == before


def test_an_unfinished_run_is_finished(data, made, monkeypatch, tmp_path):
    """A run that was killed has its record without an end: it is started again, and nothing else is."""
    folder = made / "ILVR_N=4" / "seed_1"
    pictures = {path: path.read_bytes() for path in folder.rglob("[a-e].png")}
    (folder / "run.json").write_text(json.dumps({**tiny.record(folder), "finished": None}))
    (folder / "a.png").unlink()
    started, sample = [], comparison.run
    monkeypatch.setattr(comparison, "run", lambda command: started.append(command) or sample(command))
    run(monkeypatch, flags(data, made))
    assert [command[1].endswith("ilvr_sample.py") for command in started] == [True]
    assert {path: path.read_bytes() for path in folder.rglob("[a-e].png")} == pictures


def test_trial_takes_the_first_row_of_each_method_and_three_references(data, monkeypatch, tmp_path):
    wanted = []
    monkeypatch.setattr(comparison.Comparison, "run", lambda self, rows: wanted.append((self.options, rows)) or [])
    monkeypatch.setattr(comparison.Comparison, "write", lambda self, results: "")
    again = "ILVR | N=2 | ilvr_sample.py --down_N 2"
    run(monkeypatch, flags(data, tmp_path / "out", "--quick", "--table", "-"), TABLE + again)
    ((args, rows),) = wanted
    assert [row.name for row in rows] == ["SDDM, 4 steps", "ILVR, N=4"]
    assert (args.num_samples, args.seed_numbers, args.save_dir) == (3, [0], str(tmp_path / "out_quick"))


@pytest.mark.parametrize("more, wanted", [
    (["--only", "SDEdit"], "only is 'SDEdit'"),
    (["--seeds", "1,1"], "seeds is '1,1'"),
    (["--name", "a\x1b[2J"], "name is 'a"),
    (["--processes", "2", "--launch", "srun"], "processes is 2"),
    (["--flags", "--save_dir /tmp/x"], "flags has --save_dir"),
    (["--model_path", "no.pt", "--features", "no.safetensors"], "missing: model_path no.pt; features no.safe"),
    (["--table", "-"], "missing: --dsepath no_dse.pt; --vgg_path no_vgg.pth; --vgg_path no_vgg2.pth"),
])  # fmt: skip
def test_what_does_not_fit_is_said_before_sampling(data, monkeypatch, tmp_path, more, wanted):
    table = "EGSDE | | egsde_sample.py --dsepath no_dse.pt\nSDDM | | ae_sample.py --vgg_path no_vgg.pth"
    table += "\nSDDM | b | ae_sample.py --vgg_path=no_vgg2.pth"
    with pytest.raises(InputError) as caught:
        run(monkeypatch, flags(data, tmp_path / "out", *more), table)
    error = str(caught.value)
    assert error.startswith(wanted) and error.isprintable() and len(error) < 1000
    assert not (tmp_path / "out").exists()


def test_a_link_out_of_the_save_folder_is_refused(data, monkeypatch, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "ILVR_N=4").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError) as caught:
        run(monkeypatch, flags(data, tmp_path / "out", "--only", "ILVR"))
    assert caught.value.parameter == "save_dir" and list((tmp_path / "elsewhere").iterdir()) == []


def test_a_row_that_fails_ends_the_command_with_one_line(data, tmp_path):
    """A process of its own: the sampling script's message, then the benchmark's, status 2."""
    command = [sys.executable, ROOT / "scripts" / "benchmark.py", *flags(data, tmp_path / "out", "--table", "-")]
    table = "ILVR | N=5 | ilvr_sample.py --timestep_respacing 3 --range_t 0 --down_N 5"
    done = subprocess.run(list(map(str, command)), input=table, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    assert "--down_N is 5; it must be at least 1 and divide the image size 16" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ILVR, N=5, seed 0: ended with status 2: ")


# The report's parts


def row_of(method="A", setting="b", fid=60.0, ssim=0.4, features="inception (pytorch-fid, 2048-d)", **more):
    """A row of results.json, as far as charts need one."""
    return {
        "method": method, "setting": setting, "mean": {"fid": fid, "source_ssim": ssim},
        "std": {"fid": 1.0, "source_ssim": None}, "published": {"fid": "", "source_ssim": ""},
        "curves": [], "energies": ["dct"], "protocol": {"features": features}, **more,
    }  # fmt: skip


def lines_of(figure):
    """The lines of a chart by the label in its key: lists of points."""
    (axes,) = figure.axes
    return {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines() if line.get_label()[0] != "_"}


def test_published_results_are_drawn_beside_fids_of_inception_only():
    row = row_of(published={"fid": "62.29 ± 0.63", "source_ssim": "0.422"})
    (axes,) = charts.trade_off([row]).axes
    hollow = [line for line in axes.get_lines() if line.get_markerfacecolor() == "white"]
    assert [line.get_xydata().tolist() for line in hollow] == [[[0.422, 62.29]]]
    labels = {text.get_text(): text.xy for text in axes.texts}
    assert labels == {"A, b": (0.4, 60.0), "A, b (published)": (0.422, 62.29)} and axes.get_title()[:4] == "FID "
    (axes,) = charts.trade_off([{**row, "protocol": {"features": "middle block of UNetModel"}}]).axes
    assert axes.get_title().startswith("Fréchet distance") and [text.get_text() for text in axes.texts] == ["A, b"]
    assert charts.trade_off([row_of(mean={})]) is charts.trade_off([row], "truth_ssim") is None
    assert charts.svg(charts.trade_off([row])) == charts.svg(charts.trade_off([row]))


def test_a_method_has_one_line_through_its_front():
    """Settings that another one of the method beats in both are points, and not on the line."""
    points = [(0.3, 5.0), (0.5, 9.0), (0.4, 6.0), (0.35, 8.0), (0.5, 9.0), (0.2, 5.0)]
    rows = [row_of("A", str(k), fid, ssim) for k, (ssim, fid) in enumerate(points)]
    rows += [row_of("B", "x", 7.0, 0.3), row_of("B", "y", 8.0, 0.45)]
    lines = lines_of(charts.trade_off(rows))
    assert lines == {"A": [[0.3, 5.0], [0.4, 6.0], [0.5, 9.0]], "B": [[0.3, 7.0], [0.45, 8.0]]}


def test_methods_are_told_by_dash_and_marker_and_constant_charts_are_left_out():
    steps = [{"i": i, "tangent": i, "normal": 2.0, "negative": 0, "weights": [1 / i, 1 - 1 / i]} for i in (3, 2)]
    rows = [row_of("A", "1", curves=steps, energies=["vgg"]), row_of("A", "2", curves=steps),
            row_of("B", "1", curves=steps), row_of("C", "1")]  # fmt: skip
    looks = charts.styles(rows)
    assert all(len({style[part] for style in looks.values()}) == 3 for part in ("color", "linestyle", "marker"))
    found = {chart.axes[0].get_title(): list(lines_of(chart)) for chart in charts.step_charts(rows)}
    assert found["Norm of the score's tangent part"] == ["A, 1", "A, 2", "B, 1"]
    assert "Norm of the score's normal part" not in found
    assert found["Weight of the energy vgg"] == ["A, 1"] and found["Weight of the energy dct"] == ["A, 2", "B, 1"]
    constant = [{**step, "tangent": 2.0, "weights": [1.0]} for step in steps]
    assert charts.step_charts([row_of(curves=constant)]) == []


# The emoji benchmark: fronts of what was sampled

ROWS = """
SDEdit | M=1 | sdedit_sample.py --timestep_respacing 3 --t 1
SDEdit | M=2 | sdedit_sample.py --timestep_respacing 3 --t 2
SDDM, late start | 4x4 | ae_sample.py --timestep_respacing 4 --energy dct --area 4 --start_t 3 --range_t 1
ILVR | not sampled | ilvr_sample.py --timestep_respacing 3 --range_t 0 --down_N 4
"""


@pytest.fixture(scope="module")
def emoji(data, tmp_path_factory):
    """fronts.py on real runs of three rows, one of them with two seeds; returns folders made and out."""
    root = tmp_path_factory.mktemp("emoji")
    names = [f"{i}.png" for i in range(5)]
    for part, own in (("twitter/test", names), ("fluent3d/test", names[::-1]), ("fluent3d/train", names)):
        tiny.make_references(root / "set" / part, own)
    (root / "table.txt").write_text(ROWS)
    tiny.make_judge(root / "judge.safetensors", ["twitter", "fluent3d"])
    command = ["fronts.py", "--save_dir", root / "made", "--table", root / "table.txt", "--data", root / "set"]
    command += ["--judge", root / "judge.safetensors", "--out", root, "--replicates", 20, "--pictures", 3]
    rows = ["--table", root / "table.txt", "--base_samples", root / "set" / "twitter" / "test"]
    rows += [word for name in ("--targets", "--truth") for word in (name, root / "set" / "fluent3d" / "test")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "run", in_process)
        for only, seeds in (("SD", "0"), ("4x4", "0,1")):
            run(patch, flags(data, root / "made", *rows, "--only", only, "--seeds", seeds))
        patch.setattr(sys, "argv", list(map(str, command)))
        fronts.main()
    return root / "made", root


def test_fronts_are_of_the_outputs_of_every_seed(emoji):
    made, out = emoji
    record = json.loads((out / "fronts.json").read_text())
    assert [row["setting"] for row in record["settings"]] == ["M=1", "M=2", "4x4"]
    assert [row["seeds"] for row in record["settings"]] == [1, 1, 2] and record["missing"] == ["ILVR, not sampled"]
    assert [row["evaluations"] for row in record["settings"]] == [1, 2, 3]
    ruler = fronts.Ruler(out / "judge.safetensors", out / "set" / "fluent3d" / "test")
    folders = [made / "SDDM_late_start_4x4" / f"seed_{seed}" for seed in (0, 1)]
    again = [fronts.Setting(None, [ruler.measure(str(folder))]).score(ruler.target) for folder in folders]
    for name, value in record["settings"][2].items():
        if name in again[0]:
            assert value == pytest.approx(statistics.fmean(score[name] for score in again))
    assert again[0]["distance"] != again[1]["distance"]
    distances = [kernel_distance(ruler.measure(str(folder))["features"], ruler.features)[0] for folder in folders]
    value, low, high = record["settings"][2]["kernel"]
    assert value == pytest.approx(statistics.fmean(distances)) and low < value < high
    ElementTree.fromstring((out / "fronts.svg").read_bytes())
    value, low, high = record["others"]["kernel"]
    assert low < value < high and f"KID {value:.3f} [{low:.3f}, {high:.3f}] away" in (out / "fronts.md").read_text()


def test_the_documents_tables_are_those_of_the_committed_fronts():
    record = json.loads((ROOT / "benchmarks" / "emoji" / "fronts.json").read_text())
    shown = fronts.BLOCK.search((ROOT / "docs" / "results.md").read_text())[0]
    assert shown.split("\n", 1)[1].rsplit("\n", 1)[0] == fronts.summary(record)
    rows = re.findall(
        r"^\| ([^|]+ \| [^|]* \| \d* \| [\d.]+ \| [\d.]+) \|$", (ROOT / "README.md").read_text(), re.MULTILINE
    )
    assert len(rows) > 4 and all(f"| {row} |" in shown for row in rows)


def test_the_committed_tables_can_be_read():
    folder = ROOT / "benchmarks" / "emoji"
    methods = {row.method for row in commands.read_table(str(folder / "table.txt"))}
    assert {"SDEdit", "ILVR", "EGSDE", "SDDM", "SDDM, released", fronts.OURS, *fronts.DETAILS} <= methods
    for row in commands.read_table(str(folder / "variations.txt")):
        assert f"| {row.method} | {row.setting} |" in (folder / "variations.md").read_text()


# The scripts that users edit


@pytest.mark.parametrize("script, missing", [
    ("cat2dog", ["afhq_dog_4m.pt", "val/cat", "val/dog", "cat2dog_dse.pt", "vgg_normalised.pth"]),
])  # fmt: skip
def test_task_scripts_name_what_is_missing_and_where_to_get_it(tmp_path, script, missing):
    """A copy of the scripts, so that nothing that lies in the repository's folders counts."""
    (tmp_path / "scripts").mkdir()
    for path in (ROOT / "scripts").glob("*.sh"):
        (tmp_path / "scripts" / path.name).write_bytes(path.read_bytes())
    clean = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME")}
    command = ["bash", f"scripts/{script}.sh"]
    done = subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True, timeout=600)
    head, *lines = done.stderr.splitlines()
    assert done.returncode == 2 and done.stdout == "" and head == f"error: {len(missing)} files or folders are missing:"
    for line, name in zip(lines, missing, strict=True):
        path, where = line.strip().split(" (", 1)
        assert path.endswith(name) and re.search(r"(models|datasets)/README\.md", where)
    assert sorted(os.listdir(tmp_path)) == ["scripts"]  # nothing was installed or prepared
