"""scripts/benchmark.py on real runs of a tiny model, its table and report; the search of settings; the task scripts."""

import csv
import html.parser
import io
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from argparse import Namespace

import pytest
import tiny
from conftest import ROOT
from PIL import Image

from guided_diffusion import evaluation
from guided_diffusion.errors import UserError


sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "benchmarks" / "emoji")]

import benchmark  # noqa: E402
import publish  # noqa: E402
import report  # noqa: E402
import rescore  # noqa: E402
import search  # noqa: E402

NAMES = ["a.png", "b.png", "c/d.png", "e.png"]
TABLE = """
# method | setting | command | FID | SSIM
SDDM | 4 steps | ae_sample.py --timestep_respacing 4 --range_t 1 --area 4 --energy dct | 62.29 ± 0.63 | 0.422
ILVR | N=4     | ilvr_sample.py --timestep_respacing 3 --range_t 0 --down_N 4   # no published row
"""


# The table


def test_rows_of_a_table():
    first, second = benchmark.parse_table(TABLE)
    assert (first.method, first.setting, first.script) == ("SDDM", "4 steps", "ae_sample.py")
    assert first.published == ("62.29 ± 0.63", "0.422") and second.published == ("", "")
    assert second.flags == ("--timestep_respacing", "3", "--range_t", "0", "--down_N", "4")
    assert (second.name, second.folder) == ("ILVR, N=4", "ILVR_N=4")
    (quoted,) = benchmark.parse_table("EGSDE | | egsde_sample.py --dsepath 'my models/#1.pt' | | 0.36")
    assert quoted.flags[1] == "my models/#1.pt" and quoted.published == ("", "0.36") and quoted.name == "EGSDE"


@pytest.mark.parametrize(
    "text, message",
    [
        ("# nothing\n\n", "t.txt: no row in it"),
        ("A | b", "t.txt, line 1: 2 columns"),
        ("A | b | ilvr_sample.py | 1 | 2 | 3", "line 1: 6 columns"),
        ("\nA | b | ilvr_sample.py --x 'y", "line 2: the command cannot be read .No closing quotation"),
        ("A | b | evaluate.py", "line 1: 'evaluate.py' is no sampling script"),
        ("A | b | nowhere_sample.py", "line 1: 'nowhere_sample.py' is no sampling script"),
        ("A | b | ", "line 1: '' is no sampling script"),
        ("A | b c | ilvr_sample.py\na | B_C | ilvr_sample.py", "line 2: a second row with the name 'a, B_C'"),
    ],
)
def test_bad_tables_name_the_line(text, message):
    with pytest.raises(UserError, match=message):
        benchmark.parse_table(text, "t.txt")


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
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments])
    monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    benchmark.main()


@pytest.fixture(scope="module")
def made(data):
    """A whole benchmark: two rows, two seeds; its sampling runs are processes of their own."""
    with pytest.MonkeyPatch.context() as patch:
        run(patch, flags(data, data / "out"))
    return data / "out"


def test_results_are_those_of_the_folders(data, made):
    results = json.loads((made / "results.json").read_text())
    assert [row["method"] for row in results["rows"]] == ["SDDM", "ILVR"]
    for row, evaluations in zip(results["rows"], (4, 3)):
        for seed in ("0", "1"):
            folder = made / row["folder"].replace("seed_0", f"seed_{seed}")
            assert sorted(tiny.pictures(folder)) == sorted(NAMES)
            assert tiny.record(folder)["settings"]["seed"] == int(seed)
            direct, _ = evaluation.evaluate(
                str(folder), sources=str(data / "sources"), targets=str(data / "truth"), truth=str(data / "truth"),
                features=str(data / "model.safetensors"), image_size=tiny.SIZE, lpips=False,
            )  # fmt: skip
            assert row["seeds"][seed]["negative_impact"] == direct["metrics"]["negative_impact"]
            for name in ("fid", "kid", "source_ssim", "source_l2", "truth_ssim"):
                assert row["seeds"][seed][name] == pytest.approx(direct["metrics"][name], rel=1e-6), name
        for name in ("fid", "source_ssim", "truth_psnr"):
            values = [row["seeds"][seed][name] for seed in ("0", "1")]
            assert values[0] != values[1]
            assert row["mean"][name] == pytest.approx(statistics.fmean(values))
            assert row["std"][name] == pytest.approx(statistics.stdev(values))
        assert row["mean"]["model_evaluations"] == evaluations and row["mean"]["seconds_per_image"] > 0
        assert row["images"] == 4 and "source_lpips" not in row["mean"]
    guided, plain = results["rows"]
    assert [step["i"] for step in guided["curves"]] == [3, 2] and plain["curves"] == []
    assert guided["mean"]["negative_impact"] >= 0 and "negative_impact" not in plain["mean"]
    assert "4 images for" in " ".join(results["notes"]) and "seeds 0, 1; mean ± standard deviation" in results["notes"]


