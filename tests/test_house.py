"""The rules of the house (docs/architecture.md): layers, one of each, no side effects, annotations, plain words.

Sources are read with `ast`, so that nothing escapes by standing inside a function.
"""

import ast
import io
import json
import re
import subprocess
import sys
import tokenize
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "guided_diffusion"
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
           for path in sorted(PACKAGE.rglob("*.py"))}  # fmt: skip
BELOW_CLI = {name: path for name, path in MODULES.items() if not name.startswith("guided_diffusion.cli")}

# From the ground floor up. A module imports from its own layer and those before it.
LAYERS = (
    ("errors",),
    ("registry",),
    ("options",),
    ("unet", "ddpm", "nn", "losses", "gaussian_diffusion", "respace", "resample", "script_util", "dist_util",
     "references", "image_datasets", "fp16_util", "logger", "runtime", "caching"),
    ("codec", "target", "flow"),
    ("sddm", "manifold", "moo", "solvers", "energy", "baselines", "generation"),
    ("checkpoint", "upscaler"),
    ("methods", "presets"),
    ("run",),
    ("translator", "evaluation", "training", "train_util", "diffusers_pipeline"),
    ("web",),
    ("cli",),
)  # fmt: skip

# energy.vgg takes the path of a file, and asks the reader of files only then.
UPWARDS = {("guided_diffusion.energy", "guided_diffusion.checkpoint")}

# Names of guided-diffusion whose behaviour is kept: what they do by the rules' exception.
ARGPARSE_ALLOWED = {
    ("guided_diffusion.script_util", name) for name in ("add_dict_to_argparser", "args_to_dict", "str2bool")
}
PRINT_ALLOWED = {"guided_diffusion.logger"}  # its purpose is to print tables

# Not the variables of a style sheet, var(--ink) and --ink:#222.
FLAG = re.compile(r"(?<![\w-])(?<!var\()--[a-zA-Z][\w-]*(?![\w-]|:\s*[#\d])")


@cache
def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def name_of(node):
    """A dotted name such as `sys.exit`, or "" where the node is none."""
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def functions(path):
    """Module-level functions and the methods of module-level classes: (qualified name, node)."""
    for node in tree(path).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name, node
        elif isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    yield f"{node.name}.{inner.name}", inner


def owner(path, line):
    """The name of the module-level function or method that holds a line, or ""."""
    return next((name for name, node in functions(path) if node.lineno <= line <= node.end_lineno), "")