def test_tables_have_mean_and_deviation_and_the_published_row_beside(made):
    sddm, ilvr = json.loads((made / "results.json").read_text())["rows"]
    lines = (made / "table.md").read_text().splitlines()
    heading, first, second = ([cell.strip() for cell in lines[i].strip("|").split("|")] for i in (2, 4, 5))
    assert lines[0] == "# Tiny <test>" and heading[:3] == ["method", "setting", "Fréchet ↓"]  # FID is Inception's name
    assert heading[-2:] == ["published FID", "published SSIM"]
    assert first[-2:] == ["62.29 ± 0.63", "0.422"] and second[-2:] == ["", ""]
    assert first[2] == f"{sddm['mean']['fid']:.2f} ± {sddm['std']['fid']:.2f}"
    assert first[heading.index("evaluations")] == "4" and second[heading.index("evaluations")] == "3"
    rows = list(csv.DictReader((made / "table.csv").open(encoding="utf-8")))
    assert [row["method"] for row in rows] == ["SDDM", "ILVR"] and rows[0]["seeds"] == "0 1"
    assert float(rows[1]["truth_ssim"]) == ilvr["mean"]["truth_ssim"]
    assert float(rows[1]["truth_ssim_std"]) == ilvr["std"]["truth_ssim"]
    assert rows[0]["published_fid"] == "62.29 ± 0.63" and rows[0]["images"] == "4"
    assert rows[1]["command"] == "ilvr_sample.py --timestep_respacing 3 --range_t 0 --down_N 4"