def imports(module, path):
    """What a module of the package imports, as absolute names: (name, line). Imports inside functions count."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{source}.{alias.name}"
                yield (full if full in MODULES else source), node.lineno


# ---- rule 1: below cli/ nobody knows a flag, argparse, stderr or an exit status -------------------------------------


def test_no_flag_stands_below_cli():
    found = []
    for name, path in BELOW_CLI.items():
        for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline):
            if token.type in (tokenize.STRING, tokenize.COMMENT) or token.type == getattr(
                tokenize, "FSTRING_MIDDLE", -1
            ):
                found += [f"{name}:{token.start[0]}: {flag}" for flag in FLAG.findall(token.string)]
    assert not found, "\n".join(["", *found])


def test_no_argparse_below_cli():
    found = []
    for name, path in BELOW_CLI.items():
        for node in ast.walk(tree(path)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if "argparse" in names and (name, owner(path, node.lineno)) not in ARGPARSE_ALLOWED:
                # guided-diffusion's functions may share one import at the head of their module.
                uses = [n.lineno for n in ast.walk(tree(path)) if name_of(n).startswith("argparse.")]
                if owner(path, node.lineno) == "" and {(name, owner(path, line)) for line in uses} <= ARGPARSE_ALLOWED:
                    continue
                found.append(f"{name}:{node.lineno}")
    assert not found, "\n".join(["", *found])


def test_nothing_below_cli_prints_or_exits():
    found = []
    for name, path in BELOW_CLI.items():
        for node in ast.walk(tree(path)):
            word = name_of(node.func) if isinstance(node, ast.Call) else name_of(node)
            exits = word in ("sys.exit", "exit", "quit", "SystemExit")
            prints = word in ("sys.stderr", "sys.stdout") or (isinstance(node, ast.Call) and word == "print")
            if exits or (prints and name not in PRINT_ALLOWED):
                found.append(f"{name}:{node.lineno}: {word}")
    assert not found, "\n".join(["", *found])


# ---- rule 3: options are frozen dataclasses -------------------------------------------------------------------------


def test_options_are_frozen_dataclasses():
    files = [*MODULES.values(), *SCRIPTS, *sorted((ROOT / "datasets").glob("*.py"))]
    found = []
    for path in files:
        for node in ast.walk(tree(path)):
            if not isinstance(node, ast.ClassDef):
                continue
            fields = [item.value for item in node.body if isinstance(item, ast.AnnAssign)]
            if any(isinstance(value, ast.Call) and name_of(value.func).split(".")[-1] == "option" for value in fields):
                decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
                if not any("dataclass" in text and "frozen=True" in text for text in decorators):
                    found.append(f"{path.relative_to(ROOT)}: {node.name}")
    assert not found, "\n".join(["", *found])


# ---- rule 5: one writer per file ------------------------------------------------------------------------------------

WRITERS = {"write_json", "write_text", "write_bytes", "write_atomically", "open", "dump"}


def test_run_json_has_one_writer():
    writers, speakers = set(), set()
    for name, path in MODULES.items():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call) and name_of(node.func).split(".")[-1] in WRITERS:
                text = ast.unparse(node)
                if "run.json" in text or re.search(r"\brecord\.NAME\b|\brun_record\.NAME\b", text):
                    writers.add(name)
                if name.endswith("run.record") and re.search(r"\bNAME\b", text):
                    writers.add(name)
            if isinstance(node, ast.Constant) and node.value == "run.json":
                speakers.add(name)
    assert writers <= {"guided_diffusion.run.record"}
    assert speakers <= {"guided_diffusion.run.record"}, "the name stands once: record.NAME"


# ---- rule 6: importing has no side effect ---------------------------------------------------------------------------

IMPORT_ALL = """
import importlib, json, logging, os, signal, sys, threading, warnings
import torch, numpy, PIL.Image  # what these do is theirs
def state():
    return {
        "handlers": [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)],
        "logging": [logging.root.level, len(logging.root.handlers), logging.raiseExceptions,
                    logging.getLogger("sddm").level, len(logging.getLogger("sddm").handlers)],
        "environment": dict(os.environ),
        "path": list(sys.path),
        "filters": len([f for f in warnings.filters if "torch" not in str(f)]),
        "dtype": str(torch.get_default_dtype()),
        "threads": torch.get_num_threads(),
        "grad": torch.is_grad_enabled(),
        "pixels": PIL.Image.MAX_IMAGE_PIXELS,
    }
before, failed = state(), {}
def run():
    for name in sys.argv[1:]:
        try:
            importlib.import_module(name)
        except BaseException as error:
            failed[name] = repr(error)