class Page(html.parser.HTMLParser):
    """What a page holds: images and links by address, cells, text, and that every element is closed."""

    def __init__(self, text):
        super().__init__()
        self.addresses, self.open, self.text, self.count = [], [], "", {}
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.addresses += [value for name, value in attributes if name in ("src", "href")]
        self.count[tag] = self.count.get(tag, 0) + 1
        if tag not in ("meta", "img", "path", "circle"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("path", "circle"):
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_report_is_one_page_with_pictures_and_charts(made):
    text = (made / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.count["img"] == 4 * 4  # source, two rows and truth of four references
    assert page.addresses and all(address.startswith("data:image/webp;base64,") for address in page.addresses)
    assert "http" not in text and "Tiny <test>" in page.text and "62.29 ± 0.63" in page.text
    charts = re.findall(r"<svg.*?</svg>", text)
    for chart in charts:
        ElementTree.fromstring(chart)
    assert len(charts) == 5  # trade-off with source and with truth, norms, weights of the score and of the energy
    assert "Fréchet distance against SSIM" in page.text and "(published)" not in page.text


def test_trade_offs_are_files_with_title_and_key(made):
    for name, where in (("trade_off.svg", "the source"), ("trade_off_truth.svg", "the true translation")):
        root = ElementTree.fromstring((made / name).read_bytes())
        text = " ".join(element.text for element in root.iter("{http://www.w3.org/2000/svg}text"))
        assert f"Fréchet distance against SSIM to {where}" in text and {"ILVR", "SDDM"} <= set(text.split())
        assert len(list(root.iter("{http://www.w3.org/2000/svg}circle"))) == 2


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.parent != folder}


def test_a_second_run_samples_nothing_anew(data, made, monkeypatch, capsys):
    """And a piece of it gives the same numbers."""
    before, page = files(made), (made / "report.html").read_bytes()
    table = (made / "table.md").read_text()
    monkeypatch.setattr(benchmark, "run", lambda command: pytest.fail(f"sampled anew: {command}"))
    run(monkeypatch, flags(data, made))
    assert files(made) == before and (made / "report.html").read_bytes() == page
    assert capsys.readouterr().out == table + f"report: {made / 'report.html'}\n"
    run(monkeypatch, flags(data, made, "--only", "ILVR", "--seeds", "1"))
    (row,) = json.loads((made / "results.json").read_text())["rows"]
    assert row["method"] == "ILVR" and row["std"]["fid"] is None and list(row["seeds"]) == ["1"]
    run(monkeypatch, flags(data, made))
    assert (made / "table.md").read_text() == table and files(made) == before


def test_an_unfinished_run_is_finished(data, made, monkeypatch, tmp_path):
    """A run that was killed has its record without an end: it is started again, and nothing else is."""
    folder = made / "ILVR_N=4" / "seed_1"
    pictures = {path: path.read_bytes() for path in folder.rglob("[a-e].png")}
    record = tiny.record(folder)
    record["finished"] = None
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "a.png").unlink()
    commands, sample = [], benchmark.run
    monkeypatch.setattr(benchmark, "run", lambda command: commands.append(command) or sample(command))
    run(monkeypatch, flags(data, made))
    assert [command[1].endswith("ilvr_sample.py") for command in commands] == [True]
    assert {path: path.read_bytes() for path in folder.rglob("[a-e].png")} == pictures


def test_trial_takes_the_first_row_of_each_method_and_three_references(data, monkeypatch, tmp_path):
    wanted = []
    monkeypatch.setattr(benchmark, "measure", lambda args, rows, evaluator: wanted.append((args, rows)) or [])
    monkeypatch.setattr(benchmark, "write_results", lambda args, results: "")
    again = "ILVR | N=2 | ilvr_sample.py --down_N 2"
    run(monkeypatch, flags(data, tmp_path / "out", "--quick", "--table", "-"), TABLE + again)
    ((args, rows),) = wanted
    assert [row.name for row in rows] == ["SDDM, 4 steps", "ILVR, N=4"]
    assert (args.num_samples, args.seeds, args.save_dir) == (3, [0], str(tmp_path / "out_quick"))