thread = threading.Thread(target=run)
thread.start()
thread.join()
changed = {key: [before[key], value] for key, value in state().items() if value != before[key]}
print(json.dumps([failed, changed]))
"""


def test_every_module_can_be_imported_in_a_thread_without_side_effect():
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, *MODULES], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    failed, changed = json.loads(done.stdout.splitlines()[-1])
    # The modules that need an optional package say which.
    assert "pip install diffusers" in failed.pop("guided_diffusion.diffusers_pipeline", "pip install diffusers")
    demo = "pip install -r requirements-demo.txt"
    assert demo in failed.pop("guided_diffusion.web.page", demo)
    assert (failed, changed) == ({}, {}) and done.stderr == ""


# ---- rule 7: one of each --------------------------------------------------------------------------------------------

ONE_OF_EACH = {
    "dtype table": (r"""["']?(fp32|float32|bf16)["']?\s*[:=]\s*torch\.(float32|bfloat16)""", {"runtime.py"}),
    "device picker": (r"torch\.backends\.mps\.is_available|torch\.device\(.*cuda.*is_available", {"runtime.py"}),
    "first line of an error": (r"splitlines\(\)\s*(\[0\]|or\b)", {"errors.py"}),
    # checkpoint/export.py renames a folder, checkpoint/remote.py a file that was downloaded and read.
    "atomic write": (
        r"\bos\.(replace|rename)\(|\.replace\(path\)",
        {"run/files.py", "checkpoint/export.py", "checkpoint/remote.py"},
    ),
    "JSON read": (r"\bjson\.load\((?!archive\.)|json\.loads\([^)]*read", {"run/files.py"}),
    "image to tensor and back": (r"[*/] ?127\.5", {"image_datasets.py"}),
    "option parser": (r"\bArgumentParser\b", {"cli/flags.py", "script_util.py"}),
    "listing of images": (r"\bos\.scandir\(|\bos\.walk\(", {"references.py", "run/files.py"}),
}


@pytest.mark.parametrize("what", ONE_OF_EACH)
def test_there_is_one_of_each(what):
    pattern, allowed = ONE_OF_EACH[what]
    found = []
    for path in [*MODULES.values(), *SCRIPTS, *sorted((ROOT / "datasets").glob("*.py"))]:
        name = path.relative_to(PACKAGE).as_posix() if path.is_relative_to(PACKAGE) else str(path.relative_to(ROOT))
        if name not in allowed:
            lines = enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
            found += [f"{name}:{number}: {line.strip()}" for number, line in lines if re.search(pattern, line)]
    assert not found, "\n".join(["", *found])


# ---- rule 8: imports go down ----------------------------------------------------------------------------------------


def layer(module):
    """The layer of a module of the package, by the first part of its name; the package itself is the top.

    run.files needs nothing but errors: whoever writes a file uses it.
    """
    if module == "guided_diffusion.run.files":
        return 1
    part = module.removeprefix("guided_diffusion").strip(".").partition(".")[0]
    return next((k for k, names in enumerate(LAYERS) if part in names), len(LAYERS))


def test_every_module_has_a_layer():
    assert [name for name in MODULES if name != "guided_diffusion" and layer(name) == len(LAYERS)] == []


def test_imports_go_down():
    found = []
    for name, path in MODULES.items():
        for target, line in imports(name, path):
            inside = target == "guided_diffusion" or target.startswith("guided_diffusion.")
            if (
                inside
                and target != "guided_diffusion"
                and layer(target) > layer(name)
                and (name, target) not in UPWARDS
            ):
                found.append(f"{name}:{line} imports {target}")
            if target.split(".")[0] in {script.stem for script in SCRIPTS}:
                found.append(f"{name}:{line} imports the script {target}")
    assert not found, "\n".join(["", *found])


def test_the_paper_stands_alone():
    code = "import sys, guided_diffusion.sddm, guided_diffusion.baselines; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"mpi4py", "torchvision", "scipy"} & set(done.stdout.split())  # which take long, or may be missing
    loaded = [name for name in done.stdout.split() if name.startswith("guided_diffusion.")]
    above = {"checkpoint", "run", "evaluation", "cli", "training", "options", "methods"}
    assert loaded and not [name for name in loaded if name.split(".")[1] in above]