@pytest.mark.parametrize(
    "more, message",
    [
        (["--only", "SDEdit"], "--only SDEdit: no row's method and setting contain it"),
        (["--table", "no.txt"], "--table no.txt cannot be read"),
        (["--seeds", "1,1"], "1,1 has a seed twice"),
        (["--seeds", "one"], "--seeds"),
        (["--num_samples", "0"], "'0' is not a whole number above 0"),
        (["--processes", "2", "--launch", "srun"], "--processes 2 and --launch 'srun' exclude each other"),
        (["--model_path", "no.pt", "--truth", "nowhere"], "missing: --model_path no.pt; --truth nowhere"),
        (["--features", "no.safetensors"], "missing: --features no.safetensors"),
        (["--only", "ILVR", "--lpips", "maybe"], "maybe"),
    ],
)
def test_what_does_not_fit_is_said_before_sampling(data, monkeypatch, tmp_path, more, message):
    with pytest.raises(UserError, match=re.escape(message)):
        run(monkeypatch, flags(data, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


def test_files_of_rows_are_looked_for(data, monkeypatch, tmp_path):
    table = "EGSDE | | egsde_sample.py --dsepath no_dse.pt\nSDDM | | ae_sample.py --vgg_path no_vgg.pth"
    with pytest.raises(UserError, match="missing: --dsepath no_dse.pt; --vgg_path no_vgg.pth"):
        run(monkeypatch, flags(data, tmp_path / "out", "--table", "-"), table)


def test_a_row_that_fails_ends_the_command_with_one_line(data, tmp_path):
    """A process of its own: the sampling script's message, then the benchmark's, status 2."""
    command = [sys.executable, ROOT / "scripts" / "benchmark.py", *flags(data, tmp_path / "out", "--table", "-")]
    table = "ILVR | N=5 | ilvr_sample.py --timestep_respacing 3 --range_t 0 --down_N 5"
    done = subprocess.run(list(map(str, command)), input=table, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    assert "--down_N is 5; it must divide the image size 16" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ILVR, N=5, seed 0: ended with status 2: ")


# The report's parts


def test_published_results_are_drawn_beside_fids_of_inception_only():
    row = {
        "method": "A", "setting": "b",
        "mean": {"fid": 60.0, "source_ssim": 0.4}, "std": {"fid": 1.0, "source_ssim": None},
        "published": {"fid": "62.29 ± 0.63", "source_ssim": "0.422"}, "curves": [],
        "protocol": {"features": "inception (pytorch-fid, 2048-d); images at 256x256"},
    }  # fmt: skip
    chart = report.trade_off([row]).figure()
    assert "b (published)" in chart and chart.count("<circle") == 2 and "FID against SSIM" in chart
    other = report.trade_off([{**row, "protocol": {"features": "middle block of UNetModel"}}]).figure()
    assert "(published)" not in other and other.count("<circle") == 1
    assert report.trade_off([{**row, "mean": {}, "published": {"fid": "", "source_ssim": ""}}]) is None
    assert report.trade_offs([row]) == {"trade_off.svg": report.trade_off([row])}  # no truth was measured


def test_distances_of_several_magnitudes_have_a_logarithmic_axis():
    row = {"method": "A", "std": {"fid": 1.0, "source_ssim": None}, "published": {"fid": "", "source_ssim": ""},
           "curves": [], "protocol": {}}  # fmt: skip
    rows = [{**row, "setting": str(fid), "mean": {"fid": fid, "source_ssim": 0.4}} for fid in (10.0, 100.0, 1000.0)]
    root = ElementTree.fromstring(report.trade_off(rows).file())
    heights = [float(dot.get("cy")) for dot in root.iter("{http://www.w3.org/2000/svg}circle")]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.2) and heights[0] > heights[1]
    root = ElementTree.fromstring(report.trade_off(rows[:1]).file())
    assert len(list(root.iter("{http://www.w3.org/2000/svg}circle"))) == 1


@pytest.mark.parametrize("count", [5, 300])
def test_labels_of_a_chart_do_not_cover_each_other_nor_dots(count):
    """Labels for which there is no room are left to the pointer."""
    look = {"deviation": (0, 0), "colour": "#000"}
    places = [(1 + k % 20 / 50, 2 - k // 20 / 80 - k % 20 / 400) for k in range(count)]
    points = [{"xy": place, "label": f"M={k}", **look} for k, place in enumerate(places)]
    svg = re.search(r"<svg.*?</svg>", report.chart("t", "x", "y", [], points).figure()).group()
    root = ElementTree.fromstring(svg)
    dots = [(float(dot.get("cx")), float(dot.get("cy"))) for dot in root.iter("circle")]
    boxes = []
    for text in root.iter("text"):
        if text.text.startswith("M="):
            x, y = float(text.get("x")), float(text.get("y"))
            boxes.append((x, y - 7, x + 20, y))
    assert len(dots) == count and (len(boxes) == 5 if count == 5 else 5 < len(boxes) < count)
    assert [title.text for title in root.iter("title")] == [point["label"] for point in points]
    for k, box in enumerate(boxes):
        assert not any(report.overlap(box, other) for other in boxes[:k])
        assert not any(report.overlap(box, (x - 4, y - 4, x + 4, y + 4)) for x, y in dots)


@pytest.mark.parametrize("low, high", [(0.1, 0.9), (-3, 250), (4.001, 4.002), (0, 1e-9)])
def test_ticks_are_round_and_in_range(low, high):
    marks = report.ticks(low, high)
    assert 2 <= len(marks) <= 8 and all(low - 1e-12 <= mark <= high + 1e-12 for mark in marks)
    assert report.padded([2.0, 2.0])[0] < 2 < report.padded([2.0, 2.0])[1]


def test_powers_are_round_numbers():
    assert [round(10**value, 9) for value in report.powers(-1.2, 1.2)] == [0.1, 0.2, 0.5, 1, 2, 5, 10]
    assert report.powers(-2.5, 3.5) == [-2, -1, 0, 1, 2, 3]
    assert len(report.powers(0.05, 0.2)) >= 2  # no round number in between: some others


def test_pictures_are_those_that_every_row_made(data, tmp_path):
    tiny.make_references(tmp_path / "row", NAMES[1:])
    args = Namespace(base_samples=str(data / "sources"), truth=None, pictures=2, save_dir=str(tmp_path))
    page = Page(report.pictures([{"method": "A & B", "setting": "", "folder": "row"}], args))
    assert page.count["img"] == 2 * 2 and "A & B" in page.text


# The search of settings


def test_the_rule_is_the_lowest_sum_of_ranks():
    assert search.choose([(0.5, 10.0), (0.6, 9.0), (0.4, 8.0)]) == (1, [5, 3, 4])
    assert search.choose([(0.5, 9.0), (0.6, 10.0)]) == (1, [3, 3])  # a tie goes to the higher SSIM
    assert search.choose([(0.5, 9.0), (0.5, 9.0)]) == (0, [2, 2])


def test_candidates_are_rows_that_the_benchmark_reads():
    tried = list(search.candidates())
    rows = benchmark.parse_table("\n".join(search.line_of(candidate, "'a b.pt'") for candidate in tried))
    assert [row.method for row in rows] == [candidate["method"] for candidate in tried]
    assert {row.flags[row.flags.index("--dsepath") + 1] for row in rows if "--dsepath" in row.flags} == {"a b.pt"}
    assert "--timestep_respacing 25 --area 8 --range_t 7" in search.line_of(
        {"method": "SDDM", "area": 8, "share": 0.3}, "", 25
    )


def test_search_takes_training_pictures_without_skin_tones(tmp_path):
    names = [f"{1000 + i:x}.png" for i in range(9)] + ["1f44b-1f3fb.png", "1f44b-1f3ff.png"]
    for kind in ("twitter", "fluent3d"):
        tiny.make_references(tmp_path / kind / "train", names)
    sources, truth = search.prepare(tmp_path, tmp_path / "search", 5)
    taken = sorted(path.name for path in sources.iterdir())
    assert len(taken) == 5 and not any("1f3f" in name for name in taken)
    assert taken == sorted(path.name for path in truth.iterdir())
    assert taken == search.pick_sources(tmp_path / "twitter" / "train", 5)
    search.prepare(tmp_path, tmp_path / "search", 3)
    assert len(list(sources.iterdir())) == len(list(truth.iterdir())) == 3


def test_search_writes_the_table_that_the_benchmark_reads(tmp_path):
    tried = list(search.candidates())
    results = [
        (candidate, {"setting": search.setting_and_command(candidate, "")[0], "protocol": {"name": "p"},
                     "mean": {"truth_ssim": 0.5, "fid": 1.0, "seconds_per_image": 0.1, "model_evaluations": 9}})
        for candidate in tried
    ]  # fmt: skip
    chosen = [next(candidate for candidate in tried if candidate["method"] == method) for method in search.METHODS]
    search.write(results, chosen, [2] * len(tried), Namespace(out=tmp_path, count=40))
    table = (tmp_path / "table.txt").read_text()
    rows = benchmark.parse_table(table.replace("$DSE", "x.pt"))
    assert [row.method for row in rows] == ["SDEdit", "ILVR", "EGSDE", "SDDM", "SDDM", "SDDM", "SDDM, released"]
    record = json.loads((tmp_path / "search.json").read_text())
    assert [row["chosen"] for row in record["candidates"]].count(True) == len(search.METHODS)
    assert (tmp_path / "search.md").read_text().count("| chosen |") == len(search.METHODS)


def test_search_from_pictures_to_table(data, monkeypatch, tmp_path, capfd):
    """Real runs over a small grid: a piece chooses nothing, the whole chooses by the rule and keeps the piece."""
    ilvr = "ilvr_sample.py --timestep_respacing 3 --range_t 0 --down_N {down_N}"
    grids = {
        "ILVR": ({"down_N": (2, 8)}, "N={down_N}", ilvr),
        "SDEdit": ({"t": (900,)}, "M={t}", "sdedit_sample.py --timestep_respacing 3 --t 2"),
    }
    monkeypatch.setattr(search, "METHODS", grids)
    for kind in ("twitter", "fluent3d"):
        tiny.make_references(tmp_path / "emoji" / kind / "train", [f"{100 + i:x}.png" for i in range(4)])
    command = ["search.py", "--data", tmp_path / "emoji", "--model_path", data / "model.safetensors", "--count", 3]
    command += ["--image_size", tiny.SIZE, "--flags", "--device cpu"]
    command += ["--save_dir", tmp_path / "save", "--out", tmp_path]
    monkeypatch.setattr(sys, "argv", [*map(str, command), "--only", "N=8"])
    assert search.main() == 0 and not (tmp_path / "table.txt").exists()
    before = files(tmp_path / "save" / "runs")
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    assert search.main() == 0
    after = files(tmp_path / "save" / "runs")
    assert before and before.items() <= after.items()
    rows = json.loads((tmp_path / "search.json").read_text())["candidates"]
    assert [row["setting"] for row in rows] == ["N=2", "N=8", "M=900"] and rows[2]["chosen"]
    winner, sums = search.choose([(row["truth_ssim"], row["fid"]) for row in rows[:2]])
    assert [row["chosen"] for row in rows[:2]] == [winner == 0, winner == 1]
    assert [row["rank_sum"] for row in rows[:2]] == sums
    chosen = benchmark.parse_table((tmp_path / "table.txt").read_text())
    assert [row.setting for row in chosen] == [rows[winner]["setting"], "M=900"]
    assert (tmp_path / "search.md").read_text() in capfd.readouterr().out
    ElementTree.fromstring((tmp_path / "search.svg").read_bytes())
    tiny.make_encoder(tmp_path / "dse.safetensors", 2, head="I2Iout")
    command = ["rescore.py", "--data", tmp_path / "emoji", "--dsepath", tmp_path / "dse.safetensors"]
    command += ["--save_dir", tmp_path / "save", "--out", tmp_path]
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    assert rescore.main() == 0
    ElementTree.fromstring((tmp_path / "search_extractor.svg").read_bytes())
    lines = (tmp_path / "search_extractor.md").read_text().splitlines()[4:]
    assert [line.split(" | ")[1] for line in lines] == ["N=2", "N=8", "M=900"]
    assert [line.endswith("| would be chosen |") for line in lines].count(True) == 2
    for line, row in zip(lines, rows):
        assert line.split(" | ")[2] == f"{row['truth_ssim']:.4f}" and float(line.split(" | ")[3]) >= 0


# What is published of the emoji benchmark


@pytest.fixture(scope="module")
def published(data, tmp_path_factory):
    """publish.py on a benchmark whose truth is the target domain's test split; returns folders made and out."""
    root = tmp_path_factory.mktemp("published")
    shutil.copytree(data / "sources", root / "emoji" / "twitter" / "test")
    shutil.copytree(data / "truth", root / "emoji" / "fluent3d" / "test")
    tiny.make_references(root / "emoji" / "fluent3d" / "train", [f"{i}.png" for i in range(4)])  # the truth's pixels
    tiny.make_encoder(root / "dse.safetensors", 2, head="I2Iout")
    command = ["publish.py", "--save_dir", root / "made", "--data", root / "emoji", "--out", root, "--replicates", 20]
    command += ["--model_path", data / "model.safetensors", "--dsepath", root / "dse.safetensors", "--pictures", 3]
    with pytest.MonkeyPatch.context() as patch:
        run(patch, flags(data, root / "made"))
        patch.setattr(sys, "argv", list(map(str, command)))
        assert publish.main() == 0
    return root / "made", root


def test_published_numbers_are_the_benchmark_s(published):
    made, out = published
    for name in publish.COPIES:
        assert (out / name).read_bytes() == (made / name).read_bytes()
    rows = json.loads((made / "results.json").read_text())["rows"]
    record = json.loads((out / "comparison.json").read_text())
    for row, again in zip(rows, record["rows"], strict=True):
        assert again["model"] == pytest.approx(row["mean"]["fid"], rel=1e-6)
        assert again["truth_ssim"] == pytest.approx(row["mean"]["truth_ssim"], rel=1e-6, abs=1e-6)
        assert 0 <= again["called_3d"] <= 1 and again["extractor"] > 0
    truth = record["anchors"]["4 true pictures of other emoji"]  # the same pictures here, so nothing is between them
    assert truth["model"] < 1e-9 and truth["extractor"] < 1e-9 and "truth_ssim" not in truth


def test_differences_are_of_the_same_pictures(published):
    made, out = published
    base, other = json.loads((out / "comparison.json").read_text())["rows"]
    assert set(map(tuple, base["difference"].values())) == {(0.0, 0.0, 0.0)}
    for key, (difference, low, high) in other["difference"].items():
        assert difference == pytest.approx(other[key] - base[key]) and low <= difference <= high
    text = (out / "comparison.md").read_text()
    assert "Differences to SDDM, 4 steps" in text and "| sources as they are |" in text


def test_sheet_of_pictures_has_a_row_each(published):
    with Image.open(published[1] / "pictures.png") as image:
        assert image.size == (publish.LABEL + 3 * publish.CELL, 2 * publish.CELL)


def test_publishing_needs_a_benchmark(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["publish.py", "--save_dir", str(tmp_path)])
    assert publish.main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --save_dir: {tmp_path} has no results.json that can be read (")


def test_the_committed_table_can_be_read():
    rows = benchmark.parse_table((ROOT / "benchmarks" / "emoji" / "table.txt").read_text())
    assert {row.method for row in rows} == set(search.METHODS)


# The scripts that users edit


@pytest.mark.parametrize(
    "script, missing",
    [
        ("cat2dog", ["afhq_dog_4m.pt", "val/cat", "val/dog", "cat2dog_dse.pt", "vgg_normalised.pth"]),
        ("wild2dog", ["afhq_dog_4m.pt", "val/wild", "val/dog", "wild2dog_dse.pt", "vgg_normalised.pth"]),
        ("male2female", ["celebahq_female_ddpm.pth", "male", "female", "male2female_dse.pt", "vgg_normalised.pth"]),
        ("ablation_area", ["afhq_dog_4m.pt", "val/cat", "val/dog", "vgg_normalised.pth"]),
        ("ablation_moo", ["afhq_dog_4m.pt", "val/cat", "val/dog", "vgg_normalised.pth"]),
        ("ablation_energy", ["celebahq_female_ddpm.pth", "male", "female", "vgg_normalised.pth", "male2female_dse.pt"]),
    ],
)
def test_task_scripts_name_what_is_missing_and_where_to_get_it(tmp_path, script, missing):
    """A copy of the scripts, so that nothing that lies in the repository's folders counts."""
    (tmp_path / "scripts").mkdir()
    for path in (ROOT / "scripts").glob("*.sh"):
        (tmp_path / "scripts" / path.name).write_bytes(path.read_bytes())
    clean = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME")}
    command = ["bash", f"scripts/{script}.sh"]
    done = subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True, timeout=60)
    head, *lines = done.stderr.splitlines()
    assert done.returncode == 2 and done.stdout == "" and head == f"error: {len(missing)} files or folders are missing:"
    for line, name in zip(lines, missing, strict=True):
        path, where = line.strip().split(" (", 1)
        assert path.endswith(name) and re.search(r"(models|datasets)/README\.md", where)
    assert sorted(os.listdir(tmp_path)) == ["scripts"]  # nothing was installed or prepared