def test_imports_make_no_circle():
    graph = {
        name: {target for target, _ in imports(name, path) if target in MODULES and target != name}
        for name, path in MODULES.items()
    }
    # A package's own __init__ gathers what its modules offer.
    graph = {
        name: {t for t in targets if not name.startswith(f"{t}.") and t != "guided_diffusion"}
        for name, targets in graph.items()
    }
    done, circles = set(), []

    def visit(name, above):
        if name in above:
            circles.append(" -> ".join([*above[above.index(name) :], name]))
        elif name not in done:
            for target in sorted(graph[name]):
                visit(target, [*above, name])
            done.add(name)

    for name in graph:
        visit(name, [])
    assert not circles, "\n".join(["", *circles])


def test_no_script_is_imported():
    stems = {path.stem for path in SCRIPTS}
    found = []
    folders = ("scripts", "datasets", "benchmarks", "guided_diffusion", "resizer")
    for path in sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(tree(path)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            for name in names:
                parts = name.split(".")
                if parts[0] in stems or parts[0] == "scripts":
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno} imports {name}")
    assert not found, "\n".join(["", *found])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_show_their_wiring_on_one_screen(script):
    lines = script.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 80
    assert "command.start()" in lines, "an interrupt while torch is imported is one line"
    assert any(re.match(r"    command\.run\(", line) for line in lines), "signals and exit statuses are cli.main's"


# ---- annotations ----------------------------------------------------------------------------------------------------


def test_public_functions_are_annotated():
    found = []
    for name, path in {**MODULES, "resizer": ROOT / "resizer" / "__init__.py"}.items():
        for function, node in functions(path):
            if any(part.startswith("_") and part != "__init__" and part != "__call__" for part in function.split(".")):
                continue
            everything = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            everything += [extra for extra in (node.args.vararg, node.args.kwarg) if extra]
            static = any(name_of(decorator) == "staticmethod" for decorator in node.decorator_list)
            if "." in function and not static:
                everything = everything[1:]
            missing = [argument.arg for argument in everything if argument.annotation is None]
            if missing or node.returns is None:
                found.append(f"{name}.{function}: {', '.join(missing) or 'what it returns'}")
    assert not found, "\n".join(["", *found])


# ---- prose ----------------------------------------------------------------------------------------------------------

# A dot stands for white space or a line break, so that this file has none of them.
WORN_OUT = ("gone.on with", "goes.on with", "to be.had", "a()new", "is found.out", "were.there")
PHRASES = re.compile("|".join(rf"(?<![a-zA-Z]){p}(?![a-zA-Z])".replace(".", r"\s+(?:#\s*)?") for p in WORN_OUT))
TEXTS = {".py", ".md", ".sh", ".toml", ".yml", ".yaml", ".cff", ".txt", ".ipynb"}


def test_prose_is_plain():
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        paths = [ROOT / name for name in listed.stdout.splitlines()]
    else:  # a copy without git
        paths = [path for path in ROOT.rglob("*") if not {".venv", "data"} & set(path.relative_to(ROOT).parts)]
    found = []
    for path in paths:
        if (path.suffix in TEXTS or path.name == "run") and path.is_file() and path != Path(__file__).resolve():
            text = path.read_text(encoding="utf-8")
            for match in PHRASES.finditer(text):
                line = text.count("\n", 0, match.start()) + 1
                found.append(f"{path.relative_to(ROOT)}:{line}: {match[0]!r}")
    assert not found, "\n".join(["", *found])


def test_docstrings_do_not_begin_with_what():
    found = []
    for path in [*MODULES.values(), *SCRIPTS]:
        for node in ast.walk(tree(path)):
            kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            if isinstance(node, kinds) and (ast.get_docstring(node) or "").startswith("What "):
                found.append(f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}")
    assert not found, "\n".join(["", *found])


# ---- one version ----------------------------------------------------------------------------------------------------


def test_the_version_stands_once():
    import guided_diffusion

    version = guided_diffusion.__version__
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    others = [ROOT / "pyproject.toml", ROOT / "setup.py", *MODULES.values()]
    holders = [path for path in others if re.search(rf"""["']{re.escape(version)}["']""", path.read_text("utf-8"))]
    assert holders == [PACKAGE / "__init__.py"]
